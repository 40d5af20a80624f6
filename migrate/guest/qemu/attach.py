"""Takes over a QEMU that runs already, if it is one that can be moved, and says what is missing if not."""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate.errors import ConfigError, GuestBusyError, GuestGoneError, UnsupportedHostError
from migrate.guest import protocol
from migrate.guest.qemu.command import OPTION_BYTES_MAX, OPTIONS_MAX, options_of_process
from migrate.guest.qemu.process import open_file_of
from migrate.guest.qemu.qmp import Qmp
from migrate.units import PAGE_SIZE_BYTES, format_bytes

RAM_REMEDY = (
    "RAM that can be moved is one shared file: start QEMU with -object"
    " memory-backend-file,id=ram,size=SIZE,mem-path=/dev/shm/NAME,share=on -machine memory-backend=ram"
)
_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True)
class Attached:
    """What is known of a QEMU that was taken over; the monitor and the descriptor are the caller's."""

    qmp: Qmp
    pid: int
    ram_fd: int
    ram_id: str
    memory_bytes: int
    vcpus: int
    machine_type: str
    options: list[str]
    is_running: bool


def attach(qmp_socket: str) -> Attached:
    """Take over the QEMU whose monitor is there. On an error, it runs on as it was.

    Raises:
        GuestGoneError: none is there.
        UnsupportedHostError: it cannot be moved; the message says what is missing.
    """
    connection = _connect(Path(qmp_socket))
    pid = protocol.peer_pid(connection)
    qmp = Qmp(connection)
    try:
        return _look(qmp, pid)
    except BaseException:
        qmp.close()
        raise


def machine_type_of(qmp: Qmp) -> str:
    """The machine, by the name that stays what it is: pc-i440fx-7.2, not pc."""
    return str(qmp.call("qom-get", path="/machine", property="type")).removesuffix("-machine")


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(_CONNECT_S)
    try:
        with protocol.short_path(path) as short:
            connection.connect(short)
    except OSError as error:
        connection.close()
        raise GuestGoneError(f"no QEMU listens at {path}: {error.strerror}") from error
    connection.settimeout(None)
    return connection


def _look(qmp: Qmp, pid: int) -> Attached:
    status = qmp.call("query-status")["status"]
    if status not in {"running", "paused"}:
        raise GuestBusyError(f"QEMU (process {pid}) is in state {status}, neither running nor paused")
    summary = qmp.call("query-memory-size-summary")
    memory_bytes = int(summary["base-memory"])
    if summary.get("plugged-memory"):
        raise UnsupportedHostError("RAM that was plugged in later cannot be moved", remedy="unplug it")
    ram_id, path = _find_ram(qmp, memory_bytes)
    words = _command_line(pid)
    ram_fd = open_file_of(pid, path)
    try:
        _check_file(ram_fd, memory_bytes)
        return Attached(
            qmp=qmp,
            pid=pid,
            ram_fd=ram_fd,
            ram_id=ram_id,
            memory_bytes=memory_bytes,
            vcpus=len(qmp.call("query-cpus-fast")),
            machine_type=machine_type_of(qmp),
            options=options_of_process(words, ram_id),
            is_running=status == "running",
        )
    except BaseException:
        os.close(ram_fd)
        raise


def _find_ram(qmp: Qmp, memory_bytes: int) -> tuple[str, str]:
    """The object that is the machine's RAM, and its file."""
    backend = str(qmp.call("qom-get", path="/machine", property="memory-backend") or "")
    properties = _properties(qmp, backend) if backend else {}
    kind = properties.get("type", "memory of its own")
    if kind != "memory-backend-file":
        raise UnsupportedHostError(f"the RAM of this QEMU is {kind}, not memory-backend-file", remedy=RAM_REMEDY)
    if not properties.get("share"):
        raise UnsupportedHostError("the RAM of this QEMU is a file, but a private one (share=off)", remedy=RAM_REMEDY)
    if properties.get("size") != memory_bytes:
        raise UnsupportedHostError("the RAM of this QEMU is more than one file", remedy=RAM_REMEDY)
    return backend.rpartition("/")[2], str(properties["mem-path"])


def _properties(qmp: Qmp, path: str) -> dict[str, Any]:
    path = path if path.startswith("/") else f"/objects/{path}"
    names = {each["name"] for each in qmp.call("qom-list", path=path)}
    wanted = names & {"type", "share", "size", "mem-path"}
    return {name: qmp.call("qom-get", path=path, property=name) for name in sorted(wanted)}


def _check_file(ram_fd: int, memory_bytes: int) -> None:
    file_bytes, page_size_bytes = os.fstat(ram_fd).st_size, os.fstatvfs(ram_fd).f_bsize
    if file_bytes < memory_bytes:
        raise UnsupportedHostError(f"the RAM file has {format_bytes(file_bytes)}, not {format_bytes(memory_bytes)}")
    if page_size_bytes != PAGE_SIZE_BYTES:
        raise UnsupportedHostError(
            f"the RAM file has pages of {format_bytes(page_size_bytes)}, not {format_bytes(PAGE_SIZE_BYTES)}",
            remedy="use a file on tmpfs",
        )


def _command_line(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        words = [word.decode(errors="replace") for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:-1]]
        if len(words) > OPTIONS_MAX or any(len(word) > OPTION_BYTES_MAX for word in words):
            raise ConfigError("the command line of QEMU is too long")
        return words
    raise GuestGoneError(f"QEMU (process {pid}) is gone")
