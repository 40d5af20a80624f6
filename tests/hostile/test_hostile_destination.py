"""A destination that answers nonsense: the migration to it ends, says why, and the guest runs on at the source."""

import contextlib
import itertools

import grpc
import pytest

from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import page_service_pb2_grpc as page_rpc
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import channel_to
from tests.harness.hostile_destination import HostileDestination, raising, raising_bytes
from tests.harness.memory import requests_for
from tests.harness.victim import refusal_of
from tests.harness.waiting import wait_until

# Longer than every run of the tests can wait for.
pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.thorough]
U32, U64 = 2**32 - 1, 2**64 - 1
MOVER = "mover"
_names = itertools.count()


@pytest.fixture(scope="module")
def mover(victim):
    """Another guest of the victim's, which is sent to hostile destinations, and comes to none."""
    victim.daemon.create(MOVER, memory_mib=16)
    victim.daemon.wait_populated(MOVER)
    yield victim.daemon
    victim.delete(MOVER)


def send_to(mover, double, mode=types.MIGRATION_MODE_POSTCOPY, **terms):
    return mover.start(double, MOVER, mode=mode, peer_timeout_us=200_000, **terms)


def check_stays(mover, ended):
    assert ended.holder == types.GUEST_HOLDER_SOURCE
    wait_until(lambda: not mover.guest(MOVER).migration_id, 10, "the guest to be free again")
    before = mover.statistics(MOVER).touches
    wait_until(lambda: mover.statistics(MOVER).touches > before, 10, "the guest to run on")
    assert mover.statistics(MOVER).errors == 0


def prepared(**fields):
    return lambda request, _context: transfer.PrepareResponse(**{"protocol_version": 3, **fields})


def seen(**fields):
    return lambda request, _context: transfer.GetIncomingResponse(migration=types.Migration(**fields))


def refuse(status):
    return lambda _request, context: context.abort(status, "no")


def failed(kind, message="so it is"):
    return seen(state=types.MIGRATION_STATE_FAILED, error=types.ErrorInfo(type=kind, message=message))


PREPARES = {
    "your guest is lost": (raising("GuestLostError"), "because I say so"),
    "your guest process died": (raising("GuestGoneError"), "because I say so"),
    "stop your session": (raising("StoppedError"), "because I say so"),
    "stop your pager": (raising("PagerStoppedError"), "because I say so"),
    "you were cancelled": (raising("CancelledError"), "because I say so"),
    "an error of no class": (raising("os.system"), "because I say so"),
    "an error of no name": (raising(""), "because I say so"),
    "held by 99": (raising("ConfigError", holder=99), "because I say so"),
    "words of 6 KiB": (raising("ConfigError", "x" * 6000), "xxx"),
    "words of 60 KiB": (raising("ConfigError", "x" * 60_000), "given up after"),
    "details that are no protobuf": (raising_bytes(b"\xff" * 40), "given up after"),
    "UNAVAILABLE": (refuse(grpc.StatusCode.UNAVAILABLE), "given up after"),
    "PERMISSION_DENIED": (refuse(grpc.StatusCode.PERMISSION_DENIED), "given up after"),
    "a reply that is no protobuf": (lambda *_: b"\xff" * 40, "given up after"),
    "a reply of 1 MiB": (lambda *_: b"\x7a\x80\x80\x40" + bytes(1 << 20), "given up after"),
}


@pytest.mark.parametrize("name", PREPARES)
def test_answer_to_prepare_that_makes_no_sense_ends_the_migration(mover, name):
    answer, words = PREPARES[name]
    with HostileDestination(Prepare=answer) as double:
        ended = mover.wait_final(send_to(mover, double))
    assert ended.state == types.MIGRATION_STATE_FAILED
    assert words in ended.error.message
    check_stays(mover, ended)


AGREEMENTS = {
    "transport 99": {"transport": 99},
    "compression 99": {"compression": 99},
    "zstd unasked": {"compression": types.PAGE_COMPRESSION_ZSTD},
    "protocol 2^32-1": {"protocol_version": U32},
}


@pytest.mark.parametrize("name", AGREEMENTS)
def test_agreement_on_what_is_not_there_comes_to_nothing(mover, name):
    refusing = raising("MigrationAbortedError", "after all, no", types.GUEST_HOLDER_SOURCE, grpc.StatusCode.ABORTED)
    with HostileDestination(Prepare=prepared(**AGREEMENTS[name]), Switchover=refusing) as double:
        ended = mover.wait_final(send_to(mover, double))
    assert ended.state == types.MIGRATION_STATE_FAILED
    assert "after all, no" in ended.error.message
    check_stays(mover, ended)


SWITCHOVERS = {
    "your guest is lost, and at the source": raising("GuestLostError", holder=types.GUEST_HOLDER_SOURCE),
    "your guest process died, and is at the source": raising("GuestGoneError", holder=types.GUEST_HOLDER_SOURCE),
    "stop your session": raising("StoppedError", holder=types.GUEST_HOLDER_SOURCE),
    "nobody knows, and the attempt is fenced": raising("GuestLostError", holder=types.GUEST_HOLDER_NONE),
    "UNIMPLEMENTED": refuse(grpc.StatusCode.UNIMPLEMENTED),
    "no protobuf": lambda *_: b"\xff" * 40,
}


@pytest.mark.parametrize("name", SWITCHOVERS)
def test_answer_to_switchover_that_makes_no_sense_leaves_the_guest_at_the_source(mover, name):
    with HostileDestination(Switchover=SWITCHOVERS[name]) as double:
        ended = mover.wait_final(send_to(mover, double))
    assert ended.state == types.MIGRATION_STATE_FAILED
    check_stays(mover, ended)


