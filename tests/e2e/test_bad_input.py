"""Bad input gets a clear error, and changes nothing: over real gRPC, to real daemons."""

import subprocess
import sys

import grpc
import pytest

from migrate.daemon.status import received_error
from migrate.errors import (
    AlreadyExistsError,
    ConfigError,
    GuestBusyError,
    GuestHolder,
    MissingFeatureError,
    NotEnoughMemoryError,
    NotFoundError,
    PeerUnreachableError,
)
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess
from tests.harness.tampering import TamperingPeer
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]


@pytest.fixture
def running(source):
    """A guest at the source, which must run on whatever is asked."""
    source.create("g", memory_mib=32)
    source.wait_populated("g")
    yield source
    before = source.statistics("g").touches
    wait_until(lambda: source.statistics("g").touches > before, 10, "the guest to run on")
    assert source.audit("g").errors == 0
    assert source.guest("g").migration_id == ""
    source.guests.DeleteGuest(guest.DeleteGuestRequest(name="g"), timeout=30)


def refusal(call, *arguments, **options):
    """The error that a call is refused with, as the other end rebuilds it."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    return received_error(caught.value, "the daemon")


def failed_with(migration, kind):
    assert migration.state == types.MIGRATION_STATE_FAILED
    assert migration.holder == types.GUEST_HOLDER_SOURCE
    assert migration.error.type == kind.__name__
    return migration.error


def test_unknown_guest(source, destination):
    assert isinstance(refusal(source.start, destination, "nobody"), NotFoundError)


def test_duplicate_name(running):
    assert isinstance(refusal(running.create, "g"), AlreadyExistsError)


def test_name_taken_at_the_destination(running, destination):
    destination.create("g", kind="process", memory_mib=16)
    failed_with(running.migrate(destination), AlreadyExistsError)
    assert destination.guest("g").spec.kind == types.GUEST_KIND_PROCESS
    destination.guests.DeleteGuest(guest.DeleteGuestRequest(name="g"), timeout=30)


def test_unreachable_daemon(running):
    error = failed_with(running.migrate("127.0.0.1:1"), PeerUnreachableError)
    assert "127.0.0.1:1" in error.message


def test_same_daemon(running):
    error = failed_with(running.migrate(running), ConfigError)
    assert "same daemon" in error.message
    assert running.guest_names() == ["g"]


def make_huge(request):
    request.guest.regions[0].resident_bytes = 1 << 50


def change_page_size(request):
    request.guest.page_size_bytes = 2 << 20


def speak_tomorrows_protocol(request):
    request.protocol_version = 99


def invent_vcpu_feature(request):
    (leaf,) = [entry for entry in request.guest.cpuid if (entry.function, entry.index) == (7, 0)]
    leaf.ecx |= 0xFFFFFFEF


def add_region(request):
    request.guest.regions.add(region=1, size_bytes=4096)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (make_huge, NotEnoughMemoryError, "available"),
        (change_page_size, MissingFeatureError, "pages of 2097152 bytes"),
        (speak_tomorrows_protocol, MissingFeatureError, "protocol version 99"),
        (invent_vcpu_feature, MissingFeatureError, "CPUID 0x7.0:ecx"),
        (add_region, ConfigError, "one RAM region"),
    ],
)
def test_prepare_that_the_destination_cannot_meet(running, destination, change, kind, words):
    before = destination.guest_names()
    with TamperingPeer(destination.address, prepare=change) as peer:
        error = failed_with(running.migrate(peer.address), kind)
    assert words in error.message
    assert destination.guest_names() == before


@pytest.mark.parametrize(
    "spec",
    [
        {"memory_mib": 8},
        {"vcpus": 0},
        {"vcpus": 9},
        {"name": "../escape"},
        {"name": ""},
        {"write_ratio": 1.5},
        {"working_set_mib": 64},
    ],
)
def test_guest_that_makes_no_sense(source, spec):
    assert isinstance(refusal(source.create, **{"name": "x", **spec}), ConfigError)
    assert source.guest_names() == []


def test_guest_that_does_not_fit(source):
    error = refusal(source.create, "x", memory_mib=100 << 10)
    assert isinstance(error, NotEnoughMemoryError)
    assert source.guest_names() == []


def test_second_migration_and_changes_of_a_moving_guest(source, destination):
    source.create("m", memory_mib=64, workload="idle")
    source.wait_populated("m")
    migration_id = source.start(destination, "m", max_bandwidth_bytes_per_s=32 << 20)
    for error in [
        refusal(source.start, destination, "m"),
        refusal(source.guests.PauseGuest, guest.PauseGuestRequest(name="m"), timeout=30),
        refusal(source.guests.DeleteGuest, guest.DeleteGuestRequest(name="m"), timeout=30),
    ]:
        assert isinstance(error, GuestBusyError)
        assert migration_id in error.message
    assert source.wait_final(migration_id).state == types.MIGRATION_STATE_COMPLETED
    destination.guests.DeleteGuest(guest.DeleteGuestRequest(name="m"), timeout=30)


def test_unknown_migration(destination):
    for error in [
        refusal(destination.migration, "nothing"),
        refusal(destination.transfer.Switchover, transfer.SwitchoverRequest(migration_id="nothing"), timeout=30),
        refusal(destination.transfer.Complete, transfer.CompleteRequest(migration_id="nothing"), timeout=30),
    ]:
        assert isinstance(error, NotFoundError)


def test_broken_state_leaves_the_guest_at_the_source(running, destination):
    class Breaking(TamperingPeer):
        def Switchover(self, request, context):
            request.state = request.state[: len(request.state) // 2]
            return super().Switchover(request, context)

    with Breaking(destination.address) as peer:
        failed = running.migrate(peer.address)
    assert (failed.state, failed.holder) == (types.MIGRATION_STATE_FAILED, types.GUEST_HOLDER_SOURCE)
    assert "g" not in destination.guest_names()


def test_fenced_migration_is_refused_when_it_arrives_late(destination):
    destination.transfer.Abort(transfer.AbortRequest(migration_id="late"), timeout=30)
    error = refusal(destination.transfer.Switchover, transfer.SwitchoverRequest(migration_id="late"), timeout=30)
    assert isinstance(error, GuestBusyError)
    assert error.holder is GuestHolder.SOURCE


# Root without the capabilities that open closed doors.
UNPRIVILEGED = ["setpriv", "--bounding-set=-sys_ptrace,-dac_override,-dac_read_search"]


def with_device(device, replacement):
    """A command prefix that runs the rest with another file in a device's place."""
    return ["unshare", "--mount", "sh", "-c", f'mount --bind {replacement} {device} && exec "$@"', "sh"]


