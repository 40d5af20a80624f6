"""QEMU's command line: what a creator may say in it, what we add, and what a destination makes of a source's."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from migrate.errors import ConfigError, PermissionDeniedError
from migrate.v1 import types_pb2 as types

RAM_ID = "migrate-ram"
MONITOR_ID = "migrate-monitor"
DIRECTORY_WORD = "{dir}"
VCPUS_MAX = 255
OPTIONS_MAX = 512
OPTION_BYTES_MAX = 4096
DEFAULT_PROGRAM = "qemu-system-x86_64"

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
# What the guest process says itself, or must have a say in.
_OURS = {
    "m": "--memory says how much RAM there is",
    "smp": "--vcpus says how many vCPUs there are",
    "mem-path": "RAM is a file of our own",
    "mem-prealloc": "RAM must be able to have holes",
    "incoming": "where a guest comes from is up to a migration",
    "loadvm": "a guest begins at its boot, or with a migration",
    "S": "create it, and pause it",
    "daemonize": "QEMU is a child of the guest process",
    "chroot": "it would not find its RAM",
    "runas": "start the daemon as that user",
    "pidfile": "`migrate guest show` has the pid",
    "preconfig": "QEMU must have a machine when it answers",
}
# Options without a value, of which a value that follows would be another option.
_FLAGS = {
    *("no-user-config", "nodefaults", "nographic", "no-shutdown", "no-reboot", "snapshot", "no-acpi", "no-hpet"),
    *("enable-kvm", "only-migratable", "full-screen", "portrait", "no-fd-bootchk", "win2k-hack", "usb", "S"),
    *("daemonize", "preconfig", "mem-prealloc", "singlestep", "enable-sync-profile", "version", "h", "help"),
}
# What reaches into this host by something else than a path.
_ONLY_OF_OPERATORS = {
    *("add-fd", "monitor", "mon", "qmp", "qmp-pretty", "gdb", "s", "readconfig", "writeconfig", "trace", "plugin"),
    *("tpmdev", "fsdev", "virtfs", "D", "d", "sandbox", "seed", "enable-sync-profile", "run-with", "smb", "set"),
}
_OPTIONS_WITHOUT_PATHS = {"append"}
_OWN = "\0"
_BETWEEN_PATHS = re.compile(r"[,=:\"'{}\[\]\s]+")
# What `guest attach` leaves out of the command line of the QEMU that it takes over: it belongs to that process alone.
_OF_ONE_PROCESS = {*_OURS, "name", "sandbox", "qmp", "qmp-pretty", "monitor", "mon", "gdb", "s", "D", "d", "trace"}

Option = tuple[str, str | None]


def parse_options(words: Sequence[str]) -> list[Option]:
    """Take a command line apart: (name without dashes, value or None).

    Raises:
        ConfigError: a word is no option, such as the image of a disk by itself.
    """
    options: list[Option] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name = word.removeprefix("-").removeprefix("-")
        if not word.startswith("-") or not name:
            raise ConfigError(f"{word[:80]!r} is no option of QEMU: disks are named with -drive or -blockdev")
        has_value = name not in _FLAGS and bool(rest)
        options.append((name, rest.pop(0) if has_value else None))
    return options


def format_options(options: Sequence[Option]) -> list[str]:
    """The words again."""
    return [word for name, value in options for word in ([f"-{name}"] if value is None else [f"-{name}", value])]


def check_options(words: Sequence[str]) -> None:
    """Whether a guest may be created with these options.

    Raises:
        ConfigError: it may not; the message names the option.
    """
    if len(words) > OPTIONS_MAX or any(len(word.encode()) > OPTION_BYTES_MAX for word in words):
        raise ConfigError(f"QEMU's options are at most {OPTIONS_MAX} words of at most {OPTION_BYTES_MAX} bytes")
    for name, value in parse_options(words):
        if name in _OURS:
            raise ConfigError(f"-{name} is not for you to say: {_OURS[name]}")
        if name == "object" and (value or "").startswith("memory-backend-"):
            raise ConfigError("an -object of its own for memory is not for you to say: RAM is a file of our own")
        if name in {"machine", "M"} and "memory-backend=" in (value or ""):
            raise ConfigError("memory-backend= is not for you to say: RAM is a file of our own")


def check_qemu_spec(spec: types.GuestSpec) -> None:
    """Whether such a guest of kind qemu can exist.

    Raises:
        ConfigError: it cannot.
    """
    if not 1 <= spec.vcpus <= VCPUS_MAX:
        raise ConfigError(f"a guest of kind qemu has 1 to {VCPUS_MAX} vCPUs, not {spec.vcpus}")
    if not _ID.fullmatch(spec.qemu.ram_id or RAM_ID):
        raise ConfigError(f"{spec.qemu.ram_id[:80]!r} is no id of an object of QEMU")
    check_options(spec.qemu.options)


def check_arriving_options(words: Sequence[str], directories: Sequence[Path]) -> None:
    """Whether a guest that comes from another host may have these options: what it names must be meant for guests.

    Args:
        words: The options.
        directories: Where files of arriving guests may lie, as the operator of this host says.

    Raises:
        PermissionDeniedError: it may not; the message names the option.
    """
    allowed = [directory.resolve() for directory in directories]
    for name, value in parse_options(words):
        if name in _ONLY_OF_OPERATORS:
            raise PermissionDeniedError(f"a guest that arrives may not bring -{name}")
        for path in _paths_of(name, value):
            if _OWN in path or not any(Path(path).resolve().is_relative_to(directory) for directory in allowed):
                raise PermissionDeniedError(
                    f"a guest that arrives may not use {path[:200]!r} on this host (-{name})",
                    remedy="its operator allows that with `migrate daemon --qemu-dir`, or it lies in {dir}",
                )


def _paths_of(name: str, value: str | None) -> list[str]:
    """What may be a path in an option, but for those in the guest's own directory."""
    if name in _OPTIONS_WITHOUT_PATHS or value is None:
        return []
    # A name in the guest's own directory is none of a path, unless it leads out of it.
    parts = _BETWEEN_PATHS.split(value.replace(f"{DIRECTORY_WORD}/", _OWN))
    return [part for part in parts if "/" in part.removeprefix(_OWN) or (part.startswith(_OWN) and ".." in part)]


