"""Which programs a daemon may start as guests: what its own operator put into a directory, and nothing else."""

import os
import stat
from pathlib import Path

from migrate.errors import ConfigError, UnsupportedHostError


class Programs:
    """The programs of one host. A peer names one; what runs under that name is this host's.

    Args:
        path: The directory of `migrate daemon --programs`; None if there is none.

    Raises:
        ConfigError: others than its owner, or than root and this user, decide what is in it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is None:
            return
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigError(f"the directory of programs {path} cannot be used: {error.strerror}") from error
        if not stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"{path} is no directory of programs")
        if status.st_uid not in {0, os.geteuid()} or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(
                f"others may write to the directory of programs {path}, and have the daemon run anything",
                remedy=f"chown it to root or the daemon's user, chmod go-w {path}",
            )

    def path_of(self, name: str) -> Path:
        """What is started for a guest that is a program of that name.

        Args:
            name: Checked by check_spec: it has no slash, and does not begin with a dot.

        Raises:
            UnsupportedHostError: nothing is.
        """
        if self._path is None:
            raise UnsupportedHostError(
                f"this host starts no programs, {name!r} among them",
                remedy="run its daemon with --programs DIR, where DIR has an executable file of that name",
            )
        path = self._path.absolute() / name
        if not path.is_file() or not os.access(path, os.X_OK):
            raise UnsupportedHostError(
                f"this host has no program {name!r}", remedy=f"put an executable file of that name into {self._path}"
            )
        return path
