"""Calls of the control port whose fields make no sense, each with the error that it gets. Nothing is left of them."""

import math

import grpc
import pytest

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import guest_service_pb2_grpc as guest_rpc
from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import channel_to
from tests.harness.hostile_source import PAGES, HostileSource
from tests.harness.memory import PAGE
from tests.harness.victim import HONEST, refusal_of
from tests.harness.waiting import wait_until

# Longer than every run of the tests can wait for.
pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.thorough]
U32, U64 = 2**32 - 1, 2**64 - 1
PATH = "../../../etc/passwd"
MEGABYTE = "x" * (1 << 20)


def of_spec(**fields):
    return lambda request: [setattr(request.guest.spec, name, value) for name, value in fields.items()]


def of_workload(**fields):
    return lambda request: [setattr(request.guest.spec.workload, name, value) for name, value in fields.items()]


def of_region(**fields):
    return lambda request: [setattr(request.guest.regions[0], name, value) for name, value in fields.items()]


def of_request(**fields):
    return lambda request: [setattr(request, name, value) for name, value in fields.items()]


def of_memory(size_bytes):
    def change(request):
        request.guest.spec.memory_bytes = request.guest.regions[0].size_bytes = size_bytes

    return change


PREPARES = {
    "no id": (of_request(migration_id=""), "ConfigError", "needs an id and a token"),
    "no token": (of_request(token=""), "ConfigError", "needs an id and a token"),
    "id that is a path": (of_request(migration_id=PATH), "ConfigError", "is no id of a migration"),
    "id of 65 characters": (of_request(migration_id="x" * 65), "ConfigError", "is no id of a migration"),
    "id of 1 MiB": (of_request(migration_id=MEGABYTE), "ConfigError", "is no id of a migration"),
    "id that hides": (of_request(migration_id=".hidden"), "ConfigError", "is no id of a migration"),
    "id of two lines": (of_request(migration_id="a\nb"), "ConfigError", "is no id of a migration"),
    "id with a NUL": (of_request(migration_id="a\0b"), "ConfigError", "is no id of a migration"),
    "token of 1 MiB": (of_request(token=MEGABYTE), "ConfigError", "at most 256 characters"),
    "name that is a path": (of_spec(name=PATH), "ConfigError", "is no guest name"),
    "no name": (of_spec(name=""), "ConfigError", "is no guest name"),
    "name of 20 KiB": (of_spec(name="x" * 20_000), "ConfigError", "is no guest name"),
    "name that is taken": (of_spec(name=HONEST), "AlreadyExistsError", "is on this host already"),
    "protocol 0": (of_request(protocol_version=0), "MissingFeatureError", "protocol version 0"),
    "protocol 2^32-1": (of_request(protocol_version=U32), "MissingFeatureError", "protocol version 4294967295"),
    "pages of nothing": (
        lambda request: setattr(request.guest, "page_size_bytes", 0),
        "MissingFeatureError",
        "pages of 0 bytes",
    ),
    "no region": (lambda request: request.guest.ClearField("regions"), "ConfigError", "one RAM region"),
    "1000 regions": (
        lambda request: [request.guest.regions.add(region=number) for number in range(1000)],
        "ConfigError",
        "one RAM region",
    ),
    "region 7": (of_region(region=7), "ConfigError", "one RAM region"),
    "region larger than the guest": (of_region(size_bytes=PAGES * PAGE * 2), "ConfigError", "is not the guest's"),
    "memory of no page": (of_memory(0), "ConfigError", "no size of a guest's memory"),
    "memory of half a page": (of_memory(2048), "ConfigError", "is not the guest's memory"),
    "memory of 2^63": (of_memory(1 << 63), "ConfigError", "no size of a guest's memory"),
    "memory of 1 TiB": (of_memory(1 << 40), "ConfigError", "to 128.0 GiB"),
    "resident 2^64-1": (of_region(resident_bytes=U64), "NotEnoughMemoryError", "available"),
    "no vCPU": (of_spec(vcpus=0), "ConfigError", "vCPUs"),
    "2^32-1 vCPUs": (of_spec(vcpus=U32), "ConfigError", "vCPUs"),
    "no kind": (of_spec(kind=0), "ConfigError", "kind kvm, process or qemu"),
    "kind 99": (of_spec(kind=99), "ConfigError", "kind kvm, process or qemu"),
    "write ratio NaN": (of_workload(write_ratio=math.nan), "ConfigError", "write ratio"),
    "write ratio infinite": (of_workload(write_ratio=-math.inf), "ConfigError", "write ratio"),
    "working set 2^64-1": (of_workload(working_set_bytes=U64), "ConfigError", "working set"),
    "distribution 99": (of_workload(distribution=99), "ConfigError", "a workload is"),
    "mode 99": (of_request(mode=99), "ConfigError", "migrates in modes"),
    "order that nobody has": (of_request(order="tides"), "UnsupportedHostError", "no order 'tides'; it has precopy,"),
    "order that is a module": (of_request(order="os:system"), "UnsupportedHostError", "no order 'os:system'"),
    "recorded page 2^64-1": (
        lambda request: request.recorded_pages.append(U64),
        "ConfigError",
        "was recorded of another one",
    ),
    "262,145 recorded pages": (
        lambda request: request.recorded_pages.extend([0] * 262_145),
        "ConfigError",
        "at most 262144 recorded pages",
    ),
    "order of 1 MiB": (of_request(order=MEGABYTE), "ConfigError", "no order of the background"),
    "pages at no port": (of_request(page_endpoint="localhost"), "ConfigError", "is not HOST:PORT"),
    "pages at port 65536": (of_request(page_endpoint="127.0.0.1:65536"), "ConfigError", "is not HOST:PORT"),
    "pages at a port of 5000 digits": (of_request(page_endpoint="h:" + "9" * 5000), "ConfigError", "is not HOST:PORT"),
    "control at nothing": (of_request(control_endpoint=""), "ConfigError", "is not HOST:PORT"),
    "control at a long name": (of_request(control_endpoint="h" * 300 + ":1"), "ConfigError", "255 characters"),
    "pages where nobody listens": (of_request(page_endpoint="127.0.0.1:1"), "", "127.0.0.1"),
    "peer timeout 1 us": (of_request(peer_timeout_us=1), "ConfigError", "the least is 200 ms"),
    "peer timeout 2^64-1": (of_request(peer_timeout_us=U64), "ConfigError", "at most 3600 s"),
    "20,000 CPUID entries": (
        lambda request: [request.guest.cpuid.add(function=number, eax=U32) for number in range(20_000)],
        "ConfigError",
        "at most 32768 bytes",
    ),
    "KVM guest of no host": (
        lambda request: (
            of_spec(kind=types.GUEST_KIND_KVM)(request),
            request.guest.cpuid.add(function=7, ecx=U32, ebx=U32),
        ),
        "MissingFeatureError",
        "CPUID",
    ),
}


