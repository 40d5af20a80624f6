"""Programs that opted in to being moved: the examples of docs/, built, installed and started."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from migrate.guest.program import c_dir
from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
STATUS_VARIABLE = "COUNTER_STATUS"


class Programs:
    """A directory of programs, as `migrate daemon --programs` has it, and one that they tell of themselves in."""

    def __init__(self, path):
        self.path, self.status_dir = path / "programs", path / "status"
        self.path.mkdir(mode=0o755)
        self.status_dir.mkdir()
        self.env = {STATUS_VARIABLE: str(self.status_dir)}

    def install_python(self, name="counter-py", source=EXAMPLES / "counter.py"):
        words = shlex.join([sys.executable, str(source)])
        variables = shlex.quote(f"PYTHONPATH={ROOT}")
        self._install(name, f'#!/bin/sh\nexec env {variables} {words} "$@"\n')

    def install_c(self, name="counter-c", source=EXAMPLES / "counter.c"):
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", str(c_dir())]
        command = ["gcc", *flags, str(source), str(c_dir() / "migrate_guest.c"), "-o", str(self.path / name)]
        subprocess.run(command, check=True, timeout=60)

    def _install(self, name, script):
        path = self.path / name
        path.write_text(script)
        path.chmod(0o755)

    def start(self, name, socket_path):
        """Start one as its user does, without a daemon."""
        process = subprocess.Popen([self.path / name, str(socket_path)], env={**os.environ, **self.env})
        wait_until(socket_path.exists, 20, f"{name} to listen")
        return process

    def status(self, pid):
        """What it said last: touches, errors, audits; zeros if it has said nothing."""
        path = self.status_dir / str(pid)
        return [int(word) for word in path.read_text().split()] if path.exists() else [0, 0, 0]


def program_of(guest_pid):
    """The program that a guest process has started; 0 if it has taken over one that ran already."""
    children = Path(f"/proc/{guest_pid}/task/{guest_pid}/children").read_text().split()
    return int(children[0]) if children else 0
