"""Bytes with an inaccessible page right behind them: who reads beyond the end dies at once."""

import ctypes
import mmap

from migrate.native._native import ffi

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0


class GuardedBuffer:
    """Room for so many bytes; `hold` puts some at its very end."""

    def __init__(self, room_bytes):
        self._room = -(-room_bytes // _PAGE) * _PAGE
        self._memory = mmap.mmap(-1, self._room + _PAGE)
        self._begin = ffi.from_buffer(self._memory, require_writable=True)
        guard = ctypes.c_void_p(int(ffi.cast("uintptr_t", self._begin)) + self._room)
        if ctypes.CDLL(None, use_errno=True).mprotect(guard, ctypes.c_size_t(_PAGE), _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")

    def hold(self, data):
        """A pointer to a copy of the bytes; the guard begins where they end."""
        start = self._begin + self._room - len(data)
        ffi.memmove(start, data, len(data))
        return ffi.cast("uint8_t *", start)
