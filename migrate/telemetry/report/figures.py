"""The figures of a migration under the names that its JSON gives them, and how they are written for people."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_WORDS_MAX = 500
_NUMBER_MAX = 1e18
_NONE = "none"

_QUANTILES = (
    ("count", "count"),
    ("mean", "mean"),
    ("p50", "p50"),
    ("p90", "p90"),
    ("p99", "p99"),
    ("p999", "p99.9"),
    ("max", "max"),
)

GROUPS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Time",
        (
            ("downtime_us", "downtime"),
            ("precopy_us", "precopy"),
            ("postcopy_us", "postcopy"),
            ("total_us", "total"),
        ),
    ),
    (
        "Fault latency",
        tuple((f"fault_latency_us.{name}", label) for name, label in _QUANTILES),
    ),
    (
        "Guest stall",
        tuple((f"guest_stall_us.{name}", label) for name, label in _QUANTILES),
    ),
    (
        "Pages",
        (
            ("pages.total", "total"),
            ("pages.zero", "zero"),
            ("pages.precopy", "precopy"),
            ("pages.urgent", "urgent"),
            ("pages.background", "background"),
            ("pages.duplicate", "duplicate replies"),
            ("pages.stale", "stale replies"),
            ("bytes_on_wire", "on the wire"),
        ),
    ),
    (
        "Guest",
        (
            ("guest", "name"),
            ("guest_kind", "kind"),
            ("vcpus", "vCPUs"),
            ("memory_bytes", "memory"),
            ("page_size_bytes", "page size"),
            ("guest_touches", "touches"),
            ("guest_errors", "errors"),
            ("verified_pages", "verified pages"),
        ),
    ),
    (
        "Migration",
        (
            ("migration_id", "id"),
            ("state", "state"),
            ("mode", "mode"),
            ("order", "order"),
            ("transport", "transport"),
        ),
    ),
)
"""What the JSON of `migrate start` promises, as (heading, (name, label) of each figure)."""

_KNOWN = {name for _, figures in GROUPS for name, _ in figures}


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of one trace.

    Attributes:
        name: As in the JSON, with dots between levels.
        raw: The very value of the JSON, as text.
        words: The same for people.
        is_text: It is no number.
        ratio: To that of the first trace; empty if there is none.
    """

    name: str
    raw: str
    words: str
    is_text: bool
    ratio: str = ""


def number_of(value: Any) -> float | None:
    """A value out of a file as a number; None if it is none that anybody can calculate with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and abs(value) < _NUMBER_MAX else None


def clean(value: Any) -> str:
    """A value out of a file as text that is safe to encode, and that nobody can hide in."""
    text = str(value)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:_WORDS_MAX])


def flatten(migration: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a migration's JSON with its dotted name; lists and nothings are no figures."""
    for key, value in migration.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None and not isinstance(value, list):
            yield f"{prefix}{key}", value


def groups_of(migrations: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, list[Cell | None]]]]]:
    """All figures, as (heading, (label, a cell for each migration)); migrations are flat, and the first is the measure.

    A figure that none of them has is left out; those that only a newer version knows come last, under their own names.
    """
    further = sorted({name for migration in migrations for name in migration} - _KNOWN)
    groups = []
    for heading, figures in [*GROUPS, ("Further", tuple((name, clean(name)) for name in further))]:
        rows = [(label, [_cell(name, each, migrations[0]) for each in migrations]) for name, label in figures]
        if rows := [row for row in rows if any(row[1])]:
            groups.append((heading, rows))
    return groups


def _cell(name: str, migration: Mapping[str, Any], first: Mapping[str, Any]) -> Cell | None:
    if name not in migration:
        return None
    value = migration[name]
    words = figure_words(migration, name)
    is_measured = migration is not first and words != _NONE
    ratio = ratio_words(number_of(value), number_of(first.get(name))) if is_measured else ""
    return Cell(clean(name), clean(value), words, number_of(value) is None, ratio)


def figure_words(migration: Mapping[str, Any], name: str) -> str:
    """A figure of a flat migration for people; there is no percentile of nothing."""
    group, _, last = name.rpartition(".")
    if last != "count" and migration.get(f"{group}.count") == 0:
        return _NONE
    return words_of(name, migration[name]) if name in migration else "not known"


def words_of(name: str, value: Any) -> str:
    """A figure for people; its name says the unit."""
    number = number_of(value)
    if number is None:
        return clean(value)
    if "_us" in name and not name.endswith(".count"):
        return duration_words(number)
    if "bytes" in name:
        return bytes_words(number)
    return count_words(number)


def ratio_words(value: float | None, first: float | None) -> str:
    """So many times the first, with a sign of times before it; empty if that cannot be said."""
    if value is None or not first:
        return ""
    ratio = value / first
    return f"\N{MULTIPLICATION SIGN}{ratio:,.{2 if abs(ratio) < 100 else 0}f}"  # noqa: PLR2004 - three digits are enough


def count_words(count: float) -> str:
    """`12,345`."""
    return f"{count:,}" if isinstance(count, int) else f"{count:,.6g}"


def share_words(share: float) -> str:
    """`12 %`, `1.2 %`; a share that rounds to nothing or to all is not said to be that."""
    percent = share * 100
    if 0 < percent < 0.1:  # noqa: PLR2004
        return "<0.1 %"
    if 99.9 < percent < 100:  # noqa: PLR2004
        return ">99.9 %"
    return f"{percent:.0f} %" if percent in {0, 100} else f"{percent:.1f} %"


def bytes_words(count_bytes: float) -> str:
    """Three digits, none of them if they say nothing: `4 KiB`, `1.06 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count_bytes) < 1023.5 or unit == "TiB":  # noqa: PLR2004 - what rounds to 1024 has the next unit
            break
        count_bytes /= 1024
    return f"{count_bytes:,.0f} {unit}" if count_bytes == int(count_bytes) else f"{_three_digits(count_bytes)} {unit}"


def duration_words(duration_us: float) -> str:
    """Three digits: `1.42 µs`, `85.0 µs`, `4.20 ms`, `1.31 s`."""
    if duration_us == 0:
        return "0"
    for unit, unit_us in (("µs", 1), ("ms", 10**3), ("s", 10**6)):
        value = duration_us / unit_us
        if abs(value) < 999.5 or unit == "s":  # noqa: PLR2004 - what rounds to a thousand has the next unit
            break
    return f"{_three_digits(value)} {unit}".replace("-", "\N{MINUS SIGN}")


def _three_digits(value: float) -> str:
    size = abs(value)
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0  # noqa: PLR2004
    return f"{value:,.{digits}f}"