def options_of_process(words: Sequence[str], ram_id: str) -> list[str]:
    """The options that another host needs to build what a QEMU process is, but for RAM and vCPUs.

    Args:
        words: Its command line, without the program.
        ram_id: Of the object that is its RAM.

    Raises:
        ConfigError: the command line cannot be understood.
    """
    kept: list[Option] = []
    for name, value in parse_options(words):
        if name in _OF_ONE_PROCESS:
            continue
        if name == "object" and _keys_of(value).get("id") == ram_id:
            continue
        if name in {"machine", "M"} and value is not None:
            parts = [part for part in value.split(",") if not part.startswith("memory-backend=")]
            if not parts:
                continue
            kept.append((name, ",".join(parts)))
            continue
        kept.append((name, value))
    return format_options(kept)


def command_line(
    spec: types.GuestSpec, *, program: str, ram_fd: int, monitor_fd: int, directory: Path, machine_type: str = ""
) -> list[str]:
    """The command that starts a guest.

    Args:
        spec: The guest.
        program: The QEMU.
        ram_fd: The memfd of its RAM, which it inherits.
        monitor_fd: An end of a socket pair, which it inherits.
        directory: What stands for {dir}.
        machine_type: For a guest that arrives: the machine that it has at its source.
    """
    ram_id = spec.qemu.ram_id or RAM_ID
    ram = f"memory-backend-file,id={ram_id},size={spec.memory_bytes},mem-path=/proc/self/fd/{ram_fd},share=on"
    command = [program, "-name", spec.name]
    command += [word.replace(DIRECTORY_WORD, str(directory)) for word in spec.qemu.options]
    command += ["-m", f"{spec.memory_bytes}B", "-smp", str(spec.vcpus)]
    command += ["-object", ram, "-machine", f"memory-backend={ram_id}"]
    # Guest RAM belongs into no core dump, as for guests of other kinds.
    command += ["-machine", "dump-guest-core=off,suppress-vmdesc=on"]
    command += ["-chardev", f"socket,id={MONITOR_ID},fd={monitor_fd}", "-mon", f"chardev={MONITOR_ID},mode=control"]
    if not any(name == "sandbox" for name, _ in parse_options(spec.qemu.options)):
        # Options come from an operator, or from another host: no program is run for either.
        command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    if machine_type:
        command += ["-machine", f"type={machine_type}", "-incoming", "defer"]
    return command


def program() -> str:
    """The QEMU of this host."""
    return os.environ.get("MIGRATE_QEMU", DEFAULT_PROGRAM)


def _keys_of(value: str | None) -> dict[str, str]:
    pairs = (part.partition("=") for part in (value or "").split(","))
    return {key: text for key, _, text in pairs}
