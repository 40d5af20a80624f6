"""The bare guest of qemu_guest/ in an unpatched QEMU that daemons of ours move, as a guest of kind qemu."""

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_common import BenchError, wait_until
from migrate_peer import NAME, POPULATE_S, Daemon, Report, stall_figures
from qemu_guest_build import AUDIT_REQUESTED_OFFSET, BareGuest, Mailbox, stalls_between
from qemu_peer import TOUCHES_BEFORE, check_guest, machine_options, tsc_khz

from migrate.native.machine import MAILBOX_BYTES

_AUDIT_S = 60


@dataclass(frozen=True, slots=True)
class BareGuestInQemu:
    """One that migrate_peer.migrate_with_ours moves."""

    guest: BareGuest

    @property
    def memory_bytes(self) -> int:
        """Its RAM."""
        return self.guest.memory_bytes

    @property
    def daemon_options(self) -> Sequence[str]:
        """Where its kernel is, which the destination must be allowed to use."""
        return ("--qemu-dir", str(self.guest.path.parent))

    @contextlib.contextmanager
    def running(self, source: Daemon) -> Iterator["RunningInQemu"]:
        """Have it run as the guest of QEMU's own migration does when it is moved."""
        options = ["--kind", "qemu", "--memory", str(self.memory_bytes), "--vcpus", "1"]
        source.run("guest", "create", NAME, *options, qemu_options=machine_options(self.guest))
        with _open_ram(source, self.guest) as ram:
            wait_until(lambda: ram.mailbox().touches >= TOUCHES_BEFORE, POPULATE_S, "the guest to populate its RAM")
            yield RunningInQemu(self.guest, ram, source.json("guest", "show", NAME)["resident_bytes"])


@dataclass(frozen=True, slots=True)
class RunningInQemu:
    """It, at its source, whose RAM is kept when it has left."""

    guest: BareGuest
    ram: "_Ram"
    populated_bytes: int

    def figures(self, report: Report, destination: Daemon) -> dict[str, float]:  # noqa: ARG002 - the protocol's
        """Its stalls since the switchover. Our report has none: what runs in a QEMU is not ours to ask.

        Raises:
            BenchError: its memory is wrong.
        """
        with _open_ram(destination, self.guest) as arrived:
            # At the source, nothing has changed since the switchover.
            before, after = self.ram.mailbox(), arrived.mailbox()
            arrived.request_audit(before.audits + 1)
            audited = wait_until(
                lambda: _audited(arrived, before.audits + 1), _AUDIT_S, "the guest to compare its pages"
            )
            check_guest(before, audited)
        stalls = stalls_between(before, after, tsc_khz())
        shown = {name: getattr(stalls, name) for name in ("mean", "p50", "p90", "p99", "p999", "max", "count")}
        return stall_figures(shown) | {"touches_after": after.touches - before.touches}


class _Ram:
    """RAM that is one file, of which a guest process and its QEMU have a descriptor."""

    def __init__(self, guest: BareGuest, memory: mmap.mmap) -> None:
        self._mailbox_gpa = guest.mailbox_gpa
        self._memory = memory

    def mailbox(self) -> Mailbox:
        """The guest's mailbox as it is now."""
        return Mailbox.parse(self._memory[self._mailbox_gpa : self._mailbox_gpa + MAILBOX_BYTES])

    def request_audit(self, number: int) -> None:
        """Have the guest compare every page with its version, and the sum of versions with what it has counted."""
        struct.pack_into("<Q", self._memory, self._mailbox_gpa + AUDIT_REQUESTED_OFFSET, number)


def _audited(ram: _Ram, number: int) -> Mailbox | None:
    mailbox = ram.mailbox()
    return mailbox if mailbox.audits == number else None


@contextlib.contextmanager
def _open_ram(daemon: Daemon, guest: BareGuest) -> Iterator[_Ram]:
    pid = daemon.json("guest", "show", NAME)["pid"]
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(path.readlink()).startswith(f"/memfd:migrate-{NAME} "):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                break
    else:
        raise BenchError(f"guest process {pid} has no RAM")
    try:
        memory = mmap.mmap(fd, guest.memory_bytes)
    finally:
        os.close(fd)
    with memory:
        yield _Ram(guest, memory)
