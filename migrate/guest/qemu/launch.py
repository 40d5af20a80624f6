"""Starts a QEMU whose RAM is a sealed memfd, and whose monitor nobody else has."""

import contextlib
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import GuestGoneError, MigrateError, MissingFeatureError, QemuError, UnsupportedHostError
from migrate.guest.memfd import sealed_memfd
from migrate.guest.qemu.command import command_line, program
from migrate.guest.qemu.faults import Faults, InjectedFaults, listening, needs_preload
from migrate.guest.qemu.qmp import Qmp
from migrate.v1 import types_pb2 as types

_LOG = "qemu.log"
_LAST_WORDS_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Launched:
    """A QEMU that has its machine, and does not run it yet. All of it is the caller's."""

    qmp: Qmp
    child: "subprocess.Popen[bytes]"
    ram_fd: int
    faults: Faults

    @property
    def pid(self) -> int:
        """Of the process, which ends with this one."""
        return self.child.pid


def launch(spec: types.GuestSpec, directory: Path, machine_type: str) -> Launched:
    """Start one.

    Args:
        spec: The guest.
        directory: Its own; QEMU starts in it, and writes `qemu.log` there.
        machine_type: As command_line has it.

    Raises:
        MigrateError: QEMU did not start, in its own words.
    """
    ram_fd = sealed_memfd(f"migrate-{spec.name}", spec.memory_bytes)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = command_line(
        spec,
        program=program(),
        ram_fd=ram_fd,
        monitor_fd=theirs.fileno(),
        directory=directory,
        machine_type=machine_type,
    )
    with contextlib.ExitStack() as stack:
        await_faults, variables = None, {"LD_PRELOAD": ""}
        if needs_preload():
            variables, await_faults = stack.enter_context(listening(directory, spec.memory_bytes))
        # It ends with us: nobody else could say what its vCPUs may do.
        command = ["setpriv", "--pdeathsig", "KILL", *command, "-S"]
        with theirs:
            child = _spawn(command, variables, [ram_fd, theirs.fileno()], directory)
        try:
            faults: Faults = InjectedFaults(child.pid, is_ours=True)
            qmp = Qmp(ours)
            if await_faults is not None:
                faults = await_faults(ram_fd)
        except MigrateError as error:
            child.kill()
            child.wait()
            os.close(ram_fd)
            if isinstance(error, GuestGoneError):
                raise last_words(directory, "start", is_incoming=bool(machine_type)) from error
            raise
    return Launched(qmp, child, ram_fd, faults)


def last_words(directory: Path, what: str, *, is_incoming: bool) -> MigrateError:
    """Why QEMU did not do something, as it says itself where it says everything."""
    words = (directory / _LOG).read_bytes()[-_LAST_WORDS_BYTES:].decode(errors="replace").strip()
    if "No such file or directory" in words and program() in words:
        return UnsupportedHostError(
            f"there is no {program()} on this host", remedy="install it (Debian: qemu-system-x86)"
        )
    cls = MissingFeatureError if is_incoming else QemuError
    return cls(f"QEMU did not {what}: {words or 'it does not say why'}")


def _spawn(
    command: list[str], variables: dict[str, str], pass_fds: list[int], directory: Path
) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value}
    with (directory / _LOG).open("wb") as log:
        try:
            return subprocess.Popen(
                command,
                pass_fds=pass_fds,
                env=environment,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        except OSError as error:
            raise UnsupportedHostError(f"QEMU cannot be started: {error.strerror}") from error
