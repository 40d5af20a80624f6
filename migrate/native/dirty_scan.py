"""A dirty log of any process's memory, without its help: asynchronous write-protection and PAGEMAP_SCAN.

It sees what goes through the page tables of that process: its threads, the vCPUs of a KVM guest, what system calls
write for it. It does not see other processes that map or write the same file, or that a page was punched out of the
file which had not been written since the last time, as by a balloon.
"""

import errno
import os
from typing import Any

from migrate.errors import DirtyScanError, DirtyScanUnavailableError, GuestGoneError
from migrate.native._native import ffi, lib


class DirtyScan:
    """A log of a range of a process's memory; empty at first. Calls come one at a time.

    Args:
        uffd: A userfaultfd of the process, hands shaken with `with_wp`. Stays the caller's, and must stay open.
        pagemap_fd: Its /proc/PID/pagemap, by open_pagemap or handed over by the process itself. Likewise.
        hva: Where the range begins there.
        length_bytes: Its length.

    Raises:
        DirtyScanError: the kernel refused.
    """

    def __init__(self, uffd: int, pagemap_fd: int, hva: int, length_bytes: int) -> None:
        ret = ffi.new("struct mig_dirty_scan **")
        _check("begin a dirty scan", lib.mig_dirty_scan_start(uffd, pagemap_fd, hva, length_bytes, ret))
        self._scan: Any = ret[0]
        self._words_bytes = -(-length_bytes // (4096 * 64)) * 8

    def sync(self, bitmap: Any, *, keep: bool = False) -> int:
        """Move the pages written since the last time into a bitmap, a writable buffer; return how many there are.

        With `keep`, they stay in the log, too. A page read after this has every write that the bitmap tells of.

        Raises:
            DirtyScanError: it failed, and pages are lost from the log; ESRCH if the process ended.
        """
        words = ffi.from_buffer("uint64_t[]", bitmap, require_writable=True)
        if len(words) * 8 < self._words_bytes:
            raise ValueError(f"a bitmap of {len(words) * 8} bytes, not {self._words_bytes}")
        return _check("read the dirty scan", lib.mig_dirty_scan_sync(self._scan, words, keep))

    def stop(self) -> None:
        """End it; the process's memory is as it was. Once ended, nothing is left to do."""
        scan, self._scan = self._scan, None
        if scan is None:
            return
        rc = lib.mig_dirty_scan_stop(scan)
        # A process that has ended, ENOMEM in the words of userfaultfd, leaves nothing to clear up.
        if rc not in {-errno.ESRCH, -errno.ENOMEM}:
            _check("end the dirty scan", rc)


def open_pagemap(pid: int) -> int:
    """Open the page map of a process, which needs the right to trace it; return the descriptor.

    Raises:
        GuestGoneError: there is no such process.
        DirtyScanUnavailableError: it is closed to us.
    """
    try:
        return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestGoneError(f"process {pid} is not there, or has ended") from error
    except OSError as error:
        raise DirtyScanUnavailableError(
            f"the page map of process {pid} cannot be opened",
            remedy="run the daemon as the process's own user or with CAP_SYS_PTRACE",
        ) from error


def check_dirty_scan() -> None:
    """Whether this kernel can do it; tried on memory of our own.

    Raises:
        DirtyScanUnavailableError: it cannot.
    """
    rc = lib.mig_dirty_scan_probe()
    if rc < 0:
        raise DirtyScanUnavailableError(
            f"no dirty scan here: {os.strerror(-rc)}",
            remedy="use Linux 6.7 or later (PAGEMAP_SCAN and asynchronous write-protection)",
        )


def _check(operation: str, rc: int) -> int:
    if rc < 0:
        raise DirtyScanError(operation, -rc)
    return rc
