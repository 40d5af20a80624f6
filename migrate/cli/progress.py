"""Progress on stderr: a live bar on a terminal, a sparse line now and then elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from migrate.cli.render import pages_present, state_word
from migrate.v1 import types_pb2

# A line for each quarter is enough for a log file.
_PLAIN_STEPS = 4


class Reporter(Protocol):
    """Takes notice of how far something is."""

    def report(self, label: str, done: int, total: int, note: str = "") -> None:
        """Say how far it is.

        Args:
            label: What is going on; a new label is a new phase.
            done: How much of total is done, in whatever unit total has.
            total: What done ends at; 0 if that is not known yet.
            note: A few words beside it.
        """


class PlainReporter:
    """Writes a line when the phase changes, and at each quarter of it."""

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None

    def report(self, label: str, done: int, total: int, note: str = "") -> None:
        """See Reporter."""
        step = done * _PLAIN_STEPS // total if total else 0
        if (label, step) == self._last:
            return
        self._last = (label, step)
        share = f" {done / total:.0%}" if total else ""
        click.echo(f"{label}{share}{f', {note}' if note else ''}", err=True)


class BarReporter:
    """Moves a bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
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


@contextmanager
def progress_reporter() -> Iterator[Reporter]:
    """The reporter that fits stderr; the bar goes away at the end."""
    if not sys.stderr.isatty():
        yield PlainReporter()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield BarReporter(progress)


def report_migration(reporter: Reporter, migration: types_pb2.Migration) -> None:
    """Say how far a migration is."""
    pages = migration.pages
    note = f"{pages.urgent:,} urgent" if pages.urgent else ""
    reporter.report(state_word(migration.state), pages_present(pages), pages.total, note)
