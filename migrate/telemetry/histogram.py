"""Percentiles: exact ones of a list, and those of the guest's log-linear histogram of TSC ticks."""

from collections.abc import Sequence
from math import ceil

from migrate.v1 import types_pb2 as types

OCTAVE_MIN = 10
SUB_BUCKETS = 32
STALL_MIN_US = 15.0
"""Shorter ones of the guest's are local faults of the hypervisor, which would hide the others."""
_QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99, "p999": 0.999}


def distribution_of(values_us: Sequence[float]) -> types.Distribution:
    """Mean, maximum and exact nearest-rank percentiles of some durations in microseconds."""
    if not values_us:
        return types.Distribution()
    ranked = sorted(values_us)
    count = len(ranked)
    quantiles = {name: ranked[ceil(q * count) - 1] for name, q in _QUANTILES.items()}
    return types.Distribution(count=count, mean=sum(ranked) / count, max=ranked[-1], **quantiles)


def bucket_midpoint_ticks(bucket: int) -> float:
    """The middle of what a bucket of native/mailbox.h holds, in TSC ticks; off by at most 1/64 of the value."""
    octave, sub = divmod(bucket, SUB_BUCKETS)
    width = (1 << (octave + OCTAVE_MIN)) / SUB_BUCKETS
    return (1 << (octave + OCTAVE_MIN)) + (sub + 0.5) * width


def distribution_of_ticks(
    buckets: Sequence[int], tsc_khz: int, max_ticks: int, at_least_us: float
) -> types.Distribution:
    """The distribution of a histogram's durations of at least `at_least_us`; `max` is exact, the rest midpoints."""
    kept = durations_of_ticks(buckets, tsc_khz, at_least_us)
    total = sum(count for _, count in kept)
    if not total:
        return types.Distribution()
    max_us = max_ticks * 1000 / tsc_khz
    quantiles = {name: min(max_us, _at_rank(kept, ceil(q * total))) for name, q in _QUANTILES.items()}
    mean = sum(us * count for us, count in kept) / total
    return types.Distribution(count=total, mean=min(max_us, mean), max=max_us, **quantiles)


def durations_of_ticks(buckets: Sequence[int], tsc_khz: int, at_least_us: float) -> list[tuple[float, int]]:
    """The middle of each of a histogram's buckets of at least `at_least_us`, and how many durations it holds."""
    durations = (
        (bucket_midpoint_ticks(bucket) * 1000 / tsc_khz, count) for bucket, count in enumerate(buckets) if count
    )
    return [(us, count) for us, count in durations if us >= at_least_us]


def _at_rank(kept: list[tuple[float, int]], rank: int) -> float:
    seen = 0
    for us, count in kept:
        seen += count
        if seen >= rank:
            return us
    return kept[-1][0]
