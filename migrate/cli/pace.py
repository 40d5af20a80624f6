"""How fast pages come, and when the last one will, from what a daemon says again and again."""

from collections import deque
from dataclasses import dataclass

from migrate.client.words import missing_pages, pages_present
from migrate.v1 import types_pb2 as types

# Long enough that a daemon's figures have moved on several times.
_WINDOW_US = 2_000_000


@dataclass(frozen=True, slots=True)
class _Sample:
    at_us: int
    pages: int
    wire_bytes: int


class Pace:
    """Rates over the last two seconds, by the daemon's clock."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()
        self._missing_pages = 0

    def add(self, migration: types.Migration) -> None:
        """Take in a migration as it is now."""
        sample = _Sample(migration.total_us, pages_present(migration.pages), migration.bytes_on_wire)
        last = self._samples[-1] if self._samples else sample
        if sample.wire_bytes < last.wire_bytes or sample.at_us < last.at_us:
            self._samples.clear()  # another attempt, or another daemon: it begins anew
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.at_us - self._samples[1].at_us >= _WINDOW_US:  # noqa: PLR2004 - two ends
            self._samples.popleft()
        self._missing_pages = missing_pages(migration.pages)

    @property
    def pages_per_s(self) -> float:
        """Pages that became present, less those that became stale."""
        return max(0.0, self._per_s(self._samples[-1].pages - self._samples[0].pages)) if self._samples else 0.0

    @property
    def wire_bytes_per_s(self) -> float:
        """Bytes of the page calls, both ways."""
        return self._per_s(self._samples[-1].wire_bytes - self._samples[0].wire_bytes) if self._samples else 0.0

    @property
    def left_us(self) -> float | None:
        """Until no page is missing, if it goes on so; None if pages stand still."""
        per_s = self.pages_per_s
        if not self._missing_pages:
            return 0.0
        return self._missing_pages / per_s * 1_000_000 if per_s else None

    @property
    def is_settled(self) -> bool:
        """Whether this is what happened in a whole window; that no page came in less says nothing."""
        return bool(self._samples) and self._samples[-1].at_us - self._samples[0].at_us >= _WINDOW_US

    def _per_s(self, difference: int) -> float:
        duration_us = self._samples[-1].at_us - self._samples[0].at_us
        return difference * 1_000_000 / duration_us if duration_us else 0.0
