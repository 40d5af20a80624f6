"""The migrations of this daemon, both ways, and the threads that drive them."""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable

from migrate.config import PROTOCOL_VERSION, Endpoint
from migrate.daemon.entries import destination_entry, reachable, source_entry
from migrate.daemon.guests import GuestRegistry, HostedGuest
from migrate.daemon.limits import ENDED_MAX, ENDED_WHOLE_MAX, FENCE_KEPT_S, INCOMING_MAX, REASON_CHARS_MAX
from migrate.daemon.past import (
    complete_past,
    end_of,
    fence_of,
    guests_that_never_ran,
    is_at_source,
    resume_past,
)
from migrate.daemon.peer import GrpcPeer
from migrate.errors import (
    AlreadyExistsError,
    ConfigError,
    GuestBusyError,
    GuestHolder,
    LimitError,
    MigrateError,
    NotFoundError,
    StateDirError,
    UnsupportedHostError,
)
from migrate.native.exports import Exports
from migrate.pager.fetcher import make_fetcher
from migrate.pager.orders import Orders
from migrate.pager.policy import Policy
from migrate.session.arrival import Twin
from migrate.session.destination import DestinationSession
from migrate.session.page_flow import FetcherOf
from migrate.session.ports import Journal, PeerOf
from migrate.session.record import MigrationRecord, nothing_to_recover
from migrate.session.rules import (
    MEMORY_MAX_BYTES,
    HostFacts,
    check_compression,
    check_id,
    check_peer_timeout,
    check_prepare,
    check_recorded_pages,
    check_terms,
    choose_mode,
    choose_transport,
)
from migrate.session.source import SourceSession
from migrate.session.states import State
from migrate.telemetry.clock import Clock
from migrate.telemetry.host import available_bytes
from migrate.telemetry.steps import note_past
from migrate.units import bytes_to_pages
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_JOIN_S = 10.0
_AWAIT_US_MAX = 1_000_000
_EVERY_ATTEMPT = 0xFFFFFFFF
_NOT_RUN_STATES = (State.SETUP, State.PRECOPY, State.SWITCHOVER)

_log = logging.getLogger(__name__)


