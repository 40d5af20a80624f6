"""Starts guest processes, and finds them again: exec, never fork, in a session of their own, in nobody's group."""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from google.protobuf.message import DecodeError

from migrate.error_info import error_of
from migrate.errors import GuestGoneError, MigrateError, NativeError
from migrate.guest.client import GuestClient
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

_READY = b"\0"
_KILL_WAIT_S = 10.0
_DIED = "the guest process died while it started"


def directory_of(socket_path: Path) -> Path:
    """Where the guest that listens there keeps files of its own, if it has any."""
    return socket_path.with_suffix(".d")


class GuestProcess:
    """One guest process: our child, or one that a daemon before us left.

    Args:
        pid: Of the process, which must be alive.
        socket_path: Where it listens.
        child: The same, if it is our child, who must be reaped.

    Raises:
        GuestGoneError: there is no such process.
    """

    def __init__(self, pid: int, socket_path: Path, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self._socket_path = socket_path
        self._child = child
        try:
            self._pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise GuestGoneError("the guest process is gone") from error

    def leave(self) -> None:
        """Let go of it; it lives on. Idempotent."""
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)

    def kill(self) -> None:
        """End it and wait until it is gone, with its RAM, its socket and its files. Idempotent."""
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is None:
            return
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            exited = select.poll()
            exited.register(pidfd, select.POLLIN)
            exited.poll(_KILL_WAIT_S * 1000)
        finally:
            os.close(pidfd)
        if self._child is not None:
            self._child.wait(_KILL_WAIT_S)
        self._socket_path.unlink(missing_ok=True)
        shutil.rmtree(directory_of(self._socket_path), ignore_errors=True)


def adopt_guest(socket_path: Path) -> tuple[GuestProcess, GuestClient]:
    """Take over the guest that listens at a socket, whoever started it.

    Raises:
        GuestGoneError: nobody listens there any more.
    """
    client = GuestClient(socket_path, attach=True)
    try:
        return GuestProcess(client.pid, socket_path), client
    except GuestGoneError:
        client.close()
        raise


def start_guest(
    start_from: types.GuestSpec | types.GuestDescription, socket_path: Path, program: Path | None = None
) -> GuestProcess:
    """Start a guest that begins its life here (from a spec) or arrives (from a description); return once it listens.

    Args:
        start_from: What it is.
        socket_path: Where it will listen.
        program: What it starts, if it is a program.

    Raises:
        MigrateError: what the guest process raised.
        GuestGoneError: it died without a word.
    """
    incoming = isinstance(start_from, types.GuestDescription)
    # One that died with its daemon while it started has left its socket.
    socket_path.unlink(missing_ok=True)
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    command = [sys.executable, "-m", "migrate.guest.host", "--socket", str(socket_path)]
    command += ["--description" if incoming else "--spec", start_from.SerializeToString().hex()]
    command += ["--ready-fd", str(ready_write)]
    command += [] if program is None else ["--program", str(program)]
    try:
        child = subprocess.Popen(command, pass_fds=[ready_write], start_new_session=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        os.close(ready_read)
        raise NativeError("start a guest process", error.errno or 0) from error
    finally:
        os.close(ready_write)
    process = GuestProcess(child.pid, socket_path, child)
    with os.fdopen(ready_read, "rb") as stream:
        word = stream.read()
    if word == _READY:
        return process
    process.kill()
    raise refusal_of(word)


def refusal_of(word: bytes) -> MigrateError:
    """Why a guest process did not start, by its last words."""
    try:
        return error_of(pb.GuestResponse.FromString(word).error) if word else GuestGoneError(_DIED)
    except DecodeError:  # it died before it had said all of it
        return GuestGoneError(_DIED)
