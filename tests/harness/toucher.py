"""A process whose memory is armed, and which touches pages when told: the smallest guest there is.

Run as a script it is the parent of them all, for Python takes a hundred times as long to start as to fork: it takes a
socket, and forks a child for each message there. A child answers {"touch": page} with the page's SHA-256, and those of
`count` pages if it is told a `stride`, too.
Touching waits in libc with the GIL dropped, so several touches can wait at once.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

PAGE = mmap.PAGESIZE


class Toucher:
    """The handle of one child. `uffd` belongs to whoever takes it."""

    def __init__(self, pages):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self._socket.settimeout(20)
        ended_read, ended_write = os.pipe2(os.O_CLOEXEC)
        socket.send_fds(_parent(), [str(pages).encode()], [theirs.fileno(), ended_write])
        theirs.close()
        os.close(ended_write)
        message, fds, _, _ = socket.recv_fds(self._socket, 4096, 3)
        told = json.loads(message)
        self.hva = told["hva"]
        self.uffd, self.memfd, pidfd = fds
        self.process = Forked(told["pid"], pidfd, ended_read)
        self.pages = pages

    def touch(self, page):
        """Have a page read; does not wait for the answer."""
        self._socket.send(json.dumps({"touch": page}).encode())

    def walk(self, first_page, stride, count, pause_s=0):
        """Have one thread read pages, each some time after the one before. Each is answered; does not wait."""
        words = {"touch": first_page, "stride": stride, "count": count, "pause_s": pause_s}
        self._socket.send(json.dumps(words).encode())

    def result(self):
        """(page, digest of what was read) of the touch that was answered first."""
        answer = json.loads(self._socket.recv(4096))
        return answer["page"], answer["sha256"]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.close()
        self._socket.close()
        os.close(self.memfd)


class Forked:
    """Somebody else's child, as Popen has one of ours.

    Args:
        pid: Its id.
        pidfd: The same, for good.
        ended: The end of a pipe that says how it ended.
    """

    def __init__(self, pid, pidfd, ended):
        self.pid = pid
        self.returncode = None
        self._pidfd, self._ended = pidfd, ended

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, timeout_s=20):
        if self.returncode is None:
            assert select.select([self._ended], [], [], timeout_s)[0], f"process {self.pid} has not ended"
            self.returncode = int(os.read(self._ended, 64))
        return self.returncode

    def close(self):
        os.close(self._pidfd)
        os.close(self._ended)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@functools.cache
def _parent():
    """A socket to the parent of all children, which ends with us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.harness.toucher", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()

    def end():
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def main():
    from migrate.native import uffd  # noqa: F401 - once for all children

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with whoever is interrupted
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # a sanitizer handles it
    orders = socket.socket(fileno=int(sys.argv[1]))
    children = {}
    while True:
        for ready in select.select([orders, *children], [], [])[0]:
            if ready is not orders:
                pid, ended = children.pop(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(ended, str(status).encode())
                os.close(ended)
                os.close(ready)
                continue
            message, fds, _, _ = socket.recv_fds(orders, 64, 2)
            if not message:
                return
            channel, ended = fds
            pid = os.fork()
            if pid == 0:
                for fd in (orders.detach(), ended, *children, *(kept for _, kept in children.values())):
                    os.close(fd)
                serve(socket.socket(fileno=channel), int(message))
                return
            os.close(channel)
            children[os.pidfd_open(pid)] = pid, ended


def serve(channel, pages):
    """Arm a memory, hand it over, and touch what is said, until nobody is left to say it."""
    from migrate.native import uffd

    memfd = os.memfd_create("toucher", os.MFD_CLOEXEC)
    os.ftruncate(memfd, pages * PAGE)
    memory = mmap.mmap(memfd, pages * PAGE)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd = uffd.open_uffd(user_mode_only=False)
    uffd.register_missing(fd, hva, pages * PAGE)
    told = json.dumps({"hva": hva, "pid": os.getpid()}).encode()
    socket.send_fds(channel, [told], [fd, memfd, os.pidfd_open(os.getpid())])

    def walk(touch, stride=1, count=1, pause_s=0):
        for step in range(count):
            read(touch + step * stride)
            time.sleep(pause_s)

    def read(page):
        copy = ctypes.create_string_buffer(PAGE)
        ctypes.memmove(copy, hva + page * PAGE, PAGE)
        channel.send(json.dumps({"page": page, "sha256": sha256(copy.raw)}).encode())

    while request := channel.recv(4096):
        threading.Thread(target=walk, kwargs=json.loads(request), daemon=True).start()


if __name__ == "__main__":
    main()
