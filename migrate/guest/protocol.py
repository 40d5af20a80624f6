"""One message a packet on a SOCK_SEQPACKET unix socket, descriptors beside it."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from migrate.errors import GuestGoneError, RemoteProtocolError

PACKET_MAX_BYTES = 1 << 20
_FDS_MAX = 16


_M = TypeVar("_M", bound=Message)


def make_room(connection: socket.socket) -> None:
    """Let one packet be as large as a state can be; past the sysctl's limit where we may (CAP_NET_ADMIN)."""
    for option, forced in ((socket.SO_SNDBUF, 32), (socket.SO_RCVBUF, 33)):
        try:
            connection.setsockopt(socket.SOL_SOCKET, forced, PACKET_MAX_BYTES)
        except PermissionError:
            connection.setsockopt(socket.SOL_SOCKET, option, PACKET_MAX_BYTES)


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A path to the same file that fits into struct sockaddr_un's 108 bytes, however deep the directory (unix(7))."""
    directory_fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory_fd}/{path.name}"
    finally:
        os.close(directory_fd)


def peer_pid(connection: socket.socket) -> int:
    """The process that listens at the other end (SO_PEERCRED, unix(7))."""
    pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def send(connection: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message; the descriptors stay the caller's.

    Raises:
        GuestGoneError: the other end is closed.
    """
    try:
        socket.send_fds(connection, [message.SerializeToString()], list(fds))
    except OSError as error:
        raise GuestGoneError(f"the guest's socket broke: {error.strerror}") from error


def receive(connection: socket.socket, message: _M) -> tuple[_M, list[int]]:
    """Receive one message into `message`; the descriptors that came with it are the caller's now.

    Raises:
        GuestGoneError: the other end is closed, or silent for longer than the socket's timeout.
        RemoteProtocolError: a packet that is cut off or is not such a message; its descriptors are closed.
    """
    try:
        data, fds, flags, _ = socket.recv_fds(connection, PACKET_MAX_BYTES, _FDS_MAX)
    except TimeoutError as error:
        raise GuestGoneError("the guest process did not answer in time") from error
    except OSError as error:
        raise GuestGoneError(f"the guest's socket broke: {error.strerror}") from error
    try:
        _parse(data, flags, message)
    except (GuestGoneError, RemoteProtocolError):
        for fd in fds:
            os.close(fd)
        raise
    return message, fds


def _parse(data: bytes, flags: int, message: Message) -> None:
    if not data:
        raise GuestGoneError("the guest process closed its socket")
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise RemoteProtocolError(f"a packet of the guest protocol exceeds {PACKET_MAX_BYTES} bytes")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise RemoteProtocolError("a packet of the guest protocol is not a message") from error