FIGURES = {
    "failed": (failed("GuestLostError"), "the destination gave up: so it is"),
    "failed for ever": (failed("AttemptLostError"), "given up after"),
    "failed, in 30 KiB": (failed("ConfigError", "x" * 30_000), "the destination gave up"),
    "cancelled": (seen(state=types.MIGRATION_STATE_CANCELLED), "the destination gave up"),
    "your guest is lost": (raising("GuestLostError"), "because I say so"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_that_end_a_precopy_leave_the_guest_at_the_source(mover, name):
    answer, words = FIGURES[name]
    with HostileDestination(GetIncoming=answer) as double:
        ended = mover.wait_final(send_to(mover, double, types.MIGRATION_MODE_PRECOPY))
    assert ended.state == types.MIGRATION_STATE_FAILED
    assert words in ended.error.message
    check_stays(mover, ended)


ENDLESS = {
    "more pages than there are": seen(
        state=types.MIGRATION_STATE_PRECOPY, pages=types.PageCounts(total=U64, zero=U64, precopy=U64, stale=U64)
    ),
    "everything 2^64-1": seen(
        state=99, bytes_on_wire=U64, generation=U64, deferred_pages=U64, pages=types.PageCounts(total=U64)
    ),
    "no migration": lambda *_: transfer.GetIncomingResponse(),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_precopy_to_nowhere_can_be_cancelled(mover, name):
    with HostileDestination(GetIncoming=ENDLESS[name], Switchover=raising("StoppedError", holder=1)) as double:
        migration_id = send_to(mover, double, types.MIGRATION_MODE_PRECOPY)
        assert double.came.wait(10)
        with contextlib.suppress(grpc.RpcError):  # it may have come to its end by itself
            mover.cancel(migration_id)
        check_stays(mover, mover.wait_final(migration_id))


@pytest.fixture(scope="module")
def lured(mover):
    """A destination to which pages are served, and that never has enough; it knows the token."""
    with HostileDestination() as double:
        migration_id = send_to(mover, double, types.MIGRATION_MODE_PRECOPY)
        wait_until(lambda: "Invalidate" in double.calls, 20, "the precopy to begin")
        yield double
        mover.cancel(migration_id)
        check_stays(mover, mover.wait_final(migration_id))


ENDS = {
    "END with no token": ("Complete", {"token": ""}, "PERMISSION_DENIED", "token"),
    "END with a wrong token": ("Complete", {"token": "x" * 43}, "PERMISSION_DENIED", "token"),
    "END with a token of 1 MiB": ("Complete", {"token": "x" * (1 << 20)}, "PERMISSION_DENIED", "token"),
    "END before the switchover": ("Complete", {}, "FAILED_PRECONDITION", "END makes no sense in state PRECOPY"),
    "recovery with a wrong token": (
        "ResumeMigration",
        {"token": "x", "control_endpoint": "127.0.0.1:1"},
        "PERMISSION_DENIED",
        "token",
    ),
    "recovery before the switchover": (
        "ResumeMigration",
        {"control_endpoint": "127.0.0.1:1"},
        "FAILED_PRECONDITION",
        "no pages are served in state PRECOPY",
    ),
    "recovery from nowhere": ("ResumeMigration", {"control_endpoint": "::"}, "INVALID_ARGUMENT", "HOST:PORT"),
}


@pytest.mark.parametrize("name", ENDS)
def test_call_of_a_destination_at_the_wrong_time_is_refused(lured, mover, name):
    method, fields, status, words = ENDS[name]
    fields = {"migration_id": lured.prepared.migration_id, "token": lured.prepared.token, **fields}
    got, error = refusal_of(getattr(mover.transfer, method), getattr(transfer, f"{method}Request")(**fields))
    assert got == status
    assert words in error.message


RUNS = {
    "no page": {"page_count": 0},
    "257 pages": {"page_count": 257},
    "2^32-1 pages": {"page_count": U32},
    "behind the end": {"first_page": 4096, "page_count": 1},
    "over the end": {"first_page": 4095, "page_count": 2},
    "page 2^64-1": {"first_page": U64, "page_count": 1},
    "so many that they wrap": {"first_page": U64 - 3, "page_count": 8},
    "another region": {"region": 1, "page_count": 1},
}


@pytest.mark.parametrize("port", ["page", "control"])
@pytest.mark.parametrize("name", RUNS)
def test_run_that_is_not_there_ends_the_call(lured, mover, victim, name, port):
    endpoint = victim.pages if port == "page" else victim.control
    with channel_to(str(endpoint)) as channel:
        asked = iter([*requests_for([(0, 1)]), pb.FetchPagesRequest(request_id=2, **RUNS[name])])
        call = page_rpc.PageServiceStub(channel).FetchPages(asked, metadata=lured.metadata, timeout=20)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("port", ["page", "control"])
@pytest.mark.parametrize(
    ("metadata", "status"),
    [
        ((("migration-id", "?"), ("authorization", "Bearer x")), "NOT_FOUND"),
        ((), "NOT_FOUND"),
        ("wrong token", "PERMISSION_DENIED"),
        ("no token", "PERMISSION_DENIED"),
    ],
    ids=["unknown migration", "no metadata", "wrong token", "no token"],
)
def test_page_call_without_the_token_is_refused(lured, victim, port, metadata, status):
    identity = lured.metadata[0]
    metadata = {"wrong token": (identity, ("authorization", "Bearer x")), "no token": (identity,)}.get(
        metadata, metadata
    )
    endpoint = victim.pages if port == "page" else victim.control
    with channel_to(str(endpoint)) as channel:
        call = page_rpc.PageServiceStub(channel).FetchPages(iter(()), metadata=metadata, timeout=20)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code().name == status
