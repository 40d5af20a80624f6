"""The source's side of one migration: prepare, precopy, pause, hand over, serve pages until END.

Who holds the guest is never guessed. Once Switchover was sent, the vCPUs stay paused here until the destination either
runs the guest, or says that it never did and never will; if the answer is lost, the source asks until it knows.
"""

import contextlib
import os
import secrets
import threading
from collections.abc import Callable

from migrate.config import PROTOCOL_VERSION, Endpoint
from migrate.errors import (
    ChannelError,
    GuestBusyError,
    GuestHolder,
    GuestLostError,
    LocalProtocolError,
    MigrateError,
    MigrationAbortedError,
    NotFoundError,
    PermissionDeniedError,
    PostcopyPausedError,
)
from migrate.native.compression import Compression
from migrate.native.exports import Exports
from migrate.native.page_source import PageSource
from migrate.session.convergence import DOWNTIME_LIMIT_DEFAULT_US, Next, Terms
from migrate.session.ports import GuestPort, PeerPort
from migrate.session.precopy import Precopy
from migrate.session.record import MigrationRecord
from migrate.session.rules import check_peer_version, check_terms, choose_compression, choose_mode, choose_transport
from migrate.session.states import Event, Side, State
from migrate.telemetry.clock import Clock
from migrate.units import bytes_to_pages
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_POLL_S = 0.2
_RETRY_FIRST_S = 0.1
_RETRY_MAX_S = 2.0
_PEER_SILENT_POLLS_MAX = 25
# Pages of the last round that do not come in the time that was reckoned get this much more.
_COMPLETE_GRACE_US = 1_000_000
_CANCEL_DEADLINE_S = 60.0
_RUNNING_STATES = (
    types.MIGRATION_STATE_POSTCOPY,
    types.MIGRATION_STATE_POSTCOPY_PAUSED,
    types.MIGRATION_STATE_COMPLETED,
)


class _CancelledError(MigrationAbortedError):
    """The operator gave up; the session's thread undoes what there is."""


