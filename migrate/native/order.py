"""The order of the background over bitmaps of our own: the code of live migrations, for a simulator and for tests."""

from typing import Any

from migrate.native._native import ffi, lib
from migrate.native.bitmap import MissingBitmap
from migrate.native.pager import HOLD_MAX_US, SUGGESTIONS_MAX, Order


class BackgroundOrder:
    """What to ask for next (native/order.h). Not thread-safe.

    Args:
        order: Which.
    """

    def __init__(self, order: Order) -> None:
        self._order: Any = ffi.new("struct mig_order *", {"kind": order})
        self._first = ffi.new("uint64_t *")

    def on_fault(self, page: int) -> None:
        """A fault asks for this page."""
        lib.mig_order_on_fault(self._order, page)

    def next(
        self, missing: MissingBitmap, requested: MissingBitmap, max_pages: int, now_ns: int
    ) -> tuple[int, int] | None:
        """The next run of pages that are missing and not requested, as (first page, pages); None if there is none."""
        count: int = lib.mig_order_next(self._order, missing.handle, requested.handle, max_pages, now_ns, self._first)
        return (self._first[0], count) if count else None

    @property
    def room(self) -> int:
        """How many more runs may be suggested."""
        queued: int = self._order.suggestion_tail - self._order.suggestion_head
        return SUGGESTIONS_MAX - queued

    def suggest(self, run: tuple[int, int]) -> None:
        """These pages come next; dropped if there is no room."""
        lib.mig_order_suggest(self._order, {"first_page": run[0], "count_pages": run[1]})

    def hold(self, now_ns: int, *, holds: bool) -> None:
        """Whether pages that were not suggested wait, for a second from now on."""
        lib.mig_order_hold(self._order, now_ns, HOLD_MAX_US if holds else 0)
