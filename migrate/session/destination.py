"""The destination's side of one migration: build the twin, fetch pages, load the state, run it, report END.

Prepare builds and arms the twin, Switchover runs it; an error from either means that the guest never ran here and never
will, because the twin is destroyed before the error is answered. After that, the guest lives here, and this side alone
knows which pages it lacks.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from migrate.config import SWITCHOVER_DEADLINE_S, Endpoint
from migrate.errors import (
    ChannelError,
    GuestBusyError,
    GuestGoneError,
    GuestHolder,
    GuestLostError,
    IntegrityError,
    MigrateError,
    MigrationAbortedError,
    PostcopyPausedError,
)
from migrate.native.compression import Compression
from migrate.native.pager import Order, Pager, PagerStoppedError
from migrate.pager.fetcher import Fetcher, FetchTerms, make_fetcher
from migrate.session.ports import GuestPort, PeerPort
from migrate.session.record import MigrationRecord
from migrate.session.rules import choose_compression, choose_transport
from migrate.session.states import Event, Side, State
from migrate.telemetry.clock import Clock
from migrate.telemetry.faults import FaultLatencies
from migrate.units import bytes_to_pages
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

FetcherOf = Callable[[int, FetchTerms, Clock, Callable[[MigrateError], None]], Fetcher]

_POLL_US = 100_000
_RETRY_S = 0.5
_OBSERVE_S = 0.1
# Calls that wait in the pager return at once when it is stopped.
_USERS_LEAVE_S = 30.0


@dataclass(frozen=True, slots=True)
class Twin:
    """The empty guest that a Prepare built.

    Attributes:
        guest: Its process.
        destroy: Ends the process and frees the name and the RAM.
        arrived: Makes it an ordinary guest of this host, at END.
    """

    guest: GuestPort
    destroy: Callable[[], None]
    arrived: Callable[[], None]


class DestinationSession:
    """Receives one guest. `run` is the session's thread; the rest is called for the source.

    Args:
        request: The checked Prepare.
        page_endpoint: The source's PageService, with a host that we can reach.
        build_twin: Starts the empty guest.
        source: The source's TransferService, for END.
        clock: Times it all.
        fetcher_of: Makes what fetches the pages.
    """

    def __init__(
        self,
        request: transfer.PrepareRequest,
        page_endpoint: Endpoint,
        build_twin: Callable[[types.GuestDescription], Twin],
        source: PeerPort,
        clock: Clock,
        fetcher_of: FetcherOf = make_fetcher,
    ) -> None:
        self._request = request
        self._build_twin = build_twin
        self._source = source
        self._clock = clock
        self._twin: Twin | None = None
        self._pager: Pager | None = None
        self._pager_users = 0  # calls of the source that wait in it
        self._memfds: list[int] = []
        self._is_fetching = False
        self._heard_us = clock.now_us()
        self._memory_digest = 0
        self._fetch_error: MigrateError | None = None
        self._latencies = FaultLatencies()
        self._stopping = threading.Event()
        self.transport = choose_transport(request.transport)
        self.compression = choose_compression(request.compression, self.transport)
        self._fetcher = fetcher_of(
            self.transport,
            FetchTerms(
                page_endpoint,
                request.migration_id,
                request.token,
                verify=request.verify,
                max_bandwidth_bytes_per_s=request.max_bandwidth_bytes_per_s,
                compression=Compression(self.compression),
            ),
            clock,
            self._on_fetch_failure,
        )
        spec = request.guest.spec
        self.record = MigrationRecord(
            Side.DESTINATION,
            types.Migration(
                migration_id=request.migration_id,
                guest=spec.name,
                guest_kind=spec.kind,
                mode=request.mode,
                order=request.order,
                transport=self.transport,
                compression=self.compression,
                memory_bytes=spec.memory_bytes,
                vcpus=spec.vcpus,
                peer=request.control_endpoint,
                pages=types.PageCounts(total=bytes_to_pages(spec.memory_bytes)),
            ),
            clock,
        )

    # ---- called by the source ----

    def prepare(self) -> None:
        """Build the twin, arm it, connect both page connections. On an error, nothing is left.

        Raises:
            MigrateError: what stood in the way; the guest stays at the source.
        """
        try:
            self._twin = self._build_twin(self._request.guest)
            uffd, region_hva = self._twin.guest.arm()
            try:
                self._pager = Pager(
                    uffd,
                    region_hva[0],
                    bytes_to_pages(self._request.guest.spec.memory_bytes),
                    Order[self._request.order.upper()],
                )
            except MigrateError:
                os.close(uffd)
                raise
            if self._request.mode != types.MIGRATION_MODE_POSTCOPY:
                *_, self._memfds = self._twin.guest.describe()
                self._pager.begin_precopy(self._memfds[0], verify=self._request.verify)
            self._fetcher.connect()
            with self.record.lock:
                # An abort that came meanwhile could not destroy what was not there yet.
                if self.record.is_final:
                    raise MigrationAbortedError("the source gave up while the twin was being built")
        except MigrateError as error:
            error.holder = GuestHolder.SOURCE
            with self.record.lock:
                self._destroy_twin()
                if self.record.can(Event.REFUSED):
                    self.record.on(Event.REFUSED, error)
            self._close()
            raise

    def invalidate(self, request: transfer.InvalidateRequest) -> None:
        """Lose pages that the guest wrote at the source since they were read. The first call begins to fetch.

        Raises:
            GuestBusyError: the guest is not in precopy.
            RemoteProtocolError: pages that the guest does not have, or a round older than one before.
        """
        with self.record.lock:
            self._heard_us = self._clock.now_us()
            pager = self._pager
            if not self.record.can(Event.INVALIDATED) or pager is None or not self._memfds:
                raise GuestBusyError(
                    f"pages cannot be invalidated in state {self.record.state.name}", holder=self.record.holder
                )
            self.record.on(Event.INVALIDATED)
            for part in request.stale or [transfer.StalePages()]:
                pager.invalidate(request.generation, part.first_page, part.bitmap, defer=not request.fetch)
            self.record.update(lambda migration: _note_generation(migration, request.generation))
            if not self._is_fetching:
                self._start_fetching(pager)
            self._fetcher.wake()

    def await_complete(self, timeout_us: int) -> None:
        """Wait until no page is missing, or the time is over."""
        with self._using_pager() as pager:
            if pager is not None and timeout_us:
                with contextlib.suppress(PagerStoppedError):
                    pager.wait_done(timeout_us)
                self._observe_pages(pager)

    @contextlib.contextmanager
    def _using_pager(self) -> Iterator[Pager | None]:
        """A scope in which the pager is not closed."""
        with self.record.lock:
            self._heard_us = self._clock.now_us()
            pager = self._pager
            self._pager_users += pager is not None
        try:
            yield pager
        finally:
            if pager is not None:
                self.record.update(self._leave_pager)

    def _leave_pager(self, _: types.Migration) -> None:
        self._pager_users -= 1

    def switch_over(self, request: transfer.SwitchoverRequest) -> transfer.SwitchoverResponse:
        """Load the state and run the guest.

        Raises:
            GuestBusyError: not prepared, or already past this point.
            MigrationAbortedError: the state could not be loaded, or the last pages did not come; the twin is
                destroyed, the guest is at the source.
        """
        with self.record.lock:
            if not self.record.can(Event.SWITCHOVER) or self._twin is None or self._pager is None:
                # SOURCE would mean that the guest never runs here; one whose state is being loaded is about to.
                is_loading = self.record.state is State.SWITCHOVER
                raise GuestBusyError(
                    f"a switchover makes no sense in state {self.record.state.name}",
                    holder=GuestHolder.UNSPECIFIED if is_loading else self.record.holder,
                )
            self.record.on(Event.SWITCHOVER)
        started_us = self._clock.now_us()
        self._memory_digest = request.memory_digest
        try:
            if request.complete_within_us:
                self._await_last_round(self._pager, started_us + request.complete_within_us)
            self._pager.go_live()
            # The stream goes on while the state is loaded: both take time, and neither needs the other.
            if self._is_fetching:
                self._fetcher.wake()
            else:
                self._start_fetching(self._pager)
            self._twin.guest.load_state(request.state)
            loaded_us = self._clock.now_us()
            if self._fetch_error is not None:
                raise self._fetch_error
            self._twin.guest.resume()
        except (MigrateError, PagerStoppedError) as error:
            words = error.message if isinstance(error, MigrateError) else "the destination daemon is shutting down"
            aborted = MigrationAbortedError(f"the destination could not run the guest: {words}")
            self._give_up(Event.NOT_RUNNING, aborted)
            raise aborted from error
        running_us = self._clock.now_us()
        with self.record.lock:
            self.record.update(lambda migration: _note_touches(migration, request.guest_touches))
            self.record.on(Event.RUNNING)
            if self._fetch_error is not None:
                self._on_fetch_failure(self._fetch_error)
        return transfer.SwitchoverResponse(load_state_us=loaded_us - started_us, resume_us=running_us - loaded_us)

    def _await_last_round(self, pager: Pager, until_us: int) -> None:
        """Wait until no page is missing.

        Raises:
            MigrateError: that takes too long, or pages come no more.
        """
        while not pager.wait_done(_POLL_US):
            if self._fetch_error is not None:
                raise self._fetch_error
            if self._clock.now_us() >= until_us:
                raise MigrationAbortedError("the pages of the last round did not come in time")

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

    # ---- the session's thread ----

    def run(self) -> None:
        """See the migration through to its end, or until `stop`."""
        try:
            if not self._await_switchover():
                return
            self._place_all()
            self._finish()
        except PagerStoppedError:
            return
        except (GuestLostError, GuestGoneError) as error:
            self._lose(error)
        except MigrateError as error:
            self._on_fetch_failure(error)
            self._stopping.wait()
        finally:
            self._close()

    def stop(self) -> None:
        """Have `run` return soon."""
        self._stopping.set()
        with self.record.lock:
            if self.record.can(Event.ABORTED):
                self._give_up(Event.ABORTED, MigrationAbortedError("the destination daemon is shutting down"))
            if self._pager is not None:
                self._pager.stop()

    def _start_fetching(self, pager: Pager) -> None:
        self._is_fetching = True
        self._fetcher.start(pager)

    def _await_switchover(self) -> bool:
        while not self.record.wait_state(lambda state: state not in (State.SETUP, State.PRECOPY), _OBSERVE_S):
            if self._stopping.is_set():
                return False
            with self.record.lock:
                silent_us = self._clock.now_us() - self._heard_us
                if silent_us > SWITCHOVER_DEADLINE_S * 1_000_000 and self.record.can(Event.ABORTED):
                    words = f"the source has not been heard of for {SWITCHOVER_DEADLINE_S:.0f} s"
                    self._give_up(Event.ABORTED, MigrationAbortedError(words))
        while not self.record.wait_state(lambda state: state is not State.SWITCHOVER, SWITCHOVER_DEADLINE_S):
            pass  # it ends: what it asks of the guest has deadlines of its own
        return not self.record.is_final and not self._stopping.is_set()

    def _place_all(self) -> None:
        if self._pager is None or self._twin is None:
            return
        while not self._pager.wait_done(_POLL_US):
            self._observe()

    def _finish(self) -> None:
        if self._pager is None or self._twin is None:
            return
        self._fetcher.join()
        if self._request.verify and self._pager.counters().memory_digest != self._memory_digest:
            raise IntegrityError(
                "the memory that arrived is not the one whose digest the source took while it was paused"
            )
        self._twin.guest.disarm()
        self._observe()
        self.record.update(self._note_final)
        self._report_end()
        self._twin.arrived()
        self.record.on(Event.END)

    def _report_end(self) -> None:
        """Tell the source until it has heard: only its answer is END."""
        while not self._stopping.is_set():
            request = transfer.CompleteRequest(
                migration_id=self.record.migration_id, token=self._request.token, migration=self.record.snapshot()
            )
            try:
                self._source.complete(request)
            except ChannelError as error:
                self.record.note_error(error)
            else:
                return
            self._stopping.wait(_RETRY_S)
        raise PagerStoppedError

    # ---- figures ----

    def _observe(self) -> None:
        if self._pager is None or self._twin is None:
            return
        self._latencies.add(self._pager.drain_records())
        self._observe_pages(self._pager)
        statistics = self._twin.guest.statistics()

        def change(migration: types.Migration) -> None:
            migration.guest_touches = statistics.touches
            migration.guest_errors = statistics.errors
            migration.guest_stall_us.CopyFrom(statistics.stall_us)
            migration.fault_latency_us.count = self._latencies.count

        self.record.update(change)

    def _observe_pages(self, pager: Pager) -> None:
        counters = pager.counters()

        def change(migration: types.Migration) -> None:
            migration.pages.zero = counters.zero_pages
            migration.pages.precopy = counters.precopy_pages
            migration.pages.urgent = counters.urgent_pages
            migration.pages.background = counters.background_pages
            migration.pages.duplicate = counters.duplicate_pages
            migration.pages.stale = counters.stale_pages
            migration.deferred_pages = counters.deferred_pages
            migration.bytes_on_wire = self._fetcher.wire_bytes

        self.record.update(change)

    def _note_final(self, migration: types.Migration) -> None:
        migration.fault_latency_us.CopyFrom(self._latencies.distribution())
        if self._request.verify:
            # The digest of the whole memory agrees, so zero pages are verified with the rest.
            migration.verified_pages = migration.pages.total

    # ---- ends ----

    def _on_fetch_failure(self, error: MigrateError) -> None:
        """Pages stop coming. Before the guest runs, the switchover fails of it; after that, both halves wait."""
        self._fetch_error = error
        if isinstance(error, GuestLostError):
            self._lose(error)
            return
        with self.record.lock:
            if self.record.can(Event.LINK_LOST):
                self.record.on(Event.LINK_LOST, PostcopyPausedError(error.message, remedy=error.remedy))
            elif self.record.state is State.PRECOPY:
                self._give_up(Event.REFUSED, error)
            else:
                self.record.note_error(error)

    def _lose(self, error: MigrateError) -> None:
        with self.record.lock:
            if self.record.can(Event.GUEST_LOST):
                lost = GuestLostError(
                    f"the guest process at the destination died while pages were on both hosts: {error.message}",
                    remedy="restore the guest from a backup",
                )
                self.record.on(Event.GUEST_LOST, lost)
                if self._twin is not None:
                    self._twin.destroy()

    def _give_up(self, event: Event, error: MigrateError) -> None:
        """Destroy the twin, then say so: once the state is final, the guest can never run here."""
        self._destroy_twin()
        self.record.on(event, error)

    def _destroy_twin(self) -> None:
        if self._pager is not None:
            self._pager.stop()
        if self._twin is not None:
            self._twin.destroy()

    def _close(self) -> None:
        with self.record.lock:
            pager, self._pager = self._pager, None
        if pager is not None:
            pager.stop()
            # They look at the fetcher too.
            self.record.wait_state(lambda _: not self._pager_users, _USERS_LEAVE_S)
        self._fetcher.close()
        if pager is not None:
            pager.close()
        for memfd in self._memfds:
            os.close(memfd)
        self._memfds = []
        self._source.close()


def _note_generation(migration: types.Migration, generation: int) -> None:
    migration.generation = generation


def _note_touches(migration: types.Migration, touches: int) -> None:
    migration.guest_touches = migration.guest_touches_at_switchover = touches
