"""The page: all charts of all traces, put into the template."""

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from migrate.errors import TraceError
from migrate.telemetry.report import charts, figures, timeline
from migrate.telemetry.report.charts import Frame, Series
from migrate.telemetry.report.subject import Subject, notes_of
from migrate.telemetry.trace_file import Trace

_TEMPLATE = "report.html.j2"
_LOOKS = 6
"""How many colours and dashes the style has for curves."""

_HEADLINE = (
    ("downtime_us", "downtime"),
    ("total_us", "total"),
    ("fault_latency_us.p99", "fault latency p99"),
    ("guest_stall_us.p99", "guest stall p99"),
    ("bytes_on_wire", "on the wire"),
    ("guest_errors", "guest errors"),
)


def report_html(traces: Sequence[tuple[str, Trace]]) -> str:
    """The page of some traces, with the name of each; the first is what the others are compared with.

    Raises:
        TraceError: one of them is of no migration.
    """
    subjects = []
    for place, (name, trace) in enumerate(traces):
        if not isinstance(trace.migration, Mapping):
            raise TraceError(f"{name} is no trace of ours: it has no migration")
        letter = string.ascii_uppercase[place] if place < len(string.ascii_uppercase) else str(place + 1)
        subjects.append(Subject(letter, place, figures.clean(name), trace, dict(figures.flatten(trace.migration))))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=figures.duration_words, share=figures.share_words, count=figures.count_words, bytes=figures.bytes_words
    )
    guests = ", ".join(dict.fromkeys(subject.words("guest") for subject in subjects))
    return environment.get_template(_TEMPLATE).render(
        title=f"Migration of {guests}",
        subjects=subjects,
        is_comparison=len(subjects) > 1,
        headline=_HEADLINE,
        notes=[notes_of(subject) for subject in subjects],
        groups=figures.groups_of([dict(subject.migration) for subject in subjects]),
        downtime=_downtime(subjects),
        cdfs=_cdfs(subjects),
        stages=_stages(subjects),
        maps=_maps(subjects),
        rates=_rates(subjects),
    )


def _downtime(subjects: Sequence[Subject]) -> dict[str, Any]:
    known = [subject for subject in subjects if sum(value for _, value in subject.downtime)]
    names = list(dict.fromkeys(name for subject in subjects for name, _ in subject.downtime))
    chart = None
    if known:
        label = "Downtime by its parts, " + ", ".join(f"{each.letter} {each.words('downtime_us')}" for each in known)
        chart = charts.stacked_bars([(each.letter, each.downtime) for each in known], label, "downtime")
    return {
        "chart": chart,
        "names": names,
        "columns": [dict(subject.downtime) for subject in subjects],
        "sums": [sum(value for _, value in subject.downtime) for subject in subjects],
        "unknown": [subject for subject in subjects if subject not in known],
    }


def _cdfs(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """The views in one chart if there is one trace; else a chart for each view, with all traces in it."""
    views = (("the guest's view", "guest"), ("the pager's view", "pager"))
    panels: list[tuple[str, list[Series]]]
    if len(subjects) == 1:
        panels = [
            ("", [Series(words, view, look, getattr(subjects[0], view)) for look, (words, view) in enumerate(views)])
        ]
    else:
        panels = [
            (
                words,
                [
                    Series(f"{each.letter} {each.name}", each.letter, each.place % _LOOKS, getattr(each, view))
                    for each in subjects
                ],
            )
            for words, view in views
        ]
    panels = [(words, [each for each in series if each.curve.count]) for words, series in panels]
    everything = [each for _, series in panels for each in series]
    if not everything:
        return []
    range_us = charts.latency_range(everything)
    drawn = []
    for words, series in panels:
        if series:
            label = (f"Stalls, {words}: " if words else "Stalls: ") + "; ".join(
                f"{each.label}, p99 {figures.duration_words(each.curve.quantile_us(0.99))}" for each in series
            )
            pair = [charts.cdf_chart(series, range_us, label, is_tail=is_tail) for is_tail in (False, True)]
            drawn.append({"words": words, "series": series, "charts": pair})
    return drawn


def _stages(subjects: Sequence[Subject]) -> Markup | None:
    known = [subject for subject in subjects if subject.stages]
    if not known:
        return None
    # A mean below zero, which clocks that disagree could make, has no place in a bar; the table has it.
    rows = [(each.letter, [(part.name, max(0.0, part.mean_us)) for part in each.stages]) for each in known]
    label = "Mean urgent fault by stage: " + "; ".join(
        ", ".join(f"{name} {figures.duration_words(value)}" for name, value in parts) for _, parts in rows
    )
    return charts.stacked_bars(rows, label, "mean of urgent faults")


def _maps(subjects: Sequence[Subject]) -> list[tuple[Subject, Markup]]:
    """On the same axes, with the same shades, whichever trace it is."""
    known = [subject for subject in subjects if len(subject.trace.faults)]
    if not known:
        return []
    range_s = (min(each.clock.map_begin_s for each in known), max(each.clock.end_s for each in known))
    if range_s[0] >= range_s[1]:
        return []
    memory_bytes = max(timeline.memory_bytes_of(each.trace) for each in known)
    maps = [timeline.fault_maps(each.trace, each.clock, range_s, memory_bytes) for each in known]
    kinds = [kind for kind in ("urgent", "background", "zero", "present") if any(kind in each for each in maps)]
    count_max = max(float(cells.max()) for each in maps for cells in each.values())
    nothing = np.zeros((timeline.ROWS, timeline.COLUMNS))
    drawn = []
    for subject, cells in zip(known, maps, strict=True):
        counts = dict.fromkeys(kinds, 0) | {part.name: part.count for part in subject.kinds}
        label = "Faults over time and address: " + ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds)
        frame = Frame(f"map-{subject.place}", label, range_s, subject.clock.zero_words, subject.phases)
        missing = timeline.missing_map(subject.trace, subject.clock, range_s, memory_bytes)
        rows = {kind: cells.get(kind, nothing) for kind in kinds}
        drawn.append((subject, charts.fault_chart(rows, counts, missing, frame, count_max, memory_bytes)))
    return drawn


def _rates(subjects: Sequence[Subject]) -> list[tuple[Subject, Markup]]:
    known = [subject for subject in subjects if subject.rates]
    if not known:
        return []
    range_s = (min(each.clock.begin_s for each in known), max(each.clock.end_s for each in known))
    tops: dict[str, float] = {}
    for subject in known:
        for rate in subject.rates:
            tops[rate.name] = max(tops.get(rate.name, 0.0), rate.peak_per_s)
    drawn = []
    for subject in known:
        label = "Rates over time: " + ", ".join(
            f"{each.name} at most {each.peak_per_s:,.0f}/s" for each in subject.rates
        )
        frame = Frame(f"rate-{subject.place}", label, range_s, subject.clock.zero_words, subject.phases)
        # The same rows for every trace, so that they can be looked at side by side.
        own = {rate.name: rate for rate in subject.rates}
        nothing = (np.array(range_s), np.zeros(1), 0.0)
        rows = [own.get(name) or timeline.Steps(name, *nothing) for name in timeline.RATES if name in tops]
        drawn.append((subject, charts.rate_chart(rows, tops, frame)))
    return drawn
