"""Memory that others map too: a memfd of a size that stays, since one that shrinks ends whoever looks at it."""

import fcntl
import os

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def sealed_memfd(name: str, size_bytes: int) -> int:
    """Make one, which is the caller's to close."""
    memfd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, size_bytes)
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
    return memfd


def is_sealed(fd: int) -> bool:
    """Whether a descriptor, which may be of anything, is of such memory."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False
