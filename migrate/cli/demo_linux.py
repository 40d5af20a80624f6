"""The guest of `migrate demo --kind qemu`: Linux in an unpatched QEMU, which checks its own memory aloud.

scripts/build_linux_guest makes it; what its console tells is in scripts/linux_guest/init.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from migrate.cli.progress import Reporter
from migrate.errors import CallFailedError, ConfigError
from migrate.units import format_bytes

MEMORY_MIN_BYTES = 256 << 20
# What the kernel and its file system need besides the data.
_OVERHEAD_MIB = 160
_BOOT_DEADLINE_S, _CHECK_DEADLINE_S = 120.0, 120.0
_POLL_S = 0.1
_COUNTED = re.compile(r"^(tick|sum ok|versions ok) (\d+)\b", re.MULTILINE)
_WRONG = re.compile(r"^.* BAD.*$|^.*\b(?:BUG|Oops|Kernel panic|lockup)\b.*$", re.MULTILINE)
_READY = re.compile(r"^ready ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Told:
    """What the console says so far."""

    is_ready: bool
    ticks: int
    sums: int
    versions: int
    wrong: tuple[str, ...]


class LinuxGuest:
    """That guest, and its console, which is one file on whichever side it runs.

    Args:
        base_dir: Where the file goes.

    Raises:
        ConfigError: the guest is not built.
    """

    def __init__(self, base_dir: Path) -> None:
        self.image_dir = Path(os.environ.get("MIGRATE_LINUX_GUEST", "build/linux-guest")).absolute()
        if not (self.image_dir / "vmlinuz").exists():
            raise ConfigError(
                f"there is no Linux guest in {self.image_dir}",
                remedy="scripts/build_linux_guest builds one; MIGRATE_LINUX_GUEST says where it is",
            )
        self._console = base_dir / "console"
        self._base_dir = base_dir

    @property
    def daemon_options(self) -> list[str]:
        """What a daemon needs to take it in."""
        return [word for directory in (self.image_dir, self._base_dir) for word in ("--qemu-dir", str(directory))]

    def qemu_options(self, memory_bytes: int) -> list[str]:
        """What is told to QEMU, for so much RAM.

        Raises:
            ConfigError: it has too little memory.
        """
        if memory_bytes < MEMORY_MIN_BYTES:
            raise ConfigError(f"the Linux guest needs {format_bytes(MEMORY_MIN_BYTES)}")
        data_mib = (memory_bytes >> 20) - _OVERHEAD_MIB
        kernel = f"console=ttyS0 loglevel=5 nokaslr mitigations=off init_on_alloc=0 migrate.data_mib={data_mib}"
        return [
            *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg,thread=multi", "-cpu", "qemu64"),
            *("-kernel", str(self.image_dir / "vmlinuz"), "-initrd", str(self.image_dir / "initramfs.cpio.gz")),
            *("-append", kernel, "-chardev", f"file,id=console,path={self._console},append=on"),
            *("-serial", "chardev:console", "-chardev", "null,id=port", "-serial", "chardev:port"),
        ]

    def await_ready(self, reporter: Reporter) -> None:
        """Wait until it has booted, has its data, and has compared it once.

        Raises:
            CallFailedError: it has not in time.
        """
        end_s = time.monotonic() + _BOOT_DEADLINE_S
        while not ((told := self._told()).is_ready and told.sums and told.versions):
            reporter.report("booting", 0, 0, "Linux fills its memory" if not told.is_ready else "Linux sums it up")
            _wait(end_s, "the Linux guest has not booted")

    def check(self, reporter: Reporter) -> list[str]:
        """Wait until it has compared everything anew where it is now; what was ever wrong.

        Raises:
            CallFailedError: it does not run on.
        """
        end_s, before = time.monotonic() + _CHECK_DEADLINE_S, self._told()
        # The second from now is the first that began after now.
        while (told := self._told()).sums < before.sums + 2 or told.versions < before.versions + 2:
            if told.wrong:
                break
            reporter.report("checking", 0, 0, f"Linux compares its memory, tick {told.ticks}")
            _wait(end_s, "the Linux guest does not run on at the destination")
        return list(told.wrong)

    def _told(self) -> _Told:
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        last: dict[str, int] = {}
        for word, number in _COUNTED.findall(text):
            last[word] = int(number)
        return _Told(
            is_ready=bool(_READY.search(text)),
            ticks=last.get("tick", 0),
            sums=last.get("sum ok", 0),
            versions=last.get("versions ok", 0),
            wrong=tuple(_WRONG.findall(text)),
        )


def _wait(end_s: float, otherwise: str) -> None:
    if time.monotonic() > end_s:
        raise CallFailedError(otherwise)
    time.sleep(_POLL_S)
