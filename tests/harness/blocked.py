"""Processes to inject into: each waits in one system call, and says what became of it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.harness.blocked_script import SLEEP_MS
from tests.harness.waiting import wait_until

# Numbers of x86_64.
READ, POLL, PAUSE, NANOSLEEP, SIGTIMEDWAIT, FUTEX = 0, 7, 34, 35, 128, 202
CLOCK_NANOSLEEP, EPOLL_WAIT, PSELECT, PPOLL = 230, 232, 270, 271
SLEEP_S = SLEEP_MS / 1000
_SCRIPT = Path(__file__).with_name("blocked_script.py")


class Blocked:
    """A process that waits in a system call by the number `number`.

    Args:
        call: What blocked_script.py knows it by.
        number: Of the system call that it then is in; None if it is in none.
        before: Words before its command.
        extra: Words after it.
    """

    def __init__(self, call, number=None, before=(), extra=(), **options):
        self.process = subprocess.Popen(
            [*before, sys.executable, "-I", "-S", str(_SCRIPT), call, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        self.pid = self.process.pid
        assert self.process.stdout.readline() == "ready\n"
        if number is not None:
            wait_until(lambda: syscall_of(self.pid) == number, 20, f"the process to be in {call}")

    def finish(self):
        """Give it what it waits for."""
        self.process.stdin.write("x\n")
        self.process.stdin.flush()

    def answer(self):
        """What it says last."""
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def syscall_of(pid):
    """Number of the system call that the main thread waits in; None if it runs."""
    word = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return None if word == "running" else int(word)


def state_of(pid):
    """State letter of the main thread."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def tracer_of(pid):
    """Who traces it, as the kernel says; 0 is nobody."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("TracerPid:"):
            return int(line.split()[1])
    return 0


def descriptors_of(pid):
    """What its descriptors are, by number."""
    return {int(link.name): str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
