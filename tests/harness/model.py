"""A whole migration in one process: two real registries with real sessions, pagers and page sources, and what may
happen between them as steps. What must hold after every step is in tests.harness.model_checks.
"""

from dataclasses import dataclass, field

from migrate.config import Endpoint
from migrate.daemon.migrations import MigrationRegistry
from migrate.errors import MigrateError
from migrate.native.exports import Exports
from migrate.session.states import State
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import types_pb2 as types
from tests.harness.model_control import ANSWERED, SENT, Control, ModelPeer
from tests.harness.model_guest import PAGE, WRITTEN_BYTES, ModelGuest, ModelGuests, ModelTouch
from tests.harness.model_link import REQUEST_PAGES_MAX, ModelLink
from tests.harness.model_settle import moving, thread_of
from tests.harness.model_world import World

NAME = "g"
STEP_US = 1_000
# Longer than any side waits for the other one before the switchover.
LONG_US = 130_000_000
ZERO = bytes(PAGE)
_TURNS_MAX = 60
_IDLE_TURNS = 3


@dataclass(frozen=True)
class Plan:
    """What is drawn once for a migration.

    Attributes:
        filled: What each page holds at first: None for a hole, 0 for zeros, else data.
        source_failing: Methods of the source's guest that fail, after so many calls.
        twin_failing: Likewise of the twin's.
        slow: Methods of both guests that wait at a gate.
    """

    mode: int
    order: str
    verify: bool
    on_no_convergence: int
    filled: tuple
    downtime_limit_us: int = 0
    source_failing: dict = field(default_factory=dict)
    twin_failing: dict = field(default_factory=dict)
    slow: frozenset = frozenset()
    fails_to_connect: bool = False
    is_traced: bool = False


