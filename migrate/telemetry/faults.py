"""Fault latencies of one migration: every one is kept, so that percentiles are exact."""

import threading
from array import array
from collections import deque

from migrate.native.pager import FaultBatch
from migrate.telemetry.histogram import distribution_of
from migrate.telemetry.totals import TOTALS
from migrate.v1 import types_pb2 as types

# Older marks are of no use to anybody.
_RECENT_US = 5_000_000


class FaultLatencies:
    """Kernel event read to page placed, four bytes a fault. Faults whose page had come before their event do not count.

    Not thread-safe, but for `recent`.
    """

    def __init__(self) -> None:
        self._latencies_us = array("f")
        self._lock = threading.Lock()
        self._marks: deque[tuple[int, int]] = deque()  # when, and how many had been added before

    def add(self, records: FaultBatch, now_us: int = 0) -> None:
        """Take in what the pager recorded until now."""
        latencies_us = records.latencies_us()
        TOTALS.fault_latency.add(latencies_us)
        with self._lock:
            self._marks.append((now_us, len(self._latencies_us)))
            while now_us - self._marks[0][0] > _RECENT_US:
                self._marks.popleft()
            self._latencies_us.extend(latencies_us)

    def recent(self, since_us: int) -> types.Distribution:
        """As distribution(), of those that were added since, which must be seconds at most."""
        with self._lock:
            first = next((index for at_us, index in self._marks if at_us >= since_us), len(self._latencies_us))
            latencies_us = self._latencies_us[first:]
        return distribution_of(latencies_us)

    @property
    def count(self) -> int:
        """How many faults there were."""
        return len(self._latencies_us)

    def distribution(self) -> types.Distribution:
        """Mean and exact percentiles, microseconds."""
        return distribution_of(self._latencies_us)