class MigrationRegistry:
    """All migrations of a daemon, those that one before it began or ended included. Thread-safe.

    Args:
        guests: The guests of this host.
        exports: Where source sessions publish pages.
        clock: Times every migration.
        journal: Where they are written down.
        peer_of: Connects to another daemon.
        fetcher_of: Makes what fetches pages from there.
        orders: In which they may be fetched; None for what is installed.
    """

    def __init__(
        self,
        guests: GuestRegistry,
        exports: Exports,
        clock: Clock,
        journal: Journal,
        *,
        peer_of: PeerOf = GrpcPeer,
        fetcher_of: FetcherOf = make_fetcher,
        orders: Orders | None = None,
    ) -> None:
        self._guests = guests
        self._exports = exports
        self._clock = clock
        self._journal = journal
        self._peer_of = peer_of
        self._fetcher_of = fetcher_of
        self._orders = Orders() if orders is None else orders
        self._sources: dict[str, SourceSession] = {}
        self._destinations: dict[str, DestinationSession] = {}
        self._past: dict[str, saved.SavedMigration] = {}  # ended before this daemon was started
        self._records: dict[str, MigrationRecord] = {}
        # Those that never ran at their destination and never will, and when that was known; the oldest first.
        self._ended_s: dict[str, float] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._replacing = threading.Lock()
        self.page_endpoints: dict[int, Endpoint] = {}
        self.control_endpoint = Endpoint("", 0)

    def restore(self, entries: Iterable[saved.SavedMigration]) -> None:
        """Take up what a daemon before this one wrote down; its guests have been adopted, nobody calls yet.

        Raises:
            StateDirError: one of them makes no sense.
        """
        never_ran = set()
        for twin in guests_that_never_ran(self._guests):
            # Whatever its daemon was about to do with it, the source begins anew.
            never_ran.add(twin.client.instance)
            self._guests.remove(twin)
        for entry in entries:
            if entry.destination.instance in never_ran:
                entry.destination.may_run = False
            try:
                self._restore_one(entry)
            except (MigrateError, ValueError, KeyError) as error:
                # Without it, a guest might run twice, or never again.
                raise StateDirError(
                    f"what is written down of migration {entry.migration_id!r} makes no sense: {error}",
                    remedy="no daemon wrote it like this",
                ) from error

    def _restore_one(self, entry: saved.SavedMigration) -> None:
        guest = self._guests.find_instance(entry.source.instance or entry.destination.instance)
        if entry.HasField("final"):
            if entry.final.migration_id != entry.migration_id:
                raise StateDirError(f"its end is that of {entry.final.migration_id!r}")
            self._remember(entry, guest)
        elif entry.HasField("source"):
            self._begin_source(entry, guest)
        else:
            self._take_up_destination(entry, guest)

    # ---- as a source ----

    def start(self, request: operator.StartMigrationRequest) -> str:
        """Begin to move a guest away; return the migration's id.

        Raises:
            ConfigError: the terms make no sense.
            NotFoundError: there is no such guest.
            GuestBusyError: it is being moved already.
            StateDirError: the migration cannot be written down.
        """
        check_terms(request.mode or types.MIGRATION_MODE_HYBRID, request.order)
        check_compression(request.compression, request.transport)
        check_peer_timeout(request.peer_timeout_us)
        check_recorded_pages(request.recorded_pages, bytes_to_pages(MEMORY_MAX_BYTES))
        Endpoint.parse(request.to)
        seen = self._guests.find(request.guest).client.look()
        mode = choose_mode(request.mode, has_dirty_log=seen.has_dirty_log, reason=seen.no_dirty_log_reason)
        self._forget_traces()
        migration_id = uuid.uuid4().hex[:12]
        guest = self._guests.claim(request.guest, migration_id)
        entry = source_entry(migration_id, request, guest, mode)
        try:
            self._journal.save(entry)
        except StateDirError:
            self._guests.release(guest)
            raise
        self._begin_source(entry, guest)
        return migration_id

    def complete(self, request: transfer.CompleteRequest) -> None:
        """END of a migration that left here. Repeating it is harmless.

        Raises:
            NotFoundError: no such migration left here.
            GuestBusyError: it did not come so far.
        """
        past = self._past.get(request.migration_id)
        if past is None or not past.HasField("source"):
            self._outgoing(request.migration_id).complete(request.token, request.migration)
            return
        complete_past(past, request)

    def _forget_traces(self) -> None:
        """Those of ended migrations that nobody reads."""
        with self._lock:
            records = list(self._records.values())
        for record in records:
            if record.trace is not None and record.is_final:
                record.trace.forget_unread()

    def record_trace(self, request: transfer.RecordTraceRequest) -> None:
        """A part of the trace of a migration that leaves here.

        Raises:
            NotFoundError: none does.
            PermissionDeniedError: not its token.
            ConfigError: it is not traced.
        """
        self._outgoing(request.migration_id).record_trace(request.token, request.part)

    # ---- as a destination ----

    def prepare(self, request: transfer.PrepareRequest, peer_host: str) -> transfer.PrepareResponse:
        """Build the twin of a guest that wants to come; return the terms on which its pages will be fetched.

        Args:
            request: What the source says of it.
            peer_host: Where the call came from.

        Raises:
            MigrateError: why it cannot come; nothing was changed.
        """
        check_prepare(request, HostFacts(available_bytes(), self._orders))
        policy = self._policy_of(request.order)
        entry = destination_entry(request, peer_host)
        attempt = entry.destination.attempt
        with self._replacing:
            self._check_incoming_room()
            before = self._make_way(request.migration_id, attempt)
            session = DestinationSession(
                entry,
                request.guest.spec,
                lambda description: self._build_twin(description, request.migration_id),
                self.control_endpoint,
                self._peer_of,
                self._clock,
                self._journal,
                self._fetcher_of,
                policy=policy,
            )
            with self._lock:
                self._past.pop(request.migration_id, None)
                self._ended_s.pop(request.migration_id, None)
                self._destinations[request.migration_id] = session
                self._records[request.migration_id] = session.record
        if before is not None:
            before.await_built()
        try:
            session.prepare(request.guest)
        except MigrateError:
            self._note_ended(session)
            raise
        self._spawn("destination", session)
        return transfer.PrepareResponse(
            protocol_version=PROTOCOL_VERSION,
            transport=entry.destination.transport,
            compression=entry.destination.compression,
        )

    def invalidate(self, request: transfer.InvalidateRequest) -> None:
        """Lose pages that are stale.

        Raises:
            MigrateError: they cannot be, now.
        """
        self._incoming(request.migration_id).invalidate(request)

    def switch_over(self, request: transfer.SwitchoverRequest) -> transfer.SwitchoverResponse:
        """Run a prepared guest.

        Raises:
            MigrateError: it never ran here and never will.
        """
        return self._incoming(request.migration_id).switch_over(request)

    def incoming(self, migration_id: str, await_complete_us: int, *, live: bool = False) -> types.Migration:
        """What this destination knows of a migration, at once, or when no page is missing or the time is over.

        With `live`, it has what those who watch want to know.

        Raises:
            NotFoundError: it never came here.
        """
        past = self._past.get(migration_id)
        if past is not None and past.HasField("destination"):
            return past.final
        session = self._incoming(migration_id)
        session.await_complete(min(await_complete_us, _AWAIT_US_MAX))
        found = session.record.snapshot()
        return session.record.live.add_to(found) if live else found

    def abort(self, migration_id: str, reason: str, attempt: int) -> None:
        """Undo a Prepare, and fence the attempt: a Prepare or Switchover that is still on its way is refused.

        Raises:
            GuestBusyError: vCPUs run here, or may soon.
            StateDirError: the fence could not be written down.
            LimitError: there are as many as can be, of attempts that never were here.
        """
        check_id(migration_id)
        reason = reason[:REASON_CHARS_MAX]
        attempt = attempt or _EVERY_ATTEMPT
        with self._replacing:
            session = self._destinations.get(migration_id)
            if session is None:
                self._fence_past(migration_id, attempt)
                return
        if attempt >= session.attempt:
            session.abort(reason)
            session.fence(attempt)

    # ---- for the other daemon, whichever side it is ----

    def resume(self, request: transfer.ResumeMigrationRequest, peer_host: str) -> transfer.ResumeMigrationResponse:
        """The peer was lost, and is here again.

        Raises:
            NotFoundError: no such migration is here.
            MigrateError: why it cannot go on.
        """
        control_endpoint = reachable(request.control_endpoint, peer_host)
        incoming = self._destinations.get(request.migration_id)
        if incoming is not None:
            migration = incoming.resume(request.token, control_endpoint)
            return transfer.ResumeMigrationResponse(migration=migration)
        past = self._past.get(request.migration_id)
        if past is None:
            return self._outgoing(request.migration_id).resume(request.token, control_endpoint)
        return resume_past(past, request)

    def peer_host(self, migration_id: str) -> str:
        """The host of a migration's other side; empty if no such migration is here, or none of another daemon."""
        with self._lock:
            record = self._records.get(migration_id)
        peer = record.peer if record is not None else ""
        return Endpoint.parse(peer).host if peer else ""

    # ---- for operators ----

    def start_switchover(self, migration_id: str) -> None:
        """Switch over as soon as possible.

        Raises:
            NotFoundError: no such migration leaves here.
            GuestBusyError: it has begun already.
        """
        self._outgoing(migration_id).start_switchover()

    def cancel(self, migration_id: str) -> types.Migration:
        """Give up a migration; returns when it is undone.

        Raises:
            NotFoundError: no such migration leaves here.
            GuestBusyError: it has come too far.
        """
        session = self._outgoing(migration_id)
        session.cancel()
        return session.record.snapshot()

    def recover(self, migration_id: str, to: str) -> types.Migration:
        """Have pages flow again at once; returns after the try.

        Args:
            migration_id: Which migration, of either side.
            to: Control address of the other daemon, if it is another one now.

        Raises:
            NotFoundError: no such migration is here.
            GuestBusyError: nothing has been lost that this could bring back.
            GuestLostError: it is lost for good.
            ChannelError: the other daemon does not answer.
        """
        endpoint = Endpoint.parse(to) if to else None
        with self._lock:
            session = self._sources.get(migration_id) or self._destinations.get(migration_id)
        if session is None:
            record = self.record(migration_id)
            raise nothing_to_recover(record)
        session.recover(endpoint)
        return session.record.snapshot()

    def record(self, migration_id: str) -> MigrationRecord:
        """One migration.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._lock:
            record = self._records.get(migration_id)
        if record is None:
            raise _unknown(migration_id)
        return record

    def list(self) -> list[types.Migration]:
        """All migrations, in order of their start."""
        with self._lock:
            records = list(self._records.values())
        return [record.snapshot() for record in records]

    def close(self) -> None:
        """Stop all sessions and wait for their threads."""
        with self._lock:
            sessions: list[SourceSession | DestinationSession] = [*self._sources.values()]
            sessions += self._destinations.values()
            threads = list(self._threads)
        for session in sessions:
            session.stop()
        for thread in threads:
            thread.join(_JOIN_S)

    # ---- sources ----

    def _begin_source(self, entry: saved.SavedMigration, guest: HostedGuest | None) -> None:
        migration_id = entry.migration_id
        request = entry.source.request
        if guest is not None:
            guest.migration_id = migration_id

        def with_guest(action: Callable[[HostedGuest], None]) -> Callable[[], None]:
            return lambda: action(guest) if guest is not None else None

        session = SourceSession(
            entry,
            entry.source.kind,
            guest.client if guest is not None else None,
            self._peer_of,
            self._exports,
            page_endpoint=self.page_endpoints[choose_transport(request.transport)],
            control_endpoint=self.control_endpoint,
            clock=self._clock,
            journal=self._journal,
            on_guest_left=with_guest(self._guests.remove),
            on_guest_stays=with_guest(self._guests.release),
            on_guest_spent=with_guest(self._guests.spend),
        )
        with self._lock:
            self._sources[migration_id] = session
            self._records[migration_id] = session.record
        self._spawn("source", session)

    def _outgoing(self, migration_id: str) -> SourceSession:
        with self._lock:
            session = self._sources.get(migration_id)
        if session is None:
            raise _unknown(migration_id)
        return session

    # ---- destinations ----

    def _make_way(self, migration_id: str, attempt: int) -> DestinationSession | None:
        """See that no attempt of a migration lives but the one that is about to; the one before, if there was one."""
        if migration_id in self._sources:
            raise ConfigError(
                "source and destination are the same daemon", holder=GuestHolder.SOURCE, remedy="choose another --to"
            )
        before = self._destinations.get(migration_id)
        entry = self._past.get(migration_id) if before is None else before.entry
        if entry is None:
            return None
        if entry.HasField("source") or attempt <= max(entry.destination.attempt, entry.destination.fenced_attempt):
            raise AlreadyExistsError(f"attempt {attempt} of migration {migration_id!r} has been here before")
        if before is not None:
            before.abort("a later attempt takes its place")
        elif not is_at_source(entry):
            raise GuestBusyError(
                f"migration {migration_id!r} has been here before, and its guest ran",
                holder=GuestHolder(entry.final.holder),
            )
        return before

    def _fence_past(self, migration_id: str, attempt: int) -> None:
        entry = self._past.get(migration_id)
        if entry is not None and not is_at_source(entry):
            raise GuestBusyError("vCPUs have run at the destination", holder=GuestHolder(entry.final.holder))
        if entry is None:
            self._check_fence_room()
        fenced = fence_of(migration_id, entry, attempt)
        self._journal.save(fenced)
        with self._lock:
            self._past[migration_id] = fenced
            if entry is None:
                self._add_ended(migration_id)

    def _incoming(self, migration_id: str) -> DestinationSession:
        with self._lock:
            session = self._destinations.get(migration_id)
        if session is not None:
            return session
        past = self._past.get(migration_id)
        if past is not None and past.HasField("destination"):
            holder = GuestHolder(past.final.holder)
            raise GuestBusyError(f"migration {migration_id!r} has ended at the destination", holder=holder)
        raise _unknown(migration_id)

    def _policy_of(self, order: str) -> type[Policy] | None:
        try:
            return self._orders.find(order)
        except UnsupportedHostError as error:
            error.holder = GuestHolder.SOURCE
            raise

    def _policy_again(self, entry: saved.SavedMigration) -> type[Policy] | None:
        """The policy of a guest that runs here already: it does without one that this daemon does not have."""
        try:
            return self._orders.find(entry.destination.order)
        except UnsupportedHostError as error:
            _log.warning("%s; pages of migration %s come in ascending order", error, entry.migration_id)
            return None

    def _build_twin(self, description: types.GuestDescription, migration_id: str) -> Twin:
        return self._twin_of(self._guests.create_incoming(description, migration_id))

    def _twin_of(self, guest: HostedGuest) -> Twin:
        return Twin(
            guest.client,
            destroy=lambda: self._guests.remove(guest),
            ending=lambda: self._guests.note_ending(guest),
            arrived=lambda: self._guests.release(guest),
            spend=lambda: self._guests.spend(guest),
        )

    def _take_up_destination(self, entry: saved.SavedMigration, guest: HostedGuest | None) -> None:
        """What a daemon before us received: it goes on if its guest runs here, and has ended if not."""
        if guest is None:
            end = types.MIGRATION_STATE_FAILED if entry.destination.may_run else types.MIGRATION_STATE_CANCELLED
            holder = GuestHolder.NONE if entry.destination.may_run else GuestHolder.SOURCE
            entry.final.CopyFrom(end_of(entry, end, holder))
            try:
                self._journal.save(entry)
            except StateDirError as error:
                _log.warning("%s; the next daemon will come to the same end", error)
            note_past(entry.final)
            self._remember(entry, None)
            return
        guest.migration_id = entry.migration_id
        session = DestinationSession(
            entry,
            guest.spec,
            lambda description: self._build_twin(description, entry.migration_id),
            self.control_endpoint,
            self._peer_of,
            self._clock,
            self._journal,
            self._fetcher_of,
            twin=self._twin_of(guest),
            policy=self._policy_again(entry),
        )
        with self._lock:
            self._destinations[entry.migration_id] = session
            self._records[entry.migration_id] = session.record
        self._spawn("destination", session)

    # ---- both ----

    def _remember(self, entry: saved.SavedMigration, guest: HostedGuest | None) -> None:
        """A migration that has ended; what its daemon did not come to do with its guest is done now."""
        self._past[entry.migration_id] = entry
        if entry.final.state:
            self._records[entry.migration_id] = MigrationRecord.of_ended(entry.final, self._clock)
        if is_at_source(entry):
            with self._lock:
                self._add_ended(entry.migration_id)
        if guest is None:
            return
        if entry.HasField("source") and entry.final.state == types.MIGRATION_STATE_COMPLETED:
            self._guests.remove(guest)
        elif entry.final.state == types.MIGRATION_STATE_FAILED and not is_at_source(entry):
            self._guests.spend(guest)

    def _spawn(self, side: str, session: SourceSession | DestinationSession) -> None:
        name = f"{side}-{session.record.migration_id}"

        def logged() -> None:
            try:
                session.run()
            except Exception:  # noqa: BLE001 - the last line of defence of a thread
                _log.exception("%s died of a bug; the state above it is the last that is known", name)
            self._note_ended(session)

        thread = threading.Thread(target=logged, name=name, daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()

    # ---- limits ----

    def _check_incoming_room(self) -> None:
        with self._lock:
            states = [session.record.state for session in self._destinations.values()]
        if sum(state in _NOT_RUN_STATES for state in states) >= INCOMING_MAX:
            raise LimitError(
                f"this daemon prepares for {INCOMING_MAX} guests that have not arrived, which is its limit",
                holder=GuestHolder.SOURCE,
                remedy="wait until some have",
            )

    def _check_fence_room(self) -> None:
        with self._lock:
            oldest_s = next(iter(self._ended_s.values()), 0.0)
            is_full = len(self._ended_s) >= ENDED_MAX
        if is_full and time.monotonic() - oldest_s < FENCE_KEPT_S:
            raise LimitError(
                f"this daemon has heard of {ENDED_MAX} migrations that never ran here, in {FENCE_KEPT_S:g} s,"
                " which is its limit",
                remedy="try again later",
            )

    def _note_ended(self, session: SourceSession | DestinationSession) -> None:
        """A session has nothing to do any more."""
        record, migration_id = session.record, session.record.migration_id
        with self._lock:
            is_past = record.is_final and record.holder is GuestHolder.SOURCE
            if is_past and self._records.get(migration_id) is record:
                self._add_ended(migration_id)
                self._shrink_older()

    def _add_ended(self, migration_id: str) -> None:
        """Forget the oldest, if there are too many; under the lock."""
        self._ended_s.pop(migration_id, None)
        self._ended_s[migration_id] = time.monotonic()
        if len(self._ended_s) > ENDED_MAX:
            forgotten = next(iter(self._ended_s))
            del self._ended_s[forgotten]
            for known in (self._past, self._records, self._sources, self._destinations):
                known.pop(forgotten, None)
            self._journal.forget(forgotten)

    def _shrink_older(self) -> None:
        """Of the older ended sessions, only what is written down of them stays; under the lock."""
        whole = [
            session
            for ended in self._ended_s
            if (session := self._sources.get(ended) or self._destinations.get(ended)) is not None
        ]
        for session in whole[:-ENDED_WHOLE_MAX]:
            self._shrink(session)

    def _shrink(self, session: SourceSession | DestinationSession) -> None:
        entry = session.entry
        if not is_at_source(entry):
            return  # its end could not be written down
        # A message never gives back what it held while it was changed; a copy holds what is in it now.
        entry = saved.SavedMigration.FromString(entry.SerializeToString())
        self._past[entry.migration_id] = entry
        self._records[entry.migration_id] = MigrationRecord.of_ended(entry.final, self._clock)
        self._sources.pop(entry.migration_id, None)
        self._destinations.pop(entry.migration_id, None)


def _unknown(migration_id: str) -> NotFoundError:
    return NotFoundError(f"no migration {migration_id[:80]!r} is known here", remedy="see `migrate list`")
