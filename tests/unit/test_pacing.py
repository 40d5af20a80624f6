"""The pacing of the background, on clocks and links that the test holds."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.config import REQUEST_PAGES_MAX
from migrate.native._native import ffi, lib
from migrate.native.pacing import Window
from migrate.pager.pacing import Pacer
from migrate.telemetry.clock import Clock

KIB = 1 << 10
WINDOW_MIN, WINDOW_MAX = 16 * KIB, 16 * KIB * KIB
NO_RTT = 2**64 - 1


class Time:
    def __init__(self):
        self.us = 1_000_000

    def clock(self):
        return Clock(lambda: self.us)


# ---- the cap ----


def test_no_cap_is_no_delay():
    pacer = Pacer(0, Time().clock())
    assert [pacer.delay_s(1 << 30) for _ in range(3)] == [0, 0, 0]


def test_rate_is_kept_over_time():
    time = Time()
    pacer = Pacer(1_000_000, time.clock())
    start_us = time.us
    for _ in range(100):
        time.us += round(pacer.delay_s(100_000) * 1_000_000)
    # 10 MB at 1 MB/s; the last 100 kB are on their way, and 20 ms may come at once.
    assert 9.85 <= (time.us - start_us) / 1_000_000 <= 10


def test_pause_does_not_save_up_a_burst():
    time = Time()
    pacer = Pacer(1_000_000, time.clock())
    pacer.delay_s(1000)
    time.us += 60_000_000
    assert pacer.delay_s(1_000_000) == 0
    assert 0.97 < pacer.delay_s(1) <= 1


@given(
    rate=st.integers(1, 2**40),
    steps=st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 1 << 20)), min_size=1, max_size=50),
)
def test_cap_is_never_exceeded_whatever_is_asked_for(rate, steps):
    """All that may have left by any time is the rate's, a burst of 20 ms, and what is leaving now."""
    time, total = Time(), 0
    pacer = Pacer(rate, time.clock())
    start_us = time.us
    for pause_us, count_bytes in steps:
        time.us += pause_us
        time.us += -int(-pacer.delay_s(count_bytes) * 1_000_000 // 1)
        assert total <= rate * (time.us - start_us + 20_000 + len(steps)) / 1_000_000 + 1
        total += count_bytes


# ---- the window: a link in numbers ----


@dataclass
class Link:
    """What an urgent round trip costs, and what the background delivers, for a window of so many bytes.

    Attributes:
        rate: Of the bottleneck, bytes a second.
        base_us: A round trip without any queue.
        noise_us: The mean of what the CPUs add to one round trip, exponential.
        turn_us: The mean time that one window takes besides, where the CPUs and not the link are the bottleneck.
    """

    rate: float
    base_us: float
    noise_us: float = 50
    turn_us: float = 0

    @property
    def knee_bytes(self):
        """The smallest window that fills the link."""
        return self.rate * (self.base_us + self.turn_us) / 1e6


@dataclass
class Outcome:
    """The second half of a run: delivered bytes a second, windows, the queue in microseconds as it really was."""

    rate: float
    windows: list
    queue_us: float
    first_s_above: dict


def run(link, seconds, seed=1, base_known=True):
    rng = random.Random(seed)  # noqa: S311 - the same every time
    window = Window(0, int(link.base_us * 1000) if base_known else 0)
    now_us, rtts, smallest_us, delivered = 0.0, 0, NO_RTT, 0.0
    second_half = {"bytes": 0.0, "since": None, "windows": [], "queues": []}
    above = {}
    while now_us < seconds * 1e6:
        standing_us = max(0.0, (window.count_bytes - link.rate * link.base_us / 1e6) / link.rate * 1e6)
        if link.turn_us:
            standing_us = 0.0  # the bytes in flight wait for a CPU, not in front of the link
        effective = min(link.rate, window.count_bytes / ((link.base_us + link.turn_us) / 1e6))
        noise_us = rng.expovariate(1 / link.noise_us) if link.noise_us else 0
        rtt_us = link.base_us + standing_us * rng.uniform(0.6, 1.0) + noise_us
        step_us = rtt_us + 30
        now_us += step_us
        window.on_delivery(int(effective * step_us / 1e6))
        delivered += effective * step_us / 1e6
        rtts, smallest_us = rtts + 1, min(smallest_us, rtt_us)
        if window.is_due(int(now_us * 1000), rtts):
            window.tick(int(now_us * 1000), rtts, int(smallest_us * 1000))
            rtts, smallest_us = 0, NO_RTT
            assert WINDOW_MIN <= window.count_bytes <= WINDOW_MAX
            for share in (0.5, 0.9):
                if effective > share * link.rate:
                    above.setdefault(share, now_us / 1e6)
        if now_us > seconds * 5e5:
            if second_half["since"] is None:
                second_half["since"], second_half["bytes"] = now_us, delivered
            second_half["windows"].append(window.count_bytes)
            second_half["queues"].append(standing_us)
    return Outcome(
        (delivered - second_half["bytes"]) / (now_us - second_half["since"]) * 1e6,
        second_half["windows"],
        sum(second_half["queues"]) / len(second_half["queues"]),
        above,
    )


seeds = pytest.mark.parametrize("seed", [1, 2, 3])


@seeds
def test_gigabit_is_full_with_a_short_queue(seed):
    outcome = run(Link(125e6, 80), 3, seed)
    assert outcome.rate > 0.98 * 125e6
    assert 100 <= outcome.queue_us <= 350


@seeds
def test_path_that_was_never_seen_empty_is_full_all_the_same(seed):
    """The first queue then counts as path; it stays bounded."""
    outcome = run(Link(125e6, 80), 3, seed, base_known=False)
    assert outcome.rate > 0.98 * 125e6
    assert outcome.queue_us < 2000


@seeds
def test_ten_gigabit_is_full_with_a_short_queue(seed):
    outcome = run(Link(1.25e9, 60), 3, seed)
    assert outcome.rate > 0.98 * 1.25e9
    assert 100 <= outcome.queue_us <= 350


@seeds
def test_hundred_megabit_is_full_and_its_queue_as_short_as_the_smallest_window_allows(seed):
    outcome = run(Link(12.5e6, 300), 3, seed)
    assert outcome.rate > 0.98 * 12.5e6
    # 16 KiB are 1311 us at this rate, 300 of which are the path.
    assert outcome.queue_us <= 1311 - 300 + 350


@seeds
def test_long_path_is_more_than_nine_tenths_full_within_two_seconds(seed):
    outcome = run(Link(125e6, 20_000), 6, seed)
    assert outcome.first_s_above[0.9] < 2
    assert outcome.rate > 0.95 * 125e6
    assert outcome.queue_us <= 20_000 / 4 * 1.75


@seeds
@pytest.mark.parametrize(
    "link",
    [
        Link(125e6, 80, noise_us=500),
        Link(125e6, 80, noise_us=2000),
        Link(1.3e9, 30, noise_us=30, turn_us=200),
        Link(1.3e9, 30, noise_us=1000, turn_us=1000),
        Link(20e6, 500, noise_us=3000, turn_us=3000),
        Link(125e6, 20_000, noise_us=2000),
    ],
    ids=["noise", "much noise", "CPU-bound", "CPU-bound with noise", "slow and CPU-bound", "long and noisy"],
)
def test_busy_cpus_do_not_make_the_window_collapse(link, seed):
    outcome = run(link, 3, seed)
    best = min(link.rate, WINDOW_MAX / ((link.base_us + link.turn_us) / 1e6))
    capped = min(best, KIB * KIB / ((link.base_us + link.turn_us) / 1e6)) if link.turn_us else best
    assert outcome.rate > 0.85 * capped
    assert min(outcome.windows) > min(link.knee_bytes, KIB * KIB) / 4


@seeds
def test_path_that_becomes_slow_shortens_the_window(seed):
    rng = random.Random(seed)  # noqa: S311 - the same every time
    window = Window(0, 80_000)
    now_us = 0
    for rate in (125e6, 5e6):
        for _ in range(3000):
            queue_us = max(0.0, (window.count_bytes - rate * 80e-6) / rate * 1e6)
            rtt_us = 80 + queue_us * rng.uniform(0.6, 1) + rng.expovariate(1 / 20)
            now_us += 16 * (rtt_us + 30)
            window.on_delivery(int(rate * 16 * (rtt_us + 30) / 1e6))
            if window.is_due(int(now_us * 1000), 16):
                window.tick(int(now_us * 1000), 16, int(rtt_us * 1000))
    assert window.count_bytes <= 2 * WINDOW_MIN


# ---- the window: whatever is measured ----

times_ns = st.integers(0, 2**40)
ticks = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 100_000_000), times_ns),  # elapsed
        st.one_of(st.integers(0, 1 << 30), st.integers(0, 2**40)),  # delivered
        st.integers(0, 100),  # round trips
        st.one_of(st.integers(1, 10_000_000), times_ns),  # the smallest
    ),
    max_size=60,
)


