"""A postcopy without hosts: vCPUs that touch what a trace recorded, one line, and the engine's own order and pacing.

The order (native/order.c) and the window of the background (native/pacing.c) are the code that live migrations run; a
policy is the class that they load. What is modelled is the rest: a line with a round trip and a bandwidth, which its
bytes share in the order in which they are sent and arrive in it, and what a fault takes at either end and is late on
the line, drawn from the trace.

Left out: processors that the two hosts, the daemons and the guest would have to share, and touches of pages that are
there, but for the time that they took while the trace was recorded.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from migrate.native.bitmap import MissingBitmap
from migrate.native.order import BackgroundOrder
from migrate.native.pacing import Window
from migrate.native.pager import Order
from migrate.pager.policies import RecordedSet
from migrate.pager.policy import Fault, Policy, PolicyContext, take_runs
from migrate.pager.replay import (
    Outcome,
    Overheads,
    Touches,
    first_touches,
    missing_pages,
    overheads_of,
    touches_of,
    zero_pages,
)
from migrate.telemetry.trace_file import Trace
from migrate.units import PAGE_SIZE_BYTES

# HTTP/2, gRPC and TCP/IP headers beside the pages of a message.
_MESSAGE_BYTES = 60
_WIRE_SHARE = 1.002
# A thread of Python is woken, and speaks.
_POLICY_NS = 200_000
_POLICY_TICK_NS = 250_000_000
_PROBE_NS = 2_000_000
_PROBE_BYTES = 100
_ASK_NS = 20_000
_NEVER_NS = 1 << 62


@dataclass(frozen=True, slots=True)
class Line:
    """Between the two hosts.

    Attributes:
        rtt_ns: Of a request and its page, without a queue.
        bytes_per_s: Of the direction that pages take.
    """

    rtt_ns: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """The guest's, at the switchover; arrays of a flag for each page."""

    missing: np.ndarray
    zero: np.ndarray


