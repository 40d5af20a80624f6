"""Runs in zstd: what comes back, what is not worth it, and what a liar gets."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.guarded import GuardedBuffer
from tests.harness.memory import PAGE, half_random_page_bytes, page_bytes, random_page_bytes
from tests.harness.zstd import (
    BLOCK_BYTES_MAX,
    MAGIC,
    SKIPPABLE_MAGIC,
    BadRunError,
    Decompressor,
    compressed,
    decompressed,
    frame,
    raw,
    rle,
)

ROOM = GuardedBuffer(1 << 16)
GIBIBYTE = 1 << 30


def run_of(fill, count):
    return b"".join(map(fill, range(count)))


@pytest.mark.parametrize("count", [1, 2, 4, 5, 64, 255, 256])
@pytest.mark.parametrize("fill", [page_bytes, half_random_page_bytes], ids=["dense", "half random"])
def test_run_comes_back_as_it_was(fill, count):
    pages = run_of(fill, count)
    data = compressed(pages)
    assert len(data) <= len(pages) * 7 // 8
    assert decompressed(data, count) == pages


@pytest.mark.parametrize("count", [1, 4, 256])
def test_run_that_nothing_compresses_is_left_as_it_was(count):
    assert compressed(run_of(random_page_bytes, count)) is None


@pytest.mark.parametrize(("zero_share", "is_worth_it"), [(0.10, False), (0.15, True)])
def test_run_must_shrink_by_an_eighth(zero_share, is_worth_it):
    pages = run_of(random_page_bytes, 64)
    zeros = int(len(pages) * zero_share)
    pages = pages[zeros:] + bytes(zeros)
    assert (compressed(pages) is not None) == is_worth_it


def test_run_that_is_too_long_is_left_as_it_was():
    assert compressed(bytes(300 * PAGE)) is None


def test_one_decompressor_takes_runs_of_any_length_after_each_other_and_after_bad_ones():
    decompressor = Decompressor()
    for count in (1, 256, 3, 64):
        pages = run_of(page_bytes, count)
        with pytest.raises(BadRunError):
            decompressor.run(b"nonsense" * 100, count)
        assert decompressor.run(compressed(pages), count) == pages


def test_frame_of_a_foreign_encoder_is_taken():
    """Anything that RFC 8878 allows, as long as it says how long it is."""
    block = BLOCK_BYTES_MAX
    data = frame(raw(b"a" * 100, last=False), rle(b"b", block, last=False), rle(b"c", 33 * PAGE - block - 100),
                 claims_bytes=33 * PAGE)  # fmt: skip
    assert decompressed(data, 33) == b"a" * 100 + b"b" * block + b"c" * (33 * PAGE - block - 100)


GOOD = compressed(run_of(page_bytes, 4))
BAD_RUNS = {
    "nothing": (b"", 4, "not zstd"),
    "three bytes": (MAGIC[:3], 4, "not zstd"),
    "magic alone": (MAGIC, 4, "not zstd"),
    "no zstd": (b"\x1f\x8b" + bytes(100), 4, "not zstd"),
    "plain pages": (run_of(page_bytes, 4), 4, "not zstd"),
    "format of before the RFC": (b"\x27\xb5\x2f\xfd" + GOOD[4:], 4, "not zstd"),
    "skippable frame": (SKIPPABLE_MAGIC + struct.pack("<I", 8) + bytes(8), 4, "not zstd"),
    "skippable frame before it": (SKIPPABLE_MAGIC + struct.pack("<I", 8) + bytes(8) + GOOD, 4, "not zstd"),
    "skippable frame behind it": (GOOD + SKIPPABLE_MAGIC + struct.pack("<I", 8) + bytes(8), 4, "behind its end"),
    "two frames": (GOOD + GOOD, 4, "behind its end"),
    "two frames that are the run together": (compressed(run_of(page_bytes, 2)) * 2, 4, "claims to hold 8192"),
    "byte behind it": (GOOD + b"\0", 4, "1 bytes behind its end"),
    "cut off": (GOOD[:-1], 4, "broken"),
    "header alone": (frame(claims_bytes=4 * PAGE), 4, "broken"),
    "no length": (frame(rle(b"x", 4 * PAGE)), 4, "does not say how long it is"),
    "longer run": (GOOD, 3, "a compressed run of 12288 bytes that claims to hold 16384"),
    "shorter run": (GOOD, 5, "claims to hold 16384"),
    "empty frame": (frame(raw(b""), claims_bytes=0), 4, "claims to hold 0"),
    "claims too little and holds more": (frame(rle(b"x", 5 * PAGE), claims_bytes=4 * PAGE), 4, "broken"),
    "claims too much and holds less": (frame(rle(b"x", 3 * PAGE), claims_bytes=4 * PAGE), 4, "broken"),
    "no page": (frame(raw(b""), claims_bytes=0), 0, "a compressed run of 0 pages"),
    "257 pages": (frame(rle(b"x", PAGE), claims_bytes=257 * PAGE), 257, "a compressed run of 257 pages"),
    "2^52-1 pages": (GOOD, 2**52 - 1, "pages"),
    "claim of 2^64-1": (frame(rle(b"x", PAGE), claims_bytes=2**64 - 1), 4, ""),
    "claim of 2^63": (frame(rle(b"x", PAGE), claims_bytes=2**63), 4, "claims to hold 9223372036854775808"),
    "bomb that says so": (
        frame(*[rle(b"x", BLOCK_BYTES_MAX, last=False)] * 8192, rle(b"x", 1), claims_bytes=GIBIBYTE + 1),
        4,
        "claims to hold 1073741825",
    ),
    "bomb that does not": (
        frame(*[rle(b"x", BLOCK_BYTES_MAX, last=False)] * 8192, rle(b"x", 1), claims_bytes=4 * PAGE),
        4,
        "broken",
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_what_is_not_exactly_the_run_is_refused_with_words(name):
    data, count, words = BAD_RUNS[name]
    with pytest.raises(BadRunError) as caught:
        decompressed(data, count)
    assert words in str(caught.value)


@given(data=st.data(), count=st.integers(1, 8))
def test_changed_frame_is_refused_or_is_as_long_as_its_run_and_is_never_read_beyond(data, count):
    changed = bytearray(compressed(run_of(page_bytes, count)))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(changed)))]
    # Decompressor.run reads as many bytes as the run has.
    with contextlib.suppress(BadRunError):
        assert Decompressor().run(changed, count, ROOM.hold(bytes(changed)))
