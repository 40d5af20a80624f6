"""The source's side of one migration: attempts until the guest runs there, then pages until END.

Before the switchover the guest runs on here whatever is lost, so a lost daemon or link costs an attempt, and the next
one begins anew. After it, the only copies of missing pages are here: they are served until the destination has said
END, which is written down before it is acknowledged.
"""

import contextlib
import random
import threading
from collections.abc import Callable

from migrate.barriers import Point, reach
from migrate.config import CONNECT_DEADLINE_S, PEER_TIMEOUT_DEFAULT_US, Endpoint
from migrate.errors import (
    AttemptLostError,
    ChannelError,
    ConfigError,
    GuestBusyError,
    GuestGoneError,
    GuestHolder,
    GuestLostError,
    MigrateError,
    MigrationAbortedError,
    PeerUnreachableError,
    StateDirError,
)
from migrate.native.exports import Exports
from migrate.session import figures
from migrate.session.attempt import Attempt, CancelledError, Outgoing, StoppedError
from migrate.session.backoff import RETRY_MAX_S, Backoff
from migrate.session.convergence import DOWNTIME_LIMIT_DEFAULT_US, Terms
from migrate.session.ledger import Ledger
from migrate.session.ports import GuestPort, Journal, PeerOf
from migrate.session.record import MigrationRecord, nothing_to_recover
from migrate.session.rules import check_terms, check_token, choose_transport
from migrate.session.serving import LOST_WORDS, DestinationLink, Serving
from migrate.session.states import FINAL_STATES, Event, Machine, Side, State
from migrate.session.tracing import TraceInbox
from migrate.session.two_generals import learn_whether_it_runs
from migrate.telemetry.clock import Clock
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_POLL_S = 0.2
_CANCEL_DEADLINE_S = 60.0
# So often, and for so many times the peer's timeout, a destination that was reached once is tried again.
_ATTEMPTS_MAX = 16
_LOST_TIMEOUTS_MAX = 12
# Each costs the destination a guest process.
_ATTEMPT_FIRST_S = 0.2
_ATTEMPT_MAX_S = 3.2
_AFTER_SWITCHOVER = (State.SWITCHOVER, State.POSTCOPY, State.POSTCOPY_PAUSED, State.POSTCOPY_RECOVER)


