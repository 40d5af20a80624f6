"""What harness/blocked.py starts: waits in one system call, and says what became of it. Imports nothing of ours."""

import ctypes
import fcntl
import hashlib
import json
import os
import queue
import select
import signal
import sys
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
SLEEP_MS = 1500


def call(number, *arguments):
    """A system call, as the kernel answers it: no library takes it up again."""
    began = time.monotonic()
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *wide)
    return {"result": result, "errno": ctypes.get_errno() if result < 0 else 0, "took": time.monotonic() - began}


class Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


def span():
    return ctypes.byref(Timespec(SLEEP_MS // 1000, SLEEP_MS % 1000 * 1_000_000))


def pollfd():
    return ctypes.byref((ctypes.c_int * 2)(0, select.POLLIN))


def wait_epoll():
    epoll = select.epoll()
    epoll.register(0, select.EPOLLIN)
    return call(232, epoll.fileno(), ctypes.byref((ctypes.c_char * 12)()), 1, -1)


def wait_futex(timeout):
    return call(202, ctypes.byref(ctypes.c_uint32(7)), 0, 7, timeout, None, 0)


def wait_signal():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    mask = ctypes.c_uint64(1 << (signal.SIGUSR2 - 1))
    return call(128, ctypes.byref(mask), None, None, 8)


def wait_select():
    fds = ctypes.c_uint64(1)
    return call(270, 1, ctypes.byref(fds), None, None, None, None)


def handled(wait):
    """A handler that does nothing but end a call with EINTR."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    return wait()


def count_signals():
    """Take signals by a handler, each one counted, until there is input."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received, strange = 0, []
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGRTMIN + 1, lambda *_: None)
    say("ready")
    fds = (ctypes.c_int * 4)(0, select.POLLIN, reader, select.POLLIN)
    while True:
        answer = call(7, ctypes.byref(fds), 2, -1)
        if answer["result"] < 0 and answer["errno"] != 4:
            strange.append(answer["errno"])
        if select.select([reader], [], [], 0)[0]:
            received += len(os.read(reader, 65536))
        elif select.select([0], [], [], 0)[0]:
            return {"received": received, "strange": strange}


def compute():
    """A chain of digests until there is input, and the same chain once more."""
    digest, rounds = b"", 0
    while not select.select([0], [], [], 0)[0]:
        for _ in range(100):
            digest = hashlib.sha256(digest + bytes(2000)).digest()
        rounds += 100
    again = b""
    for _ in range(rounds):
        again = hashlib.sha256(again + bytes(2000)).digest()
    return {"same": digest == again, "rounds": rounds}


def spawn(with_thread):
    """The main thread waits, uninterruptibly, for a child to open a FIFO that nobody writes to yet."""
    os.mkfifo(path := f"{sys.argv[2]}/fifo")
    if with_thread:
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    say("ready")
    child = os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, path, os.O_RDONLY, 0)])
    return {"status": os.waitpid(child, 0)[1]}


def filtered(action, *, listens=False):
    """A seccomp filter that does this to userfaultfd(2); the descriptor to listen at, if it has one."""
    program = [(0x20, 0, 0, 0), (0x15, 0, 1, 323), (0x06, 0, 0, action), (0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(
        c.to_bytes(2, "little") + bytes([yes, no]) + value.to_bytes(4, "little") for c, yes, no, value in program
    )
    buffer = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    libc.prctl(38, 1, 0, 0, 0)
    loaded = Program(len(program), ctypes.addressof(buffer))
    fd = libc.syscall(317, 1, 8 if listens else 0, ctypes.byref(loaded))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "SECCOMP_SET_MODE_FILTER")
    return fd


def held_up():
    """A filter that leaves userfaultfd(2) to a thread of ours, which answers once it has found a FIFO opened."""

    def answer():
        request = bytearray(80)
        fcntl.ioctl(found.get(), 0xC0502100, request)
        with open(sys.argv[2]):  # noqa: PTH123  # waits for who writes to it
            pass
        fcntl.ioctl(
            listener, 0xC0182101, bytes(request[:8]) + bytes(8) + (-38).to_bytes(4, "little", signed=True) + bytes(4)
        )

    os.mkfifo(sys.argv[2])
    found = queue.Queue()
    threading.Thread(target=answer, daemon=True).start()
    listener = filtered(0x7FC00000, listens=True)
    found.put(listener)
    return read()


def held():
    """Trace another process, until there is input."""
    if libc.ptrace(0x4206, int(sys.argv[2]), None, None):
        raise OSError(ctypes.get_errno(), "PTRACE_SEIZE")
    return read()


def read():
    return call(0, 0, ctypes.byref(ctypes.c_char()), 1)


def as_nobody():
    """Who gives up what root may is hidden from those of its new user, too: prctl(2), PR_SET_DUMPABLE."""
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    return read()


def killed_for_it():
    filtered(0x80000000)
    return read()


def refused_it():
    filtered(0x00050000 | 38)  # ENOSYS
    return read()


WAITS = {
    "read": read,
    "poll": lambda: call(7, pollfd(), 1, -1),
    "poll-timeout": lambda: call(7, None, 0, SLEEP_MS),
    "ppoll": lambda: call(271, pollfd(), 1, None, ctypes.byref(ctypes.c_uint64(0)), 8),
    "ppoll-timeout": lambda: call(271, None, 0, span(), ctypes.byref(ctypes.c_uint64(0)), 8),
    "pselect": wait_select,
    "epoll": wait_epoll,
    "nanosleep": lambda: call(35, span(), None),
    "clock-nanosleep": lambda: call(230, 1, 0, span(), None),
    "futex-timeout": lambda: wait_futex(span()),
    "sigtimedwait": wait_signal,
    "pause": lambda: handled(lambda: call(34)),
    "poll-handled": lambda: handled(lambda: call(7, pollfd(), 1, -1)),
    "epoll-handled": lambda: handled(wait_epoll),
    "trace": held,
    "as-nobody": as_nobody,
    "killed-for-it": killed_for_it,
    "refused-it": refused_it,
    "held-up": held_up,
}
STARTED = {"count-signals": count_signals, "compute": compute, "spawn": lambda: spawn(with_thread=False)}
STARTED["spawn-threaded"] = lambda: spawn(with_thread=True)


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main():
    name = sys.argv[1]
    if name in STARTED:
        if name == "compute":
            say("ready")
        answer = STARTED[name]()
    else:
        setup = WAITS[name]
        say("ready")
        answer = setup()
    say(json.dumps(answer))


if __name__ == "__main__":
    main()
