"""Words before a command that run it as nobody, who may use the two devices and has no capability."""

import os
import shlex
import shutil
import stat
import sys
from pathlib import Path

import migrate

NOBODY = 65534
DEVICES = (Path("/dev/kvm"), Path("/dev/userfaultfd"))
TOOLS = ("unshare", "setpriv", "mount", "mknod")


def why_not():
    """Why nothing can be run so here; empty if it can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    missing += [str(device) for device in DEVICES if not device.exists()]
    if missing:
        return f"not here: {', '.join(missing)}"
    closed = _closed(Path(migrate.__file__)) + _closed(Path(sys.prefix) / "bin")
    return f"only root enters {closed[0]}" if closed else ""


def _closed(path):
    """The directories above a path that nobody can pass, the highest first."""
    return [folder for folder in reversed(path.resolve().parents) if not folder.stat().st_mode & stat.S_IXOTH]


def prefix(stage):
    """The words.

    Args:
        stage: An empty directory, which is mounted over where only the command sees it.
    """
    lines = ["set -e", f"mount -t tmpfs -o mode=755 none {shlex.quote(str(stage))}"]
    for device in DEVICES:
        number = device.stat().st_rdev
        copy = shlex.quote(str(stage / device.name))
        lines += [
            f"mknod -m 0600 {copy} c {os.major(number)} {os.minor(number)}",
            f"chown {NOBODY}:{NOBODY} {copy}",
            f"mount --bind {copy} {device}",
        ]
    lines += _open_interpreter(stage)
    drop = f"--reuid {NOBODY} --regid {NOBODY} --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs"
    lines.append(f'exec setpriv {drop} "$@"')
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(lines), "sh"]


def _open_interpreter(stage):
    """An interpreter below a directory that only root enters is shown below one that everybody does."""
    base = Path(sys.base_prefix).resolve()
    closed = _closed(base)
    if not closed:
        return []
    copy, here, above = (shlex.quote(str(path)) for path in (stage / "python", base, closed[0]))
    return [
        f"mkdir {copy}",
        f"mount --bind {here} {copy}",
        f"mount -t tmpfs -o mode=755 none {above}",
        f"mkdir -p {here}",
        f"mount --bind {copy} {here}",
    ]
