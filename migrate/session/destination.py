"""The destination's side of one migration: build the twin, fetch pages, load the state, run it, see it through to END.

Prepare builds and arms the twin, Switchover runs it; an error from either means that the guest never ran here and never
will, because the twin is destroyed before the error is answered. That the vCPUs may run is written down before they are
told to: whatever is lost then, this side can still say what it did.
"""

import contextlib
import os
import threading
from collections.abc import Callable

from migrate.barriers import Point, reach
from migrate.config import ORDERS, PEER_TIMEOUT_DEFAULT_US, SWITCHOVER_DEADLINE_S, Endpoint
from migrate.errors import (
    LOST_REMEDY,
    AttemptLostError,
    GuestBusyError,
    GuestGoneError,
    GuestHolder,
    GuestLostError,
    MigrateError,
    MigrationAbortedError,
    RemoteProtocolError,
    StateDirError,
)
from migrate.native.compression import Compression
from migrate.native.pager import Order, Pager, PagerStoppedError
from migrate.pager.fetcher import FetchTerms, make_fetcher
from migrate.pager.policy import Policy
from migrate.session import figures
from migrate.session.arrival import Arrival, SourceLink, Twin
from migrate.session.ledger import Ledger
from migrate.session.page_flow import FetcherOf, PageFlow
from migrate.session.policy_thread import PolicyThread
from migrate.session.ports import Journal, PeerOf
from migrate.session.record import MigrationRecord, nothing_to_recover
from migrate.session.refusals import as_lost_attempt, why_not_prepared, why_not_running
from migrate.session.rules import check_token
from migrate.session.states import Event, Machine, Side, State
from migrate.session.tracing import TraceFeed
from migrate.telemetry.clock import Clock
from migrate.units import bytes_to_pages
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_POLL_US = 100_000
_BUILT_S = 60.0
# A link over which nothing has come for so long is lost, though nobody has noticed yet.
_STILL_US = 500_000
_OBSERVE_S = 0.1


