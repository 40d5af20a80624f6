"""Pauses between tries: they grow, they are bounded, and two who lost the same thing do not come back at once."""

import random

from hypothesis import given
from hypothesis import strategies as st

from migrate.session.backoff import Backoff

FIRST_S = 0.1
MAX_S = 2.0


def backoff_of(seed, first_s=FIRST_S, max_s=MAX_S):
    return Backoff(first_s, max_s, random.Random(seed))  # noqa: S311 - jitter, no secret


@given(seed=st.integers(0, 2**32), first_s=st.floats(0.001, 1), factor=st.floats(1, 100), tries=st.integers(1, 30))
def test_each_pause_is_in_the_upper_half_of_its_step(seed, first_s, factor, tries):
    max_s = first_s * factor
    backoff = backoff_of(seed, first_s, max_s)
    for attempt in range(tries):
        step_s = min(first_s * 2**attempt, max_s)
        assert step_s / 2 <= backoff.next_s() <= step_s


def test_pauses_grow_up_to_the_cap_and_stay_there():
    backoff = backoff_of(1)
    pauses_s = [backoff.next_s() for _ in range(12)]
    assert pauses_s[0] <= FIRST_S
    assert max(pauses_s) <= MAX_S
    assert all(pause_s >= MAX_S / 2 for pause_s in pauses_s[6:])


def test_jitter_spreads_over_the_whole_half():
    firsts = [backoff_of(seed).next_s() for seed in range(200)]
    assert len(set(firsts)) == 200
    assert min(firsts) < FIRST_S * 0.55
    assert max(firsts) > FIRST_S * 0.95


def test_reset_begins_anew():
    backoff = backoff_of(1)
    for _ in range(10):
        backoff.next_s()
    backoff.reset()
    assert backoff.next_s() <= FIRST_S
