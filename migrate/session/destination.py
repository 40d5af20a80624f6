"""The destination's side of one migration: build the twin, load the state, run it, fetch its pages, report END.

Prepare builds and arms the twin, Switchover runs it; an error from either means that the guest never ran here and never
will, because the twin is destroyed before the error is answered. After that, the guest lives here, and this side alone
knows which pages it lacks.
"""

import os
import threading
from collections.abc import Callable
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
from migrate.native.pager import Pager, PagerStoppedError
from migrate.pager.fetcher import FetchTerms, make_fetcher
from migrate.session.ports import GuestPort, PeerPort
from migrate.session.record import MigrationRecord
from migrate.session.rules import choose_transport
from migrate.session.states import Event, Side, State
from migrate.telemetry.clock import Clock
from migrate.telemetry.faults import FaultLatencies
from migrate.units import bytes_to_pages
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_POLL_US = 100_000
_RETRY_S = 0.5


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
    """Receives one guest. `prepare`, `switch_over` and `abort` are calls of the source; `run` is the session's thread.

    Args:
        request: The checked Prepare.
        page_endpoint: The source's PageService, with a host that we can reach.
        build_twin: Starts the empty guest.
        source: The source's TransferService, for END.
        clock: Times it all.
    """

    def __init__(
        self,
        request: transfer.PrepareRequest,
        page_endpoint: Endpoint,
        build_twin: Callable[[types.GuestDescription], Twin],
        source: PeerPort,
        clock: Clock,
    ) -> None:
        self._request = request
        self._build_twin = build_twin
        self._source = source
        self._clock = clock
        self._twin: Twin | None = None
        self._pager: Pager | None = None
        self._memory_digest = 0
        self._fetch_error: MigrateError | None = None
        self._latencies = FaultLatencies()
        self._stopping = threading.Event()
        self.transport = choose_transport(request.transport)
        self._fetcher = make_fetcher(
            self.transport,
            FetchTerms(
                page_endpoint,
                request.migration_id,
                request.token,
                verify=request.verify,
                max_bandwidth_bytes_per_s=request.max_bandwidth_bytes_per_s,
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
                self._pager = Pager(uffd, region_hva[0], bytes_to_pages(self._request.guest.spec.memory_bytes))
            except MigrateError:
                os.close(uffd)
                raise
            self._fetcher.connect()
        except MigrateError as error:
            error.holder = GuestHolder.SOURCE
            self._give_up(Event.REFUSED, error)
            self._close()
            raise

    def switch_over(self, request: transfer.SwitchoverRequest) -> transfer.SwitchoverResponse:
        """Load the state and run the guest.

        Raises:
            GuestBusyError: not prepared, or already past this point.
            MigrationAbortedError: the state could not be loaded; the twin is destroyed, the guest is at the source.
        """
        with self.record.lock:
            if not self.record.can(Event.SWITCHOVER) or self._twin is None or self._pager is None:
                raise GuestBusyError(
                    f"a switchover makes no sense in state {self.record.state.name}", holder=self.record.holder
                )
            self.record.on(Event.SWITCHOVER)
        started_us = self._clock.now_us()
        self._memory_digest = request.memory_digest
        try:
            # The stream starts while the state is loaded: both take time, and neither needs the other.
            self._fetcher.start(self._pager)
            self._twin.guest.load_state(request.state)
            loaded_us = self._clock.now_us()
            if self._fetch_error is not None:
                raise self._fetch_error
            self._twin.guest.resume()
        except MigrateError as error:
            aborted = MigrationAbortedError(f"the destination could not run the guest: {error.message}")
            self._give_up(Event.NOT_RUNNING, aborted)
            raise aborted from error
        running_us = self._clock.now_us()
        with self.record.lock:
            self.record.update(lambda migration: _note_touches(migration, request.guest_touches))
            self.record.on(Event.RUNNING)
            if self._fetch_error is not None:
                self._on_fetch_failure(self._fetch_error)
        return transfer.SwitchoverResponse(load_state_us=loaded_us - started_us, resume_us=running_us - loaded_us)

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

    def _await_switchover(self) -> bool:
        if not self.record.wait_state(
            lambda state: state not in (State.SETUP, State.SWITCHOVER), SWITCHOVER_DEADLINE_S
        ):
            with self.record.lock:
                if self.record.can(Event.ABORTED):
                    error = MigrationAbortedError(f"no switchover came within {SWITCHOVER_DEADLINE_S:.0f} s")
                    self._give_up(Event.ABORTED, error)
        self.record.wait_state(lambda state: state is not State.SWITCHOVER, SWITCHOVER_DEADLINE_S)
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
        counters = self._pager.counters()
        statistics = self._twin.guest.statistics()

        def change(migration: types.Migration) -> None:
            migration.pages.zero = counters.zero_pages
            migration.pages.urgent = counters.urgent_pages
            migration.pages.background = counters.background_pages
            migration.pages.duplicate = counters.duplicate_pages
            migration.bytes_on_wire = self._fetcher.wire_bytes
            migration.guest_touches = statistics.touches
            migration.guest_errors = statistics.errors
            migration.guest_stall_us.CopyFrom(statistics.stall_us)
            migration.fault_latency_us.count = self._latencies.count

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
        if self._pager is not None:
            self._pager.stop()
        if self._twin is not None:
            self._twin.destroy()
        self.record.on(event, error)

    def _close(self) -> None:
        if self._pager is not None:
            self._pager.stop()
        self._fetcher.close()
        if self._pager is not None:
            pager, self._pager = self._pager, None
            pager.close()
        self._source.close()


def _note_touches(migration: types.Migration, touches: int) -> None:
    migration.guest_touches = migration.guest_touches_at_switchover = touches
