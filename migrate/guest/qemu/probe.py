"""What this host can do for guests of kind qemu. Checks for doctor."""

import re
import shutil
import subprocess

from migrate.guest.probe import QEMU, Check
from migrate.guest.probe_process import check_preload, check_scan, check_trace
from migrate.guest.qemu.command import program

# -machine memory-backend=; x-ignore-shared is older.
_VERSION_MIN = (5, 0)
_VERSION = re.compile(r"version (\d+)\.(\d+)")
_ANSWER_S = 10


def check_qemu() -> tuple[Check, ...]:
    """All of it. Starts QEMU to ask for its version; changes nothing."""
    trace, preload = check_trace(), check_preload()
    # Either of the two gets a userfaultfd into QEMU; a QEMU that runs already takes the former.
    required_for = () if trace.ok or preload.ok else (QEMU,)
    checks = (_check_program(), trace, preload)
    return (*(_required(check, required_for) for check in checks[1:]), checks[0], check_scan())


def _required(check: Check, required_for: tuple[str, ...]) -> Check:
    return Check(check.name, check.ok, check.detail, check.remedy, required_for)


def _check_program() -> Check:
    name = "qemu"
    path = shutil.which(program())
    if path is None:
        return Check(
            name,
            ok=False,
            detail=f"there is no {program()}",
            remedy="install it (Debian: qemu-system-x86), or name it in MIGRATE_QEMU",
            required_for=(QEMU,),
        )
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=_ANSWER_S).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name, ok=False, detail=f"{path} does not run: {error}", remedy="mend it", required_for=(QEMU,))
    version = _VERSION.search(told)
    ok = version is not None and (int(version[1]), int(version[2])) >= _VERSION_MIN
    return Check(
        name,
        ok=ok,
        detail=told.splitlines()[0] if told else f"{path} says nothing of its version",
        remedy="" if ok else f"use QEMU {_VERSION_MIN[0]}.{_VERSION_MIN[1]} or newer",
        required_for=(QEMU,),
    )