@pytest.mark.parametrize("name", PREPARES)
def test_prepare_that_makes_no_sense_is_refused_and_leaves_no_twin(victim, name):
    change, kind, words = PREPARES[name]
    with HostileSource(victim) as source:
        request = source.request()
        change(request)
        _, error = refusal_of(source.stub.Prepare, request)
    assert kind in ("", error.type_name)
    assert words in error.message
    assert len(error.message) < 1000
    victim.wait_alone()


def start(**fields):
    terms = {"guest": HONEST, "to": "127.0.0.1:1", "mode": types.MIGRATION_MODE_POSTCOPY, "order": "precopy"}
    return lambda d: (d.migrations.StartMigration, migration.StartMigrationRequest(**{**terms, **fields}))


def create(**fields):
    spec = {"name": "x", "kind": types.GUEST_KIND_PROCESS, "memory_bytes": 16 << 20, "vcpus": 1}
    workload = types.WorkloadSpec(distribution=types.WORKLOAD_DISTRIBUTION_IDLE)
    asked = guest.CreateGuestRequest(spec=types.GuestSpec(**{**spec, "workload": workload, **fields}))
    return lambda d: (d.guests.CreateGuest, asked)


def of_transfer(method, /, **fields):
    return lambda d: (getattr(d.transfer, method), getattr(transfer, f"{method}Request")(**fields))


