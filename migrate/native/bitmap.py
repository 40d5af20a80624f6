"""Which pages of a region are missing: a view of a pager's bitmap, or a bitmap of our own, to try a policy over."""

from typing import Any

from migrate.errors import NativeError
from migrate.native._native import ffi, lib


class MissingView:
    """A read-only view of a bitmap that others may change meanwhile; it lives no longer than the bitmap.

    Args:
        bitmap: struct mig_bitmap *.
    """

    def __init__(self, bitmap: Any) -> None:
        self._bitmap = bitmap

    @property
    def handle(self) -> Any:
        """The C object, for other facades."""
        return self._bitmap

    @property
    def pages(self) -> int:
        """Length of the region."""
        pages: int = self._bitmap.bits
        return pages

    def is_missing(self, page: int) -> bool:
        """Whether a page is missing; one outside the region is not."""
        return self.count(page, 1) == 1

    def next(self, from_page: int) -> int | None:
        """The first missing page from there on; None if there is none."""
        page: int = lib.mig_bitmap_next_set(self._bitmap, max(from_page, 0))
        return page if page < self.pages else None

    def count(self, first_page: int, count_pages: int) -> int:
        """How many pages of a run are missing."""
        first, end = _clip(first_page, count_pages, self.pages)
        found: int = lib.mig_bitmap_count(self._bitmap, first, end - first)
        return found


class MissingBitmap(MissingView):
    """A bitmap of our own, all pages missing at first. Not thread-safe.

    Args:
        pages: Length of the region.
    """

    def __init__(self, pages: int) -> None:
        self._owned = ffi.gc(ffi.new("struct mig_bitmap *"), lib.mig_bitmap_deinit)
        rc = lib.mig_bitmap_init(self._owned, pages)
        if rc < 0:
            raise NativeError("make a bitmap", -rc)
        super().__init__(self._owned)
        self.lose(0, pages)

    def lose(self, first_page: int, count_pages: int) -> int:
        """A run is missing; how many of its pages were not."""
        first, end = _clip(first_page, count_pages, self.pages)
        changed: int = lib.mig_bitmap_set_range(self._owned, first, end - first)
        return changed

    def place(self, first_page: int, count_pages: int) -> int:
        """A run is there; how many of its pages were not."""
        first, end = _clip(first_page, count_pages, self.pages)
        changed: int = lib.mig_bitmap_clear_range(self._owned, first, end - first)
        return changed


def _clip(first_page: int, count_pages: int, pages: int) -> tuple[int, int]:
    """The part of a run that lies within the region, as [first, end)."""
    first = min(max(first_page, 0), pages)
    return first, max(first, min(first_page + count_pages, pages))
