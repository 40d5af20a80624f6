"""Keeps guest memory out of core dumps."""

import ctypes
import resource

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """Have this process leave no core dump, whatever it dies of, and be read by nobody of its own user.

    The limit alone does not hold where /proc/sys/kernel/core_pattern names a program.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
