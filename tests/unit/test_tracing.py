"""A trace on its way from the destination to an operator: nothing is lost unseen, and nothing grows without end."""

import pytest

from migrate.errors import ChannelError, ConfigError
from migrate.native.pager import FaultBatch, PagerCounters
from migrate.session import tracing
from migrate.session.states import State
from migrate.session.tracing import TraceFeed, TraceInbox
from migrate.telemetry.clock import Clock
from migrate.v1 import types_pb2 as types

RECORD_BYTES = 64
MIGRATION = ("m", "t")


class Time:
    def __init__(self):
        self.now_us = 1_000_000

    @property
    def clock(self):
        return Clock(lambda: self.now_us)


class Source:
    """Takes parts, or does not."""

    def __init__(self):
        self.parts = []
        self.failures = []
        self.calls = 0

    def record_trace(self, request):
        assert (request.migration_id, request.token) == MIGRATION
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        self.parts.append(request.part)


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def feed(time):
    return TraceFeed(*MIGRATION, time.clock)


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def inbox(time):
    return TraceInbox(time.clock)


def faults(count, first=0):
    return FaultBatch(b"".join((first + number).to_bytes(RECORD_BYTES, "little") for number in range(count)))


def counters(missing=5):
    return PagerCounters(*[10, missing, *[0] * (len(PagerCounters.__slots__) - 2)])


def hand_over(feed, source, **more):
    feed.hand_over(source, **more)


def test_all_that_was_seen_arrives_once_and_in_order(feed, source, time):
    feed.add_state(State.PRECOPY)
    feed.add_sample(counters(), b"\xff", 77)
    feed.add_faults(faults(3))
    hand_over(feed, source)
    time.now_us += 5
    feed.add_faults(faults(2, first=3))
    feed.add_state(State.SWITCHOVER)
    feed.add_threads([7, 8])
    feed.add_stalls(types.GuestStatistics(stalls=[types.StallCount(stall_us=20, count=3)]))
    hand_over(feed, source, is_last=True)
    got = types.TracePart()
    for part in source.parts:
        got.MergeFrom(part)
    assert b"".join(part.faults for part in source.parts) == faults(5).raw
    assert [(step.at_ns, step.state) for step in got.states] == [(1_000_000_000, 2), (1_000_005_000, 3)]
    assert (got.progress[0].missing_pages, got.progress[0].bytes_on_wire) == (5, 77)
    assert (list(got.vcpu_thread_ids), got.stalls[0].count, got.is_last) == ([7, 8], 3, True)
    assert got.origin_ns == 1_000_000_000


def test_nothing_is_said_where_there_is_nothing(feed, source):
    hand_over(feed, source)
    calls = source.calls
    hand_over(feed, source)
    assert source.calls == calls


def test_what_does_not_arrive_is_handed_over_again(feed, source):
    feed.add_faults(faults(2))
    feed.add_state(State.PRECOPY)
    source.failures = [ChannelError("away")]
    with pytest.raises(ChannelError):
        hand_over(feed, source)
    feed.add_faults(faults(1, first=2))
    feed.add_state(State.SWITCHOVER)
    hand_over(feed, source)
    assert b"".join(part.faults for part in source.parts) == faults(3).raw
    assert [step.state for part in source.parts for step in part.states] == [2, 3]


def test_what_was_gathered_for_a_second_is_handed_over_at_once(feed, source, time):
    def sample():
        feed.add_sample(counters(), b"", 0)
        feed.hand_over_now_and_then(source)

    feed.add_faults(faults(1))
    sample()
    assert source.calls == 0
    feed.add_faults(faults(2, first=1))
    time.now_us += 1_000_000
    source.failures = [ChannelError("away")]
    sample()
    sample()
    assert source.calls == 1
    time.now_us += 1_000_000
    sample()
    assert [part.faults for part in source.parts] == [faults(3).raw]


def test_source_that_does_not_want_it_is_asked_no_more(feed, source):
    feed.add_faults(faults(1))
    source.failures = [ConfigError("not traced")]
    hand_over(feed, source)
    feed.add_faults(faults(1))
    hand_over(feed, source, is_last=True)
    assert (source.calls, source.parts) == (1, [])


