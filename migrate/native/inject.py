"""A userfaultfd inside another process, an unpatched hypervisor for one, made from outside by ptrace.

One thread of the process stands still for less than a millisecond, runs one system call, and goes on as if nothing had
been: calls that it waited in are taken up again, signals come through afterwards.

The thread is stopped and let go within one call, by a thread of this process. While it lasts, no other thread of this
process may wait for that same process by pid (`Popen.wait`, `os.waitpid`), if it is our child: that would return early
and tell of a stop. Waiting on a pidfd is fine.
"""

import errno
import os
from dataclasses import dataclass
from typing import Any

from migrate.errors import (
    GuestBusyError,
    GuestGoneError,
    MigrateError,
    MissingFeatureError,
    NativeError,
    TraceUnavailableError,
    UffdUnavailableError,
)
from migrate.native._native import ffi, lib

TIMEOUT_US = 2_000_000

TRACE_REMEDY = (
    "run the daemon as the process's own user or with CAP_SYS_PTRACE, set kernel.yama.ptrace_scope to 0 where that "
    "exists, or start the process with the preload library"
)
_UFFD_REMEDY = (
    "give the process's user read and write access to /dev/userfaultfd, give the process CAP_SYS_PTRACE, or set "
    "vm.unprivileged_userfaultfd=1"
)


@dataclass(frozen=True, slots=True)
class RemoteUffd:
    """A userfaultfd of another process; hands are not shaken yet."""

    # Ours; belongs to whoever takes it.
    fd: int
    # The process's own, which it keeps until it is closed by close_uffd_in.
    target_fd: int
    # How long one of its threads stood still.
    stopped_us: int


def open_uffd_in(pid: int, *, timeout_us: int = TIMEOUT_US, despite_seccomp: bool = False) -> RemoteUffd:
    """Have a process open a userfaultfd, and take a copy.

    Args:
        pid: The process; of 64 bits.
        timeout_us: How long to try to stop one of its threads. All returns within that and a second.
        despite_seccomp: A seccomp filter in the process is suspended if we may (CAP_SYS_ADMIN). If we may not, that is
            an error, as the filter might kill the process for the call; with this, the call is made all the same.

    Raises:
        GuestGoneError: there is no such process, or it ended.
        GuestBusyError: it is traced by another process, or did not stop in time.
        TraceUnavailableError: it may not be traced by us.
        UffdUnavailableError: it may not have a userfaultfd that sees kernel faults.
        MissingFeatureError: it is not a process of 64 bits.
    """
    injected = ffi.new("struct mig_injected *")
    rc = lib.mig_inject_open_uffd(pid, _terms(timeout_us, despite_seccomp=despite_seccomp), injected)
    if rc != lib.MIG_INJECT_DONE:
        raise _error(pid, rc, injected, "userfaultfd")
    return RemoteUffd(fd=injected.fd, target_fd=injected.target_fd, stopped_us=injected.stopped_ns // 1000)


def close_uffd_in(
    pid: int, uffd: int, target_fd: int, *, timeout_us: int = TIMEOUT_US, despite_seccomp: bool = False
) -> int:
    """Have the process close its copy again; return for how many microseconds one of its threads stood still.

    Nothing is done if the descriptor there is no longer what ours is a copy of.

    Args:
        pid: The process.
        uffd: Our copy.
        target_fd: Its own number for it.
        timeout_us: As for open_uffd_in.
        despite_seccomp: As for open_uffd_in.

    Raises:
        MigrateError: as open_uffd_in.
    """
    injected = ffi.new("struct mig_injected *")
    terms = _terms(timeout_us, despite_seccomp=despite_seccomp)
    rc = lib.mig_inject_close_fd(pid, uffd, target_fd, terms, injected)
    if rc != lib.MIG_INJECT_DONE:
        raise _error(pid, rc, injected, "close")
    stopped_us: int = injected.stopped_ns // 1000
    return stopped_us


def check_may_trace() -> None:
    """Whether this process may trace others at all, whoever they are.

    Raises:
        TraceUnavailableError: the kernel or a filter forbids it.
    """
    rc = lib.mig_inject_probe()
    if rc < 0:
        raise TraceUnavailableError(
            f"other processes cannot be traced: {os.strerror(-rc)}",
            remedy="allow ptrace and pidfd_getfd in the container's seccomp profile",
        )


def _terms(timeout_us: int, *, despite_seccomp: bool) -> Any:
    return ffi.new("struct mig_inject_terms *", {"timeout_us": timeout_us, "despite_seccomp": despite_seccomp})


def _error(pid: int, rc: int, injected: Any, call: str) -> MigrateError:
    cause = os.strerror(injected.error)
    if rc < 0:
        return NativeError(f"make process {pid} call {call}", -rc)
    if rc == lib.MIG_INJECT_CALL_REFUSED:
        if injected.error in {errno.EPERM, errno.EACCES, errno.ENOSYS}:
            return UffdUnavailableError(f"process {pid} may not call {call}: {cause}", remedy=_UFFD_REMEDY)
        return NativeError(f"{call} in process {pid}", injected.error or errno.EIO)
    return {
        lib.MIG_INJECT_GONE: GuestGoneError(f"process {pid} is not there, or has ended"),
        lib.MIG_INJECT_NOT_ALLOWED: TraceUnavailableError(f"process {pid} may not be traced", remedy=TRACE_REMEDY),
        lib.MIG_INJECT_TRACED: GuestBusyError(
            f"process {pid} is traced by process {injected.tracer_pid}", remedy="end that debugger, and try again"
        ),
        lib.MIG_INJECT_NOT_64_BIT: MissingFeatureError(f"process {pid} is not one of 64 bits"),
        lib.MIG_INJECT_NO_SYSCALL: MissingFeatureError(f"no syscall instruction was found in process {pid}"),
        lib.MIG_INJECT_FILTERED: TraceUnavailableError(
            f"process {pid} has a seccomp filter, which might kill it for the call of {call}",
            remedy="give the daemon CAP_SYS_ADMIN, which suspends it, or start the process with the preload library",
        ),
        lib.MIG_INJECT_NOT_STOPPED: GuestBusyError(
            f"no thread of process {pid} stopped in time; all run on", remedy="try again"
        ),
        lib.MIG_INJECT_CALL_UNENDING: GuestBusyError(
            f"the call of {call} in process {pid} has not ended; its thread goes on as soon as it has",
            remedy="look at the kernel log for what it waits for",
        ),
    }[rc]
