"""The userfaultfds of a QEMU: made in it by injection, each for its purpose, or one that the preload library gave."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from migrate.errors import MigrateError, UnsupportedHostError
from migrate.guest.userfaultfd import Userfaultfd
from migrate.native import preload, uffd
from migrate.native.dirty_scan import open_pagemap
from migrate.native.inject import check_may_trace, close_uffd_in, open_uffd_in

PRELOAD_VARIABLE = "MIGRATE_QEMU_PRELOAD"
_PRELOAD_S = 10.0


class InjectedFaults:
    """Makes a userfaultfd in a process when one is needed, and leaves nothing behind.

    Args:
        pid: The process.
        is_ours: Whether we know that its seccomp filter, if it has one, lets the call pass.
    """

    def __init__(self, pid: int, *, is_ours: bool) -> None:
        self._pid = pid
        self._is_ours = is_ours

    def check(self) -> None:
        """Whether it can be done, by doing and undoing it.

        Raises:
            MigrateError: why not; the process runs on.
        """
        self.open(with_wp=False).close()

    def open(self, *, with_wp: bool) -> Userfaultfd:
        """One more.

        Args:
            with_wp: For a dirty scan, instead of missing pages.

        Raises:
            MigrateError: it cannot be had; the process runs on.
        """
        pagemap_fd = open_pagemap(self._pid)
        try:
            remote = open_uffd_in(self._pid, despite_seccomp=self._is_ours)
        except MigrateError:
            os.close(pagemap_fd)
            raise

        def close() -> None:
            # What was registered is let go of already: at worst, a descriptor stays behind.
            with contextlib.suppress(MigrateError):
                close_uffd_in(self._pid, remote.fd, remote.target_fd, despite_seccomp=self._is_ours)
            os.close(remote.fd)
            os.close(pagemap_fd)

        try:
            uffd.shake_hands(remote.fd, with_missing=not with_wp, with_wp=with_wp)
        except MigrateError:
            close()
            raise
        return Userfaultfd(remote.fd, pagemap_fd, close)


class PreloadedFaults:
    """The one userfaultfd that a process handed over at its start; it serves all purposes, as long as QEMU lives."""

    def __init__(self, announced: preload.Announcement) -> None:
        uffd.shake_hands(announced.uffd, with_missing=True, with_wp=True)
        self._opened = Userfaultfd(announced.uffd, announced.pagemap_fd, lambda: None)

    def open(self, *, with_wp: bool) -> Userfaultfd:  # noqa: ARG002 - it has all features
        """That one."""
        return self._opened


Faults = InjectedFaults | PreloadedFaults


def needs_preload() -> bool:
    """Whether QEMU must be started with the library, since nothing can be injected later."""
    if os.environ.get(PRELOAD_VARIABLE):
        return True
    try:
        check_may_trace()
    except MigrateError:
        return True
    return False


@contextlib.contextmanager
def listening(directory: Path, least_bytes: int) -> Iterator[tuple[dict[str, str], Callable[[int], PreloadedFaults]]]:
    """A scope to start QEMU in: variables for its environment, and what waits for the mapping of a memfd."""
    path = directory / "preload.sock"
    listener = preload.listen(path)
    try:
        yield preload.environment(path, least_bytes), lambda memfd: _await(listener, memfd)
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def _await(listener: socket.socket, memfd: int) -> PreloadedFaults:
    inode, until_s = os.fstat(memfd).st_ino, time.monotonic() + _PRELOAD_S
    while (left_s := until_s - time.monotonic()) > 0:
        listener.settimeout(left_s)
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(left_s)
                announced = preload.receive(connection)
            if announced.inode == inode:
                return PreloadedFaults(announced)
            os.close(announced.uffd)
            os.close(announced.pagemap_fd)
    raise UnsupportedHostError("QEMU was started with the preload library, which told nothing of its RAM")