class SourceSession:
    """Moves one guest away from this host. `run` is its thread; the rest is called by others.

    Args:
        migration_id: Names the migration on both sides.
        request: What the operator asked for; `request.guest` is locked for this session.
        kind: Its kind.
        guest: The guest process.
        peer: The destination daemon.
        exports: Where the guest's pages are published.
        page_endpoint: Our PageService for the transport that is asked for, as the destination should see it.
        control_endpoint: Our TransferService, likewise.
        clock: Times it all.
        on_guest_left: Called once END is acknowledged; frees the guest and its RAM.
        on_guest_stays: Called before the migration is seen to have failed or to be cancelled; unlocks the guest.
    """

    def __init__(
        self,
        migration_id: str,
        request: operator.StartMigrationRequest,
        kind: "types.GuestKind.ValueType",
        guest: GuestPort,
        peer: PeerPort,
        exports: Exports,
        *,
        page_endpoint: Endpoint,
        control_endpoint: Endpoint,
        clock: Clock,
        on_guest_left: Callable[[], None],
        on_guest_stays: Callable[[], None],
    ) -> None:
        mode = choose_mode(request.mode, kind)
        check_terms(mode, request.order)
        self._request = request
        self._terms = Terms(
            mode,
            request.downtime_limit_us or DOWNTIME_LIMIT_DEFAULT_US,
            request.on_no_convergence or types.NO_CONVERGENCE_POSTCOPY,
        )
        self._guest = guest
        self._peer = peer
        self._exports = exports
        self._page_endpoint = page_endpoint
        self._control_endpoint = control_endpoint
        self._clock = clock
        self._on_guest_left = on_guest_left
        self._on_guest_stays = on_guest_stays
        self._token = secrets.token_urlsafe(32)
        self._stopping = threading.Event()
        self._forced = threading.Event()
        self._precopy: Precopy | None = None
        self._is_published = False
        self._paused_us = 0
        self._compression = Compression.NONE  # until the destination has agreed to another
        self._memfds: list[int] = []
        self._source: PageSource | None = None
        self.record = MigrationRecord(
            Side.SOURCE,
            types.Migration(
                migration_id=migration_id,
                guest=request.guest,
                guest_kind=kind,
                mode=mode,
                order=request.order,
                transport=choose_transport(request.transport),
                compression=types.PAGE_COMPRESSION_NONE,
                peer=request.to,
            ),
            clock,
        )

    def run(self) -> None:
        """Drive the migration to a final state, or until `stop`."""
        try:
            self._prepare()
            self._switch_over(self._copy_before())
            self._serve_until_end()
        except _CancelledError:
            self._undo()
        except MigrateError as error:
            self._fail(error)
        finally:
            self._release()

    def start_switchover(self) -> None:
        """Switch over as soon as possible, whatever the mode waits for. Repeating it is harmless.

        Raises:
            GuestBusyError: it has begun already.
        """
        with self.record.lock:
            if self.record.state not in (State.SETUP, State.PRECOPY):
                raise GuestBusyError(
                    f"the switchover is not ahead in state {self.record.state.name}", holder=self.record.holder
                )
            self._forced.set()

    def cancel(self) -> None:
        """Give up; returns when the destination keeps nothing. The guest runs on here, as if nothing had been.

        Raises:
            GuestBusyError: the vCPUs have been told to stop for it, or it is over.
        """
        with self.record.lock:
            if self.record.state not in (State.CANCELLING, State.CANCELLED):
                if not self.record.can(Event.CANCEL):
                    raise GuestBusyError(
                        f"a migration in state {self.record.state.name} cannot be cancelled",
                        holder=self.record.holder,
                        remedy="wait for its end; from postcopy on, a guest can only go on to its destination",
                    )
                self.record.on(Event.CANCEL)
        if not self.record.wait_state(_is_final, _CANCEL_DEADLINE_S):
            raise GuestBusyError("the destination has not answered yet; the guest runs on at the source")

    def stop(self) -> None:
        """Have `run` return soon, wherever it is. Who holds the guest does not change."""
        self._stopping.set()

    def complete(self, token: str, destination: types.Migration) -> None:
        """END arrived from the destination. Repeating it is harmless.

        Raises:
            PermissionDeniedError: not this migration's token.
            GuestBusyError: the migration is not at a point where END makes sense.
        """
        if not secrets.compare_digest(token.encode(), self._token.encode()):
            raise PermissionDeniedError("the token is not this migration's")
        with self.record.lock:
            if self.record.state is State.COMPLETED:
                return
            if self.record.state is State.SWITCHOVER:
                # The guest has run and finished there before our call returned: END says both.
                self._note_running()
            if not self.record.can(Event.END):
                raise GuestBusyError(f"END makes no sense in state {self.record.state.name}", holder=self.record.holder)
            self.record.update(lambda migration: _merge(migration, destination))
            self.record.on(Event.END)

    # ---- SETUP ----

    def _prepare(self) -> None:
        description, _, _, self._memfds = self._guest.describe()
        self.record.update(lambda migration: _describe(migration, description))
        prepared = self._peer.prepare(
            transfer.PrepareRequest(
                migration_id=self.record.migration_id,
                protocol_version=PROTOCOL_VERSION,
                guest=description,
                page_endpoint=str(self._page_endpoint),
                control_endpoint=str(self._control_endpoint),
                token=self._token,
                mode=types.MigrationMode.ValueType(self._terms.mode),
                order=self._request.order,
                transport=choose_transport(self._request.transport),
                max_bandwidth_bytes_per_s=self._request.max_bandwidth_bytes_per_s,
                verify=self._request.verify,
                compression=self._request.compression,
            )
        )
        check_peer_version(self._terms.mode, prepared.protocol_version)
        if prepared.compression == self._request.compression:
            self._compression = Compression(choose_compression(prepared.compression, prepared.transport))
        self.record.update(lambda migration: _note_transport(migration, prepared.transport, self._compression))
        self._source = PageSource(self._memfds[0], bytes_to_pages(description.regions[0].size_bytes))

    # ---- PRECOPY ----

    def _copy_before(self) -> Next:
        """Move pages while the guest runs here, until it is time to switch over; say how."""
        if self._terms.mode == types.MIGRATION_MODE_POSTCOPY or self._source is None:
            return Next.SWITCH_WITH_REST
        self._advance(Event.PRECOPY)
        if self._request.verify:
            self._source.digest_replies()
        self._publish()
        self._precopy = Precopy(
            self.record.migration_id, self._guest, self._peer, self._exports, self._clock, self._terms
        )
        self._precopy.begin()
        return self._precopy.run(self._follow_precopy, self._forced.is_set)

    def _follow_precopy(self, incoming: types.Migration | None) -> None:
        """Take over figures, if there are any; raise what ends the precopy from here."""
        if incoming is None:
            self._stopping.wait(_POLL_S)
        if self._stopping.is_set():
            raise MigrationAbortedError("the source daemon is shutting down")
        with self.record.lock:
            if self.record.state is State.CANCELLING:
                raise _CancelledError("cancelled")
        if incoming is not None and self._precopy is not None:
            generation = self._precopy.generation
            self.record.update(lambda migration: _merge_pages(migration, incoming, generation))

    def _advance(self, event: Event) -> None:
        """A step that a cancellation may have come before."""
        with self.record.lock:
            if self.record.state is State.CANCELLING:
                raise _CancelledError("cancelled")
            self.record.on(event)

    def _publish(self) -> None:
        if self._source is not None and not self._is_published:
            self._exports.publish(self.record.migration_id, self._token, self._source, self._compression)
            self._is_published = True

    # ---- SWITCHOVER ----

    def _switch_over(self, how: Next) -> None:
        if self._source is None:
            raise LocalProtocolError("switchover before prepare")
        self._advance(Event.PREPARED if self._precopy is None else Event.SWITCHOVER)
        with_all = how is Next.SWITCH_WITH_ALL
        self._paused_us = self._clock.now_us()
        self._guest.pause()
        if self._precopy is not None:
            self._precopy.last_round(fetch=with_all)
        memory_digest = self._source.take_digests() if self._request.verify else 0
        # Pages are served from before the state is loaded, which may touch some.
        self._publish()
        state, touches = self._guest.save_state()
        self.record.update(lambda migration: _note_touches(migration, touches))
        request = transfer.SwitchoverRequest(
            migration_id=self.record.migration_id,
            state=state,
            guest_touches=touches,
            memory_digest=memory_digest,
            complete_within_us=self._terms.downtime_limit_us + _COMPLETE_GRACE_US if with_all else 0,
        )
        try:
            self._peer.switch_over(request)
        except MigrateError as error:
            if error.holder is GuestHolder.SOURCE:
                raise
            self.record.note_error(error)
            if not self._learn_whether_it_runs(error):
                return
        self._note_running()

    def _note_running(self) -> None:
        """The answer to Switchover or END came, whichever is first: the vCPUs run there."""
        with self.record.lock:
            if self.record.state is State.SWITCHOVER:
                downtime_us = self._clock.now_us() - self._paused_us
                self.record.update(lambda migration: _note_downtime(migration, downtime_us))
                self.record.on(Event.RUNNING)

    def _learn_whether_it_runs(self, lost: MigrateError) -> bool:
        """Ask until the destination says that the guest runs there (True) or never will (raises). False: stopped."""
        pause_s = _RETRY_FIRST_S
        while not self._stopping.is_set():
            try:
                if self.record.state is not State.SWITCHOVER or self._fence_or_see_it_run(lost):
                    return True
            except (ChannelError, NotFoundError) as error:
                # NotFound is no answer either: a restarted daemon forgets what its guest does not.
                self.record.note_error(error)
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, _RETRY_MAX_S)
        return False

    def _fence_or_see_it_run(self, lost: MigrateError) -> bool:
        """One question. True: it runs there. False: not known yet. Raises MigrationAbortedError: it never will."""
        migration_id = self.record.migration_id
        try:
            self._peer.abort(migration_id, "the answer to Switchover was lost")
        except GuestBusyError:
            incoming = self._peer.get_incoming(migration_id)
            if incoming.state == types.MIGRATION_STATE_FAILED and incoming.holder == types.GUEST_HOLDER_SOURCE:
                raise MigrationAbortedError(incoming.error.message) from lost
            return incoming.state in _RUNNING_STATES
        raise MigrationAbortedError(f"{lost.message}; the destination never ran the guest") from lost

    # ---- POSTCOPY ----

    def _serve_until_end(self) -> None:
        silent_polls = 0
        while not self._stopping.is_set() and not self.record.wait_state(_is_final, _POLL_S):
            try:
                incoming = self._peer.get_incoming(self.record.migration_id)
            except MigrateError as error:
                # Whatever it is, here are the only copies of pages, and somebody may come for them.
                silent_polls += 1
                if silent_polls >= _PEER_SILENT_POLLS_MAX:
                    self._pause(PostcopyPausedError(error.message, remedy=error.remedy))
                continue
            silent_polls = 0
            self._follow(incoming)
        if self.record.state is State.COMPLETED:
            self._exports.withdraw(self.record.migration_id)
            self._on_guest_left()

    def _follow(self, incoming: types.Migration) -> None:
        """Take over what the destination says of the migration while pages still move."""
        with self.record.lock:
            if self.record.is_final:
                return
            if incoming.state == types.MIGRATION_STATE_FAILED:
                self.record.on(Event.GUEST_LOST, GuestLostError(incoming.error.message))
            elif incoming.state == types.MIGRATION_STATE_POSTCOPY_PAUSED:
                self._pause(PostcopyPausedError(incoming.error.message, remedy=incoming.error.remedy))
            elif self.record.state is State.POSTCOPY_PAUSED:
                self.record.on(Event.RUNNING)
            self.record.update(lambda migration: _merge(migration, incoming))

    def _pause(self, error: PostcopyPausedError) -> None:
        with self.record.lock:
            if self.record.can(Event.LINK_LOST):
                self.record.on(Event.LINK_LOST, error)

    # ---- ends ----

    def _undo(self) -> None:
        """Cancelled: the guest never stopped, and the destination lets go of what it has."""
        if self._precopy is not None:
            self._precopy.end(guest_stays=True)
        self._keep_guest(MigrationAbortedError("cancelled by the operator"))

    def _keep_guest(self, error: MigrateError) -> None:
        """The guest runs here. Once that is seen, it can be moved again at once, to the same destination, too."""
        with contextlib.suppress(MigrateError):
            # If it cannot be reached, it will find us silent, and undo the same by itself.
            self._peer.abort(self.record.migration_id, error.message)
        self._on_guest_stays()
        with self.record.lock:
            if self.record.state is State.CANCELLING:
                self.record.on(Event.UNDONE)
            else:
                self.record.on(Event.REFUSED, error)

    def _stop_precopy(self, *, guest_stays: bool) -> None:
        self._exports.withdraw(self.record.migration_id)
        if self._precopy is not None:
            self._precopy.end(guest_stays=guest_stays)

    def _fail(self, error: MigrateError) -> None:
        """Nothing moved, or the destination gave it back: the guest runs on here."""
        with self.record.lock:
            if self.record.is_final:
                return
            is_cancelled = self.record.state is State.CANCELLING
            if not is_cancelled and not self.record.can(Event.REFUSED):
                self.record.note_error(error)
                return
            in_switchover = self.record.state is State.SWITCHOVER
        if is_cancelled:
            self._undo()
            return
        self._stop_precopy(guest_stays=True)
        if in_switchover:
            try:
                self._guest.resume()
            except MigrateError as resume_error:
                self.record.on(Event.GUEST_LOST, GuestLostError(f"{error.message}; then {resume_error.message}"))
                return
        self._keep_guest(error)

    def _release(self) -> None:
        self._stop_precopy(guest_stays=False)
        if self._source is not None:
            self._source.close()
        for memfd in self._memfds:
            os.close(memfd)
        self._peer.close()


