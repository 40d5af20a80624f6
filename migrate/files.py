"""Files that are written whole or not at all, and that nobody else can read meanwhile."""

import contextlib
import os
import tempfile
from pathlib import Path

UNFINISHED = ".*.new"
"""What a write that was cut short leaves in its directory."""


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file, over one that is there. Once this returns, it is found whatever happens to the host.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
    try:
        with os.fdopen(fd, "wb") as stream:
            os.fchmod(fd, mode)
            stream.write(data)
            stream.flush()
            os.fsync(fd)
        Path(temporary).replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    directory_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)
