"""One migration as it goes, drawn for a terminal: 80 columns are enough, and colour says nothing that glyphs do not.

On a narrower one the lines are broken between facts, never within one.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from migrate.cli.pace import Pace
from migrate.client.words import FINAL_STATES, guest_kind_word, missing_pages, pages_present, state_word
from migrate.errors import GuestHolder
from migrate.units import format_bytes, format_duration_us
from migrate.v1 import types_pb2 as types

_LABEL_COLUMNS = 9
_BAR_COLUMNS = 32
_BAR_COLUMNS_MIN = 8
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


@dataclass(frozen=True, slots=True)
class _Fact:
    """A label and what it says, in parts that stay whole where a line is too short for all of them.

    Attributes:
        between: What stands between two parts; at the end of a line, without its spaces.
    """

    label: str
    parts: Sequence[Text]
    between: str = ", "

    def lines(self, columns: int) -> list[Text]:
        """As few lines as will do."""
        mark = self.between.rstrip()
        gap = self.between[len(mark) :]
        lines = [Text()]
        for number, part in enumerate(self.parts):
            marked = part.copy().append(mark if number < len(self.parts) - 1 else "")
            if lines[-1] and lines[-1].cell_len + cell_len(gap) + marked.cell_len > columns:
                lines.append(Text())
            lines[-1].append(gap if lines[-1] else "").append_text(marked)
        return lines


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
        columns = max(1, options.max_width - _LABEL_COLUMNS)
        with self._lock:
            facts = list(self._facts(glyphs, columns))
        for fact in facts:
            for number, line in enumerate(fact.lines(columns)):
                text = Text.assemble((f"{'' if number else fact.label:<{_LABEL_COLUMNS}}", "bold"), line)
                text.no_wrap, text.overflow = True, "crop" if options.ascii_only else "ellipsis"
                yield text

    def _facts(self, glyphs: _Glyphs, columns: int) -> Iterator[_Fact]:
        migration = self._migration
        machine = f"{guest_kind_word(migration.guest_kind)}, {format_bytes(migration.memory_bytes)}"
        yield _plain("guest", f"{migration.guest} ({machine})", f"migration {migration.migration_id}")
        ends = (self._asked, migration.peer)
        source, destination = ends if migration.side != types.MIGRATION_SIDE_DESTINATION else ends[::-1]
        yield _plain("hosts", source or "?", destination or "?", between=f" {glyphs.arrow} ")
        yield _Fact("phase", _phases(migration, glyphs), "  ")
        yield _plain("time", *self._times(glyphs))
        yield _Fact("pages", _bar(migration.pages, glyphs, columns), " ")
        yield _plain("", *_kinds(migration.pages))
        rows = heat_map(self._map, columns, _MAP_ROWS)
        for label, shares in zip(("missing", ""), rows if self._map else [[]], strict=False):
            yield _Fact(label, [_heat(shares, glyphs)])
        legend = f"{glyphs.shares[0]} none", f"{' '.join(glyphs.shares[1:-1])} some", f"{glyphs.shares[-1]} all"
        yield _plain("", *legend, between="  ")
        wire, pages = format_bytes(self._pace.wire_bytes_per_s), f"{self._pace.pages_per_s:,.0f}"
        yield _plain("rate", f"{wire}/s on the wire", f"{pages} pages/s")
        yield _plain("urgent", *_latencies(migration, glyphs), between="  ")
        if migration.HasField("error"):
            words = f"{migration.error.message}; {GuestHolder(migration.holder).describe()}".split()
            yield _Fact("error", [Text(word, style="red") for word in words], " ")
        if self._hint:
            yield _Fact("", [Text(word, style="dim") for word in self._hint.split()], " ")

    def _times(self, glyphs: _Glyphs) -> Iterator[str]:
        migration = self._migration
        since_us = 0.0 if migration.state in FINAL_STATES else (time.monotonic() - self._shown_s) * 1_000_000
        yield f"{(migration.total_us + since_us) / 1_000_000:.1f} s"
        if migration.state not in FINAL_STATES and migration.pages.total:
            left_us = self._pace.left_us
            if left_us is not None:
                yield f"about {_seconds(left_us)} left"
            elif self._pace.is_settled:
                yield "left unknown: no pages come"
        if migration.downtime_us:
            yield f"downtime {_duration(migration.downtime_us, glyphs)}"


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
        return Text("not known", style="default")
    text = Text()
    for share in shares:
        level = 0 if share == 0 else len(_HEAT) - 1 if share == _SHARE_MAX else 1 + share * 3 // (_SHARE_MAX + 1)
        text.append(glyphs.shares[level], style=_HEAT[level])
    return text


def _phases(migration: types.Migration, glyphs: _Glyphs) -> list[Text]:
    state = migration.state
    here = _DETOURS.get(state, state)
    phases = [
        phase
        for phase in _PHASES
        if phase != types.MIGRATION_STATE_PRECOPY or migration.mode != types.MIGRATION_MODE_POSTCOPY
    ]
    if here not in phases:
        # It has left the way: only where it is now is worth saying.
        return [Text(f"{glyphs.now} {state_word(state)}", style="bold")]
    words = []
    for phase in phases:
        is_past = phases.index(phase) < phases.index(here) or here == types.MIGRATION_STATE_COMPLETED
        mark = glyphs.done if is_past else glyphs.now if phase == here else glyphs.ahead
        word = state_word(state if phase == here else phase)
        words.append(Text(f"{mark} {word}", style="bold" if phase == here else "default" if is_past else "dim"))
    return words


def _bar(pages: types.PageCounts, glyphs: _Glyphs, columns: int) -> list[Text]:
    share = pages_present(pages) / pages.total if pages.total else 0.0
    # 100% is for the last page.
    words = f"{int(share * 100)}%, {missing_pages(pages):,} of {pages.total:,} missing"
    # As long as there is room beside the longest words, so that it keeps its length.
    beside = columns - cell_len(f" 100%, {pages.total:,} of {pages.total:,} missing")
    length = min(_BAR_COLUMNS, beside if beside >= _BAR_COLUMNS_MIN else columns)
    full = int(share * length)
    bar = Text(glyphs.full * full, style="green").append(glyphs.empty * (length - full), style="dim")
    return [bar, Text(words, style="default")]


def _kinds(pages: types.PageCounts) -> Iterator[str]:
    for name in ("zero", "precopy", "urgent", "background"):
        yield f"{getattr(pages, name):,} {name}"
    if pages.stale:
        yield f"{pages.stale:,} stale"


def _latencies(migration: types.Migration, glyphs: _Glyphs) -> Iterator[str]:
    live = migration.live.fault_latency_us
    if not live.count:
        yield "none in the last second"
        return
    for name, value in (("p50", live.p50), ("p99", live.p99), ("max", live.max)):
        yield f"{name} {_duration(value, glyphs)}"
    yield f"({live.count:,} in the last second)"


def _duration(duration_us: float, glyphs: _Glyphs) -> str:
    return format_duration_us(duration_us).replace("µ", glyphs.micro)


def _seconds(duration_us: float) -> str:
    seconds = round(duration_us / 1_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _plain(label: str, *parts: str, between: str = ", ") -> _Fact:
    return _Fact(label, [Text(part, style="default") for part in parts], between)
