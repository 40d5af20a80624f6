"""One QEMU process, ours or somebody's, seen from outside: where its RAM is."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import GuestGoneError, UnsupportedHostError

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+)")


@dataclass(frozen=True, slots=True)
class Mapping:
    """Where a file is mapped in a process, from its beginning on, without a gap."""

    hva: int
    length_bytes: int


def find_mapping(pid: int, fd: int) -> Mapping:
    """Where a process has mapped a file of which we have a descriptor (proc_pid_maps(5)).

    Raises:
        GuestGoneError: there is no such process.
        UnsupportedHostError: its maps are closed to us, or it has not mapped the file as a shared one.
    """
    file = os.fstat(fd)
    wanted = (f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}", file.st_ino)
    hva = end_hva = next_offset = 0
    for line in _read_maps(pid).splitlines():
        found = _MAPPING.match(line)
        if found is None or (found[5], int(found[6])) != wanted or found[3][3] != "s":
            continue
        begin, end, offset = int(found[1], 16), int(found[2], 16), int(found[4], 16)
        if offset == 0:
            hva, end_hva, next_offset = begin, end, end - begin
        elif offset == next_offset and begin == end_hva:
            end_hva, next_offset = end, next_offset + end - begin
    if not hva:
        raise UnsupportedHostError(f"process {pid} has not mapped its RAM file as a shared one")
    return Mapping(hva, end_hva - hva)


def _read_maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestGoneError(f"QEMU (process {pid}) is gone") from error
    except PermissionError as error:
        raise UnsupportedHostError(
            f"the maps of QEMU (process {pid}) are closed to us",
            remedy="run the daemon as the same user, or with CAP_SYS_PTRACE",
        ) from error


def open_file_of(pid: int, path: str) -> int:
    """Open a file that a process has mapped, by its name there, or by a descriptor that it has if the name is gone.

    Raises:
        UnsupportedHostError: it cannot be opened.
    """
    candidates = [Path(f"/proc/{pid}/root") / path.lstrip("/")]
    with contextlib.suppress(OSError):
        candidates += sorted(Path(f"/proc/{pid}/fd").iterdir())
    mapped = {int(found[6]) for line in _read_maps(pid).splitlines() if (found := _MAPPING.match(line))}
    for candidate in candidates:
        try:
            name = str(candidate.readlink()) if candidate.parent.name == "fd" else path
            if name.removesuffix(" (deleted)") != path:
                continue
            fd = os.open(candidate, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        if os.fstat(fd).st_ino in mapped:
            return fd
        os.close(fd)
    raise UnsupportedHostError(
        f"the RAM file {path} of QEMU (process {pid}) cannot be opened for reading and writing",
        remedy="run the daemon as a user that may",
    )