def of_migrations(method, /, **fields):
    return lambda d: (getattr(d.migrations, method), getattr(migration, f"{method}Request")(**fields))


def of_guests(method, /, **fields):
    return lambda d: (getattr(d.guests, method), getattr(guest, f"{method}Request")(**fields))


def raw(path, data):
    return lambda d: (d.channel.unary_unary(path), data)


CALLS = {
    "Invalidate of nothing": (of_transfer("Invalidate", migration_id="?"), "NOT_FOUND", "no migration '?'"),
    "Switchover of nothing": (of_transfer("Switchover", migration_id="?"), "NOT_FOUND", "no migration '?'"),
    "Switchover of an id of 1 MiB": (of_transfer("Switchover", migration_id=MEGABYTE), "NOT_FOUND", "is known here"),
    "GetIncoming of nothing": (of_transfer("GetIncoming", await_complete_us=U64), "NOT_FOUND", "no migration ''"),
    "RecordTrace of nothing": (of_transfer("RecordTrace", migration_id=PATH), "NOT_FOUND", "is known here"),
    "trace of 3 MiB": (
        of_transfer("RecordTrace", part=types.TracePart(faults=bytes(3 << 20))),
        "RESOURCE_EXHAUSTED",
        "larger than max",
    ),
    "Complete of nothing": (of_transfer("Complete", migration_id=PATH), "NOT_FOUND", "is known here"),
    "ResumeMigration of nothing": (
        of_transfer("ResumeMigration", migration_id="?", control_endpoint="h:1"),
        "NOT_FOUND",
        "is known here",
    ),
    "ResumeMigration from nowhere": (of_transfer("ResumeMigration", migration_id="?"), "INVALID_ARGUMENT", "HOST:PORT"),
    "Abort of a path": (of_transfer("Abort", migration_id=PATH), "INVALID_ARGUMENT", "is no id of a migration"),
    "Abort of no id": (of_transfer("Abort"), "INVALID_ARGUMENT", "is no id of a migration"),
    "message of 3 MiB": (of_transfer("Abort", reason=MEGABYTE * 3), "RESOURCE_EXHAUSTED", "larger than max"),
    "state of 3 MiB": (of_transfer("Switchover", state=bytes(3 << 20)), "RESOURCE_EXHAUSTED", "larger than max"),
    "bitmap of 3 MiB": (
        of_transfer("Invalidate", stale=[transfer.StalePages(bitmap=bytes(3 << 20))]),
        "RESOURCE_EXHAUSTED",
        "larger than max",
    ),
    "no protobuf": (raw("/migrate.v1.TransferService/Prepare", b"\xff" * 64), "INTERNAL", "deserializing"),
    "no such method": (raw("/migrate.v1.TransferService/Steal", b""), "UNIMPLEMENTED", "not found"),
    "no such service": (raw("/migrate.v9.Nothing/Nothing", b""), "UNIMPLEMENTED", "not found"),
    "move nobody": (start(guest=PATH), "NOT_FOUND", "no guest named"),
    "move a name of 1 MiB": (start(guest=MEGABYTE), "NOT_FOUND", "no guest named"),
    "move to nowhere": (start(to=""), "INVALID_ARGUMENT", "HOST:PORT"),
    "move to 1 MiB": (start(to=MEGABYTE), "INVALID_ARGUMENT", "HOST:PORT"),
    "move in mode 99": (start(mode=99), "INVALID_ARGUMENT", "migrates in modes"),
    "move in no order": (start(order="\0"), "INVALID_ARGUMENT", "no order"),
    "compress with 99": (start(compression=99), "INVALID_ARGUMENT", "zstd"),
    "peer timeout for ever": (start(peer_timeout_us=U64), "INVALID_ARGUMENT", "at most 3600 s"),
    "status of nothing": (of_migrations("GetMigration", migration_id=MEGABYTE), "NOT_FOUND", "is known here"),
    "watch nothing": (of_migrations("WatchMigration", migration_id="?"), "NOT_FOUND", "is known here"),
    "trace nothing": (of_migrations("WatchTrace", migration_id="?"), "NOT_FOUND", "is known here"),
    "switch nothing over": (of_migrations("StartSwitchover", migration_id="?"), "NOT_FOUND", "is known here"),
    "cancel nothing": (of_migrations("CancelMigration", migration_id="?"), "NOT_FOUND", "is known here"),
    "recover nothing": (of_migrations("RecoverMigration", migration_id="?"), "NOT_FOUND", "is known here"),
    "create a path": (create(name=PATH), "INVALID_ARGUMENT", "is no guest name"),
    "create a name of 1 MiB": (create(name=MEGABYTE), "INVALID_ARGUMENT", "is no guest name"),
    "create 2^64-1 bytes": (create(memory_bytes=U64), "INVALID_ARGUMENT", "a multiple of 2 MiB"),
    "create 128 GiB": (create(memory_bytes=128 << 30), "RESOURCE_EXHAUSTED", "available"),
    "create 2^32-1 vCPUs": (create(vcpus=U32), "INVALID_ARGUMENT", "vCPUs"),
    "create nothing": (of_guests("CreateGuest"), "INVALID_ARGUMENT", "is no guest name"),
    "pause nobody": (of_guests("PauseGuest", name="?"), "NOT_FOUND", "no guest named"),
    "delete a path": (of_guests("DeleteGuest", name=PATH), "NOT_FOUND", "no guest named"),
    "audit nobody": (of_guests("AuditGuest", name=""), "NOT_FOUND", "no guest named"),
    "statistics every us": (of_guests("WatchGuestStatistics", name=HONEST, interval_us=1), "INVALID_ARGUMENT", "most"),
    "statistics every aeon": (
        of_guests("WatchGuestStatistics", name=HONEST, interval_us=U64),
        "INVALID_ARGUMENT",
        "least often",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_call_that_makes_no_sense_is_refused_with_status_and_words(victim, name):
    of, status, words = CALLS[name]
    method, request = of(victim.daemon)
    got, error = refusal_of(method, request)
    assert got == status
    assert words in error.message
    assert len(error.message) < 1000
    victim.wait_alone()


def test_metadata_of_32_kib_is_refused(victim):
    call = victim.daemon.transfer.GetIncoming
    status, error = refusal_of(call, transfer.GetIncomingRequest(), metadata=[("x", "y" * (32 << 10))])
    assert status == "RESOURCE_EXHAUSTED"
    assert "metadata" in error.message


def test_reason_of_a_megabyte_is_cut(victim):
    with HostileSource(victim) as source:
        source.prepare()
        source.stub.Abort(transfer.AbortRequest(migration_id=source.migration_id, reason=MEGABYTE), timeout=30)
        assert len(source.incoming().error.message) < 600


# Too many streams of the daemon, or of the connection, on which those that were given up count until it has noticed.
_FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


def following(victim, channel, interval_us):
    """A stream of statistics whose first message has come; the one before may take a moment to be let go."""
    method = guest_rpc.GuestServiceStub(channel).WatchGuestStatistics

    def begun():
        call = method(guest.WatchGuestStatisticsRequest(name=HONEST, interval_us=interval_us), timeout=60)
        try:
            next(call)
        except grpc.RpcError as error:
            if error.code() in _FULL:
                return None
            raise
        return call

    return wait_until(begun, 10, "room for a stream")


def test_follower_of_statistics_who_leaves_is_not_waited_for(victim):
    with channel_to(victim.daemon.address) as channel:
        for _ in range(130):  # twice as many as there may be at one time
            following(victim, channel, 3_600_000_000).cancel()


def test_follower_beyond_the_64th_is_refused_and_the_others_stay(victim):
    with channel_to(victim.daemon.address) as one, channel_to(victim.daemon.address) as other:
        watches = [following(victim, channel, 500_000) for channel in (one, other) for _ in range(32)]
        asked = guest.WatchGuestStatisticsRequest(name=HONEST)
        status, error = refusal_of(victim.daemon.guests.WatchGuestStatistics, asked)
        assert (status, error.type_name) == ("RESOURCE_EXHAUSTED", "LimitError")
        assert "64 streams" in error.message
        for watch in watches:
            next(watch)
            watch.cancel()
    with channel_to(victim.daemon.address) as channel:
        following(victim, channel, 500_000).cancel()
