"""Makes an ordinary Python program a guest that can be moved to another host while it runs (docs/embedding.md).

What moves is one memory, page by page, and a few bytes of state. The program itself never talks to a daemon.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from migrate.errors import ConfigError, GuestGoneError, RemoteProtocolError
from migrate.guest import protocol
from migrate.guest.memfd import sealed_memfd
from migrate.guest.program import wire
from migrate.guest.program.wire import Ask, Flag, Message

_NR_USERFAULTFD = 323
_UFFD_USER_MODE_ONLY = 1
_USERFAULTFD_IOC_NEW = 0xAA00
_LIBC = ctypes.CDLL(None, use_errno=True)


class Program:
    """This program, as a guest: its movable memory, and what is asked of it. One for each process.

    The callbacks come in a thread of ours, one at a time. What one raises is told to the operator, and the program is
    then as it was. None may wait for long: the guest stands still meanwhile.

    Args:
        name: The program's: what it is found under on every host.
        memory_bytes: How much memory it wants, at least; untouched memory costs nothing.
        pause: Stop; returns when nothing of the program touches its memory any more, or changes anything elsewhere.
        resume: Go on; returns at once.
        save: What the memory does not hold and the program needs elsewhere, at most 512 KiB. Comes while paused.
        load: The same bytes, at the destination, before the program runs for the first time.

    Attributes:
        memory: The movable memory. A program that arrives may not touch it before `load`: it would die of SIGSEGV.
        is_incoming: Whether this process was started for a guest that arrives: memory and state are still to come, and
            nothing may run before `resume`.

    Raises:
        ConfigError: such a program cannot be.
    """

    def __init__(
        self,
        name: str,
        memory_bytes: int,
        *,
        pause: Callable[[], None],
        resume: Callable[[], None],
        save: Callable[[], bytes] = bytes,
        load: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        if not 0 < len(name.encode()) <= wire.NAME_BYTES_MAX:
            raise ConfigError(f"a program's name has 1 to {wire.NAME_BYTES_MAX} bytes")
        self._name = name
        self._pause, self._resume, self._save, self._load = pause, resume, save, load
        self.is_incoming = os.environ.get(wire.INCOMING_VARIABLE) == "1"
        self._is_loaded = not self.is_incoming
        self._has_run = self._is_running = not self.is_incoming
        self._uffd = -1
        step = wire.MEMORY_STEP_BYTES
        self.memory_bytes = max(wire.MEMORY_MIN_BYTES, -(-memory_bytes // step) * step)
        self._memfd = sealed_memfd(f"migrate-{name}", self.memory_bytes)
        protection = 0 if self.is_incoming else mmap.PROT_READ | mmap.PROT_WRITE
        self.memory = mmap.mmap(self._memfd, self.memory_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._protect(protection)
        for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_DONTDUMP, mmap.MADV_DONTFORK):
            self.memory.madvise(advice)
        try:
            self._pagemap_fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._pagemap_fd = -1  # it is moved in mode postcopy, then
        self._answers: dict[int, Callable[[list[int]], tuple[int, ...]]] = {
            Ask.PAUSE: self._do_pause,
            Ask.RESUME: self._do_resume,
            Ask.SAVE: self._do_save,
            Ask.LOAD: self._do_load,
            Ask.OPEN_UFFD: self._do_open_uffd,
            Ask.CLOSE_UFFD: self._do_close_uffd,
        }

    def serve(self, socket_path: "Path | str | None" = None) -> None:
        """Be a guest from now on, in a thread of its own; returns at once.

        Args:
            socket_path: Where `migrate guest attach --socket` finds the program, unless a daemon started it. One that
                lies there from before is replaced.

        Raises:
            ConfigError: no daemon started it, and no path was given, or none that can be listened on.
        """
        inherited = os.environ.pop(wire.FD_VARIABLE, "")
        os.environ.pop(wire.INCOMING_VARIABLE, None)
        if inherited:
            connection = socket.socket(fileno=int(inherited))
            connection.set_inheritable(False)
            self._begin(lambda: self._serve_starter(connection))
        else:
            if socket_path is None:
                raise ConfigError("a program that no daemon started needs a path for its socket")
            listener = _listen(Path(socket_path))
            self._begin(lambda: self._serve_all(listener))

    @staticmethod
    def _begin(work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="migrate-guest", daemon=True).start()

    # ---- connections ----

    def _serve_starter(self, connection: socket.socket) -> None:
        self._serve_one(connection)
        os._exit(0)  # nobody else could say whether we may run

    def _serve_all(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            self._serve_one(connection)

    def _serve_one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(GuestGoneError, RemoteProtocolError):
            while True:
                request, fds = wire.receive(connection)
                try:
                    answer, answered_fds = self._answer(request, fds)
                finally:
                    for fd in fds:
                        os.close(fd)
                try:
                    wire.send(connection, answer, answered_fds)
                finally:
                    if request.ask == Ask.SAVE:
                        for fd in answered_fds:
                            os.close(fd)
        # A companion that is gone watches no page: what it registered is let go of.
        self._do_close_uffd([])

    def _answer(self, request: Message, fds: list[int]) -> tuple[Message, tuple[int, ...]]:
        if request.ask == Ask.HELLO:
            return self._hello(request)
        try:
            return Message(request.ask, request.sequence), self._answers.get(request.ask, _do_not_know)(fds)
        except Exception as error:  # noqa: BLE001 - a callback may raise anything, and the operator shall hear of it
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
            return Message(request.ask, request.sequence, error=number, text=str(error) or repr(error)), ()

    def _hello(self, request: Message) -> tuple[Message, tuple[int, ...]]:
        flags = Flag.HAS_RUN if self._has_run else Flag(0)
        flags |= Flag.RUNNING if self._is_running else Flag(0)
        flags |= Flag.INCOMING if not self._is_loaded else Flag(0)
        hello = Message(
            Ask.HELLO,
            request.sequence,
            flags=int(flags),
            memory_bytes=self.memory_bytes,
            hva=self._hva,
            text=self._name,
        )
        return hello, (self._memfd,) if self._pagemap_fd < 0 else (self._memfd, self._pagemap_fd)

    # ---- what is asked ----

    def _do_pause(self, _: list[int]) -> tuple[int, ...]:
        if not self._has_run:
            raise OSError(errno.EBUSY, "it has never run")
        if self._is_running:
            self._pause()
            self._is_running = False
        return ()

    def _do_resume(self, _: list[int]) -> tuple[int, ...]:
        if not self._is_loaded:
            raise OSError(errno.EBUSY, "its state has not arrived")
        if not self._is_running:
            self._resume()
            self._has_run = self._is_running = True
        return ()

    def _do_save(self, _: list[int]) -> tuple[int, ...]:
        if self._is_running or not self._has_run:
            raise OSError(errno.EBUSY, "state is saved while paused only")
        saved = self._save()
        if len(saved) > wire.STATE_BYTES_MAX:
            raise OSError(errno.EMSGSIZE, f"its state has {len(saved)} bytes, more than {wire.STATE_BYTES_MAX}")
        return (wire.state_file(saved),)

    def _do_load(self, fds: list[int]) -> tuple[int, ...]:
        if self._is_loaded:
            raise OSError(errno.EBUSY, "it has a state already")
        if len(fds) != 1:
            raise OSError(errno.EINVAL, "a state comes in one descriptor")
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        self._load(wire.read_state(fds[0]))
        self._is_loaded = True
        return ()

    def _do_open_uffd(self, _: list[int]) -> tuple[int, ...]:
        self._do_close_uffd([])
        self._uffd = _open_uffd()
        return (self._uffd,)

    def _do_close_uffd(self, _: list[int]) -> tuple[int, ...]:
        if self._uffd >= 0:
            os.close(self._uffd)
            self._uffd = -1
        return ()

    def _protect(self, protection: int) -> None:
        if _LIBC.mprotect(ctypes.c_void_p(self._hva), ctypes.c_size_t(self.memory_bytes), protection):
            raise OSError(ctypes.get_errno(), "mprotect")


def _do_not_know(_: list[int]) -> tuple[int, ...]:
    raise OSError(errno.ENOSYS, "a request that this version does not know")


def _open_uffd() -> int:
    """A userfaultfd, hands not shaken: one that sees what the kernel touches if it is to be had, else what we touch."""
    with contextlib.suppress(OSError):
        device_fd = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(device_fd, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(device_fd)
    for flags in (0, _UFFD_USER_MODE_ONLY):
        fd: int = _LIBC.syscall(_NR_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | flags)
        if fd >= 0:
            return fd
    raise OSError(ctypes.get_errno(), "no userfaultfd is to be had")


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with protocol.short_path(path) as short:
            listener.bind(short)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    return listener
