"""Starts guest processes: exec, never fork, in a session of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from migrate.errors import GuestGoneError
from migrate.guest.client import received_error
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

_READY = b"\0"
_KILL_WAIT_S = 10.0


class GuestProcess:
    """One guest process, our child.

    Args:
        process: The child.
        socket_path: Where it listens.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", socket_path: Path) -> None:
        self._process = process
        self._socket_path = socket_path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def kill(self) -> None:
        """End it and wait until it is gone, with its RAM and its socket. Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait(_KILL_WAIT_S)
        self._socket_path.unlink(missing_ok=True)


def start_guest(start_from: types.GuestSpec | types.GuestDescription, socket_path: Path) -> GuestProcess:
    """Start a guest that begins its life here (from a spec) or arrives (from a description); return once it listens.

    Raises:
        MigrateError: what the guest process raised.
        GuestGoneError: it died without a word.
    """
    incoming = isinstance(start_from, types.GuestDescription)
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    command = [sys.executable, "-m", "migrate.guest.host", "--socket", str(socket_path)]
    command += ["--description" if incoming else "--spec", start_from.SerializeToString().hex()]
    command += ["--ready-fd", str(ready_write)]
    try:
        child = subprocess.Popen(command, pass_fds=[ready_write], start_new_session=True, stdin=subprocess.DEVNULL)
    finally:
        os.close(ready_write)
    process = GuestProcess(child, socket_path)
    with os.fdopen(ready_read, "rb") as stream:
        word = stream.read()
    if word == _READY:
        return process
    process.kill()
    if not word:
        raise GuestGoneError("the guest process died while it started")
    raise received_error(pb.GuestResponse.FromString(word).error)
