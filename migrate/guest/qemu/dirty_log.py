"""Which pages a QEMU writes, noted in a memfd."""

import contextlib
import fcntl
import mmap
import os

from migrate.guest.qemu.faults import Faults
from migrate.native.dirty_scan import DirtyScan
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import types_pb2 as types

_MFD_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK_GROW = 0x2 | 0x4


class DirtyLog:
    """Pages that one process writes, in a memfd of a bit for each page."""

    def __init__(self, faults: Faults, hva: int, spec: types.GuestSpec) -> None:
        size_bytes = -(-(spec.memory_bytes // PAGE_SIZE_BYTES) // 64) * 8
        with contextlib.ExitStack() as stack:
            opened = faults.open(with_wp=True)
            stack.callback(opened.close)
            self._scan = DirtyScan(opened.fd, opened.pagemap_fd, hva, spec.memory_bytes)
            stack.callback(self._scan.stop)
            self.memfd = os.memfd_create(f"migrate-{spec.name}-dirty", _MFD_FLAGS)
            stack.callback(os.close, self.memfd)
            os.ftruncate(self.memfd, size_bytes)
            fcntl.fcntl(self.memfd, _F_ADD_SEALS, _F_SEAL_SHRINK_GROW)
            self._bitmap = mmap.mmap(self.memfd, size_bytes)
            stack.callback(self._bitmap.close)
            self._stack = stack.pop_all()

    def sync(self, *, keep: bool) -> int:
        """As the guest has it."""
        return self._scan.sync(self._bitmap, keep=keep)

    def close(self) -> None:
        """Note nothing any more; nothing of ours is left in the process."""
        self._stack.close()