def test_large_batches_come_in_pieces(feed, source, monkeypatch):
    monkeypatch.setattr(tracing, "_PART_BYTES_MAX", 4 * RECORD_BYTES)
    feed.add_faults(faults(10))
    hand_over(feed, source)
    assert [len(part.faults) // RECORD_BYTES for part in source.parts] == [4, 4, 2]


def test_faults_that_nobody_takes_are_counted_as_lost(feed, source, monkeypatch):
    monkeypatch.setattr(tracing, "KEPT_BYTES_MAX", 4 * RECORD_BYTES)
    feed.add_faults(faults(3))
    feed.add_faults(faults(2))
    feed.add_faults(faults(1, first=3))
    hand_over(feed, source)
    feed.add_faults(faults(2, first=4))
    hand_over(feed, source)
    assert b"".join(part.faults for part in source.parts) == faults(6).raw
    assert sum(part.lost_faults for part in source.parts) == 2


def test_a_long_precopy_is_sampled_less_often(feed, source, time, monkeypatch):
    monkeypatch.setattr(tracing, "_SAMPLES_MAX", 8)
    taken = []
    for _ in range(400):
        if feed.wants_sample(5):
            taken.append(time.now_us)
            feed.add_sample(counters(), b"", 0)
        time.now_us += 100_000
    hand_over(feed, source)
    times_us = [sample.at_ns // 1000 for sample in source.parts[0].progress]
    assert 2 <= len(times_us) < 8
    assert set(times_us) <= set(taken)
    assert times_us == sorted(times_us)
    assert times_us[-1] > 20_000_000


def test_the_end_is_sampled_once_whenever_it_comes(feed, time):
    feed.add_sample(counters(5), b"", 0)
    assert not feed.wants_sample(4)
    assert feed.wants_sample(0)
    feed.add_sample(counters(0), b"", 0)
    time.now_us += 200_000
    assert not feed.wants_sample(0)
    # A round of the dirty log has come.
    assert feed.wants_sample(3)


def test_sets_of_pages_are_compressed_or_left_out(feed, source, monkeypatch):
    feed.add_bitmap("missing_at_switchover", b"\xff" * 10_000)
    hand_over(feed, source)
    assert 0 < len(source.parts[0].missing_at_switchover) < 100
    monkeypatch.setattr(tracing, "_BITMAP_BYTES_MAX", 8)
    feed.add_bitmap("zero_at_end", bytes(range(256)))
    feed.add_faults(faults(1))
    hand_over(feed, source)
    assert (source.parts[1].zero_at_end, source.parts[1].faults) == (b"", faults(1).raw)


def part(count, *, is_last=False):
    return types.TracePart(faults=faults(count).raw, is_last=is_last)


def test_inbox_gives_each_part_once_and_then_ends(inbox):
    inbox.add(part(1))
    assert inbox.take(0) == part(1)
    assert inbox.take(0) is None
    assert not inbox.is_read
    inbox.add(part(2, is_last=True))
    assert not inbox.is_read
    assert inbox.take(0) == part(2, is_last=True)
    assert (inbox.take(60), inbox.is_read) == (None, True)


def test_inbox_that_nobody_reads_is_bounded_and_says_what_it_lost(inbox, monkeypatch):
    monkeypatch.setattr(tracing, "KEPT_BYTES_MAX", part(3).ByteSize())
    inbox.add(part(3))
    inbox.add(part(2))
    assert inbox.take(0) == types.TracePart(faults=faults(3).raw, lost_faults=2)
    inbox.add(part(1))
    assert inbox.take(0) == part(1)


def test_nothing_comes_after_the_last_part(inbox):
    inbox.add(part(0, is_last=True))
    inbox.add(part(1))
    assert inbox.take(0) == part(0, is_last=True)
    assert inbox.take(0) is None


def test_what_nobody_wants_for_a_minute_is_forgotten(inbox, time):
    inbox.add(part(3))
    time.now_us += 59_000_000
    inbox.forget_unread()
    assert inbox.take(0) == part(3)
    inbox.add(part(2))
    time.now_us += 61_000_000
    inbox.forget_unread()
    assert inbox.take(0) is None
    inbox.add(part(1))
    assert inbox.take(0) == types.TracePart(faults=faults(1).raw, lost_faults=2)
