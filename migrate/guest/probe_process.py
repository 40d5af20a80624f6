"""What this host can do for guests that are processes of somebody else's, as an unpatched QEMU. Checks for doctor.

`required_for` is for the caller to say.
"""

from migrate.errors import MigrateError
from migrate.guest.probe import PROC, Check

_CAP_SYS_PTRACE = 1 << 19
_PTRACE_SCOPES = {0: "of its own user", 1: "that it started", 2: "none", 3: "none"}
_SCOPE_NEVER = 3


def check_trace(*, required_for: tuple[str, ...] = ()) -> Check:
    """Whether this process may trace another one, to have it open a userfaultfd."""
    name = "ptrace"
    try:
        # A host without the extension still deserves the rest of the report.
        from migrate.native.inject import TRACE_REMEDY, check_may_trace  # noqa: PLC0415

        check_may_trace()
    except ImportError:
        return _unbuilt(name, required_for)
    except MigrateError as error:
        return Check(name, ok=False, detail=error.message, remedy=error.remedy, required_for=required_for)
    scope, is_capable = _ptrace_scope(), _has_sys_ptrace()
    if is_capable and scope != _SCOPE_NEVER:
        detail = "any process of this host, by CAP_SYS_PTRACE"
        return Check(name, ok=True, detail=detail, required_for=required_for)
    ok = scope == 0
    detail = f"processes {_PTRACE_SCOPES.get(scope, 'none')} (kernel.yama.ptrace_scope is {scope})"
    return Check(name, ok=ok, detail=detail, remedy="" if ok else TRACE_REMEDY, required_for=required_for)


def check_scan(*, required_for: tuple[str, ...] = ()) -> Check:
    """Whether the kernel keeps a dirty log of any process: without it, no precopy of such a guest."""
    name = "dirty-scan"
    try:
        from migrate.native.dirty_scan import check_dirty_scan  # noqa: PLC0415  # as above

        check_dirty_scan()
    except ImportError:
        return _unbuilt(name, required_for)
    except MigrateError as error:
        return Check(name, ok=False, detail=error.message, remedy=error.remedy, required_for=required_for)
    detail = "asynchronous write-protection and PAGEMAP_SCAN work"
    return Check(name, ok=True, detail=detail, required_for=required_for)


def check_preload(*, required_for: tuple[str, ...] = ()) -> Check:
    """Whether there is the library that does without ptrace."""
    from migrate.native.preload import library_path  # noqa: PLC0415  # beside the others

    name = "preload-library"
    try:
        return Check(name, ok=True, detail=str(library_path()), required_for=required_for)
    except MigrateError as error:
        return Check(name, ok=False, detail=error.message, remedy=error.remedy, required_for=required_for)


def _unbuilt(name: str, required_for: tuple[str, ...]) -> Check:
    return Check(
        name,
        ok=False,
        detail="unknown while the native extension is not built",
        remedy="build the native extension first",
        required_for=required_for,
    )


def _ptrace_scope() -> int:
    """The setting of Yama; 0 where that is not in the kernel."""
    try:
        return int((PROC / "sys/kernel/yama/ptrace_scope").read_text())
    except (OSError, ValueError):
        return 0


def _has_sys_ptrace() -> bool:
    try:
        status = (PROC / "self/status").read_text()
    except OSError:
        return False
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) & _CAP_SYS_PTRACE)
