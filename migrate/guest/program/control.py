"""The companion's end of a program's socket."""

import contextlib
import itertools
import os
import socket
import threading
import time
from pathlib import Path

from migrate.errors import GuestBusyError, GuestGoneError, ProgramError, RemoteProtocolError
from migrate.guest import protocol
from migrate.guest.program import wire
from migrate.guest.program.wire import Ask, Message

_CALL_S = 20.0
_CONNECT_S = 10.0


class Control:
    """One program, asked one thing at a time. Thread-safe.

    Args:
        connection: To it; ours from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def call(self, ask: Ask, fds: tuple[int, ...] = (), *, undo: Ask | None = None) -> tuple[Message, list[int]]:
        """Ask for something; the answer, and the descriptors that came with it, which the caller closes.

        Args:
            ask: What.
            fds: What goes with it; stays the caller's.
            undo: Asked for, without waiting, if no answer came in time.

        Raises:
            ProgramError: the program says that it cannot.
            GuestBusyError: it does not answer in time.
            GuestGoneError: it has ended, or hung up.
        """
        with self._lock:
            number = next(self._numbers)
            wire.send(self._connection, Message(ask, number), fds)
            try:
                answer, received = self._await(number)
            except TimeoutError as error:
                if undo is not None:
                    wire.send(self._connection, Message(undo, next(self._numbers)))
                raise GuestBusyError(
                    f"the program did not answer {ask.name} in {_CALL_S:.0f} s",
                    remedy="its callbacks must return soon; one that waits for a page cannot",
                ) from error
        if answer.error:
            _close(received)
            words = answer.text or os.strerror(answer.error)
            raise ProgramError(f"the program refused {ask.name}: {words}")
        return answer, received

    def call_plain(self, ask: Ask, fds: tuple[int, ...] = (), *, undo: Ask | None = None) -> Message:
        """The same, of what comes without descriptors."""
        answer, received = self.call(ask, fds, undo=undo)
        _close(received)
        return answer

    def call_for_fd(self, ask: Ask) -> int:
        """The same, of what comes with one descriptor, which the caller closes."""
        _, received = self.call(ask)
        if len(received) != 1:
            _close(received)
            raise RemoteProtocolError(f"the program answered {ask.name} with {len(received)} descriptors, not one")
        return received[0]

    def close(self) -> None:
        """Let the program be. Idempotent."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _await(self, number: int) -> tuple[Message, list[int]]:
        until_s = time.monotonic() + _CALL_S
        while True:
            self._connection.settimeout(max(0.001, until_s - time.monotonic()))
            answer, received = wire.receive(self._connection)
            if answer.sequence == number:
                return answer, received
            _close(received)  # of a question that nobody waits for any more


def connect(path: str) -> tuple[Control, int]:
    """Connect to a program that runs; the control, and its pid.

    Raises:
        GuestGoneError: none listens there.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    connection.settimeout(_CONNECT_S)
    try:
        with protocol.short_path(Path(path)) as short:
            connection.connect(short)
    except OSError as error:
        connection.close()
        raise GuestGoneError(f"no program listens at {path}: {error.strerror}") from error
    return Control(connection), protocol.peer_pid(connection)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
