"""A guest that runs at the destination and lacks pages: they are placed, lost, found again, until END.

Nothing here can go back. Pages that stay away are waited for; the operator may have said for how long.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from migrate.barriers import Point, reach
from migrate.config import Endpoint
from migrate.errors import (
    GuestHolder,
    GuestLostError,
    IntegrityError,
    MigrateError,
    PostcopyPausedError,
)
from migrate.native.pager import PagerStoppedError
from migrate.session.backoff import between_tries
from migrate.session.figures import page_counts
from migrate.session.ledger import Ledger
from migrate.session.live import MAP_CELLS
from migrate.session.page_flow import PageFlow
from migrate.session.ports import GuestPort, PeerOf, PeerPort
from migrate.session.states import Event, State
from migrate.session.tracing import TraceFeed
from migrate.telemetry.clock import Clock
from migrate.telemetry.faults import FaultLatencies
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_POLL_US = 100_000
# Pages that flowed for so long were lost by something new.
_STEADY_US = 2_000_000
_LOOK_S = 0.1
_RECENT_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Twin:
    """The guest that a Prepare built.

    Attributes:
        guest: Its process.
        destroy: Ends the process and frees the name and the RAM.
        ending: Told when all of it is here: whoever wants it may wait for END.
        arrived: Makes it an ordinary guest of this host, at END.
        spend: Lets it be, as one that lacks pages for good: it can be deleted, and nothing else.
    """

    guest: GuestPort
    destroy: Callable[[], None]
    ending: Callable[[], None]
    arrived: Callable[[], None]
    spend: Callable[[], None]


class SourceLink:
    """Where the source is, as far as is known. Thread-safe.

    Args:
        entry: What is written down of it; kept up to date.
        own_endpoint: Our TransferService, as the source should see it.
        peer_of: Connects to it.
        timeout_s: Of silence, after which it is lost.
    """

    def __init__(
        self, entry: saved.SavedDestination, own_endpoint: Endpoint, peer_of: PeerOf, timeout_s: float
    ) -> None:
        self._entry = entry
        self._own_endpoint = own_endpoint
        self._peer_of = peer_of
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._peer = self._connect()

    @property
    def peer(self) -> PeerPort:
        """Its TransferService."""
        with self._lock:
            return self._peer

    def connect_anew(self, control: Endpoint | None = None) -> None:
        """It listens there now, or still where it was: a connection that has failed waits before it tries again."""
        with self._lock:
            if control is not None:
                self._entry.control_endpoint = str(control)
            before, self._peer = self._peer, self._connect()
        before.close()

    def find_pages(self, migration_id: str) -> Endpoint:
        """Say where we are, and hear where the pages are served now.

        Raises:
            GuestLostError: nowhere any more.
            MigrateError: that cannot be known now.
        """
        answer = self.peer.resume_migration(
            transfer.ResumeMigrationRequest(
                migration_id=migration_id, token=self._entry.token, control_endpoint=str(self._own_endpoint)
            )
        )
        pages = Endpoint.parse(answer.page_endpoint)
        if pages.is_unspecified:
            pages = Endpoint(Endpoint.parse(self._entry.control_endpoint).host, pages.port)
        self._entry.page_endpoint = str(pages)
        return pages

    def close(self) -> None:
        """Close the connection."""
        self.peer.close()

    def _connect(self) -> PeerPort:
        return self._peer_of(Endpoint.parse(self._entry.control_endpoint), "source", self._timeout_s)


class Arrival:
    """One guest's pages from the moment it runs here. `run` is called by the session's thread.

    Args:
        ledger: Of the migration.
        flow: Its pages.
        link: Where they come from.
        clock: Times it all.
        is_taken_up: Whether a daemon before this one placed some of the pages.
        trace: Told everything that was seen, if it is traced.
    """

    def __init__(
        self,
        ledger: Ledger,
        flow: PageFlow,
        link: SourceLink,
        clock: Clock,
        *,
        is_taken_up: bool,
        trace: TraceFeed | None = None,
    ) -> None:
        self._ledger = ledger
        self._record = ledger.record
        self._saved = ledger.entry.destination
        self._flow = flow
        self._link = link
        self._clock = clock
        self._is_taken_up = is_taken_up
        self._trace = trace
        self._latencies = FaultLatencies()
        self._stopping = threading.Event()
        self._forced = threading.Event()
        self._backoff = between_tries()
        self._recovered_us = self._moved_us = clock.now_us()
        self._missing_pages = 0

    def run(self, twin: Twin) -> None:
        """See it through to END.

        Raises:
            PagerStoppedError: told to stop, or pages were given up.
            GuestLostError: a half of the guest is gone, or was given up.
            MigrateError: what nobody can mend.
        """
        self._moved_us = self._clock.now_us()
        if self._trace is not None:
            self._trace.add_threads(list(twin.guest.look().vcpu_thread_ids))
        if self._flow.is_armed:
            self._place_all(twin)
            self._finish_pages(twin)
        self.observe(twin, with_stalls=self._trace is not None)
        self._record.update(self._note_final)
        twin.ending()
        self._report_end()
        reach(Point.DESTINATION_ACKNOWLEDGED, self._record.migration_id)
        twin.arrived()
        self._ledger.end_anyhow(Event.END)
        reach(Point.DESTINATION_ENDED, self._record.migration_id)

    def note_failure(self, error: MigrateError) -> None:
        """Pages stop coming, or still do not come."""
        with self._record.lock:
            paused = PostcopyPausedError(error.message, remedy=error.remedy)
            if self._record.can(Event.LINK_LOST):
                self._record.on(Event.LINK_LOST, paused)
            elif self._record.state is State.POSTCOPY_PAUSED:
                self._record.note_error(paused)

    def recover_now(self) -> None:
        """Do not wait for the end of a pause."""
        self._forced.set()

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()
        self._forced.set()

    # ---- pages ----

    def _place_all(self, twin: Twin) -> None:
        while not self._is_complete():
            self.observe(twin)
            if self._trace is not None and self._record.state is State.POSTCOPY:
                self._trace.hand_over_now_and_then(self._link.peer)
            if self._record.state is State.POSTCOPY_PAUSED:
                self._recover(twin)

    def _is_complete(self) -> bool:
        if self._stopping.is_set():
            raise PagerStoppedError
        with self._flow.using() as pager:
            if pager is None:
                raise PagerStoppedError
            return pager.wait_done(_POLL_US)

    def _recover(self, twin: Twin) -> None:
        """Try until pages flow again, or the deadline decides."""
        if self._clock.now_us() - self._recovered_us > _STEADY_US:
            self._backoff.reset()
        while self._record.state is State.POSTCOPY_PAUSED:
            self._heed_deadline(twin)
            self._pause(self._backoff.next_s(), twin)
            try:
                self._take_up_pages()
            except GuestLostError:
                raise
            except MigrateError as error:
                self.note_failure(error)

    def _take_up_pages(self) -> None:
        pages = self._link.find_pages(self._record.migration_id)
        with self._record.lock:
            if not self._record.can(Event.RECOVERING):
                return
            self._record.on(Event.RECOVERING)
        self._flow.take_over(pages)
        self._recovered_us = self._clock.now_us()
        with self._record.lock:
            if self._record.state is State.POSTCOPY_RECOVER:
                self._record.update(_count_recovery)
                self._record.on(Event.RUNNING)

    def _pause(self, pause_s: float, twin: Twin) -> None:
        """Wait, but for a guest that dies, an operator, and the deadline."""
        while pause_s > 0 and not self._forced.wait(min(pause_s, _LOOK_S)):
            pause_s -= _LOOK_S
            self.observe(twin)
            self._heed_deadline(twin)
        self._forced.clear()
        if self._stopping.is_set():
            raise PagerStoppedError

    def _heed_deadline(self, twin: Twin) -> None:
        deadline_us = self._saved.deadline_us
        away_us = self._clock.now_us() - self._moved_us
        if not deadline_us or away_us <= deadline_us:
            return
        words = f"no page has come for {away_us / 1_000_000:.1f} s, longer than the deadline"
        if self._saved.on_deadline != types.DEADLINE_ACTION_POISON:
            raise GuestLostError(f"{words}: the guest was stopped, as the operator chose")
        with self._flow.using() as pager:
            if pager is None:
                raise PagerStoppedError
            poisoned_pages = pager.poison_missing()
        # What is known to be zero may be touched still; poison outlives this.
        twin.guest.disarm()
        lost = GuestLostError(
            f"{words}: {poisoned_pages} pages are lost; the guest runs on at the destination without them, as the"
            " operator chose, and a touch of one is a memory error",
            holder=GuestHolder.DESTINATION,
        )
        self._ledger.end_anyhow(Event.POISONED, lost)
        twin.spend()
        raise PagerStoppedError

    # ---- END ----

    def _finish_pages(self, twin: Twin) -> None:
        self._flow.join()
        counters = self._flow.counters()
        if counters is None:
            raise PagerStoppedError
        # A daemon that was started again knows nothing of the digests of pages that it found here.
        if self._saved.verify and not self._is_taken_up and counters.memory_digest != self._saved.memory_digest:
            raise IntegrityError(
                "the memory that arrived is not the one whose digest the source took while it was paused"
            )
        reach(Point.DESTINATION_COMPLETE, self._record.migration_id)
        if self._trace is not None:
            self._trace.add_bitmap("zero_at_end", self._flow.copy_map(known_zero=True))
        twin.guest.disarm()
        reach(Point.DESTINATION_DISARMED, self._record.migration_id)

    def _report_end(self) -> None:
        """Tell the source until it has heard: only its answer is END."""
        backoff = between_tries()
        while not self._stopping.is_set():
            request = transfer.CompleteRequest(
                migration_id=self._record.migration_id, token=self._saved.token, migration=self._record.snapshot()
            )
            try:
                if self._trace is not None:
                    self._trace.hand_over(self._link.peer, is_last=True)
                self._link.peer.complete(request)
            except MigrateError as error:
                self._record.note_error(error)
            else:
                return
            self._forced.wait(backoff.next_s())
            self._forced.clear()
        raise PagerStoppedError

    # ---- figures ----

    def observe(self, twin: Twin, *, with_stalls: bool = False) -> None:
        """Take over what the pager and the guest know, for the trace with every bucket of its stalls.

        Raises:
            GuestGoneError: the guest process died.
        """
        served = self._flow.drain_records()
        self._latencies.add(served, self._clock.now_us())
        if self._trace is not None:
            self._trace.add_faults(served)
        self.observe_pages()
        statistics = twin.guest.statistics(with_stalls=with_stalls)
        if self._trace is not None and with_stalls:
            self._trace.add_stalls(statistics)

        def change(migration: types.Migration) -> None:
            migration.guest_touches = statistics.touches
            migration.guest_errors = statistics.errors
            migration.guest_stall_us.CopyFrom(statistics.stall_us)
            migration.fault_latency_us.count = self._latencies.count

        self._record.update(change)

    def observe_pages(self) -> None:
        """Take over what the pager knows."""
        counters = self._flow.counters()
        if counters is None:
            return
        if counters.missing_pages != self._missing_pages:
            self._missing_pages = counters.missing_pages
            self._moved_us = self._clock.now_us()
        wire_bytes = self._flow.wire_bytes
        if self._trace is not None and self._trace.wants_sample(counters.missing_pages):
            self._trace.add_sample(counters, self._flow.missing_map(MAP_CELLS), wire_bytes)

        def change(migration: types.Migration) -> None:
            migration.pages.CopyFrom(page_counts(counters))
            migration.deferred_pages = counters.deferred_pages
            migration.bytes_on_wire = wire_bytes

        self._record.update(change)

    def live_figures(self) -> types.LiveFigures | None:
        """What those who watch want to know now; None while no page can be missing."""
        missing_map = self._flow.missing_map(MAP_CELLS)
        if not missing_map:
            return None
        recent = self._latencies.recent(self._clock.now_us() - _RECENT_US)
        return types.LiveFigures(missing_map=missing_map, fault_latency_us=recent)

    def _note_final(self, migration: types.Migration) -> None:
        migration.fault_latency_us.CopyFrom(self._latencies.distribution())
        counters = self._flow.counters()
        if not self._flow.is_armed:
            # Everything was here when this daemon was started.
            migration.pages.background = migration.pages.total
        if self._saved.verify and not self._is_taken_up:
            # The digest of the whole memory agrees, so zero pages are verified with the rest.
            migration.verified_pages = migration.pages.total
        elif self._saved.verify and counters is not None:
            migration.verified_pages = counters.verified_pages


def _count_recovery(migration: types.Migration) -> None:
    migration.recoveries += 1