class SourceSession:
    """Moves one guest away from this host. `run` is its thread; the rest is called by others.

    Args:
        entry: The migration as it is written down: a new one, or one that a daemon before this one began.
        kind: The guest's kind.
        guest: The guest process, locked for this session; None if it has died since the entry was written.
        peer_of: Connects to the destination.
        exports: Where the guest's pages are published.
        page_endpoint: Our PageService for the transport that is asked for, as the destination should see it.
        control_endpoint: Our TransferService, likewise.
        clock: Times it all.
        journal: Where the entry is written.
        on_guest_left: Called once END is acknowledged; frees the guest and its RAM.
        on_guest_stays: Called before the migration is seen to have failed or to be cancelled; unlocks the guest.
        on_guest_spent: Called when the guest's other half is lost: what is here must never run again.
    """

    def __init__(
        self,
        entry: saved.SavedMigration,
        kind: "types.GuestKind.ValueType",
        guest: GuestPort | None,
        peer_of: PeerOf,
        exports: Exports,
        *,
        page_endpoint: Endpoint,
        control_endpoint: Endpoint,
        clock: Clock,
        journal: Journal,
        on_guest_left: Callable[[], None],
        on_guest_stays: Callable[[], None],
        on_guest_spent: Callable[[], None],
    ) -> None:
        source = entry.source
        request = source.request
        request.peer_timeout_us = request.peer_timeout_us or PEER_TIMEOUT_DEFAULT_US
        mode = request.mode or types.MIGRATION_MODE_POSTCOPY  # chosen when it was started
        check_terms(mode, request.order)
        self.entry = entry
        self._saved = source
        self._is_taken_up = source.attempt > 0
        self._clock = clock
        self._timeout_us = request.peer_timeout_us
        self._guest = guest
        self._on_guest_left = on_guest_left
        self._on_guest_stays = on_guest_stays
        self._on_guest_spent = on_guest_spent
        self._stopping = threading.Event()
        self._forced = threading.Event()
        self._attempt: Attempt | None = None
        self._between_attempts = Backoff(_ATTEMPT_FIRST_S, _ATTEMPT_MAX_S, random.Random())  # noqa: S311 - jitter
        self._lost_us: int | None = None
        self._is_reached = self._is_taken_up
        self._serving: Serving | None = None
        self.record = MigrationRecord(
            Machine(Side.SOURCE, State.SWITCHOVER if self._is_taken_up else State.SETUP),
            types.Migration(
                migration_id=entry.migration_id,
                guest=request.guest,
                guest_kind=kind,
                mode=mode,
                order=request.order,
                transport=source.transport or choose_transport(request.transport),
                compression=source.compression or types.PAGE_COMPRESSION_NONE,
                peer=source.to,
                attempt=source.attempt,
            ),
            clock,
        )
        if request.trace:
            self.record.trace = TraceInbox(clock)
        self._ledger = Ledger(self.record, entry, journal)
        terms = Terms(
            mode,
            request.downtime_limit_us or DOWNTIME_LIMIT_DEFAULT_US,
            request.on_no_convergence or types.NO_CONVERGENCE_POSTCOPY,
        )
        self._link = DestinationLink(
            self._ledger,
            control_endpoint,
            page_endpoint,
            peer_of,
            clock,
            must_announce=self._is_taken_up,
            on_moved=self._publish_again,
        )
        self._out: Outgoing | None = None
        if guest is not None:
            self._out = Outgoing(self._ledger, terms, guest, self._link, exports, clock, self._pause_between)
        self._exports = exports

    def run(self) -> None:
        """Drive the migration to a final state, or until `stop`."""
        try:
            is_over_there = self._is_taken_up and self._take_up()
            while not is_over_there:
                is_over_there = self._try()
            self._serve_until_end()
        except StoppedError:
            return
        except CancelledError:
            self._undo()
        except MigrateError as error:
            self._fail(error)
        finally:
            self._release()

    # ---- called by others ----

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
            StateDirError: that could not be written down; the migration goes on.
        """
        with self.record.lock:
            if self.record.state not in (State.CANCELLING, State.CANCELLED):
                if not self.record.can(Event.CANCEL):
                    raise GuestBusyError(
                        f"a migration in state {self.record.state.name} cannot be cancelled",
                        holder=self.record.holder,
                        remedy="wait for its end; from postcopy on, a guest can only go on to its destination",
                    )
                self._saved.is_cancelled = True
                try:
                    self._ledger.save()
                except StateDirError:
                    self._saved.is_cancelled = False
                    raise
                self.record.on(Event.CANCEL)
        if not self.record.wait_state(_is_final, _CANCEL_DEADLINE_S):
            raise GuestBusyError("the destination has not answered yet; the guest runs on at the source")

    def recover(self, to: Endpoint | None) -> None:
        """Have pages flow again at once, perhaps from a destination that listens elsewhere now.

        Raises:
            GuestBusyError: nothing has been lost that this could bring back.
            GuestLostError: it is lost for good.
            ChannelError: the destination cannot be reached.
        """
        if self.record.state not in _AFTER_SWITCHOVER:
            raise nothing_to_recover(self.record)
        if to is not None:
            self._link.turn_to(to)
        self._link.announce_again()
        if self._serving is None:
            return  # the session's thread is asking who runs the guest, and will at the new address
        self._serving.look()
        # That thread follows what comes of it.
        self.record.wait_state(lambda state: state is not State.POSTCOPY_PAUSED, self._timeout_us / 1_000_000)

    def stop(self) -> None:
        """Have `run` return soon, wherever it is. Who holds the guest does not change."""
        self._stopping.set()

    def resume(self, token: str, control_endpoint: Endpoint) -> transfer.ResumeMigrationResponse:
        """The destination, where the guest runs, asks for pages again, perhaps from another address.

        Raises:
            PermissionDeniedError: not this migration's token.
            GuestLostError: its pages are not here any more.
            GuestBusyError: the guest has not been handed over.
        """
        check_token(token, self._saved.token)
        with self.record.lock:
            if self.record.state is State.FAILED and self.record.holder is not GuestHolder.SOURCE:
                raise GuestLostError(LOST_WORDS)
            if self.record.state not in (*_AFTER_SWITCHOVER, State.COMPLETED):
                raise GuestBusyError(
                    f"no pages are served in state {self.record.state.name}", holder=self.record.holder
                )
            if self._guest is None:
                raise GuestLostError(LOST_WORDS)
            if self._attempt is None and self.record.state is not State.COMPLETED:
                raise ChannelError("the source daemon has just been started, and does not serve pages yet")
            self._note_running()
        self._link.offer(control_endpoint)
        return transfer.ResumeMigrationResponse(
            page_endpoint=str(self._link.page_endpoint), migration=self.record.snapshot()
        )

    def record_trace(self, token: str, part: types.TracePart) -> None:
        """The destination hands over a part of the trace.

        Raises:
            PermissionDeniedError: not this migration's token.
            ConfigError: it is not traced.
        """
        check_token(token, self._saved.token)
        if self.record.trace is None:
            raise ConfigError("the migration is not traced")
        self.record.trace.add(part)

    def complete(self, token: str, destination: types.Migration) -> None:
        """END arrived from the destination. Repeating it is harmless.

        Raises:
            PermissionDeniedError: not this migration's token.
            GuestBusyError: the migration is not at a point where END makes sense.
            StateDirError: it could not be written down; say it again later.
        """
        check_token(token, self._saved.token)
        reach(Point.SOURCE_ENDING, self.record.migration_id)
        with self.record.lock:
            if self.record.state is State.COMPLETED:
                return
            # The guest may have run and finished there before our call returned: END says both.
            self._note_running()
            if not self.record.can(Event.END):
                raise GuestBusyError(f"END makes no sense in state {self.record.state.name}", holder=self.record.holder)
            self.record.update(lambda migration: figures.merge(migration, destination))
            self._ledger.end(Event.END)
        reach(Point.SOURCE_ENDED, self.record.migration_id)

    # ---- before the guest runs there ----

    def _take_up(self) -> bool:
        """A daemon before us began this: find out how far it came. True: the guest runs at the destination."""
        is_paused = self._look_at_guest()
        if self._out is None or self._guest is None:
            lost = GuestLostError("the guest process died at the source")
            try:
                self._ask(lost)
            except MigrationAbortedError as error:
                raise lost from error
            return True
        if self._saved.is_cancelled or not is_paused:
            # Its vCPUs were never stopped, or run again: no switchover of its was ever sent, or it was fenced.
            self.record.on(Event.RETRY)
            if self._saved.is_cancelled:
                self.record.on(Event.CANCEL)
                raise CancelledError("cancelled")
            return False
        attempt = self._serve_again(self._out)
        try:
            self._ask(ChannelError("the source daemon was started again"))
        except AttemptLostError as error:
            self._retreat(attempt, error)
            return False
        return True

    def _look_at_guest(self) -> bool:
        """Whether its vCPUs were told to stop. One that does not answer has died with the daemon before us."""
        if self._guest is None:
            return False
        try:
            # What we do not know of its rounds, we do not use: a next attempt begins a log of its own.
            self._guest.stop_dirty_log()
            state = self._guest.look().state
        except GuestGoneError:
            self._guest = self._out = None
            return False
        return state == types.GUEST_STATE_PAUSED

    def _serve_again(self, out: Outgoing) -> Attempt:
        """Serve the pages of vCPUs that stand still: somebody may need them, whatever else is known."""
        while True:
            attempt = Attempt(out, self._saved.attempt)
            try:
                attempt.serve_again()
            except MigrateError as error:
                attempt.close()
                self.record.note_error(error)
                self._pause_between(RETRY_MAX_S)
            else:
                self._attempt = attempt
                return attempt

    def _ask(self, lost: MigrateError) -> None:
        learn_whether_it_runs(self.record, lambda: self._link.peer, self._saved.attempt, lost, self._pause_between)
        self._note_running()

    def _try(self) -> bool:
        """One attempt. True: the guest runs at the destination. False: it is lost, and another may be made."""
        if self._out is None:
            raise GuestLostError("the guest process died at the source")
        self._saved.attempt += 1
        self._ledger.save()
        self.record.update(self._note_attempt)
        attempt = self._attempt = Attempt(self._out, self._saved.attempt)
        try:
            attempt.prepare()
            self._is_reached, self._lost_us = True, None
            attempt.switch_over(attempt.copy_before(self._follow_precopy, self._forced.is_set))
        except AttemptLostError as error:
            self._retreat(attempt, error)
            return False
        self._note_running()
        reach(Point.SOURCE_RUNNING, self.record.migration_id)
        return True

    def _retreat(self, attempt: Attempt, error: AttemptLostError) -> None:
        """The guest runs on here; wait a little, unless there were tries enough."""
        attempt.retreat(guest_stays=True)
        if self.record.state is State.SWITCHOVER:
            self._resume_guest(error)
        attempt.close()
        now_us = self._clock.now_us()
        self._lost_us = self._lost_us or now_us
        # One that never was reached is perhaps being started; more likely, the address is wrong.
        self._is_reached |= not isinstance(error.__cause__, PeerUnreachableError)
        patience_us = _LOST_TIMEOUTS_MAX * self._timeout_us if self._is_reached else CONNECT_DEADLINE_S * 1_000_000
        if self._saved.attempt >= _ATTEMPTS_MAX or now_us - self._lost_us > patience_us:
            if isinstance(error.__cause__, PeerUnreachableError):
                raise error.__cause__
            raise MigrationAbortedError(f"{error.message}; given up after {self._saved.attempt} attempts")
        with self.record.lock:
            if self.record.state is State.CANCELLING:
                raise CancelledError("cancelled")
            self.record.on(Event.RETRY, error)
        self._pause_between(self._between_attempts.next_s())

    def _resume_guest(self, error: MigrateError) -> None:
        if self._guest is None:
            return
        try:
            self._guest.resume()
        except MigrateError as resume_error:
            raise GuestLostError(f"{error.message}; then {resume_error.message}") from resume_error

    def _follow_precopy(self, incoming: types.Migration | None) -> None:
        """Take over figures, if there are any; raise what ends the precopy from here."""
        if incoming is None:
            self._stopping.wait(_POLL_S)
        self._check_wanted()
        precopy = self._attempt.precopy if self._attempt is not None else None
        if incoming is not None and precopy is not None:
            self._link.note_heard()
            generation = precopy.generation
            self.record.update(lambda migration: figures.merge_pages(migration, incoming, generation))

    def _check_wanted(self) -> None:
        if self._stopping.is_set():
            raise MigrationAbortedError("the source daemon is shutting down")
        with self.record.lock:
            if self.record.state is State.CANCELLING:
                raise CancelledError("cancelled")

    def _pause_between(self, pause_s: float) -> None:
        """Wait between tries, for as long as they are wanted."""
        self.record.wait_state(lambda state: state is State.CANCELLING or _is_final(state), pause_s)
        if self._stopping.is_set() and self.record.state is State.SWITCHOVER:
            raise StoppedError
        self._check_wanted()

    # ---- once it does ----

    def _note_running(self) -> None:
        """An answer, END, or a request for pages came, whichever is first: the vCPUs run there."""
        with self.record.lock:
            if self.record.state is State.SWITCHOVER:
                paused_us = self._attempt.paused_us if self._attempt is not None else None
                if self._attempt is not None and paused_us is not None:
                    downtime_us, parts = self._clock.now_us() - paused_us, self._attempt.downtime
                    self.record.update(lambda migration: figures.note_downtime(migration, downtime_us, parts))
                self.record.on(Event.RUNNING)

    def _publish_again(self) -> None:
        if self._attempt is not None:
            self._attempt.publish_again()

    def _serve_until_end(self) -> None:
        serving = self._serving = Serving(self._ledger, self._link, self._stopping)
        serving.run()
        if self.record.state is State.COMPLETED:
            self._exports.withdraw(self.record.migration_id)
            self._on_guest_left()
            reach(Point.SOURCE_LEFT, self.record.migration_id)
        elif self.record.state is State.FAILED:
            self._on_guest_spent()

    # ---- ends ----

    def _undo(self) -> None:
        """Cancelled: the guest never stopped, and the destination lets go of what it has."""
        if self._attempt is not None:
            self._attempt.retreat(guest_stays=True)
        self._keep_guest(MigrationAbortedError("cancelled by the operator"))

    def _keep_guest(self, error: MigrateError) -> None:
        """The guest runs here. Once that is seen, it can be moved again at once, to the same destination, too."""
        with contextlib.suppress(MigrateError):
            # If it cannot be reached, it will find us silent, and undo the same by itself.
            self._link.peer.abort(self.record.migration_id, error.message, self._saved.attempt)
        self._on_guest_stays()
        with self.record.lock:
            if self.record.state is State.CANCELLING:
                self._ledger.end_anyhow(Event.UNDONE)
            else:
                self._ledger.end_anyhow(Event.REFUSED, error)

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
        if self._attempt is not None:
            self._attempt.retreat(guest_stays=True)
        try:
            if isinstance(error, GuestLostError):
                raise error
            if in_switchover:
                self._resume_guest(error)
        except GuestLostError as lost:
            with contextlib.suppress(MigrateError):
                self._link.peer.abort(self.record.migration_id, lost.message, self._saved.attempt)
            self._on_guest_spent()
            self._ledger.end_anyhow(Event.GUEST_LOST, lost)
            return
        self._keep_guest(error)

    def _release(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
        self._link.close()

    def _note_attempt(self, migration: types.Migration) -> None:
        migration.attempt = self._saved.attempt


def _is_final(state: State) -> bool:
    return state in FINAL_STATES
