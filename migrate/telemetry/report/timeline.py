"""What happened when, and where in RAM: phases, faults in cells, the sweep over missing pages, rates."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from migrate.client.words import FINAL_STATES, state_word
from migrate.telemetry.report.figures import clean, number_of
from migrate.telemetry.trace_file import KINDS, Progress, Trace
from migrate.units import PAGE_SIZE_BYTES, pages_to_bytes

COLUMNS = 344
ROWS = 56
"""Cells of a map of faults: two pixels each of the drawing."""

_PARTS = 256
_BINS = 150
_NS_PER_S = 1e9
_AFTER = 4
"""How many times as long as before the vCPUs came the map of faults shows what came after."""

RATES = ("faults", "precopy pages", "urgent pages", "background pages", "zero pages", "bytes on the wire")
"""What there may be a rate of, in the order in which they are drawn."""

_FINAL_WORDS = frozenset(map(state_word, FINAL_STATES))


@dataclass(frozen=True, slots=True)
class Phase:
    """A state and when it began and ended, in seconds from the trace's zero."""

    state: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Clock:
    """What a trace's times are counted from.

    Attributes:
        zero_ns: Where zero is.
        zero_words: What happened there.
        begin_s, end_s: Where the trace begins and ends, seconds from zero.
    """

    zero_ns: float
    zero_words: str
    begin_s: float
    end_s: float

    def seconds(self, at_ns: np.ndarray | float) -> np.ndarray:
        """Times of the trace as seconds from zero."""
        return np.asarray((np.asarray(at_ns, dtype=np.float64) - self.zero_ns) / _NS_PER_S)

    @property
    def map_begin_s(self) -> float:
        """Where a map of faults begins: it leaves out most of a long precopy, which has none."""
        return max(self.begin_s, -self.end_s / _AFTER) if self.end_s > 0 else self.begin_s


@dataclass(frozen=True, slots=True)
class Steps:
    """A rate over time: `per_s[i]` holds from `edges_s[i]` to `edges_s[i + 1]`."""

    name: str
    edges_s: np.ndarray
    per_s: np.ndarray
    total: float

    @property
    def peak_per_s(self) -> float:
        """The greatest of them."""
        return float(self.per_s.max()) if len(self.per_s) else 0.0


def clock_of(trace: Trace) -> Clock:
    """Times count from when the vCPUs came, if they did."""
    states = [(at_ns, state) for at_ns, state in trace.states if number_of(at_ns) is not None]
    ends = [at_ns for at_ns, _ in states] + [sample.at_ns for sample in trace.progress]
    if len(trace.faults):
        ends.append(int(trace.faults.placed_ns.max()))
    end_ns = max(ends, default=0)
    for wanted, words in (("postcopy", "the vCPUs came to the destination"), ("switchover", "the switchover began")):
        for at_ns, state in states:
            if state == wanted:
                return Clock(at_ns, words, -at_ns / _NS_PER_S, (end_ns - at_ns) / _NS_PER_S)
    return Clock(0, "the destination was prepared", 0.0, end_ns / _NS_PER_S)


def phases_of(trace: Trace, clock: Clock) -> list[Phase]:
    """The states that the destination was in, one after the other; a final one has no length."""
    steps = [
        (float(clock.seconds(at_ns)), clean(state)) for at_ns, state in trace.states if number_of(at_ns) is not None
    ]
    if not steps:
        return []
    if steps[0][0] > clock.begin_s:
        steps.insert(0, (clock.begin_s, "setup"))
    if steps[-1][1] not in _FINAL_WORDS:
        steps.append((clock.end_s, ""))
    return [Phase(state, begin, max(begin, end)) for (begin, state), (end, _) in pairwise(steps)]


def memory_bytes_of(trace: Trace) -> int:
    """How much RAM the maps are of: what the JSON says, and at least as much as has faults."""
    said = number_of(trace.migration.get("memory_bytes")) or 0
    seen = pages_to_bytes(int(trace.faults.page.max()) + 1) if len(trace.faults) else 0
    return max(int(said), seen, PAGE_SIZE_BYTES)


