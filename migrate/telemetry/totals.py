"""What this process has counted since it was started: a daemon's metrics are made of it, and nothing else reads it.

There is one daemon in a process, so there is one of these (`TOTALS`). Whatever counts here is cheap and never fails.
"""

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from migrate.v1 import types_pb2 as types

FAULT_LATENCY_BOUNDS_US = (
    *(25.0, 50.0, 100.0, 200.0, 400.0, 800.0, 1_600.0, 3_200.0, 6_400.0),
    *(12_500.0, 25_000.0, 50_000.0, 100_000.0, 250_000.0, 1_000_000.0, 5_000_000.0),
)
DOWNTIME_BOUNDS_US = (
    *(1_000.0, 2_500.0, 5_000.0, 10_000.0, 25_000.0, 50_000.0, 100_000.0, 250_000.0, 500_000.0),
    *(1_000_000.0, 2_500_000.0, 5_000_000.0, 10_000_000.0, 30_000_000.0),
)

PAGE_KINDS = ("zero", "precopy", "urgent", "background", "duplicate", "stale")
_ENDS = (types.MIGRATION_STATE_COMPLETED, types.MIGRATION_STATE_CANCELLED, types.MIGRATION_STATE_FAILED)


class Buckets:
    """A histogram with fixed bounds. Thread-safe.

    Args:
        bounds_us: Upper bounds, ascending; what is above the last one is counted, too.
    """

    def __init__(self, bounds_us: Sequence[float]) -> None:
        self.bounds_us = tuple(bounds_us)
        self._counts = [0] * (len(bounds_us) + 1)
        self._sum_us = 0.0
        self._lock = threading.Lock()

    def add(self, values_us: Iterable[float]) -> None:
        """Count durations. A batch is sorted once, so that a million faults a minute cost next to nothing."""
        ranked = sorted(values_us)
        ends = [bisect_right(ranked, bound_us) for bound_us in self.bounds_us] + [len(ranked)]
        with self._lock:
            self._sum_us += sum(ranked)
            for bucket, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                self._counts[bucket] += end - begin

    def read(self) -> tuple[list[int], float]:
        """Cumulative counts, one for each bound and one for all, and the sum in microseconds."""
        with self._lock:
            counts, sum_us = list(self._counts), self._sum_us
        total = 0
        cumulative = []
        for count in counts:
            total += count
            cumulative.append(total)
        return cumulative, sum_us


@dataclass(slots=True)
class _Seen:
    """The most that an attempt of a migration has shown of what is counted here already."""

    wire_bytes: int = 0
    pages: dict[str, int] = field(default_factory=dict)


class Totals:
    """Counts of migrations, pages and errors. Thread-safe."""

    def __init__(self) -> None:
        self.fault_latency = Buckets(FAULT_LATENCY_BOUNDS_US)
        self.downtime = Buckets(DOWNTIME_BOUNDS_US)
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._started: Counter[int] = Counter()
        self._ended: Counter[tuple[int, int]] = Counter()
        self._retries = 0
        self._pauses: Counter[int] = Counter()
        self._pages: Counter[tuple[int, str]] = Counter()
        self._wire_bytes: Counter[int] = Counter()
        self._errors: Counter[tuple[str, str]] = Counter()

    def note_begun(self, migration: types.Migration) -> None:
        """A migration, or another attempt of one at the destination, has begun, or is taken up."""
        key = (migration.migration_id, int(migration.side))
        with self._lock:
            if key not in self._seen:
                self._started[migration.side] += 1
            self._seen[key] = _Seen()

    def note_step(self, migration: types.Migration, before: int) -> None:
        """A migration has taken a step of its state table."""
        state = migration.state
        with self._lock:
            if state == types.MIGRATION_STATE_SETUP:
                self._retries += 1
                self._seen[migration.migration_id, int(migration.side)] = _Seen()
            elif state == types.MIGRATION_STATE_POSTCOPY_PAUSED and before != state:
                self._pauses[migration.side] += 1
        if state not in _ENDS:
            return
        self.note_figures(migration)
        with self._lock:
            self._seen.pop((migration.migration_id, int(migration.side)), None)
            self._ended[migration.side, state] += 1
        is_whole = state == types.MIGRATION_STATE_COMPLETED and migration.side == types.MIGRATION_SIDE_SOURCE
        if is_whole and migration.downtime_us:
            self.downtime.add([migration.downtime_us])

    def note_figures(self, migration: types.Migration) -> None:
        """How far a migration is; one that has ended has been counted."""
        side = int(migration.side)
        with self._lock:
            seen = self._seen.get((migration.migration_id, side))
            if seen is None:
                return
            # Discards make the figures of a precopy fall, and a counter never does.
            self._wire_bytes[side] += max(0, migration.bytes_on_wire - seen.wire_bytes)
            seen.wire_bytes = max(seen.wire_bytes, migration.bytes_on_wire)
            for kind in PAGE_KINDS:
                count: int = getattr(migration.pages, kind)
                known = seen.pages.get(kind, 0)
                self._pages[side, kind] += max(0, count - known)
                seen.pages[kind] = max(known, count)

    def note_error(self, where: str, type_name: str) -> None:
        """An error came of a migration, or a call was answered with it.

        Args:
            where: `migration` or `call`.
            type_name: A class of migrate/errors.py.
        """
        with self._lock:
            self._errors[where, type_name] += 1

    def started(self) -> Mapping[int, int]:
        """Migrations begun or taken up, by side."""
        with self._lock:
            return dict(self._started)

    def ended(self) -> Mapping[tuple[int, int], int]:
        """Migrations that ended, by side and state."""
        with self._lock:
            return dict(self._ended)

    def retries(self) -> int:
        """Attempts that were lost before the switchover."""
        with self._lock:
            return self._retries

    def pauses(self) -> Mapping[int, int]:
        """How often pages came to stand still after the switchover, by side."""
        with self._lock:
            return dict(self._pauses)

    def pages(self) -> Mapping[tuple[int, str], int]:
        """Pages by side and kind."""
        with self._lock:
            return dict(self._pages)

    def wire_bytes(self) -> Mapping[int, int]:
        """Bytes of the page calls, by side."""
        with self._lock:
            return dict(self._wire_bytes)

    def errors(self) -> Mapping[tuple[str, str], int]:
        """Errors by where and type."""
        with self._lock:
            return dict(self._errors)


TOTALS = Totals()
