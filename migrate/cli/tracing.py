"""`--trace FILE`: reads a migration's trace from its source as it comes, and writes it down at its end."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from migrate.cli.extras import imports_extra
from migrate.cli.render import migration_json
from migrate.client import Client
from migrate.client.words import FINAL_STATES
from migrate.errors import MigrateError, TraceError
from migrate.v1 import types_pb2

if TYPE_CHECKING:
    from migrate.telemetry.trace_file import TraceRecorder

_Command = TypeVar("_Command", bound=Callable[..., Any])

# A source has all of the trace before it says that the migration has ended.
_REST_S = 30.0
_LOOK_S = 0.2


def trace_option(command: _Command) -> _Command:
    """The option --trace; the command gets it as `trace`, a Path or None."""
    option = click.option(
        "--trace",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write every fault to this file, for `migrate trace`.",
    )
    return option(command)


def make_recorder(path: Path) -> "TraceRecorder":
    """What gathers a trace that is to be written to a file.

    Raises:
        TraceError: it could not be written there; better known now.
    """
    with imports_extra():
        from migrate.telemetry.trace_file import TraceRecorder  # noqa: PLC0415
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise TraceError(
            f"the trace cannot be written to {path}", remedy="name a file in a directory that you may write"
        )
    return TraceRecorder()


class TraceToFile:
    """A scope in which one migration is traced to a file; at its end, what has come is written, whatever happened.

    Args:
        path: The file; None does nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._recorder = None if path is None else make_recorder(path)
        self._migration: types_pb2.Migration | None = None
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self._reader: threading.Thread | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether there is a file."""
        return self._path is not None

    def begin(self, client: Client, migration_id: str) -> None:
        """The migration has been started, traced, at this client's daemon."""
        if self._recorder is not None:
            self._migration = types_pb2.Migration(migration_id=migration_id)
            self._reader = threading.Thread(target=self._read, args=(client, migration_id), daemon=True)
            self._reader.start()

    def note(self, migration: types_pb2.Migration) -> None:
        """How far it is."""
        self._migration = migration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._recorder is None or self._path is None or self._migration is None or self._reader is None:
            return
        self._leaving.set()
        if self._migration.state in FINAL_STATES:
            self._reader.join(_REST_S)
        downtime = self._migration.downtime if self._migration.HasField("downtime") else None
        with self._lock:
            try:
                self._recorder.write(self._path, migration_json(self._migration), downtime)
            except OSError as error:
                raise TraceError(f"the trace cannot be written to {self._path}: {error.strerror}") from error
            if not self._recorder.is_whole:
                click.echo(f"migrate: {self._path} has what was traced until now, not all of the migration", err=True)

    def _read(self, client: Client, migration_id: str) -> None:
        """Take in all of it, though the daemon be started again meanwhile."""
        while self._recorder is not None:
            try:
                for part in client.migrations.trace(migration_id):
                    with self._lock:
                        self._recorder.add(part)
            except MigrateError:
                if self._leaving.wait(_LOOK_S):
                    return
            else:
                return