def content(number, page):
    """A page's bytes: data that tells pages and values apart, or zeros for value 0."""
    if not number:
        return ZERO
    return (number << 16 | page).to_bytes(8, "little") * (PAGE // 8)


class Journal:
    """What would survive: the last that was written of each migration."""

    def __init__(self):
        self.entries = {}

    def save(self, migration):
        self.entries[migration.migration_id] = migration.SerializeToString()


class Registry(MigrationRegistry):
    """One of the model's: it is known where a Prepare waits for the twin of the one before."""

    def __init__(self, world, *args, **more):
        super().__init__(*args, **more)
        self._world = world

    def _make_way(self, migration_id, attempt):
        before = super()._make_way(migration_id, attempt)
        return before and Replaced(self._world, before)


class Replaced:
    """A destination's session that a later attempt has taken the place of."""

    def __init__(self, world, session):
        self._world = world
        self._session = session

    def await_built(self):
        """See DestinationSession."""
        self._world.await_thread(self._session.await_built, self._session._built.is_set)


class Model:
    """One migration, from its start on."""

    def __init__(self, plan):
        self.plan = plan
        self.pages = len(plan.filled)
        self.world = World()
        self.control = Control(self.world)
        self.links = []
        self.touches = []
        self.cancels = []
        self.reference = [ZERO] * self.pages
        self._exports = Exports()
        no_exports = Exports()
        self.at_source = ModelGuests(None, self._on_source_kill)
        self.at_destination = ModelGuests(self._make_twin, self._on_twin_kill)
        self.source_registry = self._registry(self.at_source, self._exports, "source")
        self.destination_registry = self._registry(self.at_destination, no_exports, "destination")
        self.source = self._make_source()
        self.has_left = False
        request = operator.StartMigrationRequest(
            guest=NAME,
            to="127.0.0.1:1",
            mode=types.MigrationMode.ValueType(plan.mode),
            order=plan.order,
            verify=plan.verify,
            trace=plan.is_traced,
            downtime_limit_us=plan.downtime_limit_us,
            on_no_convergence=types.NoConvergence.ValueType(plan.on_no_convergence),
        )
        self.migration_id = self.source_registry.start(request)
        self.source_session = self.source_registry._sources[self.migration_id]
        self.settle()

    def _registry(self, guests, exports, role):
        registry = Registry(
            self.world,
            guests,
            exports,
            self.world.clock,
            Journal(),
            peer_of=self._peer_of,
            fetcher_of=self._fetcher_of,
        )
        registry.control_endpoint = Endpoint("127.0.0.1", 2)
        registry.page_endpoints = {types.PAGE_TRANSPORT_NATIVE_GRPC: Endpoint("127.0.0.1", 3)}
        registry.role = role
        return registry

    def _peer_of(self, _endpoint, role, _timeout_s):
        registries = {"source": lambda: self.source_registry, "destination": lambda: self.destination_registry}
        return ModelPeer(self.control, registries[role], self._on_invalidated)

    def _fetcher_of(self, _transport, terms, _clock, on_failure):
        link = ModelLink(self.world, self._exports, terms, on_failure, fails_to_connect=self.plan.fails_to_connect)
        self.links.append(link)
        return link

    def _make_source(self):
        spec = types.GuestSpec(
            name=NAME, kind=types.GUEST_KIND_KVM, memory_bytes=self.pages * PAGE, vcpus=1, workload=types.WorkloadSpec()
        )
        description = types.GuestDescription(spec=spec, page_size_bytes=PAGE)
        guest = ModelGuest(
            self.world,
            description,
            slow=self.plan.slow,
            failing=self.plan.source_failing,
            on_resume=self._on_source_resume,
        )
        guest.is_loaded = guest.is_running = guest.has_run = True
        for page, number in enumerate(self.plan.filled):
            if number is not None:
                self.reference[page] = content(number, page)
                guest.write(page, self.reference[page])
        self.at_source._make = lambda _: guest
        self.at_source.add(description)
        return guest

    def _make_twin(self, description):
        if "build" in self.plan.slow:
            self.world.pass_gate("build")
        empty = types.GuestDescription(spec=description.spec, page_size_bytes=PAGE)
        return ModelGuest(
            self.world, empty, slow=self.plan.slow, failing=self.plan.twin_failing, on_resume=self._on_twin_resume
        )

    # ---- what guests report ----

    def _on_source_resume(self):
        if any(twin.has_run for twin in self.at_destination.made):
            self.world.violate("the guest was resumed at the source after it had run at the destination")

    def _on_twin_resume(self):
        if self.source.is_running:
            self.world.violate("the guest was run at the destination while it ran at the source")
        if self.source_state in (State.FAILED, State.CANCELLED):
            self.world.violate("the guest was run at the destination after the source had taken it back")

    def _on_source_kill(self, _guest):
        self.has_left = True
        if self.source_state is not State.COMPLETED:
            self.world.violate(f"the source freed the guest in state {self.source_state}")
        counters = self.link.counters() if self.link is not None else None
        if not self.twin_runs or (counters is not None and counters.missing_pages):
            self.world.violate("the source freed the guest before all pages were at the destination")

    def _on_twin_kill(self, twin):
        if twin.has_run:
            self.world.violate("the twin was destroyed after it had run")

    # ---- looking ----

    @property
    def source_state(self):
        return self.source_session.record.state

    @property
    def destination_session(self):
        return self.destination_registry._destinations.get(self.migration_id)

    @property
    def link(self):
        return self.links[-1] if self.links else None

    @property
    def twin(self):
        """The latest one that lives."""
        return next((twin for twin in reversed(self.at_destination.made) if not twin.is_dead), None)

    @property
    def twin_runs(self):
        return self.twin is not None and self.twin.is_running

    @property
    def is_over(self):
        """Whether both sessions' threads have ended, and no call is left."""
        threads = [thread_of(self, registry) for registry in (self.source_registry, self.destination_registry)]
        return not any(thread is not None and thread.is_alive() for thread in threads) and not self.control.calls

    # ---- waiting until nothing moves but by a step ----

    def settle(self):
        """Wait until every thread stands at a gate, waits for pages, or has ended."""
        self.world.settle(lambda: moving(self))
        self.touches = [touch for touch in self.touches if not self._take_in(touch)]

    def _take_in(self, touch):
        """Compare what a touch found, once it is done."""
        if not touch.is_done:
            return False
        if touch.found != self.reference[touch.page]:
            self.world.violate(f"the guest read wrong bytes of page {touch.page}")
        return True

    # ---- steps of the guest ----

    def write(self, page, number):
        """The guest writes a page at the source."""
        self.reference[page] = content(number, page)
        self.source.write(page, self.reference[page])

    def touch(self, page, number):
        """The guest touches a page at the destination, and with a number writes a part of it."""
        if any(touch.page == page for touch in self.touches):
            return
        written = None
        if number is not None:
            offset = number * WRITTEN_BYTES % PAGE
            data = content(number, page)[:WRITTEN_BYTES]
            written = (offset, data)
            before = self.reference[page]
            self.reference[page] = before[:offset] + data + before[offset + WRITTEN_BYTES :]
        counters = self.link.counters()
        touch = ModelTouch(self.world, self.twin, page, written)
        touch.twin = self.twin
        touch.faults_before = counters.faults if counters is not None else 0
        self.twin.touches += 1
        self.touches.append(touch)
        self.settle()

    def touch_what_is_missing(self, index, number):
        """The guest touches a page whose touch is a fault."""
        if not self.twin_runs:
            return
        if missing := [page for page in range(self.pages) if not self.twin.is_populated(page)]:
            self.touch(missing[index % len(missing)], number if number % 2 else None)

    def write_somewhere(self, index, number):
        if self.source.is_running:
            self.write(index * number % self.pages, number)

    def write_what_is_on_its_way(self, index, number):
        """The guest writes pages at the source that were asked for, and perhaps read."""
        if self.source.is_running and self.link.in_flight:
            request = self.link.in_flight[index % len(self.link.in_flight)]
            for offset in range(min(request.count_pages, 1 + number % 4)):
                self.write(request.first_page + offset, number)

    # ---- steps of the page call ----

    def requests(self, *, served):
        """Requests under way, those with a reply or those without."""
        return [one for one in (self.link.in_flight if self.link else []) if (one.runs is not None) is served]

    def ask_background(self, index, _number):
        self.link.ask_background(1 + index)

    def ask_urgent(self, _index, _number):
        self.link.ask_urgent()

    def begin_to_read(self, index, _number):
        """The source looks at the generation, and reads later."""
        if waiting := [one for one in self.requests(served=False) if one.generation is None]:
            self.link.label(waiting[index % len(waiting)])

    def read(self, index, _number):
        if waiting := self.requests(served=False):
            self.link.read(waiting[index % len(waiting)])

    def deliver(self, index, _number):
        if served := self.requests(served=True):
            self.link.deliver(served[index % len(served)])

    def flow(self):
        """Every page that may move does."""
        link = self.link
        while link is not None and link.is_active:
            link.ask_urgent()
            is_asked = link.ask_background(REQUEST_PAGES_MAX)
            for request in list(link.in_flight):
                if request.runs is None:
                    link.read(request)
                if request.runs is not None:
                    link.deliver(request)
            if not is_asked and not link.in_flight:
                break
        self.settle()

    # ---- steps of the control calls ----

    def stale_on_the_way(self):
        """Pages that the source took from the log, and that the destination has not been told of."""
        return self.source.taken

    def _on_invalidated(self, request):
        for part in request.stale:
            bits = int.from_bytes(part.bitmap, "little")
            self.source.taken -= {part.first_page + bit for bit in range(bits.bit_length()) if bits >> bit & 1}

    def calls(self, *stages):
        return [call for call in self.control.calls if call.stage in stages]

    def pass_call(self, call):
        """Deliver a call, and its answer if it can be had at once."""
        if call.stage == SENT:
            self.control.deliver(call)
            self.settle()
        if call.stage == ANSWERED and call.caller is not None:
            self.control.answer(call)
            self.settle()

    def go_on(self, index, _number):
        """Let a guest's method or a call go on, if one waits."""
        if self.world.gates:
            self.world.open_gate(index % len(self.world.gates))
        elif calls := self.calls(SENT, ANSWERED):
            self.pass_call(calls[index % len(calls)])

    # ---- steps of the operator ----

    def force(self):
        try:
            self.source_registry.start_switchover(self.migration_id)
        except MigrateError as error:
            return error
        return None

    def cancel(self):
        outcome = []

        def run():
            try:
                outcome.append(self.source_registry.cancel(self.migration_id))
            except MigrateError as error:
                outcome.append(error)

        self.cancels.append((self.world.spawn("cancel", run), outcome))
        self.settle()

    # ---- the end ----

    def drive(self):
        """Let everything happen until the migration is over, or can go no further."""
        idle_turns = 0
        for turn in range(_TURNS_MAX):
            if self.is_over:
                return
            if turn == _TURNS_MAX // 2:
                self.force()  # what would wait for ever
            seen = self._progress()
            while self.world.gates:
                self.world.open_gate(0)
                self.settle()
            self.flow()
            for call in list(self.control.calls):
                if call in self.control.calls:
                    self.pass_call(call)
            self.world.now_us += STEP_US
            idle_turns = idle_turns + 1 if self._progress() == seen else 0
            if idle_turns == _IDLE_TURNS:
                self.world.now_us += LONG_US
                self.settle()
                idle_turns = 0

    def _progress(self):
        session = self.destination_session
        counters = self.link.counters() if self.link else None
        states = [
            one and (one.record.state, one.record._migration.generation) for one in (self.source_session, session)
        ]
        return states, counters, [call.name for call in self.control.calls]

    def close(self):
        """End what is left, as daemons do that shut down."""
        self.world.open_all()
        self.control.go_down()
        self.source_registry.close()
        self.destination_registry.close()
        for guest in [self.source, *self.at_destination.made]:
            guest.kill()
        self.world.join_all()
        for guest in [self.source, *self.at_destination.made]:
            guest.free()
