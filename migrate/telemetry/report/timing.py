"""How long faults and stalls took: curves, percentiles, stages. Numbers only, nothing is drawn here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from migrate.telemetry.histogram import STALL_MIN_US
from migrate.telemetry.report.figures import number_of
from migrate.telemetry.trace_file import KINDS, Faults

_POINTS = 300
_VCPUS_MAX = 16

STAGES = (
    ("queue", "event read to taken from the queue"),
    ("request", "taken to written to the socket"),
    ("network", "written to reply complete, less the read at the source"),
    ("source", "read at the source"),
    ("placement", "reply complete to placed"),
)


@dataclass(frozen=True, slots=True)
class Curve:
    """A distribution of durations.

    Attributes:
        values_us: Ascending, each once or more often.
        at_most: How many durations are at most that long.
        mean_us: Of all of them.
    """

    values_us: np.ndarray
    at_most: np.ndarray
    mean_us: float

    @property
    def count(self) -> int:
        """How many durations there are."""
        return int(self.at_most[-1]) if len(self.at_most) else 0

    def quantile_us(self, share: float) -> float:
        """Nearest rank, as telemetry/histogram.py has it."""
        rank = max(1, math.ceil(share * self.count))
        return float(self.values_us[np.searchsorted(self.at_most, rank)])

    def thinned(self) -> "Curve":
        """The same with few points, of which the longest durations have their part."""
        if len(self.values_us) <= _POINTS:
            return self
        count = self.count
        bulk = np.linspace(1, count, _POINTS)
        tail = count - np.geomspace(1, count, _POINTS) + 1
        kept = np.unique(np.searchsorted(self.at_most, np.unique(np.ceil(np.concatenate([bulk, tail])))))
        return Curve(self.values_us[kept], self.at_most[kept], self.mean_us)


@dataclass(frozen=True, slots=True)
class Part:
    """A share of something that was timed; `blocked_us` is the sum of what its faults took."""

    name: str
    what: str
    count: int
    share: float
    mean_us: float
    p50_us: float
    p99_us: float
    blocked_us: float


def latencies_us(faults: Faults) -> np.ndarray:
    """Kernel event read to page placed, of every fault."""
    return np.asarray(faults.latency_ns / 1000.0)


def pager_curve(faults: Faults) -> Curve:
    """Latencies of the faults that waited: not of those whose page had come before their event."""
    return _curve_of(latencies_us(faults)[~faults.is_present])


def guest_curve(stalls: Sequence[tuple[float, int]]) -> Curve:
    """The guest's histogram of its own stalls."""
    kept = sorted(
        (float(us), int(count))
        for us, count in stalls
        if number_of(us) is not None and number_of(count) is not None and us >= STALL_MIN_US and count > 0
    )
    values_us = np.array([us for us, _ in kept], dtype=np.float64)
    counts = np.array([count for _, count in kept], dtype=np.int64)
    total = counts.sum()
    return Curve(values_us, np.cumsum(counts), float(values_us @ counts / total) if total else 0.0)


def _curve_of(values_us: np.ndarray) -> Curve:
    ranked = np.sort(values_us)
    return Curve(ranked, np.arange(1, len(ranked) + 1), float(ranked.mean()) if len(ranked) else 0.0)


def stages_of(faults: Faults) -> list[Part]:
    """Where the time of urgent faults went; the means add up to the mean latency of those that Faults.has_stages picks.

    Where no source said how long it read, that stage is left out, and its time is in that of the network.
    """
    kept = faults.has_stages
    if not kept.any():
        return []
    taken, sent, replied = (each[kept] for each in (faults.taken_ns, faults.sent_ns, faults.replied_ns))
    read = np.maximum(0, faults.read_ns[kept])
    durations_ns = (
        taken - faults.at_ns[kept],
        sent - taken,
        replied - sent - read,
        read,
        faults.placed_ns[kept] - replied,
    )
    total_us = latencies_us(faults)[kept].mean()
    parts = []
    for (name, what), stage_ns in zip(STAGES, durations_ns, strict=True):
        if name != "source" or read.any():
            said = what if read.any() else what.removesuffix(", less the read at the source")
            part = _part(name, said, stage_ns / 1000.0, 0)
            parts.append(replace(part, share=_share(part.mean_us, total_us)))
    return parts


def kinds_of(faults: Faults) -> list[Part]:
    """The faults by what brought their page; kinds without a fault are left out."""
    taken_us = latencies_us(faults)
    whats = {
        "zero": "known to be zero, placed at once",
        "urgent": "asked for because of the fault",
        "background": "the background had asked for it already",
        "present": "it had come before the event was read",
    }
    parts = [
        _part(kind, whats[kind], taken_us[faults.kind == number], len(faults)) for number, kind in enumerate(KINDS)
    ]
    return [part for part in parts if part.count]


def vcpus_of(faults: Faults) -> list[Part]:
    """The faults that waited, by who waited; of many vCPUs, those that waited longest by themselves."""
    waited = ~faults.is_present
    taken_us, vcpus = latencies_us(faults)[waited], faults.vcpu[waited]
    names, place = np.unique(vcpus, return_inverse=True)
    blocked_us = np.bincount(place, weights=taken_us, minlength=len(names)) if len(names) else np.zeros(0)
    longest = np.sort(np.argsort(blocked_us)[::-1][:_VCPUS_MAX])
    parts = []
    for index in longest:
        name, what = (f"vCPU {names[index]}", "") if names[index] >= 0 else ("other", "no vCPU, or it is not known")
        parts.append(_part(name, what, taken_us[place == index], len(taken_us)))
    if len(names) > len(longest):
        rest = ~np.isin(place, longest)
        name = f"{len(names) - len(longest)} more"
        parts.append(_part(name, "those that waited least", taken_us[rest], len(taken_us)))
    return parts


def _part(name: str, what: str, values_us: np.ndarray, of_count: int) -> Part:
    curve = _curve_of(values_us)
    if not curve.count:
        return Part(name, what, 0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50_us, p99_us = curve.quantile_us(0.50), curve.quantile_us(0.99)
    share = _share(curve.count, of_count)
    return Part(name, what, curve.count, share, curve.mean_us, p50_us, p99_us, float(values_us.sum()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def downtime_parts(downtime_us: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The named parts of the downtime that are numbers, in their order, as (name, microseconds)."""
    return [(name, int(value)) for name, value in downtime_us.items() if (number_of(value) is not None and value >= 0)]
