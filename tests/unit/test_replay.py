"""What a trace says of its guest: touches, what faults took, what it went through."""

import struct
import zlib

import pytest

from migrate.errors import TraceError
from migrate.pager.policies import Demand
from migrate.pager.replay import (
    bandwidth_bytes_per_s,
    first_touches,
    missing_pages,
    outcome_of,
    overheads_of,
    touches_of,
    zero_pages,
)
from migrate.pager.simulator import Line, Oracle, replay
from migrate.telemetry.trace_file import TraceRecorder, read_trace
from migrate.v1 import types_pb2 as types

US = 1_000
ORIGIN_NS, RUNNING_NS = 10**15, 100 * US
ZERO, URGENT, BACKGROUND, PRESENT = range(4)
PAGES = 16


def fault(page, at_us, *, thread=7, kind=URGENT, took_us=100):
    """Urgent ones: 10 us to the socket, 60 on the way and 5 at the source, the rest until the page is there."""
    at_ns = ORIGIN_NS + at_us * US
    asked = [at_ns + 2 * US, at_ns + 10 * US, 5 * US, at_ns + 75 * US] if kind == URGENT else [0, 0, 0, 0]
    return struct.pack("<8Q", page, at_ns, *asked, at_ns + took_us * US, thread | kind << 32)


@pytest.fixture
def trace_of(tmp_path):
    def make(*faults, order="demand", progress=(), missing=None, zero=None):
        recorder = TraceRecorder()
        part = types.TracePart(origin_ns=ORIGIN_NS, vcpu_thread_ids=[7, 8], faults=b"".join(faults), is_last=True)
        part.states.add(at_ns=ORIGIN_NS + RUNNING_NS, state=types.MIGRATION_STATE_POSTCOPY)
        for at_us, missing_pages_now, wire_bytes in progress:
            part.progress.add(at_ns=ORIGIN_NS + at_us * US, missing_pages=missing_pages_now, bytes_on_wire=wire_bytes)
        for name, pages in (("missing_at_switchover", missing), ("zero_at_end", zero)):
            if pages is not None:
                bits = sum(1 << page for page in pages)
                setattr(part, name, zlib.compress(bits.to_bytes(PAGES // 8, "little")))
        recorder.add(part)
        recorder.write(tmp_path / "t", {"order": order, "pages": {"total": PAGES}}, None)
        return read_trace(tmp_path / "t")

    return make


def test_outcome_counts_pages_once_and_every_wait(trace_of):
    trace = trace_of(
        fault(1, 200),
        fault(1, 250, thread=8, took_us=50),
        fault(2, 400, kind=BACKGROUND, took_us=300),
        fault(3, 800, kind=ZERO),
        fault(4, 900, kind=PRESENT, took_us=1),
        progress=[(500, 3, 0), (1100, 0, 0)],
        missing=range(1, 10),
        zero=[3],
    )
    outcome = outcome_of(trace)
    assert (outcome.pages, outcome.waited_pages) == (8, 2)
    assert outcome.stalls_us.tolist() == [50, 100, 300]
    assert outcome.fault_share == 2 / 8
    assert (outcome.stall_us(0.5), outcome.stall_us(0.99), outcome.stall_total_us) == (100, 300, 450)
    assert outcome.duration_us == 1000


def test_what_a_trace_does_not_say_of_its_pages_is_taken_for_all_and_none(trace_of):
    trace = trace_of(fault(1, 200))
    assert missing_pages(trace).sum() == PAGES
    assert zero_pages(trace).sum() == 0
    assert outcome_of(trace).duration_us == 200  # to its last page


def test_touches_are_those_of_each_thread_with_the_time_between(trace_of):
    (first, second) = touches_of(trace_of(fault(1, 130), fault(2, 140, thread=8), fault(5, 260), fault(3, 420)))
    assert (first.thread_id, first.pages, first.think_ns) == (7, [1, 5, 3], [30 * US, 30 * US, 60 * US])
    assert (second.thread_id, second.pages, second.think_ns) == (8, [2], [40 * US])
    assert second.wake_ns == 0


def test_what_comes_first_between_faults_is_the_time_to_wake(trace_of):
    at_us, faults = 200, []
    for number in range(16):
        faults.append(fault(number, at_us))
        at_us += 100 + (20 if number < 4 else 500)
    (touches,) = touches_of(trace_of(*faults))
    assert touches.wake_ns == 20 * US


def test_overheads_are_those_of_urgent_faults(trace_of):
    overheads = overheads_of(trace_of(fault(1, 200), fault(2, 400, kind=BACKGROUND), fault(3, 600, took_us=95)))
    assert overheads.before_ns.tolist() == [10 * US, 10 * US]
    assert overheads.read_ns.tolist() == [5 * US, 5 * US]
    assert overheads.jitter_ns.tolist() == [0, 0]
    assert overheads.after_ns.tolist() == [25 * US, 20 * US]
    assert overheads.rtt_ns == 60 * US


def test_first_touches_are_in_their_order_and_once(trace_of):
    assert first_touches(trace_of(fault(9, 200), fault(2, 300, thread=8), fault(9, 310), fault(1, 500))) == [9, 2, 1]


def test_bandwidth_is_the_best_that_progress_shows(trace_of):
    progress = [(0, 9, 0), (1_000, 8, 1_000), (2_000, 7, 6_000), (2_000, 7, 9_000), (4_000, 1, 8_000)]
    assert bandwidth_bytes_per_s(trace_of(progress=progress)) == 5_000_000
    assert bandwidth_bytes_per_s(trace_of()) == 0


def test_a_replay_on_demand_takes_what_the_trace_took(trace_of):
    trace = trace_of(*(fault(page, 200 + 150 * page) for page in range(PAGES)))
    outcome = replay(trace, Line(60 * US, 1e15), policy=Demand)
    assert outcome.stalls_us.tolist() == pytest.approx([100] * PAGES, abs=0.01)
    assert outcome.duration_us == pytest.approx(outcome_of(trace).duration_us, abs=1)
    assert replay(trace, Line(60 * US, 1e15), policy=Oracle).waited_pages < PAGES


def test_a_trace_without_faults_cannot_be_replayed(trace_of):
    with pytest.raises(TraceError, match="no fault to replay"):
        touches_of(trace_of())
    with pytest.raises(TraceError, match="no urgent fault"):
        overheads_of(trace_of(fault(1, 200, kind=PRESENT)))