def _is_final(state: State) -> bool:
    return state in (State.COMPLETED, State.FAILED, State.CANCELLED)


def _describe(migration: types.Migration, description: types.GuestDescription) -> None:
    migration.guest_kind = description.spec.kind
    migration.memory_bytes = description.spec.memory_bytes
    migration.vcpus = description.spec.vcpus
    migration.pages.total = bytes_to_pages(description.spec.memory_bytes)


def _note_transport(
    migration: types.Migration, transport: "types.PageTransport.ValueType", compression: Compression
) -> None:
    migration.transport = transport
    migration.compression = types.PageCompression.ValueType(compression)


def _note_touches(migration: types.Migration, touches: int) -> None:
    migration.guest_touches = migration.guest_touches_at_switchover = touches


def _note_downtime(migration: types.Migration, downtime_us: int) -> None:
    migration.downtime_us = downtime_us


def _merge_pages(migration: types.Migration, destination: types.Migration, generation: int) -> None:
    """Copy the figures of a precopy that only the destination can know."""
    migration.bytes_on_wire = destination.bytes_on_wire
    migration.pages.CopyFrom(destination.pages)
    migration.generation = generation


def _merge(migration: types.Migration, destination: types.Migration) -> None:
    """Copy the figures that only the destination can know."""
    migration.bytes_on_wire = destination.bytes_on_wire
    migration.pages.CopyFrom(destination.pages)
    migration.fault_latency_us.CopyFrom(destination.fault_latency_us)
    migration.guest_stall_us.CopyFrom(destination.guest_stall_us)
    migration.guest_touches = destination.guest_touches
    migration.guest_errors = destination.guest_errors
    migration.verified_pages = destination.verified_pages
