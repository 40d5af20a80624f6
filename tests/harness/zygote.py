"""Forks daemons from a process that has loaded what daemons load, for that is most of what a start costs.

What runs is `migrate` with its words, and dies and is reaped like any process; that Python comes to it by itself is for
tests that start theirs anew. It forks nothing once the other end of its socket is closed.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_MESSAGE_BYTES_MAX = 128 << 10


class Zygote:
    """The process, once there is a request, which it answers one at a time. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._socket = None

    def migrate(self, words, env, ready_fd, stderr):
        """`migrate` with such words in such an environment; what it has of ours are two files.

        Args:
            words: Of the command line; --ready-fd is added.
            env: All of its variables.
            ready_fd: Which file that is.
            stderr: What it has for stderr.
        """
        request = {"words": words, "env": env}
        return ForkedProcess(self, self._ask(request, [ready_fd, stderr]))

    def reap(self, pid):
        """How a process that it forked has ended, as subprocess has it."""
        return self._ask({"reap": pid})

    def _start(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE_BYTES_MAX)
        with theirs:
            command = [sys.executable, "-m", "tests.harness.zygote", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=_ROOT)
        atexit.register(self._close)

    def _close(self):
        self._socket.close()
        self._process.wait(30)

    def _ask(self, request, fds=()):
        with self._lock:
            if self._socket is None:
                self._start()
            socket.send_fds(self._socket, [json.dumps(request).encode()], list(fds))
            return json.loads(self._socket.recv(_MESSAGE_BYTES_MAX))


class ForkedProcess:
    """What a test may do with a process, as subprocess.Popen has it. Thread-safe."""

    def __init__(self, zygote, pid):
        self.pid = pid
        self.returncode = None
        self._zygote = zygote
        self._reaping = threading.Lock()
        # It is reaped on request, so that it is still the one that was forked. Others may wait on it: it stays open.
        self._pidfd = os.pidfd_open(pid)
        weakref.finalize(self, os.close, self._pidfd)

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("migrate", timeout)
        with self._reaping:
            if self.returncode is None:
                self.returncode = self._zygote.reap(self.pid)
        return self.returncode

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


ZYGOTE = Zygote()


def _serve(connection):
    """Answer requests until there are no more, in the process itself; the words, in one that it has forked."""
    while True:
        message, fds, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES_MAX, 2)
        if not message:
            return None
        request = json.loads(message)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        elif answer := os.fork():
            for fd in fds:
                os.close(fd)
        else:
            connection.close()
            return _become(request, *fds)
        connection.send(json.dumps(answer).encode())


def _become(request, ready_fd, stderr):
    os.dup2(stderr, sys.stderr.fileno())
    os.close(stderr)
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return [*request["words"], "--ready-fd", str(ready_fd)]


def _main():
    # Loaded here, so that whoever only asks does not load it.
    import migrate.cli.daemon
    import migrate.daemon.main  # noqa: F401
    from migrate.cli.main import run

    # Ctrl-C ends the tests, which still want to know how their daemons ended.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would leave threads behind"
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        words = _serve(connection)
    if words is not None:
        sys.argv[1:] = words
        run()


if __name__ == "__main__":
    _main()
