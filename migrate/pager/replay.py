"""What a recorded trace says of a guest: which pages each vCPU touched, after how long, and what waiting for them cost.

A trace recorded with order `demand` has every first touch of every page, for each was a fault. One recorded with
another order lacks those of pages that had come before they were touched.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from migrate.errors import TraceError
from migrate.telemetry.trace_file import Trace

_PATH_PERCENTILE = 10
_WAKE_PERCENTILE, _FIRST_PART = 75, 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a guest went through, live or simulated. The pager's view: from the kernel's event to the page in its place.

    Attributes:
        pages: That were missing at the switchover and not zero.
        waited_pages: Of these, that a vCPU waited for: network faults.
        stalls_us: Each wait, ascending.
        duration_us: From the first to the last page.
    """

    pages: int
    waited_pages: int
    stalls_us: np.ndarray
    duration_us: float

    @property
    def fault_share(self) -> float:
        """The share of pages that a vCPU waited for, 0 to 1."""
        return self.waited_pages / self.pages if self.pages else 0.0

    @property
    def stall_total_us(self) -> float:
        """All waits of all vCPUs."""
        return float(self.stalls_us.sum())

    def stall_us(self, quantile: float) -> float:
        """A nearest-rank percentile of the waits; 0 if there were none."""
        if not len(self.stalls_us):
            return 0.0
        return float(self.stalls_us[max(0, int(np.ceil(quantile * len(self.stalls_us))) - 1)])


@dataclass(frozen=True, slots=True)
class Touches:
    """The touches of one vCPU, in order.

    Attributes:
        thread_id: Its thread.
        pages: What it touched.
        think_ns: How long it ran between the page before, or the switchover, and this touch; if it had waited, from the
            moment on that the page was there.
        wake_ns: How much of that it takes a vCPU that has waited to run again, mostly.
    """

    thread_id: int
    pages: Sequence[int]
    think_ns: Sequence[int]
    wake_ns: int = 0


@dataclass(frozen=True, slots=True)
class Overheads:
    """What each urgent fault of a trace took beside the path, in nanoseconds; arrays of one length.

    Attributes:
        before_ns: Event to request written.
        read_ns: At the source.
        jitter_ns: On the path, beyond the round trip.
        after_ns: Reply to page in its place.
        rtt_ns: Round trip of the path that it was recorded on, the page's own transmission included.
    """

    before_ns: np.ndarray
    read_ns: np.ndarray
    jitter_ns: np.ndarray
    after_ns: np.ndarray
    rtt_ns: float


def outcome_of(trace: Trace) -> Outcome:
    """What the guest of a trace went through, live."""
    faults = trace.faults
    waited = faults.is_network_fault
    stalls_us = np.sort(faults.latency_ns[waited]) / 1000
    begin_ns = running_ns(trace)
    placed_ns = [sample.at_ns for sample in trace.progress if not sample.missing_pages and sample.at_ns >= begin_ns]
    end_ns = min(placed_ns) if placed_ns else int(faults.placed_ns.max(initial=begin_ns))
    return Outcome(
        pages=int((missing_pages(trace) & ~zero_pages(trace)).sum()),
        waited_pages=len(np.unique(faults.page[waited])),
        stalls_us=stalls_us,
        duration_us=(end_ns - begin_ns) / 1000,
    )


def touches_of(trace: Trace) -> list[Touches]:
    """What each vCPU touched.

    Raises:
        TraceError: nobody touched anything.
    """
    faults = trace.faults
    if not len(faults):
        raise TraceError("the trace has no fault to replay", remedy="record one with --mode postcopy --order demand")
    begin_ns = running_ns(trace)
    found = []
    for thread_id in np.unique(faults.thread_id):
        own = faults.thread_id == thread_id
        at_ns, placed_ns = faults.at_ns[own], faults.placed_ns[own]
        free_ns = np.concatenate(([min(begin_ns, at_ns[0])], placed_ns[:-1]))
        think_ns = np.maximum(at_ns - free_ns, 0)
        # At first, hardly a page is there: what comes between two faults is that the vCPU wakes, and little else.
        first_ns = think_ns[1 : 2 + len(think_ns) // _FIRST_PART]
        wake_ns = int(np.percentile(first_ns, _WAKE_PERCENTILE)) if len(first_ns) else 0
        found.append(Touches(int(thread_id), faults.page[own].tolist(), think_ns.tolist(), wake_ns))
    return found


def overheads_of(trace: Trace) -> Overheads:
    """What its urgent faults took.

    Raises:
        TraceError: there was none.
    """
    faults = trace.faults
    urgent = faults.is_urgent & (faults.sent_ns >= 0) & (faults.replied_ns >= 0)
    if not urgent.any():
        raise TraceError("the trace has no urgent fault that could say how long one takes")
    read_ns = np.maximum(faults.read_ns[urgent], 0)
    path_ns = np.maximum((faults.replied_ns - faults.sent_ns)[urgent] - read_ns, 0)
    rtt_ns = float(np.percentile(path_ns, _PATH_PERCENTILE))
    return Overheads(
        before_ns=(faults.sent_ns - faults.at_ns)[urgent],
        read_ns=read_ns,
        jitter_ns=np.maximum(path_ns - rtt_ns, 0),
        after_ns=(faults.placed_ns - faults.replied_ns)[urgent],
        rtt_ns=rtt_ns,
    )


def first_touches(trace: Trace) -> list[int]:
    """Each page that was touched, once, in the order of first touches."""
    return list(dict.fromkeys(trace.faults.page.tolist()))


def bandwidth_bytes_per_s(trace: Trace) -> float:
    """The best rate that its progress shows; 0 if it shows none."""
    samples = trace.progress
    rates = [
        (after.bytes_on_wire - before.bytes_on_wire) * 1e9 / (after.at_ns - before.at_ns)
        for before, after in itertools.pairwise(samples)
        if after.at_ns > before.at_ns
    ]
    return max(rates, default=0.0)


def running_ns(trace: Trace) -> int:
    """When the vCPUs ran at the destination, on the trace's clock; its first fault if that is not known."""
    begun = [at_ns for at_ns, state in trace.states if state == "postcopy"]
    return begun[0] if begun else int(trace.faults.at_ns[0]) if len(trace.faults) else 0


def missing_pages(trace: Trace) -> np.ndarray:
    """Whether each page was missing at the switchover; all, if the trace does not say."""
    if trace.missing_at_switchover is None:
        return np.ones(_pages(trace), dtype=bool)
    return trace.missing_at_switchover[: _pages(trace)]


def zero_pages(trace: Trace) -> np.ndarray:
    """Whether each page is zero; none, if the trace does not say."""
    if trace.zero_at_end is None:
        return np.zeros(_pages(trace), dtype=bool)
    return trace.zero_at_end[: _pages(trace)]


def _pages(trace: Trace) -> int:
    pages: int = trace.migration["pages"]["total"]
    return pages
