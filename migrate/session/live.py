"""What those who watch a migration want to know at once: gathered, or asked for, only while somebody does."""

import contextlib
import threading
from collections.abc import Callable, Iterator

from migrate.v1 import types_pb2 as types

MAP_CELLS = 256
"""Parts of RAM in a map of missing pages: enough for two lines of a wide terminal, and a quarter of a kilobyte."""


class Live:
    """Thread-safe. The destination gathers; the source hands on what the destination told it last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers = 0
        self._told: types.LiveFigures | None = None
        self._gather: Callable[[], types.LiveFigures | None] = lambda: self._told

    def gather_by(self, gather: Callable[[], types.LiveFigures | None]) -> None:
        """This side knows for itself."""
        self._gather = gather

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A scope in which somebody watches."""
        with self._lock:
            self._watchers += 1
        try:
            yield
        finally:
            with self._lock:
                self._watchers -= 1
                if not self._watchers:
                    self._told = None  # whoever comes next would take it for what is so now

    @property
    def is_watched(self) -> bool:
        """Whether anybody does."""
        return self._watchers > 0

    def hand_on(self, destination: types.Migration) -> None:
        """What the destination says, if it was asked and knows."""
        with self._lock:
            if self._watchers and destination.HasField("live"):
                self._told = destination.live

    def add_to(self, migration: types.Migration) -> types.Migration:
        """The same migration with what is known now."""
        figures = self._gather()
        if figures is not None:
            migration.live.CopyFrom(figures)
        return migration
