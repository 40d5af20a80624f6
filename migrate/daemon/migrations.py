"""The migrations of this daemon, both ways, and the threads that drive them."""

import logging
import threading
import uuid
from collections.abc import Callable

from migrate.config import PROTOCOL_VERSION, Endpoint
from migrate.daemon.guests import GuestRegistry
from migrate.daemon.peer import GrpcPeer
from migrate.errors import AlreadyExistsError, ConfigError, GuestHolder, NotFoundError
from migrate.native.exports import Exports
from migrate.pager.fetcher import make_fetcher
from migrate.session.destination import DestinationSession, FetcherOf, Twin
from migrate.session.ports import PeerPort
from migrate.session.record import MigrationRecord
from migrate.session.rules import (
    HostFacts,
    check_compression,
    check_prepare,
    check_terms,
    choose_mode,
    choose_transport,
)
from migrate.session.source import SourceSession
from migrate.telemetry.clock import Clock
from migrate.telemetry.host import available_bytes
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_JOIN_S = 10.0
_AWAIT_US_MAX = 1_000_000

_log = logging.getLogger(__name__)


class MigrationRegistry:
    """All sessions of a daemon since it started. Thread-safe.

    Args:
        guests: The guests of this host.
        exports: Where source sessions publish pages.
        clock: Times every migration.
        peer_of: Connects to another daemon, by its endpoint and role.
        fetcher_of: Makes what fetches pages from there.
    """

    def __init__(
        self,
        guests: GuestRegistry,
        exports: Exports,
        clock: Clock,
        *,
        peer_of: Callable[[Endpoint, str], PeerPort] = GrpcPeer,
        fetcher_of: FetcherOf = make_fetcher,
    ) -> None:
        self._guests = guests
        self._exports = exports
        self._clock = clock
        self._peer_of = peer_of
        self._fetcher_of = fetcher_of
        self._sources: dict[str, SourceSession] = {}
        self._destinations: dict[str, DestinationSession] = {}
        self._records: dict[str, MigrationRecord] = {}
        self._fenced: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self.page_endpoints: dict[int, Endpoint] = {}
        self.control_endpoint = Endpoint("", 0)

    # ---- as a source ----

    def start(self, request: operator.StartMigrationRequest) -> str:
        """Begin to move a guest away; return the migration's id.

        Raises:
            ConfigError: the terms make no sense.
            NotFoundError: there is no such guest.
            GuestBusyError: it is being moved already.
        """
        check_terms(request.mode or types.MIGRATION_MODE_HYBRID, request.order)
        check_compression(request.compression, request.transport)
        to = Endpoint.parse(request.to)
        kind = self._guests.find(request.guest).spec.kind
        choose_mode(request.mode, kind)
        migration_id = uuid.uuid4().hex[:12]
        guest = self._guests.claim(request.guest, migration_id)
        session = SourceSession(
            migration_id,
            request,
            kind,
            guest.client,
            self._peer_of(to, "destination"),
            self._exports,
            page_endpoint=self.page_endpoints[choose_transport(request.transport)],
            control_endpoint=self.control_endpoint,
            clock=self._clock,
            on_guest_left=lambda: self._guests.remove(guest),
            on_guest_stays=lambda: self._guests.release(guest),
        )
        with self._lock:
            self._sources[migration_id] = session
            self._records[migration_id] = session.record
        self._spawn(f"source-{migration_id}", session.run)
        return migration_id

    def complete(self, request: transfer.CompleteRequest) -> None:
        """END of a migration that left here.

        Raises:
            NotFoundError: no such migration left here.
        """
        self._outgoing(request.migration_id).complete(request.token, request.migration)

    # ---- as a destination ----

    def prepare(self, request: transfer.PrepareRequest, peer_host: str) -> transfer.PrepareResponse:
        """Build the twin of a guest that wants to come; return the terms on which its pages will be fetched.

        Args:
            request: What the source says of it.
            peer_host: Where the call came from.

        Raises:
            MigrateError: why it cannot come; nothing was changed.
        """
        check_prepare(request, HostFacts(available_bytes()))
        page_endpoint = _reachable(request.page_endpoint, peer_host)
        control_endpoint = _reachable(request.control_endpoint, peer_host)
        with self._lock:
            if request.migration_id in self._sources:
                raise ConfigError(
                    "source and destination are the same daemon",
                    holder=GuestHolder.SOURCE,
                    remedy="choose another --to",
                )
            if request.migration_id in self._destinations or request.migration_id in self._fenced:
                raise AlreadyExistsError(f"migration {request.migration_id!r} has been here before")
            session = DestinationSession(
                request,
                page_endpoint,
                lambda description: self._build_twin(description, request.migration_id),
                self._peer_of(control_endpoint, "source"),
                self._clock,
                self._fetcher_of,
            )
            self._destinations[request.migration_id] = session
            self._records[request.migration_id] = session.record
        session.prepare()
        self._spawn(f"destination-{request.migration_id}", session.run)
        return transfer.PrepareResponse(
            protocol_version=PROTOCOL_VERSION, transport=session.transport, compression=session.compression
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

    def incoming(self, migration_id: str, await_complete_us: int) -> types.Migration:
        """What this destination knows of a migration, at once, or when no page is missing or the time is over.

        Raises:
            NotFoundError: it never came here.
        """
        session = self._incoming(migration_id)
        session.await_complete(min(await_complete_us, _AWAIT_US_MAX))
        return session.record.snapshot()

    def abort(self, migration_id: str, reason: str) -> None:
        """Undo a Prepare, and fence the id: a Prepare or Switchover that is still on its way is refused.

        Raises:
            GuestBusyError: vCPUs run here, or may soon.
        """
        with self._lock:
            session = self._destinations.get(migration_id)
            if session is None:
                self._fenced.add(migration_id)
                return
        session.abort(reason)

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
            GuestBusyError: it is too late.
        """
        session = self._outgoing(migration_id)
        session.cancel()
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

    def _outgoing(self, migration_id: str) -> SourceSession:
        with self._lock:
            session = self._sources.get(migration_id)
        if session is None:
            raise _unknown(migration_id)
        return session

    def _incoming(self, migration_id: str) -> DestinationSession:
        with self._lock:
            session = self._destinations.get(migration_id)
        if session is None:
            raise _unknown(migration_id)
        return session

    def _build_twin(self, description: types.GuestDescription, migration_id: str) -> Twin:
        guest = self._guests.create_incoming(description, migration_id)
        return Twin(
            guest.client,
            destroy=lambda: self._guests.remove(guest),
            arrived=lambda: self._guests.release(guest),
        )

    def _spawn(self, name: str, run: Callable[[], None]) -> None:
        def logged() -> None:
            try:
                run()
            except Exception:  # noqa: BLE001 - the last line of defence of a thread
                _log.exception("%s died of a bug; the state above it is the last that is known", name)

        thread = threading.Thread(target=logged, name=name, daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()


def _reachable(endpoint: str, peer_host: str) -> Endpoint:
    """The peer's endpoint, with the host that its call came from where it names none."""
    parsed = Endpoint.parse(endpoint)
    return Endpoint(peer_host, parsed.port) if parsed.is_unspecified else parsed


def _unknown(migration_id: str) -> NotFoundError:
    return NotFoundError(f"no migration {migration_id!r} is known here", remedy="see `migrate list`")
