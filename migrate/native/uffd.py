"""userfaultfd: open one, register and unregister ranges."""

import errno
import os

from migrate.errors import UffdError, UffdUnavailableError
from migrate.native._native import ffi, lib

_REMEDIES = {
    errno.EPERM: (
        "run as root or with CAP_SYS_PTRACE, give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1"
    ),
    errno.EACCES: "give this user read and write access to /dev/userfaultfd",
    errno.ENOSYS: "use a kernel built with CONFIG_USERFAULTFD",
    errno.ENOTSUP: "use Linux 5.18 or later (missing faults on shmem, thread id, exact address)",
}


def open_uffd(*, user_mode_only: bool, with_wp: bool = False) -> int:
    """Open a userfaultfd with the features that the pager needs; return its descriptor.

    Args:
        user_mode_only: Faults of kernel code are not reported. Needs no privilege, but cannot serve a KVM guest.
        with_wp: With the features that a dirty scan needs, instead.

    Raises:
        UffdUnavailableError: not to be had here; the remedy says why.
    """
    ret_fd = ffi.new("int *")
    rc = lib.mig_uffd_open(lib.MIG_UFFD_WP_FEATURES if with_wp else lib.MIG_UFFD_FEATURES, user_mode_only, ret_fd)
    if rc < 0:
        kind = "user-mode" if user_mode_only else "kernel-fault"
        raise UffdUnavailableError(f"no {kind} userfaultfd here: {os.strerror(-rc)}", remedy=_REMEDIES.get(-rc, ""))
    fd: int = ret_fd[0]
    return fd


def shake_hands(uffd: int, *, with_missing: bool = False, with_wp: bool = False) -> None:
    """Make a userfaultfd that another process opened ready for use, once in its life.

    Args:
        uffd: Our copy of it.
        with_missing: With the features that the pager needs.
        with_wp: With those that a dirty scan needs.

    Raises:
        UffdUnavailableError: the kernel lacks one of them, or hands were shaken before.
    """
    features = (lib.MIG_UFFD_FEATURES if with_missing else 0) | (lib.MIG_UFFD_WP_FEATURES if with_wp else 0)
    rc = lib.mig_uffd_shake_hands(uffd, features)
    if rc < 0:
        remedy = "use Linux 6.7 or later (asynchronous write-protection)" if with_wp else _REMEDIES.get(-rc, "")
        raise UffdUnavailableError(f"no such userfaultfd here: {os.strerror(-rc)}", remedy=remedy)


def register_missing(uffd: int, hva: int, length_bytes: int) -> None:
    """Have missing pages of a range of the userfaultfd's process reported.

    Raises:
        UffdError: the kernel refused.
    """
    _check("UFFDIO_REGISTER", lib.mig_uffd_register_missing(uffd, hva, length_bytes))


def unregister(uffd: int, hva: int, length_bytes: int) -> None:
    """Let a range go: waiters are woken, holes read as zero.

    Raises:
        UffdError: the kernel refused.
    """
    _check("UFFDIO_UNREGISTER", lib.mig_uffd_unregister(uffd, hva, length_bytes))


def wake(uffd: int, hva: int, length_bytes: int) -> None:
    """Wake the waiters of a range, so that each faults again.

    Raises:
        UffdError: the kernel refused.
    """
    _check("UFFDIO_WAKE", lib.mig_uffd_wake(uffd, hva, length_bytes))


def _check(operation: str, rc: int) -> None:
    if rc < 0:
        raise UffdError(operation, -rc)
