"""What outlives a daemon: the sockets of its guests, and a small file for each migration.

The directory belongs to one daemon at a time. A file is written whole or not at all (write, fsync, rename, fsync of the
directory), so that a daemon that is killed while it writes finds what was there before.
"""

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from migrate.errors import ConfigError, StateDirError
from migrate.files import UNFINISHED, replace_file
from migrate.session.rules import is_id
from migrate.v1 import daemon_state_pb2 as saved

_VERSION = 1
_SUFFIX = ".pb"
# The record of a migration that has ended also refuses what a peer may still say of it.
_KEPT_S = 7 * 86_400


class StateDir:
    """The state directory of a daemon.

    Args:
        path: Where it is, or shall be.

    Raises:
        ConfigError: it cannot be made, others can enter it, or another daemon uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket_dir = path / "guests"
        self._migrations = path / "migrations"
        try:
            for directory in (path, self.socket_dir, self._migrations):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := why_not_private(path):
                raise ConfigError(f"the state directory {reason}", remedy=f"chmod 700 {path}, as its owner")
            self._lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"the state directory {path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock_fd)
            raise ConfigError(
                f"another daemon uses the state directory {path}", remedy="give each daemon a --state-dir of its own"
            ) from error

    def close(self) -> None:
        """Let another daemon have it."""
        os.close(self._lock_fd)

    def save(self, migration: saved.SavedMigration) -> None:
        """Write a migration down; once this returns, it is found again whatever happens to the host.

        Raises:
            StateDirError: it could not be written; what was there before still is.
        """
        if not is_id(migration.migration_id):
            raise StateDirError(f"{migration.migration_id!r} is no id of a migration")
        migration.version = _VERSION
        path = self._migrations / (migration.migration_id + _SUFFIX)
        try:
            replace_file(path, migration.SerializeToString())
        except OSError as error:
            raise StateDirError(
                f"the state directory {self.path} cannot be written: {error.strerror}",
                remedy="free space on its file system",
            ) from error

    def forget(self, migration_id: str) -> None:
        """Remove what is written down of a migration. If that fails, the next daemon finds an end too many."""
        with contextlib.suppress(OSError):
            (self._migrations / (migration_id + _SUFFIX)).unlink(missing_ok=True)

    def load(self) -> Iterator[saved.SavedMigration]:
        """All migrations that were written down, in the order of their ids' last change; old ends are removed.

        Raises:
            StateDirError: one cannot be read, or was written by a newer version.
        """
        for path in self._migrations.glob(UNFINISHED):
            path.unlink(missing_ok=True)
        for path in sorted(self._migrations.glob("*" + _SUFFIX), key=lambda found: found.stat().st_mtime_ns):
            migration = _read(path)
            if migration.HasField("final") and time.time() - path.stat().st_mtime > _KEPT_S:
                path.unlink(missing_ok=True)
                continue
            yield migration


def why_not_private(path: Path) -> str:
    """Why a directory is not this user's alone; empty if it is. In it are tokens, and sockets that obey who calls.

    Raises:
        OSError: it cannot be looked at.
    """
    status = path.stat()
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user (uid {status.st_uid})"
    mode = stat.S_IMODE(status.st_mode)
    return f"{path} is open to others (its mode is {mode:04o})" if mode & 0o077 else ""


def _read(path: Path) -> saved.SavedMigration:
    migration = saved.SavedMigration()
    try:
        migration.ParseFromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise StateDirError(f"{path} cannot be read: {error}", remedy="no daemon wrote it like this") from error
    if migration.version != _VERSION:
        raise StateDirError(
            f"{path} was written by another version of migrate ({migration.version}, this one knows {_VERSION})",
            remedy="start the version that wrote it",
        )
    if migration.migration_id + _SUFFIX != path.name or not is_id(migration.migration_id):
        raise StateDirError(
            f"{path} holds a migration {migration.migration_id!r}", remedy="a file has the name of its migration"
        )
    return migration
