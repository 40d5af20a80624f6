"""The pacer, on a clock that the test holds."""

from migrate.pager.pacing import Pacer
from migrate.telemetry.clock import Clock


class Time:
    def __init__(self):
        self.us = 1_000_000

    def clock(self):
        return Clock(lambda: self.us)


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
