"""What a policy is: a Python class that names the pages to fetch next. docs/policies.md shows how to write one.

It runs in a thread beside the pager, in the daemon of the destination, or in a simulator over a bitmap of its own. It
never runs between a fault and its page: what it names is asked for before the rest of the background, and a fault
before either. It never touches memory of the guest.
"""

import itertools
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from migrate.units import PAGE_SIZE_BYTES


@dataclass(frozen=True, slots=True)
class Fault:
    """A vCPU touched a missing page, and waits.

    Attributes:
        page: Which.
        event_ns: When that was known, on the clock of PolicyContext.now_ns.
        thread_id: Of the vCPU's thread.
        was_requested: Whether the page had been asked for by then; if not, it is now, urgently.
    """

    page: int
    event_ns: int
    thread_id: int
    was_requested: bool


class MissingPages(Protocol):
    """The pages that the guest lacks, read-only. Some may have been asked for and be on their way."""

    @property
    def pages(self) -> int:
        """Length of the region; pages are numbered from 0."""
        ...

    def is_missing(self, page: int) -> bool:
        """Whether a page is missing; one outside the region is not."""
        ...

    def next(self, from_page: int) -> int | None:
        """The first missing page from there on; None if there is none."""
        ...

    def count(self, first_page: int, count_pages: int) -> int:
        """How many pages of a run are missing."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy is told of its migration when it is made.

    Attributes:
        pages: Of the guest's RAM.
        recorded_pages: Pages that an earlier run faulted on, in that order; empty if nobody gave any.
        page_size_bytes: Of each.
        now_ns: The time; a simulator has its own.
    """

    pages: int
    recorded_pages: Sequence[int] = ()
    page_size_bytes: int = PAGE_SIZE_BYTES
    now_ns: Callable[[], int] = time.monotonic_ns


class Policy:
    """Names the pages to fetch next. A policy overrides what it needs; all of it is called by one thread.

    One is made for each guest that arrives, just before it runs here. A policy that raises is dropped, and the pages
    that it has not named come in ascending order.

    Args:
        context: What it is told.
    """

    holds_rest: bool = False
    """While this is true, pages that it has not named wait. Looked at a few times a second, after the methods."""

    def __init__(self, context: PolicyContext) -> None:
        self.context = context

    def on_fault(self, fault: Fault) -> None:
        """A vCPU waits for a page. Called for each fault on a missing page, in their order."""

    def next_runs(self, missing: MissingPages) -> Iterable[tuple[int, int]]:  # noqa: ARG002 - who overrides it needs it
        """The runs to fetch next, as (first page, pages), after those that it named before.

        Called after faults, and a few times a second, while there is room in the queue of runs. No more is taken of
        what is returned than finds room, and the rest is not kept: return an iterator and go on with it next time,
        or name only what matters now. What is not missing any more when its turn comes is passed over.

        Args:
            missing: To look up what is still missing.
        """
        return ()


def take_runs(policy: Policy, missing: MissingPages, room: int) -> list[tuple[int, int]]:
    """What a policy names, as far as there is room for it, without what lies outside the region.

    Raises:
        Exception: whatever the policy raises; TypeError or ValueError if it names no runs.
    """
    runs = []
    for first_page, count_pages in itertools.islice(policy.next_runs(missing), room):
        first, count = operator.index(first_page), operator.index(count_pages)
        end = min(first + count, missing.pages)
        first = max(first, 0)
        if first < end:
            runs.append((first, end - first))
    return runs
