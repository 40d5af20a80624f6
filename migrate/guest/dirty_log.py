"""A dirty log of a process's memory in a memfd, as the guest protocol has it, for every guest without KVM's."""

import contextlib
import mmap
import os
from dataclasses import dataclass

from migrate.errors import MigrateError
from migrate.guest.memfd import sealed_memfd
from migrate.guest.userfaultfd import Userfaultfd
from migrate.native.dirty_scan import DirtyScan, check_dirty_scan, open_pagemap
from migrate.units import PAGE_SIZE_BYTES


@dataclass(frozen=True, slots=True)
class OwnScan:
    """What a process needs to log its own writes.

    Attributes:
        pagemap_fd: Its own page map; -1 if there is none to be had.
        obstacle: Why this host does not let it; empty if it does.
    """

    pagemap_fd: int
    obstacle: str

    @classmethod
    def open(cls) -> "OwnScan":
        """Try it. Before `forbid_core_dumps`, after which a process without privileges is denied its own page map."""
        try:
            check_dirty_scan()
            return cls(open_pagemap(os.getpid()), "")
        except MigrateError as error:
            return cls(-1, f"{error.message} ({error.remedy})" if error.remedy else error.message)


class ScanLog:
    """Pages that one process writes, in a memfd of a bit for each page.

    Args:
        opened: A userfaultfd of the process, hands shaken for a dirty scan; closed at the end, and if it cannot begin.
        hva: Where its RAM is.
        memory_bytes: How much that is.
        name: The guest's.

    Raises:
        MigrateError: the kernel refused.
    """

    def __init__(self, opened: Userfaultfd, hva: int, memory_bytes: int, name: str) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(opened.close)
            self._scan = DirtyScan(opened.fd, opened.pagemap_fd, hva, memory_bytes)
            stack.callback(self._scan.stop)
            self.memfd, self._bitmap = make_bitmap(name, memory_bytes)
            stack.callback(os.close, self.memfd)
            stack.callback(self._bitmap.close)
            self._stack = stack.pop_all()

    def sync(self, *, keep: bool) -> int:
        """Move what was noted into the memfd; how many pages that are. With `keep`, it stays noted, too."""
        return self._scan.sync(self._bitmap, keep=keep)

    def close(self) -> None:
        """Note nothing any more; nothing of ours is left in the process."""
        self._stack.close()


def make_bitmap(name: str, memory_bytes: int) -> tuple[int, mmap.mmap]:
    """The memfd of a dirty log, of 64-bit words with a bit for each page, and where it is mapped."""
    size_bytes = -(-(memory_bytes // PAGE_SIZE_BYTES) // 64) * 8
    memfd = sealed_memfd(f"migrate-{name}-dirty", size_bytes)
    return memfd, mmap.mmap(memfd, size_bytes)
