"""When to switch over, on series of rounds as they were recorded, and at the edges of the rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.session.convergence import (
    OVERHEAD_US,
    SETTLE_ROUNDS_MAX,
    SETTLED_PAGES,
    Next,
    Round,
    Terms,
    is_stuck,
    next_step,
    transfer_us,
)
from migrate.v1 import types_pb2 as types

GIGABIT_BYTES_PER_S = 117e6

# Rounds, and the bandwidth that was measured by then, of `migrate demo --mode precopy --vcpus 2 --write-ratio 1`.
# With --memory 1GiB --touch-rate 1000:
SLOW_WRITER = [(Round(1_509, 606_125), 1_780_605_835)]
# The same with --max-bandwidth 1Gbit:
SLOW_WRITER_CAPPED = [(Round(15_341, 8_576_204), 125_322_605), (Round(1_383, 538_952), 133_214_760)]
# At full speed, with --memory 256MiB --max-bandwidth 100MB:
FULL_SPEED_CAPPED = [
    (Round(65_525, 2_666_224), 100_910_427),
    (Round(65_525, 2_701_250), 100_992_691),
    (Round(65_525, 2_701_211), 100_910_521),
    (Round(65_525, 2_706_747), 100_919_513),
]


def precopy(on_no_convergence=types.NO_CONVERGENCE_POSTCOPY, downtime_limit_us=50_000):
    return Terms(types.MIGRATION_MODE_PRECOPY, downtime_limit_us, on_no_convergence)


def play(terms, recorded):
    """The step after each round, until one is not ANOTHER_ROUND."""
    rounds, steps = [], []
    for one, bandwidth_bytes_per_s in recorded:
        rounds.append(one)
        steps.append(next_step(terms, rounds, bandwidth_bytes_per_s))
        if steps[-1] is not Next.ANOTHER_ROUND:
            break
    return steps


def test_a_slow_writer_switches_after_the_first_pass():
    assert play(precopy(), SLOW_WRITER) == [Next.SWITCH_WITH_ALL]


def test_a_slow_link_takes_one_round_more():
    assert play(precopy(), SLOW_WRITER_CAPPED) == [Next.ANOTHER_ROUND, Next.SWITCH_WITH_ALL]


@pytest.mark.parametrize(
    ("on_no_convergence", "last"),
    [
        (types.NO_CONVERGENCE_POSTCOPY, Next.SWITCH_WITH_REST),
        (types.NO_CONVERGENCE_FAIL, Next.GIVE_UP),
        (types.NO_CONVERGENCE_WAIT, Next.ANOTHER_ROUND),
    ],
)
def test_a_writer_faster_than_the_link_does_not_converge(on_no_convergence, last):
    assert play(precopy(on_no_convergence), FULL_SPEED_CAPPED) == [Next.ANOTHER_ROUND] * 3 + [last]


def test_rounds_that_shrink_are_not_stuck():
    assert not is_stuck([Round(pages, 1) for pages in (1_000, 800, 600, 450, 330)])
    assert not is_stuck([Round(pages, 1) for pages in (1_000, 990, 980, 500)])
    assert is_stuck([Round(pages, 1) for pages in (1_000, 990, 980, 970)])


def test_rounds_that_go_up_and_down_make_no_progress():
    # Each is a tenth smaller than the one before it, or larger; none than the smallest.
    assert is_stuck([Round(pages, 1) for pages in (1_000, 1_200, 1_000, 1_180)])
    assert not is_stuck([Round(pages, 1) for pages in (1_000, 1_200, 1_000, 890)])


def test_three_rounds_without_progress_are_needed():
    assert not is_stuck([Round(1_000, 1)] * 3)
    assert is_stuck([Round(1_000, 1)] * 4)


def test_hybrid_looks_until_little_is_stale():
    terms = Terms(types.MIGRATION_MODE_HYBRID)
    many, few = Round(SETTLED_PAGES + 1, 1), Round(SETTLED_PAGES, 1)
    assert next_step(terms, [many], 0) is Next.ANOTHER_LOOK
    assert next_step(terms, [many, few], 0) is Next.SWITCH_WITH_REST
    assert next_step(terms, [many] * SETTLE_ROUNDS_MAX, 0) is Next.SWITCH_WITH_REST


def test_the_downtime_limit_includes_what_is_not_pages():
    pages = 1_000
    exact_us = OVERHEAD_US + transfer_us(pages, GIGABIT_BYTES_PER_S)
    rounds = [Round(pages, 1_000_000)]
    assert next_step(precopy(downtime_limit_us=int(exact_us) + 1), rounds, GIGABIT_BYTES_PER_S) is Next.SWITCH_WITH_ALL
    assert next_step(precopy(downtime_limit_us=int(exact_us) - 1), rounds, GIGABIT_BYTES_PER_S) is Next.ANOTHER_ROUND


@given(
    dirty=st.lists(st.integers(0, 1 << 24), min_size=1, max_size=20),
    limit_us=st.integers(1, 10**7),
    bandwidth=st.floats(0, 1e11),
    on_no_convergence=st.sampled_from([1, 2, 3]),
)
def test_what_is_switched_with_fits(dirty, limit_us, bandwidth, on_no_convergence):
    rounds = [Round(pages, 1_000) for pages in dirty]
    step = next_step(precopy(on_no_convergence, limit_us), rounds, bandwidth)
    if step is Next.SWITCH_WITH_ALL:
        assert OVERHEAD_US + transfer_us(dirty[-1], bandwidth) <= limit_us
    if step is Next.GIVE_UP:
        assert on_no_convergence == types.NO_CONVERGENCE_FAIL
    if on_no_convergence == types.NO_CONVERGENCE_WAIT:
        assert step in (Next.ANOTHER_ROUND, Next.SWITCH_WITH_ALL)


def test_a_round_knows_its_rate():
    assert Round(500, 250_000).dirty_pages_per_s == pytest.approx(2_000)
    assert Round(5, 0).dirty_pages_per_s > 0