class DestinationSession:
    """Receives one guest, in one attempt. `run` is the session's thread; the rest is called for others.

    Args:
        entry: The migration as it is written down: a new attempt, or what a daemon before this one had of a guest that
            runs here.
        spec: The guest.
        build_twin: Starts the empty guest.
        own_endpoint: Our TransferService, as the source should see it.
        peer_of: Connects to the source's, for END.
        clock: Times it all.
        journal: Where the entry is written.
        fetcher_of: Makes what fetches the pages.
        twin: The guest that runs here already.
        policy: Names the pages to fetch first, once the guest is about to run here; None goes by the entry's order.
    """

    def __init__(
        self,
        entry: saved.SavedMigration,
        spec: types.GuestSpec,
        build_twin: Callable[[types.GuestDescription], Twin],
        own_endpoint: Endpoint,
        peer_of: PeerOf,
        clock: Clock,
        journal: Journal,
        fetcher_of: FetcherOf = make_fetcher,
        twin: Twin | None = None,
        policy: type[Policy] | None = None,
    ) -> None:
        self._saved = incoming = entry.destination
        incoming.peer_timeout_us = incoming.peer_timeout_us or PEER_TIMEOUT_DEFAULT_US
        self.attempt = incoming.attempt
        self.entry = entry
        self._spec = spec
        self._build_twin = build_twin
        self._clock = clock
        self._twin = twin
        self._policy = policy
        self._is_taken_up = twin is not None
        self._built = threading.Event()  # or not, but it is tried no more
        if twin is not None:
            self._built.set()
        self._memfds: list[int] = []
        self._heard_us = clock.now_us()
        self._stopping = threading.Event()
        self.record = MigrationRecord(
            Machine(Side.DESTINATION, State.POSTCOPY_PAUSED if self._is_taken_up else State.SETUP),
            types.Migration(
                migration_id=entry.migration_id,
                guest=spec.name,
                guest_kind=spec.kind,
                mode=incoming.mode,
                order=incoming.order,
                transport=incoming.transport,
                compression=incoming.compression,
                memory_bytes=spec.memory_bytes,
                vcpus=spec.vcpus,
                peer=incoming.control_endpoint,
                pages=types.PageCounts(total=bytes_to_pages(spec.memory_bytes)),
                attempt=incoming.attempt,
                guest_touches=incoming.guest_touches,
                guest_touches_at_switchover=incoming.guest_touches,
            ),
            clock,
        )
        self._ledger = Ledger(self.record, entry, journal)
        self._link = SourceLink(incoming, own_endpoint, peer_of, incoming.peer_timeout_us / 1_000_000)
        self._flow = PageFlow(
            incoming.transport,
            FetchTerms(
                Endpoint.parse(incoming.page_endpoint),
                entry.migration_id,
                incoming.token,
                verify=incoming.verify,
                max_bandwidth_bytes_per_s=incoming.max_bandwidth_bytes_per_s,
                compression=Compression(incoming.compression),
                peer_timeout_us=incoming.peer_timeout_us,
            ),
            clock,
            fetcher_of,
            self._on_fetch_failure,
        )
        self._trace = TraceFeed(entry.migration_id, incoming.token, clock) if incoming.trace else None
        if self._trace is not None:
            self.record.on_step = self._trace.add_state
        self._arrival = Arrival(
            self._ledger, self._flow, self._link, clock, is_taken_up=self._is_taken_up, trace=self._trace
        )
        self.record.live.gather_by(self._arrival.live_figures)

    # ---- called by the source ----

    def prepare(self, description: types.GuestDescription) -> None:
        """Build the twin, arm it, connect both page connections. On an error, nothing is left.

        Raises:
            MigrateError: what stood in the way; the guest stays at the source.
        """
        try:
            self._prepare(description)
        except MigrateError as error:
            refused = why_not_prepared(error)
            refused.holder = GuestHolder.SOURCE
            with self.record.lock:
                self._destroy_twin()
                if self.record.can(Event.REFUSED):
                    self._ledger.end_anyhow(Event.REFUSED, refused)
            self._close()
            raise refused from error
        finally:
            self._built.set()
        reach(Point.DESTINATION_PREPARED, self.record.migration_id)

    def _prepare(self, description: types.GuestDescription) -> None:
        self._check_wanted()
        self._ledger.save()
        reach(Point.DESTINATION_PREPARING, self.record.migration_id)
        self._twin = self._build_twin(description)
        self._saved.instance = self._twin.guest.instance
        reach(Point.DESTINATION_BUILT, self.record.migration_id)
        pager = self._arm(self._twin)
        if self._saved.mode != types.MIGRATION_MODE_POSTCOPY:
            *_, self._memfds = self._twin.guest.describe()
            pager.begin_precopy(self._memfds[0], verify=self._saved.verify)
        self._flow.connect()
        with self.record.lock:
            # An abort that came meanwhile could not destroy what was not there yet.
            self._check_wanted()
            self._ledger.save()

    def _check_wanted(self) -> None:
        if self.record.is_final:
            raise MigrationAbortedError("the source gave up while the twin was being built")

    def await_built(self) -> None:
        """Wait until no twin is being built any more: its name may be wanted again."""
        self._built.wait(_BUILT_S)

    def invalidate(self, request: transfer.InvalidateRequest) -> None:
        """Lose pages that the guest wrote at the source since they were read. The first call begins to fetch.

        Raises:
            GuestBusyError: the guest is not in precopy.
            RemoteProtocolError: pages that the guest does not have, or a round older than one before.
        """
        with self.record.lock, self._flow.using() as pager:
            self._heard_us = self._clock.now_us()
            if not self.record.can(Event.INVALIDATED) or pager is None or not self._memfds:
                raise GuestBusyError(
                    f"pages cannot be invalidated in state {self.record.state.name}", holder=self.record.holder
                )
            self._check_attempt(request.attempt)
            self.record.on(Event.INVALIDATED)
            for part in request.stale or [transfer.StalePages()]:
                pager.invalidate(request.generation, part.first_page, part.bitmap, defer=not request.fetch)
            self.record.update(lambda migration: _note_generation(migration, request.generation))
            self._flow.fetch()
        reach(Point.DESTINATION_INVALIDATED, self.record.migration_id)

    def await_complete(self, timeout_us: int) -> None:
        """Wait until no page is missing, or the time is over."""
        self._heard_us = self._clock.now_us()
        with self._flow.using() as pager:
            if pager is not None:
                if timeout_us:
                    with contextlib.suppress(PagerStoppedError):
                        pager.wait_done(timeout_us)
                self._arrival.observe_pages()

    def switch_over(self, request: transfer.SwitchoverRequest) -> transfer.SwitchoverResponse:
        """Load the state and run the guest.

        Raises:
            GuestBusyError: not prepared, or already past this point.
            MigrationAbortedError: the state could not be loaded, or the last pages did not come; the twin is
                destroyed, the guest is at the source.
        """
        with self.record.lock:
            if not self.record.can(Event.SWITCHOVER) or self._twin is None or not self._flow.is_armed:
                # SOURCE would mean that the guest never runs here; one whose state is being loaded is about to.
                is_loading = self.record.state is State.SWITCHOVER
                raise GuestBusyError(
                    f"a switchover makes no sense in state {self.record.state.name}",
                    holder=GuestHolder.UNSPECIFIED if is_loading else self.record.holder,
                )
            self._check_attempt(request.attempt)
            self.record.on(Event.SWITCHOVER)
        reach(Point.DESTINATION_SWITCHING, self.record.migration_id)
        started_us = self._clock.now_us()
        try:
            complete_us, loaded_us = self._load(self._twin, request, started_us)
            self._twin.guest.resume()
        except (MigrateError, PagerStoppedError) as error:
            aborted = why_not_running(error)
            self._give_up(Event.NOT_RUNNING, aborted)
            raise aborted from error
        running_us = self._clock.now_us()
        with self.record.lock:
            self.record.update(lambda migration: figures.note_touches(migration, request.guest_touches))
            self.record.on(Event.RUNNING)
            if self._flow.failure is not None:
                self._on_fetch_failure(self._flow.failure)
        reach(Point.DESTINATION_RUNNING, self.record.migration_id)
        return transfer.SwitchoverResponse(
            last_pages_us=complete_us - started_us,
            load_state_us=loaded_us - complete_us,
            resume_us=running_us - loaded_us,
        )

    def abort(self, reason: str) -> None:
        """Undo Prepare and never run the guest. Repeating it is harmless.

        Raises:
            GuestBusyError: vCPUs run here, or may soon.
        """
        with self.record.lock:
            never_ran = self.record.state in (State.CANCELLED, State.FAILED)
            if never_ran and self.record.holder is GuestHolder.SOURCE:
                return
            if not self.record.can(Event.ABORTED):
                raise GuestBusyError("vCPUs have been told to run at the destination", holder=self.record.holder)
            self._give_up(Event.ABORTED, MigrationAbortedError(f"the source gave up: {reason}"))

    def fence(self, attempt: int) -> None:
        """Note that this attempt and those before it never run here, which is so.

        Raises:
            StateDirError: that could not be written down.
        """
        with self.record.lock:
            if attempt > self._saved.fenced_attempt:
                self._saved.fenced_attempt = attempt
                self._ledger.save()

    def resume(self, token: str, control_endpoint: Endpoint) -> types.Migration:
        """The source's daemon was started again, perhaps at another address: have pages flow again.

        Raises:
            PermissionDeniedError: not this migration's token.
        """
        check_token(token, self._saved.token)
        self._connect_anew(control_endpoint)
        self._arrival.recover_now()
        return self.record.snapshot()

    # ---- called by operators ----

    def recover(self, to: Endpoint | None) -> None:
        """Have pages flow again at once, perhaps from a source that listens elsewhere now.

        Raises:
            GuestBusyError: nothing has been lost that this could bring back.
            GuestLostError: it is lost for good.
        """
        if self.record.state not in (State.POSTCOPY, State.POSTCOPY_PAUSED, State.POSTCOPY_RECOVER):
            raise nothing_to_recover(self.record)
        self._connect_anew(to)
        self._arrival.recover_now()
        self.record.wait_state(
            lambda state: state is not State.POSTCOPY_PAUSED, self._saved.peer_timeout_us / 1_000_000
        )

    # ---- the session's thread ----

    def run(self) -> None:
        """See the migration through to its end, or until `stop`."""
        try:
            if self._is_taken_up:
                self._take_up()
            elif not self._await_switchover():
                return
            if self._twin is not None:
                self._arrival.run(self._twin)
        except PagerStoppedError:
            return
        except (GuestLostError, GuestGoneError) as error:
            self._lose(error)
        except MigrateError as error:
            self._arrival.note_failure(error)
            self._stopping.wait()
        finally:
            self._close()

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()
        self._arrival.stop()
        with self.record.lock:
            if self.record.can(Event.ABORTED):
                self._give_up(Event.ABORTED, AttemptLostError("the destination daemon is shutting down"))
        self._flow.stop()

    # ---- parts ----

    def _connect_anew(self, source: Endpoint | None) -> None:
        """The source listens there now, or still where it was."""
        self._link.connect_anew(source)
        if source is not None:
            self.record.update(lambda migration: figures.note_peer(migration, str(source)))
            with contextlib.suppress(StateDirError):  # found out again, if need be
                self._ledger.save()

    def _arm(self, twin: Twin) -> Pager:
        uffd, region_hva = twin.guest.arm()
        try:
            pager = Pager(uffd, region_hva[0], bytes_to_pages(self._spec.memory_bytes), self._order())
        except MigrateError:
            os.close(uffd)
            raise
        self._flow.arm(pager)
        return pager

    def _order(self) -> Order:
        if self._policy is not None:
            return Order.SUGGESTED
        # A policy that a daemon before us had is missed by nobody.
        return Order[self._saved.order.upper()] if self._saved.order in ORDERS else Order.PRECOPY

    def _start_policy(self, pager: Pager) -> None:
        if self._policy is not None:
            PolicyThread(
                self._flow, self._policy, pager.pages, self._saved.recorded_pages, self.record.migration_id
            ).start()

    def _take_up(self) -> None:
        """The guest runs here, and a daemon before us served its faults: find out what is missing."""
        if self._twin is None or not self._twin.guest.look().is_armed:
            return  # it was let go: nothing is
        *_, self._memfds = self._twin.guest.describe()
        # Known to nobody yet: no page is placed, and no fault read, before this is done.
        pager = self._arm(self._twin)
        pager.find_present(self._memfds[0])
        self._start_policy(pager)
        self._arrival.recover_now()

    def _load(self, twin: Twin, request: transfer.SwitchoverRequest, started_us: int) -> tuple[int, int]:
        """All that comes before the vCPUs run; when no page was waited for any more, and when the state was loaded."""
        with self._flow.using() as pager:
            if pager is None:
                raise PagerStoppedError
            if request.complete_within_us:
                within_us = min(request.complete_within_us, int(SWITCHOVER_DEADLINE_S * 1_000_000))
                self._await_last_round(pager, started_us + within_us)
            complete_us = self._clock.now_us()
            self._start_policy(pager)
            pager.go_live()
            if self._trace is not None:
                self._trace.add_bitmap("missing_at_switchover", pager.copy_map())
        # The stream goes on while the state is loaded, and that the vCPUs may run is written: none needs the others.
        self._flow.fetch()
        self._saved.memory_digest = request.memory_digest
        self._saved.guest_touches = request.guest_touches
        self._saved.may_run = True
        failures: list[MigrateError] = []
        writer = threading.Thread(target=self._write_may_run, args=(failures,), name="may-run")
        writer.start()
        try:
            twin.guest.load_state(request.state)
            loaded_us = self._clock.now_us()
            reach(Point.DESTINATION_LOADED, self.record.migration_id)
        except RemoteProtocolError as error:
            # No other attempt would bring a better state, and each stops the vCPUs.
            raise MigrationAbortedError(error.message, remedy=error.remedy) from error
        finally:
            writer.join()
        for failure in (*failures, self._flow.failure):
            if failure is not None:
                raise failure
        reach(Point.DESTINATION_MAY_RUN, self.record.migration_id)
        return complete_us, loaded_us

    def _write_may_run(self, failures: list[MigrateError]) -> None:
        try:
            self._ledger.save()
        except MigrateError as error:
            failures.append(error)

    def _await_last_round(self, pager: Pager, until_us: int) -> None:
        """Wait until no page is missing.

        Raises:
            AttemptLostError: no page comes any more.
            MigrateError: that takes too long, or the link failed.
        """
        missing_pages, moved_us = pager.counters().missing_pages, self._clock.now_us()
        while not pager.wait_done(_POLL_US):
            if self._flow.failure is not None:
                raise self._flow.failure
            now_us = self._clock.now_us()
            if pager.counters().missing_pages != missing_pages:
                missing_pages, moved_us = pager.counters().missing_pages, now_us
            if now_us >= until_us:
                words = "the pages of the last round did not come in time"
                raise (AttemptLostError if now_us - moved_us > _STILL_US else MigrationAbortedError)(words)

    def _await_switchover(self) -> bool:
        while not self.record.wait_state(lambda state: state not in (State.SETUP, State.PRECOPY), _OBSERVE_S):
            if self._stopping.is_set():
                return False
            with self.record.lock:
                silent_us = self._clock.now_us() - self._heard_us
                if silent_us > SWITCHOVER_DEADLINE_S * 1_000_000 and self.record.can(Event.ABORTED):
                    words = f"the source has not been heard of for {SWITCHOVER_DEADLINE_S:.0f} s"
                    self._give_up(Event.ABORTED, AttemptLostError(words))
        while not self.record.wait_state(lambda state: state is not State.SWITCHOVER, SWITCHOVER_DEADLINE_S):
            pass  # it ends: what it asks of the guest has deadlines of its own
        return not self.record.is_final and not self._stopping.is_set()

    def _check_attempt(self, attempt: int) -> None:
        if (attempt or 1) != self.attempt:
            raise GuestBusyError(
                f"attempt {attempt} is not the one that was prepared, {self.attempt}", holder=GuestHolder.SOURCE
            )

    # ---- ends ----

    def _on_fetch_failure(self, error: MigrateError) -> None:
        """Pages stop coming. Before the guest runs, the switchover fails of it; after that, both halves wait."""
        if isinstance(error, GuestLostError):
            self._lose(error)
            return
        with self.record.lock:
            if self.record.state is State.PRECOPY:
                self._give_up(Event.REFUSED, as_lost_attempt(error))
            elif self.record.can(Event.LINK_LOST):
                self._arrival.note_failure(error)
            else:
                self.record.note_error(error)

    def _lose(self, error: MigrateError) -> None:
        with self.record.lock:
            if self.record.can(Event.GUEST_LOST):
                lost = GuestLostError(
                    f"the guest was lost while its pages were on both hosts: {error.message}",
                    remedy=LOST_REMEDY,
                )
                # Before anything else: what is missing must never read as zero.
                if self._twin is not None:
                    self._twin.destroy()
                self._ledger.end_anyhow(Event.GUEST_LOST, lost)

    def _give_up(self, event: Event, error: MigrateError) -> None:
        """Destroy the twin, then say so: once the state is final, the guest can never run here."""
        self._destroy_twin()
        self._ledger.end_anyhow(event, error)

    def _destroy_twin(self) -> None:
        self._flow.stop()
        if self._twin is not None:
            self._twin.destroy()

    def _close(self) -> None:
        self._flow.close()
        for memfd in self._memfds:
            os.close(memfd)
        self._memfds = []
        self._link.close()


def _note_generation(migration: types.Migration, generation: int) -> None:
    migration.generation = generation
