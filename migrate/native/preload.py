"""The preload library: where ptrace is not allowed, a process that was started with it hands over its userfaultfd.

It is for `LD_PRELOAD`, and tells a daemon's socket of each large shared mapping of a file, with a userfaultfd and the
page map of the process. The process keeps its copy of the userfaultfd. Nobody can make it close that one.
"""

import importlib.machinery
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import RemoteProtocolError, UnsupportedHostError

_VERSION = 1
# struct announcement of preload/mmap_hook.c.
_ANNOUNCEMENT = struct.Struct("=IIQQQQQ")
_CREDENTIALS = struct.Struct("=iII")
_FDS = 2
_BACKLOG = 16


@dataclass(frozen=True, slots=True)
class Announcement:
    """A mapping of a process, and what is needed to serve and to scan it. The descriptors are the taker's."""

    # As the kernel names the sender of the message.
    pid: int
    hva: int
    length_bytes: int
    # Where in the file the mapping begins, and which file that is: st_dev and st_ino.
    file_offset_bytes: int
    device: int
    inode: int
    # A userfaultfd of the process; hands are not shaken yet.
    uffd: int
    # Its page map, for a dirty scan.
    pagemap_fd: int


def library_path() -> Path:
    """Where the library is.

    Raises:
        UnsupportedHostError: it was not built.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_native_preload{suffix}")
        if path.exists():
            return path
    raise UnsupportedHostError("the preload library is not built", remedy="install the package anew")


def environment(socket_path: Path, least_bytes: int) -> dict[str, str]:
    """What to add to the environment of a process, beside what it has.

    Args:
        socket_path: Where the daemon listens; see listen.
        least_bytes: Smaller mappings are not told of.

    Raises:
        UnsupportedHostError: the library was not built.
    """
    preloads = [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    return {
        "LD_PRELOAD": ":".join([*preloads, str(library_path())]),
        "MIGRATE_PRELOAD_SOCKET": str(socket_path),
        "MIGRATE_PRELOAD_MIN_BYTES": str(least_bytes),
    }


def listen(socket_path: Path) -> socket.socket:
    """A socket for processes that were started so. It has to listen before they start: they do not wait."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(str(socket_path))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def receive(connection: socket.socket) -> Announcement:
    """Read what one accepted connection has to say; it says one thing.

    Raises:
        RemoteProtocolError: it is not what the library says.
    """
    message, fds, _, _ = socket.recv_fds(connection, _ANNOUNCEMENT.size + 1, _FDS, socket.MSG_CMSG_CLOEXEC)
    is_whole = len(message) == _ANNOUNCEMENT.size and len(fds) == _FDS
    version, _, hva, length_bytes, file_offset_bytes, device, inode = (
        _ANNOUNCEMENT.unpack(message) if is_whole else (0,) * 7
    )
    if version != _VERSION:
        for fd in fds:
            os.close(fd)
        raise RemoteProtocolError(f"a message of {len(message)} bytes and {len(fds)} descriptors, of version {version}")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Announcement(
        pid=_CREDENTIALS.unpack(credentials)[0],
        hva=hva,
        length_bytes=length_bytes,
        file_offset_bytes=file_offset_bytes,
        device=device,
        inode=inode,
        uffd=fds[0],
        pagemap_fd=fds[1],
    )
