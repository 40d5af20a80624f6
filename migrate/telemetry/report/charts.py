"""The charts of a report, each from numbers that timing.py and timeline.py made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from migrate.telemetry.report.drawing import (
    CHARACTER_PX,
    Drawing,
    Scale,
    linear_ticks,
    log_range,
    log_ticks,
    steps_path,
)
from migrate.telemetry.report.figures import bytes_words, count_words, duration_words
from migrate.telemetry.report.timeline import COLUMNS, ROWS, Phase, Steps
from migrate.telemetry.report.timing import Curve

WIDTH = 740
_RIGHT = 14
_CDF_RIGHT = 24
_CELL_PX = 2
_BAND_PX = 18
_LATENCY_US_MIN = 0.1
_LONG_PHASES = frozenset({"precopy", "postcopy"})


@dataclass(frozen=True, slots=True)
class Series:
    """A curve with its names, and the number of its look: colour and dashes (`s0`, `s1`, … of the style)."""

    label: str
    letter: str
    look: int
    curve: Curve


def latency_range(series: Sequence[Series]) -> tuple[float, float]:
    """Round durations around all curves but the fastest thousandth of each."""
    lows = [max(_LATENCY_US_MIN, each.curve.quantile_us(0.001)) for each in series]
    highs = [max(_LATENCY_US_MIN, float(each.curve.values_us[-1])) for each in series]
    low, high = log_range(min(lows), 1.5 * max(highs))  # room for the name of the last mark
    return low, max(high, 10 * low)


def cdf_chart(series: Sequence[Series], range_us: tuple[float, float], label: str, *, is_tail: bool) -> Markup:
    """The share of durations that are at most so long; of the tail, on log axes, the share that is longer."""
    height, left, top, bottom = 300, 64, 20, 250
    drawing = Drawing(WIDTH, height, label)
    across = Scale(*range_us, left, WIDTH - _CDF_RIGHT, is_log=True)
    count_max = max(each.curve.count for each in series)
    if is_tail:
        lowest, _ = log_range(1 / max(count_max, 10), 1)
        up = Scale(10.0 ** np.floor(np.log10(lowest) + 1e-9), 1, bottom, top, is_log=True)
        shares = [value for value, _ in log_ticks(up.low, 1) if abs(np.log10(value) % 1) < 1e-6]  # noqa: PLR2004
    else:
        up = Scale(0, 1, bottom, top)
        shares = [0, 0.25, 0.5, 0.75, 1]
    for share in shares:
        drawing.add("line", x1=left, x2=WIDTH - _CDF_RIGHT, y1=up.px(share), y2=up.px(share), class_="grid")
        drawing.text(f"{share * 100:g} %", left - 8, up.px(share) + 4, anchor="end")
    _log_axis(drawing, across, bottom)
    drawing.text("duration, log scale", (left + WIDTH - _CDF_RIGHT) / 2, height - 6, "axis", "middle")
    for each in series:
        _cdf_line(drawing, each, across, up, is_tail=is_tail)
    for share in (0.99, 0.999) if is_tail else (0.5, 0.99):
        _marks(drawing, series, share, across, up, is_tail=is_tail)
    return drawing.markup()


def _cdf_line(drawing: Drawing, series: Series, across: Scale, up: Scale, *, is_tail: bool) -> None:
    curve = series.curve.thinned()
    shares = curve.at_most / curve.count
    if is_tail:
        # Nothing is longer than the longest: the line ends there, at the height that it came with.
        shares = 1 - np.concatenate([shares[:-1], shares[-2:-1] if len(shares) > 1 else [0.0]])
    xs = np.concatenate([[across.from_px], across.all_px(curve.values_us)])
    ys = up.all_px(np.concatenate([[1.0 if is_tail else 0.0], shares]))
    hint = f"{series.label}: {count_words(curve.count)} durations"
    drawing.add("path", d=steps_path(xs, ys), class_=f"curve s{series.look}", hint=hint)


def _marks(
    drawing: Drawing, series: Sequence[Series], share: float, across: Scale, up: Scale, *, is_tail: bool
) -> None:
    marked = [each for each in series if each.curve.count * (1 - share) >= 1]
    ranked = sorted(marked, key=lambda each: each.curve.quantile_us(share))
    for place, each in enumerate(ranked):
        value_us = each.curve.quantile_us(share)
        x, y = across.px(value_us), up.px(1 - share if is_tail else share)
        name = f"p{share * 100:g}"
        hint = f"{each.label}: {name} {duration_words(value_us)}"
        drawing.add("circle", cx=x, cy=y, r=4, class_=f"mark s{each.look}", hint=hint)
        if len(ranked) > 2:  # noqa: PLR2004 - more of them have no room; the table has the numbers
            continue
        # The faster of two is named on the side where no curve is: left of it, the slower right of it.
        is_first = place == 0 and len(ranked) > 1
        words = f"{each.letter} {name} {duration_words(value_us)}".strip()
        y_words = y + 16 if is_first == is_tail else y - 8
        width = len(words) * CHARACTER_PX
        if is_first and x - 8 - width > across.from_px:
            drawing.text(words, x - 8, y_words, "mark-words", "end")
        else:
            drawing.text(words, min(x + 8, WIDTH - width), y_words, "mark-words")


def _log_axis(drawing: Drawing, across: Scale, bottom: float) -> None:
    drawing.add("line", x1=across.from_px, x2=across.to_px, y1=bottom, y2=bottom, class_="base")
    for value_us, is_named in log_ticks(across.low, across.high):
        x = across.px(value_us)
        drawing.add("line", x1=x, x2=x, y1=bottom, y2=bottom + (7 if is_named else 4), class_="base")
        if is_named:
            drawing.text(_duration_tick(value_us), x, bottom + 20, anchor="middle")


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], label: str, axis: str) -> Markup:
    """A bar for each row, of its parts one after the other in microseconds; the longest part stands out."""
    left, bar_px, pitch_px = (34 if len(rows) > 1 else 8), 36, 48
    bottom = len(rows) * pitch_px
    drawing = Drawing(WIDTH, bottom + 44, label)
    longest_us = max(sum(value for _, value in parts) for _, parts in rows)
    across = Scale(0, longest_us or 1, left, WIDTH - 34)
    for number, (name, parts) in enumerate(rows):
        y = number * pitch_px + 6
        if len(rows) > 1:
            drawing.text(name, 4, y + bar_px / 2 + 5, "letter")
        at_us, greatest = 0.0, max(value for _, value in parts)
        for place, (part, value_us) in enumerate(parts, 1):
            x, width = across.px(at_us), across.px(at_us + value_us) - across.px(at_us)
            at_us += value_us
            look = "part-most" if value_us == greatest else f"part-{place % 2}"
            hint = f"{place} {part}: {duration_words(value_us)}"
            if width >= 0.1:  # noqa: PLR2004 - narrower than what a coordinate can say
                drawing.box(x, y, width, bar_px, f"part {look}", hint=hint)
            words = next((each for each in (f"{place} {part}", str(place)) if len(each) * CHARACTER_PX + 6 < width), "")
            if words:
                drawing.text(words, x + width / 2, y + bar_px / 2 + 4, f"in-{look}", "middle")
    drawing.add("line", x1=left, x2=across.to_px, y1=bottom, y2=bottom, class_="base")
    for value_us in linear_ticks(0, longest_us, 6):
        x = across.px(value_us)
        drawing.add("line", x1=x, x2=x, y1=bottom, y2=bottom + 6, class_="base")
        drawing.text(_duration_tick(value_us), x, bottom + 19, anchor="middle")
    drawing.text(axis, (left + WIDTH - 34) / 2, bottom + 38, "axis", "middle")
    return drawing.markup()


def fault_chart(
    maps: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
    missing: np.ndarray | None,
    frame: "Frame",
    count_max: float,
    memory_bytes: int,
) -> Markup:
    """A map for each kind of fault, one below the other: time across, RAM upwards, over the pages still missing.

    Args:
        maps: Faults in cells, for each kind.
        counts: How many of them there are in all.
        missing: The share of missing pages in the same cells.
        frame: Time, and what happened.
        count_max: Faults in the fullest cell of all maps that this one is looked at with.
        memory_bytes: Of RAM.
    """
    left, top, pitch_px, height_px = WIDTH - _RIGHT - COLUMNS * _CELL_PX, 46, 152, ROWS * _CELL_PX
    bottom = top + (len(maps) - 1) * pitch_px + height_px
    drawing = Drawing(WIDTH, bottom + 42, frame.label)
    across = Scale(*frame.range_s, left, WIDTH - _RIGHT)
    frame.draw(drawing, across, bottom)
    if missing is not None:
        drawing.mask(f"{frame.name}-missing", missing)
    unit, unit_bytes = next((unit for unit in _MEMORY_UNITS if memory_bytes >= unit[1]), _MEMORY_UNITS[-1])
    for row, (kind, cells) in enumerate(maps.items()):
        y = top + row * pitch_px
        place = (left, y, COLUMNS * _CELL_PX, height_px)
        drawing.text(f"{kind}: {count_words(counts[kind])} fault{'s' * (counts[kind] != 1)}", left, y - 8, "row-name")
        if not row:
            drawing.text(f"upwards: RAM address in {unit}", WIDTH - _RIGHT, y - 8, anchor="end")
        drawing.box(*place, "ground")
        if missing is not None:
            drawing.box(*place, "missing", mask=f"url(#{frame.name}-missing)")
        drawing.mask(f"{frame.name}-{kind}", density(cells, count_max))
        drawing.box(*place, f"kind-{kind}", mask=f"url(#{frame.name}-{kind})")
        upwards = Scale(0, memory_bytes, y + height_px, y)
        for offset_bytes in linear_ticks(0, memory_bytes, 4, base=2):
            at = upwards.px(offset_bytes)
            drawing.add("line", x1=left - 4, x2=left, y1=at, y2=at, class_="base")
            drawing.text(f"{offset_bytes / unit_bytes:g}", left - 6, at + 4, anchor="end")
        frame.lines(drawing, across, y, y + height_px)
    return drawing.markup()


def density(cells: np.ndarray, count_max: float) -> np.ndarray:
    """How strong each cell is drawn: one fault can be seen, and from there on by the logarithm."""
    if count_max <= 1:
        return np.asarray(np.minimum(cells, 1))
    shade = 0.5 + 0.5 * np.log(np.maximum(cells, 1)) / np.log(count_max)
    return np.asarray(np.where(cells > 0, shade, 0))


def rate_chart(rates: Sequence[Steps], tops: Mapping[str, float], frame: "Frame") -> Markup:
    """A row for each rate, each on its own scale up to its top."""
    left, top, pitch_px, height_px = 78, 50, 82, 48
    bottom = top + (len(rates) - 1) * pitch_px + height_px
    drawing = Drawing(WIDTH, bottom + 42, frame.label)
    across = Scale(*frame.range_s, left, WIDTH - _RIGHT)
    frame.draw(drawing, across, bottom)
    for row, rate in enumerate(rates):
        y = top + row * pitch_px
        is_bytes = rate.name.startswith("bytes")
        write = bytes_words if is_bytes else _compact
        ceiling = linear_ticks(0, tops[rate.name], 2, base=2 if is_bytes else 10)[-1]
        upwards = Scale(0, max(ceiling, tops[rate.name]), y + height_px, y)
        drawing.text(rate.name, left, y - 9, "row-name")
        drawing.text(f"at most {write(rate.peak_per_s)}/s", WIDTH - _RIGHT, y - 9, anchor="end")
        for value in (ceiling, 0):
            at = upwards.px(value)
            drawing.add("line", x1=left, x2=WIDTH - _RIGHT, y1=at, y2=at, class_="base" if not value else "grid")
            drawing.text(f"{write(value)}/s" if value else "0", left - 6, at + 4, anchor="end")
        edges_px = np.repeat(across.all_px(rate.edges_s), 2)
        heights_px = np.concatenate([[y + height_px], np.repeat(upwards.all_px(rate.per_s), 2), [y + height_px]])
        kind = rate.name.removesuffix(" pages").split()[0]
        drawing.add("path", d=steps_path(edges_px, heights_px) + "Z", class_=f"rate kind-{kind}", hint=rate.name)
        frame.lines(drawing, across, y, y + height_px)
    return drawing.markup()


@dataclass(frozen=True, slots=True)
class Frame:
    """What charts over time share: the axis below, and the phases above.

    Attributes:
        name: Begins the ids of the chart, which are unique in a page.
        label: What the chart shows, in words.
        range_s: Where time begins and ends.
        zero_words: What happened at zero.
        phases: What the destination was doing.
    """

    name: str
    label: str
    range_s: tuple[float, float]
    zero_words: str
    phases: Sequence[Phase]

    def draw(self, drawing: Drawing, across: Scale, bottom: float) -> None:
        """Draw the band of phases on top, and the axis."""
        begin_s, end_s = self.range_s
        for phase in self.phases:
            x, width = across.px(phase.begin_s), across.px(phase.end_s) - across.px(phase.begin_s)
            if phase.end_s < begin_s or phase.begin_s > end_s or width < 1:
                continue
            hint = f"{phase.state}: {duration_words((phase.end_s - phase.begin_s) * 1e6)}"
            drawing.add(
                "rect",
                x=x,
                y=0,
                width=width,
                height=_BAND_PX,
                class_="phase-long" if phase.state in _LONG_PHASES else "phase-short",
                hint=hint,
            )
            if len(phase.state) * CHARACTER_PX + 6 < width:
                drawing.text(phase.state, x + width / 2, 13, "phase", "middle")
        unit, per_s = ("s", 1.0) if end_s - begin_s >= 2 else ("ms", 1000.0)  # noqa: PLR2004 - few digits either way
        drawing.add("line", x1=across.from_px, x2=across.to_px, y1=bottom, y2=bottom, class_="base")
        for at in linear_ticks(begin_s * per_s, end_s * per_s, 8):
            x = across.px(at / per_s)
            drawing.add("line", x1=x, x2=x, y1=bottom, y2=bottom + 6, class_="base")
            drawing.text(f"{at:,.6g}".replace("-", "\N{MINUS SIGN}"), x, bottom + 19, anchor="middle")
        middle = (across.from_px + across.to_px) / 2
        drawing.text(f"{unit} since {self.zero_words}", middle, bottom + 37, "axis", "middle")

    def lines(self, drawing: Drawing, across: Scale, top: float, bottom: float) -> None:
        """Draw where phases begin, over what is there."""
        for phase in self.phases:
            if self.range_s[0] < phase.begin_s < self.range_s[1]:
                x = across.px(phase.begin_s)
                drawing.add("line", x1=x, x2=x, y1=top, y2=bottom, class_="begin", hint=f"{phase.state} begins")


_MEMORY_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def _compact(count: float) -> str:
    """`1.2 k`: as short as the margin of a chart wants it."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def _duration_tick(duration_us: float) -> str:
    """A round duration without the digits that a measured one has."""
    for unit, size_us in (("s", 1e6), ("ms", 1e3)):
        if duration_us >= size_us * 0.999:
            return f"{duration_us / size_us:.4g} {unit}"
    return f"{duration_us:.4g} µs" if duration_us else "0"