@pytest.mark.root
def test_host_without_kvm():
    bare = DaemonProcess(prefix=with_device("/dev/kvm", "/dev/null"))
    try:
        error = refusal(bare.create, "x")
        assert error.type_name == "KvmUnavailableError"
        assert "/dev/kvm" in error.message
        assert "--kind process" in error.remedy
        assert bare.guest_names() == []
    finally:
        bare.close()


@pytest.mark.root
def test_destination_without_userfaultfd(running, tmp_path):
    # The device is closed, and the system call needs CAP_SYS_PTRACE.
    door = tmp_path / "closed"
    door.touch(mode=0o000)
    closed = DaemonProcess(prefix=[*with_device("/dev/userfaultfd", door), *UNPRIVILEGED])
    try:
        failed = running.migrate(closed)
        assert failed.holder == types.GUEST_HOLDER_SOURCE
        assert failed.error.type == "UffdUnavailableError"
        assert "/dev/userfaultfd" in failed.error.remedy
        assert closed.guest_names() == []
    finally:
        closed.close()


def test_address_in_use(source):
    second = subprocess.run(
        [sys.executable, "-m", "migrate", "daemon", "--listen", source.address],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert second.returncode == 1
    assert f"cannot listen on {source.address}" in second.stderr


def test_holder_words_are_in_every_error(running):
    error = failed_with(running.migrate("127.0.0.1:1"), PeerUnreachableError)
    assert error.holder == types.GUEST_HOLDER_SOURCE
    assert "source" in GuestHolder(error.holder).describe()