def check_bounds(window):
    assert WINDOW_MIN <= window.count_bytes <= WINDOW_MAX
    assert 0 < window.run_pages <= REQUEST_PAGES_MAX


@given(begin_ns=st.integers(0, 2**62), base_ns=st.one_of(st.just(0), st.integers(1, 10**7), times_ns), ticks=ticks)
def test_window_stays_within_its_bounds_whatever_is_measured(begin_ns, base_ns, ticks):
    """And nothing divides by zero: a rate of 0, no time between ticks, round trips of 0, and none at all."""
    window = Window(begin_ns, base_ns)
    check_bounds(window)
    now_ns = begin_ns
    for elapsed_ns, delivered, rtts, smallest_ns in ticks:
        now_ns += elapsed_ns
        window.on_delivery(delivered)
        window.is_due(now_ns, rtts)
        window.tick(now_ns, rtts, smallest_ns if rtts else NO_RTT)
        check_bounds(window)


@given(ticks=ticks, base_ns=st.integers(1, 10**7))
def test_base_is_the_smallest_round_trip_of_all(ticks, base_ns):
    window = ffi.new("struct mig_window *")
    lib.mig_window_init(window, 0, base_ns)
    now_ns, smallest = 0, base_ns
    for elapsed_ns, delivered, rtts, smallest_ns in ticks:
        now_ns += elapsed_ns
        lib.mig_window_on_delivery(window, delivered)
        lib.mig_window_tick(window, now_ns, {"count": rtts, "smallest_ns": smallest_ns if rtts else NO_RTT})
        if rtts and smallest_ns:
            smallest = min(smallest, smallest_ns)
        if all(tick[3] for tick in ticks):
            assert window.base_rtt_ns == smallest
        assert window.queue_ns <= 2**40


def test_epoch_ends_with_enough_round_trips_or_with_patience():
    window = Window(0, 80_000)
    assert not window.is_due(3_000_000, 1000)
    assert window.is_due(5_000_000, 1000)
    window.tick(5_000_000, 1000, 80_000)
    assert not window.is_due(10_000_000, 0)
    assert window.is_due(5_000_000 + 100_000_000, 0)


def test_no_round_trips_leave_the_window_as_it_is():
    window = Window(0, 80_000)
    before = window.count_bytes
    window.tick(50_000_000, 0, NO_RTT)
    assert window.count_bytes == before


def test_long_epoch_of_a_long_path_is_two_round_trips():
    window = Window(0, 200_000_000)
    assert not window.is_due(390_000_000, 1000)
    assert window.is_due(410_000_000, 1000)
