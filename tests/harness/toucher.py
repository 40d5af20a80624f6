"""A process whose memory is armed, and which touches pages when told: the smallest guest there is.

Run as a script it is the child: it takes one socket and answers {"touch": page} with the page's SHA-256, and
those of `count` pages if it is told a `stride`, too.
Touching waits in libc with the GIL dropped, so several touches can wait at once.
"""

import ctypes
import hashlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time

PAGE = mmap.PAGESIZE


class Toucher:
    """The parent's handle of one child. `uffd` belongs to whoever takes it."""

    def __init__(self, pages):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self._socket.settimeout(20)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.toucher", str(theirs.fileno()), str(pages)],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        message, fds, _, _ = socket.recv_fds(self._socket, 4096, 2)
        self.hva = json.loads(message)["hva"]
        self.uffd, self.memfd = fds
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
        self._socket.close()
        os.close(self.memfd)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def main():
    from migrate.native import uffd

    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # a sanitizer handles it
    channel = socket.socket(fileno=int(sys.argv[1]))
    pages = int(sys.argv[2])
    memfd = os.memfd_create("toucher", os.MFD_CLOEXEC)
    os.ftruncate(memfd, pages * PAGE)
    memory = mmap.mmap(memfd, pages * PAGE)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd = uffd.open_uffd(user_mode_only=False)
    uffd.register_missing(fd, hva, pages * PAGE)
    socket.send_fds(channel, [json.dumps({"hva": hva}).encode()], [fd, memfd])

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
