"""Fault latencies of one migration: every one is kept, so that percentiles are exact."""

from array import array

from migrate.native.pager import FaultBatch
from migrate.telemetry.histogram import distribution_of
from migrate.v1 import types_pb2 as types


class FaultLatencies:
    """Kernel event read to page placed, four bytes a fault. Faults whose page had come before their event do not count.

    Not thread-safe.
    """

    def __init__(self) -> None:
        self._latencies_us = array("f")

    def add(self, records: FaultBatch) -> None:
        """Take in what the pager recorded."""
        self._latencies_us.extend(records.latencies_us())

    @property
    def count(self) -> int:
        """How many faults there were."""
        return len(self._latencies_us)

    def distribution(self) -> types.Distribution:
        """Mean and exact percentiles, microseconds."""
        return distribution_of(self._latencies_us)