def fault_maps(trace: Trace, clock: Clock, range_s: tuple[float, float], memory_bytes: int) -> dict[str, np.ndarray]:
    """Faults by kind, counted in ROWS cells of address (lowest first) by COLUMNS of time."""
    faults = trace.faults
    at_s = clock.seconds(faults.at_ns)
    offsets_bytes = faults.page.astype(np.float64) * PAGE_SIZE_BYTES
    maps = {}
    for number, kind in enumerate(KINDS):
        chosen = faults.kind == number
        if chosen.any():
            ranges = ((0.0, float(memory_bytes)), range_s)
            cells, _, _ = np.histogram2d(offsets_bytes[chosen], at_s[chosen], bins=(ROWS, COLUMNS), range=ranges)
            maps[kind] = cells
    return maps


def missing_map(trace: Trace, clock: Clock, range_s: tuple[float, float], memory_bytes: int) -> np.ndarray | None:
    """How missing the same cells were as last told, 0 not at all and 1 wholly; None if nothing was told.

    A cell of which little is missing is a quarter, so that it can be seen.
    """
    told = [
        (float(clock.seconds(sample.at_ns)), np.frombuffer(sample.missing_map, dtype=np.uint8) / 255.0)
        for sample in trace.progress
        if sample.missing_map
    ]
    if trace.missing_at_switchover is not None and len(trace.missing_at_switchover):
        parts = np.array_split(trace.missing_at_switchover, min(_PARTS, len(trace.missing_at_switchover)))
        told.append((0.0, np.array([part.mean() for part in parts])))
        told.sort(key=lambda each: each[0])
    if not told:
        return None
    begin_s, end_s = range_s
    times_s = begin_s + (np.arange(COLUMNS) + 0.5) * (end_s - begin_s) / COLUMNS
    # The map may be of more RAM than this guest has.
    places = (np.arange(ROWS) + 0.5) / ROWS * memory_bytes / memory_bytes_of(trace)
    within = places < 1
    shares = np.zeros((ROWS, COLUMNS))
    for column, last in enumerate(np.searchsorted([at_s for at_s, _ in told], times_s, side="right") - 1):
        if last >= 0 and times_s[column] <= clock.end_s:
            parts_of_ram = told[last][1]
            shares[within, column] = parts_of_ram[(places[within] * len(parts_of_ram)).astype(int)]
    return np.where(shares > 0, 0.25 + 0.75 * shares, 0)


def rates_of(trace: Trace, clock: Clock) -> list[Steps]:
    """Faults, pages by kind and bytes a second, each over the whole trace; those that are always zero are left out."""
    rates = []
    if len(trace.faults) and clock.end_s > clock.begin_s:
        # Far from zero, the edges of narrow bins are one and the same float; counted from the beginning, they are not.
        since_s = clock.seconds(trace.faults.at_ns) - clock.begin_s
        counts, edges_s = np.histogram(since_s, bins=_BINS, range=(0, clock.end_s - clock.begin_s))
        rates.append(Steps("faults", clock.begin_s + edges_s, counts / np.diff(edges_s), len(trace.faults)))
    samples = _spread(trace.progress)
    rates += [
        _deltas(f"{name} pages", clock, samples, [sample.pages[name] or 0 for sample in samples])
        for name in ("precopy", "urgent", "background", "zero")
    ]
    rates.append(_deltas("bytes on the wire", clock, samples, [sample.bytes_on_wire or 0 for sample in samples]))
    return [rate for rate in rates if rate.total > 0]


def _spread(progress: Sequence[Progress]) -> list[Progress]:
    """So few samples that no step is too narrow to be seen."""
    kept: list[Progress] = []
    for sample in progress:
        if not kept or sample.at_ns > kept[-1].at_ns:
            kept.append(sample)
    if len(kept) > _BINS:
        kept = [kept[index] for index in np.linspace(0, len(kept) - 1, _BINS + 1).astype(int)]
    return kept


def _deltas(name: str, clock: Clock, samples: Sequence[Progress], counts: Sequence[int]) -> Steps:
    """What falls, because pages became stale or another attempt began, counts as nothing."""
    edges_s = clock.seconds(np.array([sample.at_ns for sample in samples], dtype=np.float64))
    grown = np.maximum(0, np.diff(np.array(counts, dtype=np.float64)))
    widths_ns = np.array([after.at_ns - before.at_ns for before, after in pairwise(samples)], dtype=np.float64)
    return Steps(name, edges_s, grown / (widths_ns / _NS_PER_S), float(grown.sum()))
