"""A daemon of our own on this machine, as a process with an end."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from migrate.errors import CallFailedError

READY_DEADLINE_S = 20.0
STOP_DEADLINE_S = 10.0
_LOG_TAIL_LINES = 20


class LocalDaemon:
    """`migrate daemon` on loopback ports that the kernel chose.

    Args:
        name: What messages call it.
        base_dir: Directory for its state and its log; the caller removes it after stop().
        options: Further ones of the command.
    """

    def __init__(self, name: str, base_dir: Path, options: Sequence[str] = ()) -> None:
        self.name = name
        self._options = options
        self.address = ""
        self._log_path = base_dir / f"{name}.log"
        self._base_dir = base_dir
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
            CallFailedError: it ended, or did not serve in time; its log says why.
        """
        ready_fd, child_fd = os.pipe()
        try:
            with self._log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self._command(child_fd),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(child_fd,),
                    # Its state goes when it does: it makes a directory of its own, in here.
                    env={**os.environ, "TMPDIR": str(self._base_dir)},
                    # Ctrl-C is for us: we stop the daemon when its guests are gone.
                    process_group=0,
                )
            os.close(child_fd)
            child_fd = -1
            self.address = self._await_ready(ready_fd)
        finally:
            os.close(ready_fd)
            if child_fd >= 0:
                os.close(child_fd)

    def stop(self) -> None:
        """End it: by SIGTERM, or by SIGKILL if that takes too long. Does nothing if it has ended."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def exit_status(self) -> int | None:
        """The exit status as subprocess has it; None while it runs or has not been started."""
        return None if self._process is None else self._process.poll()

    def log_tail(self) -> str:
        """The end of its log."""
        try:
            lines = self._log_path.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _command(self, ready_fd: int) -> list[str]:
        return [
            *(sys.executable, "-m", "migrate", "daemon"),
            *("--listen", "127.0.0.1:0", "--page-listen", "127.0.0.1:0"),
            *("--ready-fd", str(ready_fd), *self._options),
        ]

    def _await_ready(self, ready_fd: int) -> str:
        """Read the one line of JSON that a serving daemon writes."""
        deadline_s = time.monotonic() + READY_DEADLINE_S
        line = b""
        while not line.endswith(b"\n"):
            readable, _, _ = select.select([ready_fd], [], [], max(0.0, deadline_s - time.monotonic()))
            chunk = os.read(ready_fd, 4096) if readable else b""
            if not chunk:
                raise self._not_ready(timed_out=not readable)
            line += chunk
        listen: str = json.loads(line)["listen"]
        return listen

    def _not_ready(self, *, timed_out: bool) -> CallFailedError:
        what = f"does not serve after {READY_DEADLINE_S:.0f} s" if timed_out else "ended before it served"
        tail = self.log_tail()
        return CallFailedError(f"the {self.name} daemon {what}" + (f":\n{tail}" if tail else ""))


class GuestProcesses:
    """The processes of guests that daemons told us of, so that none outlives us.

    A guest outlives its daemon by design; a demonstration must not leave one behind.
    """

    def __init__(self) -> None:
        self._pidfds: dict[int, int] = {}

    def add(self, pid: int) -> None:
        """Remember a guest's process; a pidfd cannot come to mean another process later."""
        if pid <= 0 or pid in self._pidfds:
            return
        try:
            self._pidfds[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            return

    def end_all(self) -> None:
        """Kill those that still live."""
        for pidfd in self._pidfds.values():
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(pidfd)
        self._pidfds.clear()