class Simulation:
    """One postcopy. Made for one `run`.

    Args:
        memory: What is missing.
        vcpus: What each touches.
        overheads: Of a fault, to draw from.
        line: Between the hosts.
        order: An order of the C core; None for a policy's.
        policy_of: Makes the policy.
        recorded_pages: What it is told of an earlier run.
        seed: Of what is drawn.
    """

    def __init__(
        self,
        memory: Memory,
        vcpus: Sequence[Touches],
        overheads: Overheads,
        line: Line,
        *,
        order: Order | None = None,
        policy_of: Callable[[PolicyContext], Policy] | None = None,
        recorded_pages: Sequence[int] = (),
        seed: int = 1,
    ) -> None:
        pages = len(memory.missing)
        self._zero = memory.zero
        self._vcpus = [_Vcpu(number, touches) for number, touches in enumerate(vcpus)]
        self._line = line
        self._overheads = overheads
        self._draws = self._draw_for_ever(seed)
        self._missing, self._requested = MissingBitmap(pages), MissingBitmap(pages)
        self._requested.place(0, pages)
        for first, end in _runs(~memory.missing):
            self._missing.place(first, end - first)
        self._left = int(memory.missing.sum())
        self._now_ns = 0
        self._events: list[tuple[int, int, Callable[..., None], tuple[float, ...]]] = []
        self._numbers = itertools.count()
        self._free_ns = 0.0  # when the line has carried all that was sent
        self._arrived_ns = 0.0  # when all of that is there
        self._order = BackgroundOrder(Order.SUGGESTED if order is None else order)
        self._policy = None
        self._is_policy_awake = False
        self._heard: list[Fault] = []
        if policy_of is not None:
            self._policy = policy_of(PolicyContext(pages, tuple(recorded_pages), now_ns=lambda: self._now_ns))
        self._window = Window(0, int(line.rtt_ns))
        self._open_bytes = 0
        self._rtt_count, self._smallest_rtt_ns = 0, _NEVER_NS
        self._waiters: dict[int, list[_Vcpu]] = {}
        self._stalls_ns: list[int] = []
        self._waited_pages = 0
        self._data_pages = int((memory.missing & ~memory.zero).sum())

    def run(self) -> Outcome:
        """Until no page is missing."""
        for vcpu in self._vcpus:
            if vcpu.think_ns:
                self._at(vcpu.think_ns[0], self._touch, vcpu.number)
        self._at(0, self._think)
        self._at(_PROBE_NS, self._probe)
        self._at(0, self._ask)
        while self._events and self._left:
            self._now_ns, _, act, arguments = heapq.heappop(self._events)
            act(*arguments)
        stalls_us = np.sort(np.array(self._stalls_ns, dtype=float)) / 1000
        return Outcome(self._data_pages, self._waited_pages, stalls_us, self._now_ns / 1000)

    # ---- vCPUs ----

    def _touch(self, number: int) -> None:
        """A vCPU goes on until it meets a page that is missing, or something else happens before its next touch."""
        vcpu = self._vcpus[number]
        while vcpu.next < len(vcpu.pages):
            page = vcpu.pages[vcpu.next]
            if self._missing.is_missing(page):
                self._wait(vcpu, page)
                return
            vcpu.next += 1
            if vcpu.next == len(vcpu.pages):
                return
            at_ns = self._now_ns + max(0, vcpu.think_ns[vcpu.next] - vcpu.wake_ns)
            if self._events and self._events[0][0] <= at_ns:
                self._at(at_ns, self._touch, number)
                return
            self._now_ns = at_ns

    def _wait(self, vcpu: "_Vcpu", page: int) -> None:
        vcpu.since_ns = self._now_ns
        self._waiters.setdefault(page, []).append(vcpu)
        was_requested = self._requested.is_missing(page)
        if not was_requested:
            self._requested.lose(page, 1)
            self._order.on_fault(page)
            before_ns, read_ns, late_ns, after_ns = next(self._draws)
            self._at(int(self._now_ns + before_ns + read_ns), self._reply, page, read_ns, late_ns, after_ns)
        if self._policy is not None:
            self._heard.append(Fault(page, self._now_ns, vcpu.thread_id, was_requested))
            self._wake_policy(_POLICY_NS)

    def _place(self, first_page: int, count_pages: int) -> None:
        self._left -= self._missing.place(first_page, count_pages)
        for page in range(first_page, first_page + count_pages):
            waiters = self._waiters.pop(page, None)
            if waiters is None:
                continue
            if not self._zero[page]:
                self._waited_pages += 1
                self._stalls_ns += [self._now_ns - vcpu.since_ns for vcpu in waiters]
            for vcpu in waiters:
                vcpu.next += 1
                if vcpu.next < len(vcpu.pages):
                    self._at(self._now_ns + vcpu.think_ns[vcpu.next], self._touch, vcpu.number)

    # ---- the line ----

    # A reply takes the line when it leaves, not when it is asked for; `_carry` counts the request's way in.
    def _reply(self, page: int, read_ns: float, late_ns: float, after_ns: float) -> None:
        """The source has read an urgent page."""
        arrival_ns = self._carry(page, 1, late_ns)
        self._at(int(arrival_ns), self._hear, int(arrival_ns - self._now_ns + read_ns))
        self._at(int(arrival_ns + after_ns), self._place, page, 1)

    def _reply_run(self, first_page: int, count_pages: int) -> None:
        """It has read a run of the background's."""
        self._at(int(self._carry(first_page, count_pages)), self._hear_background, first_page, count_pages)

    def _carry(self, first_page: int, count_pages: int, late_ns: float = 0.0) -> float:
        """When the reply to a request of now has arrived.

        The line carries one byte after another: what is late has all that is behind it arrive late, and costs no rate.
        """
        data_pages = count_pages - int(self._zero[first_page : first_page + count_pages].sum())
        count_bytes = data_pages * PAGE_SIZE_BYTES * _WIRE_SHARE + _MESSAGE_BYTES
        begin_ns = max(self._now_ns + self._line.rtt_ns / 2, self._free_ns)
        self._free_ns = begin_ns + count_bytes * 1e9 / self._line.bytes_per_s
        self._arrived_ns = max(self._arrived_ns, self._free_ns + self._line.rtt_ns / 2 + late_ns)
        return self._arrived_ns

    def _hear(self, rtt_ns: int) -> None:
        """An urgent page, or the answer to a PING, has come: a measure of the line."""
        self._rtt_count += 1
        self._smallest_rtt_ns = min(self._smallest_rtt_ns, rtt_ns)

    def _probe(self) -> None:
        """While the background is busy and no urgent page is on its way, a PING measures the line (native/fetch.c)."""
        if self._open_bytes and not self._waiters:
            queue_ns = max(0.0, self._free_ns - self._now_ns - self._line.rtt_ns / 2)
            rtt_ns = int(self._line.rtt_ns + queue_ns + _PROBE_BYTES * 1e9 / self._line.bytes_per_s)
            self._at(self._now_ns + rtt_ns, self._hear, rtt_ns)
        self._at(self._now_ns + _PROBE_NS, self._probe)
        self._ask()

    # ---- the background ----

    def _ask(self) -> None:
        """As ask_background and tick of native/fetch.c."""
        if self._window.is_due(self._now_ns, self._rtt_count):
            self._window.tick(self._now_ns, self._rtt_count, self._smallest_rtt_ns)
            self._rtt_count, self._smallest_rtt_ns = 0, _NEVER_NS
        if self._open_bytes > self._window.kept_bytes:
            return
        while self._open_bytes < self._window.count_bytes:
            run = self._order.next(self._missing, self._requested, self._window.run_pages, self._now_ns)
            if run is None:
                return
            first_page, count_pages = run
            self._requested.lose(first_page, count_pages)
            self._open_bytes += count_pages * PAGE_SIZE_BYTES
            self._at(self._now_ns + _ASK_NS, self._reply_run, first_page, count_pages)

    def _hear_background(self, first_page: int, count_pages: int) -> None:
        self._open_bytes -= count_pages * PAGE_SIZE_BYTES
        self._window.on_delivery(count_pages * PAGE_SIZE_BYTES)
        self._place(first_page, count_pages)
        self._ask()

    # ---- the policy ----

    def _wake_policy(self, delay_ns: int) -> None:
        if not self._is_policy_awake:
            self._is_policy_awake = True
            self._at(self._now_ns + delay_ns, self._think)

    def _think(self) -> None:
        """As session/policy_thread.py has it: hear of faults, name pages, hold the rest back or not."""
        if self._policy is None:
            return
        self._is_policy_awake = False
        heard, self._heard = self._heard, []
        for fault in heard:
            self._policy.on_fault(fault)
        for run in take_runs(self._policy, self._missing, self._order.room):
            self._order.suggest(run)
        self._order.hold(self._now_ns, holds=self._policy.holds_rest)
        self._at(self._now_ns + _POLICY_TICK_NS, self._wake_policy, 0)
        self._ask()

    # ---- parts ----

    def _at(self, at_ns: int, act: Callable[..., None], *arguments: float) -> None:
        heapq.heappush(self._events, (at_ns, next(self._numbers), act, arguments))

    def _draw_for_ever(self, seed: int) -> Iterator[tuple[float, float, float, float]]:
        """What one urgent fault takes before it is sent, at the source, by being late, and after the reply."""
        random = np.random.default_rng(seed)
        parts = self._overheads
        columns = np.stack([parts.before_ns, parts.read_ns, parts.jitter_ns, parts.after_ns]).astype(float)
        while True:
            drawn = random.integers(0, columns.shape[1], 4096)
            yield from zip(*columns[:, drawn].tolist(), strict=True)


