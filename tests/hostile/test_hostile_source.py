"""A source that lies, in what it calls and in the pages that it serves: its own migration ends, and says why."""

import struct
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness import zstd
from tests.harness.fake_source import common, hold_all
from tests.harness.hostile_source import PAGES, HostileSource
from tests.harness.memory import PAGE
from tests.harness.victim import refusal_of
from tests.unit.test_native_fetch_lies import LIES, NOT_GRPC

# Longer than every run of the tests can wait for.
pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.thorough]
U64 = 2**64 - 1


def gives_up(seen, words):
    assert seen.state == types.MIGRATION_STATE_FAILED
    assert seen.holder == types.GUEST_HOLDER_SOURCE
    assert words in seen.error.message


# ---- pages ----


@pytest.mark.parametrize("name", LIES)
def test_lie_about_pages_ends_the_migration(victim, name):
    lie, words = LIES[name]

    def answer(call, request):
        call.reply(lie(request))
        return True

    with HostileSource(victim, on_request=answer) as source:
        gives_up(source.fetched_until_it_fails(), words)
        victim.wait_alone()


@pytest.mark.parametrize("name", NOT_GRPC)
def test_page_service_that_is_none_ends_the_migration(victim, name):
    act, words = NOT_GRPC[name]

    def begin(call):
        act(call)
        return True

    with HostileSource(victim, on_call=begin, on_request=hold_all, on_end=hold_all) as source:
        try:
            seen = source.fetched_until_it_fails()
        except grpc.RpcError:  # known already when Prepare, or the first round, came
            seen = source.incoming()
        gives_up(seen, words)
        victim.wait_alone()


def frame_of(count_bytes, body):
    """A zstd frame with a single segment that claims so many bytes."""
    return zstd.MAGIC + bytes([0xE0]) + struct.pack("<Q", count_bytes) + body


def rle_block(count_bytes, *, last=True):
    return struct.pack("<I", count_bytes << 3 | 1 << 1 | last)[:3] + b"\x41"


