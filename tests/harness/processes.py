"""Processes by their ids: guests outlive their daemon, and must not outlive their test."""

import contextlib
import os
import signal
from pathlib import Path

from tests.harness.waiting import wait_until


def is_alive(pid):
    """Whether a process exists; one that ended and waits to be waited for does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def guest_pids(state_dir):
    """The guest processes whose socket lies in a daemon's state directory, whoever knows of them."""
    socket_dir = os.fsencode(Path(state_dir) / "guests") + b"/"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = path.read_bytes().split(b"\0")
            if b"migrate.guest.host" in words and any(word.startswith(socket_dir) for word in words):
                found.append(int(path.parent.name))
    return sorted(pid for pid in found if is_alive(pid))


def end_guests(state_dir):
    """Kill what guests of a state directory are left, and wait until they are gone; which those were."""
    left = guest_pids(state_dir)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in left:
        wait_until(lambda pid=pid: not is_alive(pid), 20, f"guest process {pid} to be gone")
    return left


def memory_fds(pid):
    """The memfds and userfaultfds that a process has open."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                target = str(link.readlink())
                if target.startswith("/memfd:") or "userfaultfd" in target:
                    found.append(target)
    return found
