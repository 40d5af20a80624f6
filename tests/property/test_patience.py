"""How long a peer is waited for, and the pauses between tries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.native._native import ffi, lib

MS = 1_000_000
SECOND = 1000 * MS
FIRST, LONGEST = 20 * MS, SECOND


@given(st.integers(1000, 10**9))
def test_loss_of_a_peer_is_known_within_its_timeout(peer_timeout_us):
    patience = lib.mig_patience_of(peer_timeout_us)
    peer_timeout_ns = peer_timeout_us * 1000
    assert patience.silent_ns + patience.lost_ns <= peer_timeout_ns
    assert 2 * patience.ping_ns <= patience.silent_ns, "there is time for an answer"
    assert patience.ping_ns <= SECOND
    assert patience.connect_ns < patience.lost_ns
    assert patience.proven_ns <= patience.lost_ns


def test_five_seconds_unless_told_otherwise():
    default, told = (ffi.new("struct mig_patience *", lib.mig_patience_of(us)) for us in (0, 5_000_000))
    assert bytes(ffi.buffer(default)) == bytes(ffi.buffer(told))


def made(random=None):
    backoff = ffi.new("struct mig_backoff *")
    lib.mig_backoff_init(backoff)
    if random is not None:
        backoff.random = random
    return backoff


@given(st.integers(1, 2**64 - 1), st.integers(1, 20))
def test_pauses_grow_to_a_second_each_within_the_upper_half(random, tries):
    backoff = made(random)
    assert lib.mig_backoff_next_ns(backoff) == 0
    longest = FIRST
    for _ in range(tries):
        assert longest // 2 <= lib.mig_backoff_next_ns(backoff) <= longest
        longest = min(longest * 2, LONGEST)
    lib.mig_backoff_reset(backoff)
    assert lib.mig_backoff_next_ns(backoff) == 0
    assert FIRST // 2 <= lib.mig_backoff_next_ns(backoff) <= FIRST


def test_no_two_links_keep_step_and_pauses_spread_over_the_half():
    starts = [made() for _ in range(2000)]
    for backoff in starts:
        lib.mig_backoff_next_ns(backoff)
    pauses = [lib.mig_backoff_next_ns(backoff) for backoff in starts]
    assert len(set(pauses)) > len(pauses) * 0.99
    assert sum(pauses) / len(pauses) == pytest.approx(FIRST * 0.75, rel=0.02)
    quarter = FIRST // 8
    for part in range(4):
        low = FIRST // 2 + part * quarter
        assert 400 < sum(low <= pause < low + quarter for pause in pauses) < 600
