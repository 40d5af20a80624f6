"""A daemon that answers from canned messages, over a real socket: the other end for tests of the command line."""

from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc

from migrate.v1 import (
    guest_service_pb2,
    guest_service_pb2_grpc,
    migration_service_pb2,
    migration_service_pb2_grpc,
    types_pb2,
)

STOP_GRACE_S = 1.0


def make_guest(name="alpha", state=types_pb2.GUEST_STATE_RUNNING, **fields):
    """A guest as a daemon describes it."""
    spec = types_pb2.GuestSpec(
        name=name,
        kind=types_pb2.GUEST_KIND_KVM,
        memory_bytes=1 << 30,
        vcpus=2,
        workload=types_pb2.WorkloadSpec(distribution=types_pb2.WORKLOAD_DISTRIBUTION_ZIPF, write_ratio=0.25, seed=7),
    )
    return types_pb2.Guest(spec=spec, state=state, pid=4242, resident_bytes=1 << 29, **fields)


def make_migration(state=types_pb2.MIGRATION_STATE_COMPLETED, **fields):
    """A migration that went well, but for what is given."""
    values = {
        "migration_id": "m-1",
        "side": types_pb2.MIGRATION_SIDE_SOURCE,
        "guest": "alpha",
        "guest_kind": types_pb2.GUEST_KIND_KVM,
        "mode": types_pb2.MIGRATION_MODE_POSTCOPY,
        "state": state,
        "order": "precopy",
        "transport": types_pb2.PAGE_TRANSPORT_GRPCIO,
        "memory_bytes": 1 << 30,
        "page_size_bytes": 4096,
        "vcpus": 2,
        "peer": "192.0.2.2:7400",
        "downtime_us": 4200,
        "postcopy_us": 900_000,
        "total_us": 910_000,
        "bytes_on_wire": 1 << 29,
        "pages": types_pb2.PageCounts(total=262144, zero=131072, urgent=1072, background=130000, duplicate=5),
        "fault_latency_us": types_pb2.Distribution(count=3, mean=1.5, p50=1, p90=2, p99=3, p999=3, max=3.25),
        "guest_stall_us": types_pb2.Distribution(count=1, mean=20, p50=20, p90=20, p99=20, p999=20, max=20),
        "guest_touches": 2**63,
        "verified_pages": 131072,
        "guest_touches_at_switchover": 1000,
        "holder": types_pb2.GUEST_HOLDER_DESTINATION,
    }
    return types_pb2.Migration(**{**values, **fields})


def make_statistics(**fields):
    """What a healthy guest says about itself."""
    stalls = types_pb2.Distribution(count=1, mean=20, p50=20, p90=20, p99=20, p999=20, max=20)
    return types_pb2.GuestStatistics(**{"touches": 100, "writes": 50, "stall_us": stalls, **fields})


@dataclass
class FakeDaemon(guest_service_pb2_grpc.GuestServiceServicer, migration_service_pb2_grpc.MigrationServiceServicer):
    """Answers with what its fields hold, and keeps the requests."""

    guests: list = field(default_factory=lambda: [make_guest("alpha"), make_guest("beta")])
    migrations: list = field(default_factory=lambda: [make_migration()])
    # What WatchMigration sends, one after the other.
    watched: list = field(default_factory=lambda: [make_migration()])
    statistics: types_pb2.GuestStatistics = field(default_factory=make_statistics)
    # Fails every call: (status, ErrorInfo or None).
    failure: tuple | None = None
    # Fails WatchMigration after `watched`.
    watch_failure: tuple | None = None
    # What RecoverMigration finds.
    recovered: types_pb2.Migration = field(
        default_factory=lambda: make_migration(types_pb2.MIGRATION_STATE_POSTCOPY, recoveries=1)
    )
    requests: list = field(default_factory=list)
    address: str = ""

    def _answer(self, request, context, response):
        self.requests.append(request)
        _fail(context, self.failure)
        return response

    def CreateGuest(self, request, context):
        guest = make_guest(request.spec.name, types_pb2.GUEST_STATE_POPULATING)
        return self._answer(request, context, guest_service_pb2.CreateGuestResponse(guest=guest))

    def ListGuests(self, request, context):
        return self._answer(request, context, guest_service_pb2.ListGuestsResponse(guests=self.guests))

    def GetGuest(self, request, context):
        guest = make_guest(request.name)
        return self._answer(request, context, guest_service_pb2.GetGuestResponse(guest=guest))

    def PauseGuest(self, request, context):
        return self._answer(request, context, guest_service_pb2.PauseGuestResponse())

    def ResumeGuest(self, request, context):
        return self._answer(request, context, guest_service_pb2.ResumeGuestResponse())

    def DeleteGuest(self, request, context):
        return self._answer(request, context, guest_service_pb2.DeleteGuestResponse())

    def AuditGuest(self, request, context):
        audited = types_pb2.GuestStatistics()
        audited.CopyFrom(self.statistics)
        audited.audits += 1
        return self._answer(request, context, guest_service_pb2.AuditGuestResponse(statistics=audited))

    def WatchGuestStatistics(self, request, context):
        yield self._answer(request, context, guest_service_pb2.WatchGuestStatisticsResponse(statistics=self.statistics))

    def StartMigration(self, request, context):
        return self._answer(request, context, migration_service_pb2.StartMigrationResponse(migration_id="m-1"))

    def GetMigration(self, request, context):
        response = migration_service_pb2.GetMigrationResponse(
            migration=make_migration(migration_id=request.migration_id)
        )
        return self._answer(request, context, response)

    def ListMigrations(self, request, context):
        response = migration_service_pb2.ListMigrationsResponse(migrations=self.migrations)
        return self._answer(request, context, response)

    def StartSwitchover(self, request, context):
        return self._answer(request, context, migration_service_pb2.StartSwitchoverResponse())

    def CancelMigration(self, request, context):
        cancelled = make_migration(types_pb2.MIGRATION_STATE_CANCELLED, migration_id=request.migration_id)
        return self._answer(request, context, migration_service_pb2.CancelMigrationResponse(migration=cancelled))

    def RecoverMigration(self, request, context):
        response = migration_service_pb2.RecoverMigrationResponse(migration=self.recovered)
        return self._answer(request, context, response)

    def WatchMigration(self, request, context):
        self._answer(request, context, None)
        for migration in self.watched:
            yield migration_service_pb2.WatchMigrationResponse(migration=migration)
        _fail(context, self.watch_failure)


def _fail(context, failure):
    if failure is None:
        return
    status, info = failure
    if info is not None:
        context.set_trailing_metadata((("migrate-error-bin", info.SerializeToString()),))
    context.abort(status, "canned")


@contextmanager
def serve(daemon: FakeDaemon, port: int = 0) -> Iterator[FakeDaemon]:
    """Serve on a loopback port, of the kernel's choice if none is given."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    guest_service_pb2_grpc.add_GuestServiceServicer_to_server(daemon, server)
    migration_service_pb2_grpc.add_MigrationServiceServicer_to_server(daemon, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    daemon.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield daemon
    finally:
        server.stop(STOP_GRACE_S).wait()
