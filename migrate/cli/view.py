"""One migration as it goes, drawn for a terminal: 80 columns are enough, and colour says nothing that glyphs do not."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from migrate.cli.pace import Pace
from migrate.client.words import FINAL_STATES, guest_kind_word, missing_pages, pages_present, state_word
from migrate.errors import GuestHolder
from migrate.units import format_bytes, format_duration_us
from migrate.v1 import types_pb2 as types

_LABEL_COLUMNS = 9
_BAR_COLUMNS = 32
_MAP_ROWS = 2
_SHARE_MAX = 255
_HEAT = ("green", "yellow", "dark_orange", "red", "bright_red")

_PHASES = (
    types.MIGRATION_STATE_SETUP,
    types.MIGRATION_STATE_PRECOPY,
    types.MIGRATION_STATE_SWITCHOVER,
    types.MIGRATION_STATE_POSTCOPY,
    types.MIGRATION_STATE_COMPLETED,
)
_DETOURS = {
    types.MIGRATION_STATE_POSTCOPY_PAUSED: types.MIGRATION_STATE_POSTCOPY,
    types.MIGRATION_STATE_POSTCOPY_RECOVER: types.MIGRATION_STATE_POSTCOPY,
}


@dataclass(frozen=True, slots=True)
class _Glyphs:
    """What it is drawn with.

    Attributes:
        shares: Of missing pages: none, up to a third, up to two thirds, more, all.
    """

    full: str
    empty: str
    done: str
    now: str
    ahead: str
    arrow: str
    micro: str
    shares: Sequence[str]


_UNICODE = _Glyphs("█", "░", "✓", "▸", "·", "→", "µ", "·░▒▓█")
_ASCII = _Glyphs("#", ".", "+", ">", "-", "->", "u", ".:+%#")


class MigrationView:
    """Draws the migration that was shown last; its clock ticks on between.

    Args:
        asked: Address of the daemon that is asked.
        hint: A line below it all.
    """

    def __init__(self, asked: str, hint: str = "") -> None:
        self._asked = asked
        self._hint = hint
        self._pace = Pace()
        self._migration = types.Migration()
        self._map = b""
        self._shown_s = time.monotonic()
        self._lock = threading.Lock()  # one thread shows, another draws

    def show(self, migration: types.Migration) -> None:
        """Draw this one from now on."""
        with self._lock:
            self._pace.add(migration)
            self._shown_s = time.monotonic()
            if migration.live.missing_map:
                self._map = migration.live.missing_map
            elif migration.pages.total and not missing_pages(migration.pages):
                self._map = bytes(1)
            self._migration = migration

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = _ASCII if options.ascii_only else _UNICODE
        with self._lock:
            lines = list(self._lines(glyphs, options.max_width - _LABEL_COLUMNS))
        for label, line in lines:
            text = Text.assemble((f"{label:<{_LABEL_COLUMNS}}", "bold"), line)
            text.no_wrap, text.overflow = label != "error", "crop" if options.ascii_only else "ellipsis"
            yield text

    def _lines(self, glyphs: _Glyphs, columns: int) -> Iterator[tuple[str, Text]]:
        migration = self._migration
        machine = f"{guest_kind_word(migration.guest_kind)}, {format_bytes(migration.memory_bytes)}"
        yield "guest", _plain(f"{migration.guest} ({machine}), migration {migration.migration_id}")
        ends = (self._asked, migration.peer)
        source, destination = ends if migration.side != types.MIGRATION_SIDE_DESTINATION else ends[::-1]
        yield "hosts", _plain(f"{source or '?'} {glyphs.arrow} {destination or '?'}")
        yield "phase", _phases(migration, glyphs)
        yield "time", _plain(self._times(glyphs))
        yield "pages", _bar(migration.pages, glyphs)
        yield "", _plain(_kinds(migration.pages))
        rows = heat_map(self._map, columns, _MAP_ROWS)
        for label, shares in zip(("missing", ""), rows, strict=False):
            yield label, _heat(shares, glyphs)
        yield "", _plain(f"{glyphs.shares[0]} none  {' '.join(glyphs.shares[1:-1])} some  {glyphs.shares[-1]} all")
        rate = f"{format_bytes(self._pace.wire_bytes_per_s)}/s on the wire, {self._pace.pages_per_s:,.0f} pages/s"
        yield "rate", _plain(rate)
        yield "urgent", _plain(_latencies(migration, glyphs))
        if migration.HasField("error"):
            yield "error", Text(f"{migration.error.message}; {GuestHolder(migration.holder).describe()}", style="red")
        if self._hint:
            yield "", Text(self._hint, style="dim")

    def _times(self, glyphs: _Glyphs) -> str:
        migration = self._migration
        since_us = 0.0 if migration.state in FINAL_STATES else (time.monotonic() - self._shown_s) * 1_000_000
        words = [f"{(migration.total_us + since_us) / 1_000_000:.1f} s"]
        if migration.state not in FINAL_STATES and migration.pages.total:
            left_us = self._pace.left_us
            words.append("left unknown: no pages come" if left_us is None else f"about {_seconds(left_us)} left")
        if migration.downtime_us:
            words.append(f"downtime {_duration(migration.downtime_us, glyphs)}")
        return ", ".join(words)


def heat_map(shares: bytes, columns: int, rows: int) -> list[list[int]]:
    """Shares of missing pages (0 none, 255 all) for each cell of some rows, from those of a daemon's parts of RAM.

    A cell that covers several parts shows their mean, and says none or all only if all of them do.
    """
    if not shares:
        return [[] for _ in range(rows)]
    count = columns * rows
    cells = []
    for cell in range(count):
        first = cell * len(shares) // count
        covered = shares[first : max(first + 1, (cell + 1) * len(shares) // count)]
        mean = sum(covered) // len(covered)
        is_mixed = 0 < sum(covered) < _SHARE_MAX * len(covered)
        cells.append(min(_SHARE_MAX - 1, max(1, mean)) if is_mixed else mean)
    return [cells[row * columns : (row + 1) * columns] for row in range(rows)]


def _heat(shares: Sequence[int], glyphs: _Glyphs) -> Text:
    if not shares:
        return _plain("not known")
    text = Text()
    for share in shares:
        level = 0 if share == 0 else len(_HEAT) - 1 if share == _SHARE_MAX else 1 + share * 3 // (_SHARE_MAX + 1)
        text.append(glyphs.shares[level], style=_HEAT[level])
    return text


def _phases(migration: types.Migration, glyphs: _Glyphs) -> Text:
    state = migration.state
    here = _DETOURS.get(state, state)
    phases = [
        phase
        for phase in _PHASES
        if phase != types.MIGRATION_STATE_PRECOPY or migration.mode != types.MIGRATION_MODE_POSTCOPY
    ]
    if here not in phases:
        # It has left the way: only where it is now is worth saying.
        return Text(f"{glyphs.now} {state_word(state)}", style="bold")
    text = Text()
    for phase in phases:
        is_past = phases.index(phase) < phases.index(here) or here == types.MIGRATION_STATE_COMPLETED
        mark = glyphs.done if is_past else glyphs.now if phase == here else glyphs.ahead
        word = state_word(state if phase == here else phase)
        text.append(f"{mark} {word}  ", style="bold" if phase == here else "" if is_past else "dim")
    return text


def _bar(pages: types.PageCounts, glyphs: _Glyphs) -> Text:
    share = pages_present(pages) / pages.total if pages.total else 0.0
    full = int(share * _BAR_COLUMNS)
    text = Text(glyphs.full * full, style="green").append(glyphs.empty * (_BAR_COLUMNS - full), style="dim")
    # 100% is for the last page.
    percent = int(share * 100)
    return text.append(f" {percent}%, {missing_pages(pages):,} of {pages.total:,} missing", style="default")


def _kinds(pages: types.PageCounts) -> str:
    names = ("zero", "precopy", "urgent", "background")
    words = ", ".join(f"{getattr(pages, name):,} {name}" for name in names)
    return words + (f", {pages.stale:,} stale" if pages.stale else "")


def _latencies(migration: types.Migration, glyphs: _Glyphs) -> str:
    live = migration.live.fault_latency_us
    if not live.count:
        return "none in the last second"
    parts = (("p50", live.p50), ("p99", live.p99), ("max", live.max))
    words = "  ".join(f"{name} {_duration(value, glyphs)}" for name, value in parts)
    return f"{words}  ({live.count:,} in the last second)"


def _duration(duration_us: float, glyphs: _Glyphs) -> str:
    return format_duration_us(duration_us).replace("µ", glyphs.micro)


def _seconds(duration_us: float) -> str:
    seconds = round(duration_us / 1_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _plain(words: str) -> Text:
    return Text(words, style="default")
