"""One trace, as the page speaks of it: what can be shown of it, and what must be said."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from migrate.telemetry.report import figures, timeline, timing
from migrate.telemetry.trace_file import Trace
from migrate.units import pages_to_bytes

_SAME_SHARE = 0.001
"""By how much a percentile of the trace may differ from that of the JSON, whose durations have single precision."""

_ROUNDING_US = 0.001


@dataclass(frozen=True)
class Subject:
    """One trace, as the page speaks of it.

    Attributes:
        letter: What it is called, beside its file.
        place: The same as a number, from 0.
        name: Its file.
        trace: What is in it.
        migration: Its JSON, flat.
    """

    letter: str
    place: int
    name: str
    trace: Trace
    migration: Mapping[str, Any]

    @cached_property
    def clock(self) -> timeline.Clock:
        """What its times are counted from."""
        return timeline.clock_of(self.trace)

    @cached_property
    def phases(self) -> list[timeline.Phase]:
        """The states of its destination."""
        return timeline.phases_of(self.trace, self.clock)

    @cached_property
    def guest(self) -> timing.Curve:
        """What the guest measured."""
        return timing.guest_curve(self.trace.stalls)

    @cached_property
    def pager(self) -> timing.Curve:
        """What the pager measured."""
        return timing.pager_curve(self.trace.faults)

    @cached_property
    def stages(self) -> list[timing.Part]:
        """Where the time of urgent faults went."""
        return timing.stages_of(self.trace.faults)

    @cached_property
    def unstaged(self) -> int:
        """Urgent faults that are not in the stages."""
        faults = self.trace.faults
        return int(faults.is_urgent.sum() - faults.has_stages.sum())

    @cached_property
    def kinds(self) -> list[timing.Part]:
        """Its faults by kind."""
        return timing.kinds_of(self.trace.faults)

    @cached_property
    def vcpus(self) -> list[timing.Part]:
        """Its faults by who waited."""
        return timing.vcpus_of(self.trace.faults)

    @cached_property
    def downtime(self) -> list[tuple[str, int]]:
        """The parts of its downtime, under names without their unit."""
        parts = timing.downtime_parts(self.trace.downtime_us)
        return [(figures.clean(name.removesuffix("_us").replace("_", " ")), value) for name, value in parts]

    @cached_property
    def rates(self) -> list[timeline.Steps]:
        """Its rates."""
        return timeline.rates_of(self.trace, self.clock)

    @property
    def lost_faults(self) -> int:
        """How many of its faults were not kept."""
        return int(figures.number_of(self.trace.lost_faults) or 0)

    @property
    def missing_pages(self) -> int:
        """How many pages were missing when the vCPUs came."""
        missing = self.trace.missing_at_switchover
        return 0 if missing is None else int(missing.sum())

    @property
    def missing_bytes(self) -> int:
        """How much RAM that was."""
        return pages_to_bytes(self.missing_pages)

    def words(self, name: str) -> str:
        """A figure of its JSON for people."""
        return figures.figure_words(self.migration, name)

    def number(self, name: str) -> float:
        """A figure of its JSON, 0 if there is none."""
        return figures.number_of(self.migration.get(name)) or 0

    @property
    def sentence(self) -> str:
        """What was moved, how, and what came of it."""
        said = [
            f"{self.words('guest_kind')} guest",
            f"{self.words('vcpus')} vCPU{'s' * (self.number('vcpus') != 1)}",
            f"{self.words('memory_bytes')} of RAM",
            f"mode {self.words('mode')}",
            f"order {self.words('order')}",
            f"transport {self.words('transport')}",
        ]
        if "peer" in self.migration:
            said.append(f"peer {self.words('peer')}")
        return ", ".join(said)


def notes_of(subject: Subject) -> list[str]:
    """What a reader must know before trusting the charts."""
    trace, state, mode = subject.trace, subject.migration.get("state"), subject.migration.get("mode")
    notes = []
    if not trace.is_whole:
        notes.append("The trace is not whole: its last piece never came. The charts show what came before.")
    if state not in {None, "completed"}:
        notes.append(f"The migration did not complete, it is {figures.clean(state)}: its figures end where it did.")
    if subject.lost_faults:
        notes.append(
            f"{subject.lost_faults:,} faults were not kept: curves, stages and maps are of the other"
            f" {len(trace.faults):,}, the figures of all."
        )
    if not any(phase.state == "precopy" for phase in subject.phases):
        notes.append(f"There was no precopy{': mode postcopy has none' if mode == 'postcopy' else ''}.")
    if not len(trace.faults):
        why = ": in mode precopy, no page is missing when the vCPUs come" if mode == "precopy" else ""
        notes.append(f"No fault is recorded{why}.")
    if not subject.guest.count:
        kind = subject.words("guest_kind")
        why = (
            f"a guest of kind {kind} does not time its touches" if kind == "qemu" else "no touch took as long as 15 µs"
        )
        notes.append(f"There is no guest's view of the stalls: {why}, or it was not asked.")
    if not trace.progress:
        notes.append("No progress is recorded: there are no rates of pages, and no map of what was missing.")
    return notes + _differences(subject)


def _differences(subject: Subject) -> list[str]:
    """Where curves and JSON, which ought to be of the same durations, are not."""
    views = []
    if subject.trace.is_whole:
        views.append(("guest stall", "guest_stall_us", subject.guest))
        if not subject.lost_faults:
            views.append(("fault latency", "fault_latency_us", subject.pager))
    differing = []
    for words, group, curve in views:
        quantiles = ((f"{group}.p50", 0.5), (f"{group}.p99", 0.99))
        if curve.count and any(
            name in subject.migration
            and not math.isclose(
                subject.number(name), curve.quantile_us(share), rel_tol=_SAME_SHARE, abs_tol=_ROUNDING_US
            )
            for name, share in quantiles
        ):
            differing.append(
                f"The {words} of the JSON ({subject.words(f'{group}.count')}) is not quite that of the trace"
                f" ({curve.count:,}): the figures are the former, the curves the latter."
            )
    return differing
