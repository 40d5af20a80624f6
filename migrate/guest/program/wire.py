"""What companion and program say to each other: fixed packets on a SOCK_SEQPACKET socket, descriptors beside them.

The companion asks, the program answers, one at a time; migrate_guest.c has the same. An answer has its request's
number, so that one that comes too late is told from the next.
"""

import os
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from migrate.errors import GuestGoneError, RemoteProtocolError

FD_VARIABLE = "MIGRATE_GUEST_FD"
"""A program that a daemon starts finds the socket there, as a descriptor's number."""
INCOMING_VARIABLE = "MIGRATE_GUEST_INCOMING"
"""Set to 1 if its memory and its state are still to arrive."""

STATE_BYTES_MAX = 512 << 10
"""A state travels in one packet of the guest protocol."""
MEMORY_STEP_BYTES = 2 << 20
MEMORY_MIN_BYTES = 16 << 20
"""Guests of every kind have at least so much, in such steps; what is never touched costs nothing."""
NAME_BYTES_MAX = 64

# struct mig_guest_message of migrate_guest.c.
_MESSAGE = struct.Struct("=IIIiIIQQ88s")
_MAGIC = 0x3147494D
_FDS_MAX = 2


class Ask(IntEnum):
    """What a companion asks for, and what comes with it."""

    HELLO = 1
    """Who it is: memory_bytes, hva, flags, its name; its memfd, and its page map if it could open that."""
    PAUSE = 2
    RESUME = 3
    SAVE = 4
    """The state comes in a memfd."""
    LOAD = 5
    """The state goes in a memfd."""
    OPEN_UFFD = 6
    """A userfaultfd of the program's, hands not shaken; it keeps its copy until CLOSE_UFFD."""
    CLOSE_UFFD = 7


class Flag(IntFlag):
    """What a program says of itself in its HELLO."""

    HAS_RUN = 1
    RUNNING = 2
    INCOMING = 4


@dataclass(frozen=True, slots=True)
class Message:
    """One packet."""

    ask: int
    sequence: int
    error: int = 0
    flags: int = 0
    memory_bytes: int = 0
    hva: int = 0
    text: str = ""


def send(connection: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one packet; the descriptors stay the caller's.

    Raises:
        GuestGoneError: the other end is closed.
    """
    packet = _MESSAGE.pack(
        _MAGIC,
        message.sequence,
        message.ask,
        message.error,
        message.flags,
        0,
        message.memory_bytes,
        message.hva,
        message.text.encode(errors="replace")[: 88 - 1],
    )
    try:
        socket.send_fds(connection, [packet], list(fds))
    except OSError as error:
        raise GuestGoneError(f"the socket between program and companion broke: {error.strerror}") from error


def receive(connection: socket.socket) -> tuple[Message, list[int]]:
    """Receive one packet; the descriptors that came with it are the caller's now.

    Raises:
        GuestGoneError: the other end is closed.
        TimeoutError: nothing came within the socket's timeout.
        RemoteProtocolError: it is no such packet.
    """
    try:
        packet, fds, flags, _ = socket.recv_fds(connection, _MESSAGE.size + 1, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        raise
    except OSError as error:
        raise GuestGoneError(f"the socket between program and companion broke: {error.strerror}") from error
    if not packet:
        raise GuestGoneError("the other end of the program's socket was closed")
    if len(packet) == _MESSAGE.size and not flags & socket.MSG_CTRUNC:
        magic, sequence, ask, error_number, message_flags, _, memory_bytes, hva, text = _MESSAGE.unpack(packet)
        if magic == _MAGIC:
            words = text.partition(b"\0")[0].decode(errors="replace")
            return Message(ask, sequence, error_number, message_flags, memory_bytes, hva, words), fds
    for fd in fds:
        os.close(fd)
    raise RemoteProtocolError("a packet that no program of this version sends: is it built with another migrate?")


def state_file(state: bytes) -> int:
    """A memfd that holds a state, which the caller closes."""
    fd = os.memfd_create("migrate-state", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(state)
    return fd


def read_state(fd: int) -> bytes:
    """What such a memfd holds.

    Raises:
        RemoteProtocolError: too much.
    """
    size_bytes = os.fstat(fd).st_size
    if size_bytes > STATE_BYTES_MAX:
        raise RemoteProtocolError(
            f"a state has at most {STATE_BYTES_MAX} bytes, not {size_bytes}: what is large belongs into the memory"
        )
    return os.pread(fd, size_bytes, 0)
