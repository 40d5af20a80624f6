"""The policies that are shipped. Each is a few lines, to be read; docs/policies.md says where they come from."""

from collections.abc import Iterator
from dataclasses import dataclass

from migrate.pager.policy import Fault, MissingPages, Policy, PolicyContext


class Demand(Policy):
    """Fetches nothing but what vCPUs wait for, until no fault has come for a second.

    A study of first touches wants every one of them to be a fault.
    """

    _QUIET_NS = 1_000_000_000

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.holds_rest = True
        self._quiet_since_ns = context.now_ns()

    def on_fault(self, fault: Fault) -> None:
        """The quiet is over."""
        self._quiet_since_ns = fault.event_ns

    def next_runs(self, missing: MissingPages) -> Iterator[tuple[int, int]]:  # noqa: ARG002
        """None, ever."""
        self.holds_rest = self.context.now_ns() - self._quiet_since_ns < self._QUIET_NS
        return iter(())


class RecordedSet(Policy):
    """Fetches the pages that an earlier run faulted on first, in its order.

    After REAP (Ustiugov, Petrov, Kogias, Bugnion, Grot: ASPLOS 2021): the working set of a guest that starts from the
    same state is mostly the same.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._rest = ((page, 1) for page in dict.fromkeys(context.recorded_pages))

    def next_runs(self, missing: MissingPages) -> Iterator[tuple[int, int]]:  # noqa: ARG002
        """Goes on where it was; neighbours become one run in the queue."""
        return self._rest


class Stride(Policy):
    """Looks ahead of each vCPU that walks in even steps, twice as far each time that it meets a fault again.

    After the reference prediction table of Chen and Baer (IEEE Transactions on Computers, 1995), with vCPUs in the
    place of load instructions.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._walks: dict[int, _Walk] = {}

    def on_fault(self, fault: Fault) -> None:
        """One step of a vCPU."""
        self._walks.setdefault(fault.thread_id, _Walk(fault.page)).step(fault.page)

    def next_runs(self, missing: MissingPages) -> Iterator[tuple[int, int]]:
        """What each vCPU will want, the nearest first."""
        for walk in self._walks.values():
            yield from ((page, 1) for page in walk.ahead(missing.pages))


_AHEAD_MIN = 8
_AHEAD_MAX = 1024


@dataclass(slots=True)
class _Walk:
    """One vCPU's way, as its faults show it.

    Attributes:
        last: Where it faulted.
        stride: Between its last two faults.
        ahead_steps: How far to look ahead; 0 until two strides have been the same.
        named: The last page that was named.
    """

    last: int
    stride: int = 0
    ahead_steps: int = 0
    named: int = 0

    def step(self, page: int) -> None:
        """A fault. Where pages were named, the vCPU faults again only behind them, or if they come too late."""
        moved, self.last = page - self.last, page
        if self.ahead_steps and moved % self.stride == 0 and 0 < moved // self.stride <= 2 * self.ahead_steps:
            self.ahead_steps = min(2 * self.ahead_steps, _AHEAD_MAX)
        elif moved:
            self.ahead_steps = _AHEAD_MIN if moved == self.stride else 0
            self.stride, self.named = moved, page

    def ahead(self, pages: int) -> Iterator[int]:
        """The pages on its way that have not been named."""
        if not self.ahead_steps:
            return
        page = max(self.named, self.last, key=lambda page: page * self.stride) + self.stride
        end = self.last + self.stride * self.ahead_steps
        while (end - page) * self.stride >= 0 and 0 <= page < pages:
            self.named = page
            yield page
            page += self.stride
