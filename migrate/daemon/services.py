"""The gRPC face of the registries: each method takes a message apart, calls one thing, and puts an answer together."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from urllib.parse import unquote

import grpc

from migrate.daemon.entries import reachable
from migrate.daemon.guests import GuestRegistry
from migrate.daemon.migrations import MigrationRegistry
from migrate.errors import ConfigError
from migrate.telemetry.host import available_bytes
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import guest_service_pb2_grpc as guest_rpc
from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import migration_service_pb2_grpc as migration_rpc
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import transfer_service_pb2_grpc as transfer_rpc

# Names, arguments and meanings of the methods are the proto's.
# ruff: noqa: N802, D102, ARG002

_AUDIT_DEADLINE_US = 120_000_000
_WATCH_INTERVAL_MIN_US = 10_000
_WATCH_INTERVAL_MAX_US = 3_600_000_000
_WATCH_POLL_S = 0.5

# Migration, host, the call.
CheckParty = Callable[[str, str, grpc.ServicerContext], None]


class GuestServicer(guest_rpc.GuestServiceServicer):
    """Guests of this host."""

    def __init__(self, guests: GuestRegistry, stopping: threading.Event) -> None:
        self._guests = guests
        self._stopping = stopping

    def CreateGuest(
        self, request: guest.CreateGuestRequest, context: grpc.ServicerContext
    ) -> guest.CreateGuestResponse:
        return guest.CreateGuestResponse(guest=self._guests.create(request.spec))

    def ListGuests(self, request: guest.ListGuestsRequest, context: grpc.ServicerContext) -> guest.ListGuestsResponse:
        return guest.ListGuestsResponse(guests=self._guests.list(), available_bytes=available_bytes())

    def GetGuest(self, request: guest.GetGuestRequest, context: grpc.ServicerContext) -> guest.GetGuestResponse:
        return guest.GetGuestResponse(guest=self._guests.describe(self._guests.find(request.name)))

    def PauseGuest(self, request: guest.PauseGuestRequest, context: grpc.ServicerContext) -> guest.PauseGuestResponse:
        self._guests.operate(request.name).client.pause()
        return guest.PauseGuestResponse()

    def ResumeGuest(
        self, request: guest.ResumeGuestRequest, context: grpc.ServicerContext
    ) -> guest.ResumeGuestResponse:
        self._guests.operate(request.name).client.resume()
        return guest.ResumeGuestResponse()

    def DeleteGuest(
        self, request: guest.DeleteGuestRequest, context: grpc.ServicerContext
    ) -> guest.DeleteGuestResponse:
        self._guests.remove(self._guests.operate(request.name, to_delete=True))
        return guest.DeleteGuestResponse()

    def AuditGuest(self, request: guest.AuditGuestRequest, context: grpc.ServicerContext) -> guest.AuditGuestResponse:
        statistics = self._guests.find(request.name).client.audit(_AUDIT_DEADLINE_US)
        return guest.AuditGuestResponse(statistics=statistics)

    def WatchGuestStatistics(
        self, request: guest.WatchGuestStatisticsRequest, context: grpc.ServicerContext
    ) -> Iterator[guest.WatchGuestStatisticsResponse]:
        if 0 < request.interval_us < _WATCH_INTERVAL_MIN_US:
            raise ConfigError(f"statistics are sent every {_WATCH_INTERVAL_MIN_US} us at the most often")
        if request.interval_us > _WATCH_INTERVAL_MAX_US:
            raise ConfigError(f"statistics are sent every {_WATCH_INTERVAL_MAX_US} us at the least often")
        found = self._guests.find(request.name)
        while context.is_active():
            yield guest.WatchGuestStatisticsResponse(statistics=found.client.statistics())
            if not request.interval_us or not self._pause(request.interval_us / 1_000_000, context):
                return

    def _pause(self, pause_s: float, context: grpc.ServicerContext) -> bool:
        """Wait; False if nobody waits for the next any more."""
        while pause_s > 0 and context.is_active():
            if self._stopping.wait(min(pause_s, _WATCH_POLL_S)):
                return False
            pause_s -= _WATCH_POLL_S
        return context.is_active()


class MigrationServicer(migration_rpc.MigrationServiceServicer):
    """Migrations, for operators."""

    def __init__(self, migrations: MigrationRegistry, stopping: threading.Event) -> None:
        self._migrations = migrations
        self._stopping = stopping

    def StartMigration(
        self, request: migration.StartMigrationRequest, context: grpc.ServicerContext
    ) -> migration.StartMigrationResponse:
        return migration.StartMigrationResponse(migration_id=self._migrations.start(request))

    def GetMigration(
        self, request: migration.GetMigrationRequest, context: grpc.ServicerContext
    ) -> migration.GetMigrationResponse:
        return migration.GetMigrationResponse(migration=self._migrations.record(request.migration_id).snapshot())

    def ListMigrations(
        self, request: migration.ListMigrationsRequest, context: grpc.ServicerContext
    ) -> migration.ListMigrationsResponse:
        return migration.ListMigrationsResponse(migrations=self._migrations.list())

    def WatchMigration(
        self, request: migration.WatchMigrationRequest, context: grpc.ServicerContext
    ) -> Iterator[migration.WatchMigrationResponse]:
        record = self._migrations.record(request.migration_id)
        version = -1
        with record.live.watched() if request.live else contextlib.nullcontext():
            while context.is_active() and not self._stopping.is_set():
                changed = record.wait_changed(version, _WATCH_POLL_S)
                if changed == version:
                    continue
                version = changed
                is_final = record.is_final
                found = record.snapshot()
                yield migration.WatchMigrationResponse(migration=record.live.add_to(found) if request.live else found)
                if is_final:
                    return

    def WatchTrace(
        self, request: migration.WatchTraceRequest, context: grpc.ServicerContext
    ) -> Iterator[migration.WatchTraceResponse]:
        record = self._migrations.record(request.migration_id)
        if record.trace is None:
            raise ConfigError(
                f"migration {request.migration_id!r} is not traced here", remedy="ask its source, and start it traced"
            )
        while context.is_active() and not self._stopping.is_set():
            # What comes of a trace comes before the end.
            is_final = record.is_final
            part = record.trace.take(0 if is_final else _WATCH_POLL_S)
            if part is not None:
                yield migration.WatchTraceResponse(part=part)
            elif is_final or record.trace.is_read:
                return

    def StartSwitchover(
        self, request: migration.StartSwitchoverRequest, context: grpc.ServicerContext
    ) -> migration.StartSwitchoverResponse:
        self._migrations.start_switchover(request.migration_id)
        return migration.StartSwitchoverResponse()

    def CancelMigration(
        self, request: migration.CancelMigrationRequest, context: grpc.ServicerContext
    ) -> migration.CancelMigrationResponse:
        return migration.CancelMigrationResponse(migration=self._migrations.cancel(request.migration_id))

    def RecoverMigration(
        self, request: migration.RecoverMigrationRequest, context: grpc.ServicerContext
    ) -> migration.RecoverMigrationResponse:
        return migration.RecoverMigrationResponse(migration=self._migrations.recover(request.migration_id, request.to))


class TransferServicer(transfer_rpc.TransferServiceServicer):
    """Migrations, for the other daemon.

    Args:
        migrations: Those of this daemon.
        check_party: Raises if the caller is not the host that is named as the other side of a migration.
    """

    def __init__(self, migrations: MigrationRegistry, check_party: CheckParty | None = None) -> None:
        self._migrations = migrations
        self._check_party = check_party

    def Prepare(self, request: transfer.PrepareRequest, context: grpc.ServicerContext) -> transfer.PrepareResponse:
        peer_host = _peer_host(context.peer())
        self._check(request.migration_id, context, reachable(request.control_endpoint, peer_host).host)
        return self._migrations.prepare(request, peer_host)

    def Invalidate(
        self, request: transfer.InvalidateRequest, context: grpc.ServicerContext
    ) -> transfer.InvalidateResponse:
        self._check(request.migration_id, context)
        self._migrations.invalidate(request)
        return transfer.InvalidateResponse()

    def Switchover(
        self, request: transfer.SwitchoverRequest, context: grpc.ServicerContext
    ) -> transfer.SwitchoverResponse:
        self._check(request.migration_id, context)
        return self._migrations.switch_over(request)

    def GetIncoming(
        self, request: transfer.GetIncomingRequest, context: grpc.ServicerContext
    ) -> transfer.GetIncomingResponse:
        self._check(request.migration_id, context)
        migration = self._migrations.incoming(request.migration_id, request.await_complete_us, live=request.live)
        return transfer.GetIncomingResponse(migration=migration)

    def Complete(self, request: transfer.CompleteRequest, context: grpc.ServicerContext) -> transfer.CompleteResponse:
        self._check(request.migration_id, context)
        self._migrations.complete(request)
        return transfer.CompleteResponse()

    def RecordTrace(
        self, request: transfer.RecordTraceRequest, context: grpc.ServicerContext
    ) -> transfer.RecordTraceResponse:
        self._check(request.migration_id, context)
        self._migrations.record_trace(request)
        return transfer.RecordTraceResponse()

    def Abort(self, request: transfer.AbortRequest, context: grpc.ServicerContext) -> transfer.AbortResponse:
        self._check(request.migration_id, context)
        self._migrations.abort(request.migration_id, request.reason, request.attempt)
        return transfer.AbortResponse()

    def ResumeMigration(
        self, request: transfer.ResumeMigrationRequest, context: grpc.ServicerContext
    ) -> transfer.ResumeMigrationResponse:
        self._check(request.migration_id, context)
        return self._migrations.resume(request, _peer_host(context.peer()))

    def _check(self, migration_id: str, context: grpc.ServicerContext, claimed_host: str = "") -> None:
        """Whoever speaks for a migration is its other side as it is known here, and the one that it claims to be."""
        if self._check_party is None:
            return
        for host in {claimed_host, self._migrations.peer_host(migration_id)} - {""}:
            self._check_party(migration_id, host, context)


def _peer_host(peer: str) -> str:
    """The host of grpc's `ipv4:HOST:PORT` or `ipv6:%5BHOST%5D:PORT`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