class Oracle(RecordedSet):
    """Knows which pages will be touched, and in which order: what no order can do better by much."""


def replay(
    trace: Trace,
    line: Line,
    *,
    order: Order | None = None,
    policy: type[Policy] | None = None,
    recorded_pages: Sequence[int] = (),
    overheads: Overheads | None = None,
) -> Outcome:
    """What the guest of a trace would go through.

    Args:
        trace: Of what it touched.
        line: Between the hosts.
        order: Of the C core; None for a policy's.
        policy: The class.
        recorded_pages: What a policy is told of an earlier run; those of the trace itself, of Oracle.
        overheads: What a fault takes beside the line, to draw from; those of the trace, unless given.

    Raises:
        TraceError: nobody touched anything, or no fault says how long one takes.
        Exception: whatever the policy raises.
    """
    if policy is Oracle:
        recorded_pages = first_touches(trace)
    memory = Memory(missing_pages(trace), zero_pages(trace))
    simulation = Simulation(
        memory,
        touches_of(trace),
        overheads or overheads_of(trace),
        line,
        order=order,
        policy_of=policy,
        recorded_pages=recorded_pages,
    )
    return simulation.run()


class _Vcpu:
    """One vCPU and where it is: its next touch, and since when it waits."""

    def __init__(self, number: int, touches: Touches) -> None:
        self.number = number
        self.thread_id = touches.thread_id
        self.pages, self.think_ns, self.wake_ns = touches.pages, touches.think_ns, touches.wake_ns
        self.next = 0
        self.since_ns = 0


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Where flags are set, as [first, end)."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]
