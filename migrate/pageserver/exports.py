"""Which memories are served now, to whom."""

import hmac
import threading
from dataclasses import dataclass

from migrate.errors import NotFoundError, PermissionDeniedError
from migrate.native.pageserver import PageSource

METADATA_MIGRATION_ID = "migration-id"
METADATA_AUTHORIZATION = "authorization"
BEARER = "Bearer "


@dataclass(frozen=True, slots=True)
class Export:
    """One guest's memory, served to the holder of one token while its migration lasts."""

    migration_id: str
    token: str
    source: PageSource


class Exports:
    """All memories that this daemon serves. Thread-safe."""

    def __init__(self) -> None:
        self._exports: dict[str, Export] = {}
        self._readers: dict[str, int] = {}
        self._changed = threading.Condition()

    def publish(self, export: Export) -> None:
        """Serve a memory from now on."""
        with self._changed:
            self._exports[export.migration_id] = export

    def withdraw(self, migration_id: str) -> None:
        """Serve a memory no longer. Returns once no reader is inside it, so that it may be freed."""
        with self._changed:
            self._exports.pop(migration_id, None)
            self._changed.wait_for(lambda: not self._readers.get(migration_id))

    def check(self, migration_id: str, authorization: str) -> Export:
        """The export that a call may read.

        Raises:
            NotFoundError: no such migration serves pages now.
            PermissionDeniedError: the token is not the migration's.
        """
        with self._changed:
            export = self._exports.get(migration_id)
        if export is None:
            raise NotFoundError(f"no pages are served here for migration {migration_id!r}")
        if not hmac.compare_digest(authorization.encode(), (BEARER + export.token).encode()):
            raise PermissionDeniedError("the token is not this migration's")
        return export

    def reading(self, export: Export) -> "Reading":
        """A scope in which the export's memory stays mapped.

        Raises (on entering):
            NotFoundError: the export was withdrawn meanwhile.
        """
        return Reading(self, export)

    def _enter(self, export: Export) -> PageSource:
        with self._changed:
            if self._exports.get(export.migration_id) is not export:
                raise NotFoundError(f"pages of migration {export.migration_id!r} are no longer served")
            self._readers[export.migration_id] = self._readers.get(export.migration_id, 0) + 1
            return export.source

    def _leave(self, export: Export) -> None:
        with self._changed:
            left = self._readers[export.migration_id] - 1
            if left:
                self._readers[export.migration_id] = left
            else:
                del self._readers[export.migration_id]
                self._changed.notify_all()


class Reading:
    """Keeps one export's memory from being freed."""

    def __init__(self, exports: Exports, export: Export) -> None:
        self._exports = exports
        self._export = export

    def __enter__(self) -> PageSource:
        return self._exports._enter(self._export)  # noqa: SLF001 - two halves of one lock

    def __exit__(self, *_: object) -> None:
        self._exports._leave(self._export)  # noqa: SLF001
