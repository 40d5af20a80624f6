"""Progress on stderr: a live view on a terminal, a sparse line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import click
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from migrate.cli.render import migration_status_json, print_json
from migrate.cli.view import MigrationView
from migrate.client import FINAL_STATES, pages_present, state_word
from migrate.v1 import types_pb2

# A line for each quarter is enough for a log file.
_PLAIN_STEPS = 4
_DRAWINGS_PER_S = 4
_JSON_EACH_S = 1.0


class Reporter(Protocol):
    """Takes notice of how far something is."""

    wants_live: bool
    """Whether `show` has a use for what costs something to gather (Migration.live)."""

    def report(self, label: str, done: int, total: int, note: str = "") -> None:
        """Say how far it is.

        Args:
            label: What is going on; a new label is a new phase.
            done: How much of total is done, in whatever unit total has.
            total: What done ends at; 0 if that is not known yet.
            note: A few words beside it.
        """

    def show(self, migration: types_pb2.Migration) -> None:
        """Say how far a migration is."""


class PlainReporter:
    """Writes a line when the phase changes, and at each quarter of it."""

    wants_live = False

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None

    def report(self, label: str, done: int, total: int, note: str = "") -> None:
        """See Reporter."""
        step = done * _PLAIN_STEPS // total if total else 0
        # Pages that become stale again take it back, which is worth no line.
        if self._last is not None and self._last[0] == label and step <= self._last[1]:
            return
        self._last = (label, step)
        # 100% is for the last of them.
        share = f" {done * 100 // total}%" if total else ""
        click.echo(f"{label}{share}{f', {note}' if note else ''}", err=True)

    def show(self, migration: types_pb2.Migration) -> None:
        """See Reporter."""
        pages = migration.pages
        note = f"{pages.urgent:,} urgent" if pages.urgent else ""
        self.report(state_word(migration.state), pages_present(pages), pages.total, note)


class JsonReporter:
    """Prints a line of JSON on stdout when the state changes, and once a second; none for the end, which follows."""

    wants_live = False

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._last: tuple[int, float] | None = None

    def report(self, label: str, done: int, total: int, note: str = "") -> None:
        """See Reporter."""

    def show(self, migration: types_pb2.Migration) -> None:
        """See Reporter."""
        now_s = self._now_s()
        is_due = self._last is None or self._last[0] != migration.state or now_s - self._last[1] >= _JSON_EACH_S
        if is_due and migration.state not in FINAL_STATES:
            self._last = migration.state, now_s
            print_json(migration_status_json(migration))
            sys.stdout.flush()


class LiveReporter:
    """Moves a bar, or draws a migration.

    Args:
        live: What draws it.
        asked: Address of the daemon that tells of the migration.
        hint: A line below a migration.
    """

    wants_live = True

    def __init__(self, live: Live, asked: str, hint: str) -> None:
        self._live = live
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=live.console,
        )
        self._view = MigrationView(asked, hint)
        self._label = ""
        self._task: TaskID | None = None

    def report(self, label: str, done: int, total: int, note: str = "") -> None:
        """See Reporter."""
        if self._task is None or label != self._label:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(label, total=None, note="")
            self._label = label
        self._progress.update(self._task, completed=done, total=total or None, note=note)
        self._live.update(self._progress)

    def show(self, migration: types_pb2.Migration) -> None:
        """See Reporter."""
        self._view.show(migration)
        self._live.update(self._view)


@contextmanager
def progress_reporter(asked: str = "", hint: str = "") -> Iterator[Reporter]:
    """The reporter that fits stderr; what it draws is on a screen of its own, which goes away at the end.

    Args:
        asked: Address of the daemon that tells of a migration.
        hint: A line below a migration that is drawn.
    """
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield PlainReporter()
        return
    # Drawn among other lines, it would leave pieces of itself whenever the terminal is resized.
    with Live(console=console, refresh_per_second=_DRAWINGS_PER_S, screen=True) as live:
        try:
            yield LiveReporter(live, asked, hint)
        finally:
            # A terminal may have but one screen.
            live.update("", refresh=True)
