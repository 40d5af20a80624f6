"""A process that writes its mapped file, and is told what to do with it: what a dirty scan has to see.

Run as a script it is the child. It takes one socket, hands over its memory, and answers one JSON message with another.
"""

import ctypes
import json
import mmap
import os
import random
import socket
import subprocess
import sys
import threading

PAGE = mmap.PAGESIZE
# Linux 5.4; Python 3.11 does not name it.
MADV_PAGEOUT = 21


class Writer:
    """The parent's handle of one child with so many pages of shared memory. `memfd` belongs to it."""

    def __init__(self, pages, **options):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(20)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.writer", str(theirs.fileno()), str(pages)],
            pass_fds=[theirs.fileno()],
            **options,
        )
        theirs.close()
        message, fds, _, _ = socket.recv_fds(self._socket, 4096, 1)
        self.hva = json.loads(message)["hva"]
        (self.memfd,) = fds
        self.pages = pages
        self.pid = self.process.pid

    def do(self, **order):
        """Have it do something; its answer."""
        self._socket.send(json.dumps(order).encode())
        return json.loads(self._socket.recv(1 << 16))

    def read(self):
        """All of its memory, past its page tables."""
        return os.pread(self.memfd, self.pages * PAGE, 0)

    def close(self):
        self.process.kill()
        self.process.wait()
        self._socket.close()
        os.close(self.memfd)


class _Memory:
    def __init__(self, pages):
        self.pages = pages
        self.memfd = os.memfd_create("writer", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, pages * PAGE)
        self.map = mmap.mmap(self.memfd, pages * PAGE)
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.threads = []
        self.is_stopping = threading.Event()
        self.counts = []

    def write(self, page, version):
        self.map[page * PAGE : page * PAGE + 8] = version.to_bytes(8, "little")

    def write_on(self, thread, seed):
        """Stamp random pages, each thread those of its own number, with ever higher versions."""
        choose = random.Random(seed)  # noqa: S311  # no secret
        version = 0
        while not self.is_stopping.is_set():
            version += 1
            page = choose.randrange(self.pages // len(self.counts)) * len(self.counts) + thread
            self.write(page, version)
            self.counts[thread] = version

    def run(self, order):
        match order["do"]:
            case "write":
                for page in order["pages"]:
                    self.write(page, order["version"])
            case "read":
                return sum(self.map[page * PAGE] for page in order["pages"])
            case "start":
                self.is_stopping.clear()
                self.counts = [0] * order["threads"]
                self.threads = [
                    threading.Thread(target=self.write_on, args=(thread, order["seed"] + thread), daemon=True)
                    for thread in range(order["threads"])
                ]
                for thread in self.threads:
                    thread.start()
            case "count":
                return sum(self.counts)
            case "stop":
                self.is_stopping.set()
                for thread in self.threads:
                    thread.join()
            case "punch":
                libc = ctypes.CDLL(None, use_errno=True)
                libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
                first, count = order["pages"][0], len(order["pages"])
                if libc.fallocate(self.memfd, 3, first * PAGE, count * PAGE):
                    raise OSError(ctypes.get_errno(), "fallocate")
            case "evict":
                self.map.madvise(MADV_PAGEOUT)
            case "drop":
                self.map.madvise(mmap.MADV_DONTNEED)
        return None


def main():
    channel = socket.socket(fileno=int(sys.argv[1]))
    memory = _Memory(int(sys.argv[2]))
    socket.send_fds(channel, [json.dumps({"hva": memory.hva}).encode()], [memory.memfd])
    while order := channel.recv(1 << 20):
        channel.send(json.dumps(memory.run(json.loads(order))).encode())


if __name__ == "__main__":
    main()