BOMBS = {
    "frame of 2^64-1 bytes": lambda r: frame_of(U64, rle_block(1 << 17)),
    "frame of 1 TiB": lambda r: frame_of(1 << 40, rle_block(1 << 17)),
    "more than it claims": lambda r: frame_of(
        r.page_count * PAGE, rle_block(1 << 17, last=False) * 30_000 + rle_block(1)
    ),
    "less than it claims": lambda r: frame_of(r.page_count * PAGE, rle_block(1)),
    "two frames": lambda r: zstd.compressed(bytes(PAGE) * r.page_count) * 2,
    "no frame": lambda r: bytes(64),
    "nothing": lambda r: b"",
    "cut off": lambda r: zstd.compressed(bytes(PAGE) * r.page_count)[:-1],
    "another run's length": lambda r: zstd.compressed(bytes(PAGE) * (r.page_count + 1)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bomb_ends_the_migration(victim, name):
    def answer(call, request):
        content = pb.Compressed(compression=types.PAGE_COMPRESSION_ZSTD, data=BOMBS[name](request))
        call.reply(pb.FetchPagesResponse(**common(request), compressed=content))
        return True

    with HostileSource(victim, on_request=answer) as source:
        seen = source.fetched_until_it_fails(compression=types.PAGE_COMPRESSION_ZSTD)
        gives_up(seen, "")
        assert seen.pages.precopy == 0
        victim.wait_alone()


def test_compressed_run_that_was_not_agreed_on_ends_the_migration(victim):
    def answer(call, request):
        content = pb.Compressed(
            compression=types.PAGE_COMPRESSION_ZSTD, data=zstd.compressed(bytes(PAGE) * request.page_count)
        )
        call.reply(pb.FetchPagesResponse(**common(request), compressed=content))
        return True

    with HostileSource(victim, on_request=answer) as source:
        gives_up(source.fetched_until_it_fails(), "compress")


@pytest.mark.parametrize("digest", [0, 12345, U64])
def test_digest_that_does_not_match_ends_the_migration(victim, digest):
    with HostileSource(victim, digest=lambda *_: digest) as source:
        gives_up(source.fetched_until_it_fails(verify=True), "do not have the source's digest")


# ---- rounds of stale pages ----


def stale(first_page, bitmap=b"\x01"):
    return {"stale": [transfer.StalePages(first_page=first_page, bitmap=bitmap)]}


ROUNDS = {
    "page behind the end": (stale(PAGES), "ABORTED", "do not lie within"),
    "page 2^64-1": (stale(U64), "ABORTED", "do not lie within"),
    "page 2^63": (stale(1 << 63), "ABORTED", "do not lie within"),
    "bitmap over the end": (stale(PAGES - 8, b"\xff\xff"), "ABORTED", "do not lie within"),
    "bitmap of 1 MiB": (stale(0, b"\xff" * (1 << 20)), "ABORTED", "do not lie within"),
    "attempt 7": ({"attempt": 7}, "FAILED_PRECONDITION", "attempt 7 is not the one"),
    "attempt 2^32-1": ({"attempt": 2**32 - 1}, "FAILED_PRECONDITION", "is not the one"),
    "an older generation": ({"generation": 0}, "ABORTED", "by generation 0"),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_round_that_makes_no_sense_is_refused(victim, name):
    fields, status, words = ROUNDS[name]
    with HostileSource(victim, on_request=hold_all) as source:
        source.prepare()
        source.invalidate(generation=1)
        got, error = refusal_of(lambda timeout: source.invalidate(**fields))
        assert got == status
        assert words in error.message


def test_generation_of_2_64_less_1_leaves_nothing_to_come_and_harms_nobody(victim):
    with HostileSource(victim) as source:
        source.prepare()
        source.invalidate(generation=U64)
        assert source.incoming().generation == U64


def test_round_in_mode_postcopy_is_refused(victim):
    with HostileSource(victim, on_request=hold_all) as source:
        source.prepare(mode=types.MIGRATION_MODE_POSTCOPY)
        status, error = refusal_of(lambda timeout: source.invalidate())
        assert status == "FAILED_PRECONDITION"
        assert "cannot be invalidated" in error.message


# ---- switchover ----

STATES = {
    "no state": b"",
    "one byte": b"\x00",
    "garbage": bytes(range(256)) * 16,
    "ones": b"\xff" * 4096,
    "1 MiB": bytes(1 << 20),
    "2 MiB less a little": bytes((2 << 20) - 4096),
}


@pytest.mark.parametrize("name", STATES)
def test_state_that_is_none_is_refused_and_the_twin_destroyed(victim, name):
    with HostileSource(victim, on_request=hold_all) as source:
        source.prepare(mode=types.MIGRATION_MODE_POSTCOPY)
        status, error = refusal_of(lambda timeout: source.switch_over(state=STATES[name]))
        assert status == "ABORTED"
        assert error.type_name in ("MigrationAbortedError", "AttemptLostError")
        assert "could not run the guest" in error.message
        victim.wait_alone()
        status, error = refusal_of(lambda timeout: source.switch_over(state=STATES[name]))
        assert status == "FAILED_PRECONDITION"


@pytest.mark.parametrize("attempt", [2, 2**32 - 1])
def test_switchover_of_another_attempt_is_refused(victim, attempt):
    with HostileSource(victim, on_request=hold_all) as source:
        source.prepare(mode=types.MIGRATION_MODE_POSTCOPY)
        status, error = refusal_of(lambda timeout: source.switch_over(attempt=attempt))
        assert status == "FAILED_PRECONDITION"
        assert "is not the one that was prepared" in error.message


def test_switchover_twice_at_one_time_is_refused_once(victim):
    with HostileSource(victim, on_request=hold_all) as source:
        source.prepare(mode=types.MIGRATION_MODE_POSTCOPY)
        with ThreadPoolExecutor(8) as pool:
            found = [
                each.result()[0]
                for each in [pool.submit(refusal_of, source.stub.Switchover, source.switchover()) for _ in range(8)]
            ]
        assert sorted(found) == ["ABORTED"] + ["FAILED_PRECONDITION"] * 7


# ---- attempts and tokens ----


def test_attempt_that_was_here_before_is_refused(victim):
    with HostileSource(victim, on_request=hold_all) as source:
        source.prepare(attempt=5)
        for attempt in (5, 4, 0):
            status, error = refusal_of(source.stub.Prepare, source.request(attempt=attempt))
            assert status == "ALREADY_EXISTS"
            assert "has been here before" in error.message


def test_attempt_after_the_last_one_is_refused(victim):
    with HostileSource(victim) as source:
        source.stub.Abort(transfer.AbortRequest(migration_id=source.migration_id), timeout=30)
        status, error = refusal_of(source.stub.Prepare, source.request(attempt=2**32 - 1))
        assert status == "ALREADY_EXISTS"
        assert "has been here before" in error.message


@pytest.mark.parametrize("token", ["", "secre", "secret2", "s\u00e9cret", "x" * 100_000])
def test_resume_with_a_wrong_token_is_refused(victim, token):
    with HostileSource(victim, on_request=hold_all) as source:
        source.prepare()
        asked = transfer.ResumeMigrationRequest(
            migration_id=source.migration_id, token=token, control_endpoint="127.0.0.1:1"
        )
        status, error = refusal_of(source.stub.ResumeMigration, asked)
        assert status == "PERMISSION_DENIED"
        assert "token" in error.message
        asked.control_endpoint = "nowhere"
        assert refusal_of(source.stub.ResumeMigration, asked)[0] == "INVALID_ARGUMENT"


def test_prepares_without_end_are_refused_at_the_64th_twin(victim):
    """Never switched over, never given up: what they took is free again once they are."""
    sources = [HostileSource(victim, on_request=hold_all) for _ in range(65)]
    try:
        for source in sources[:64]:
            source.prepare()
        status, error = refusal_of(sources[64].stub.Prepare, sources[64].request())
        assert (status, error.type_name) == ("RESOURCE_EXHAUSTED", "LimitError")
        assert "64 guests that have not arrived" in error.message
        victim.check_well()
    finally:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda source: source.__exit__(None, None, None), sources))
    victim.wait_alone()
