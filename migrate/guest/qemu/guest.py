"""A guest of kind qemu: a QEMU that we start, or one that runs already, behind the port that every guest has.

Its RAM is one shared file, of which the daemon gets a descriptor; QEMU's own migration stream carries everything else
(capability x-ignore-shared). The userfaultfds are made inside QEMU, from outside (native/inject.py). No call but those
that change the guest asks QEMU anything: one that waits for a page answers nobody.
"""

import contextlib
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from migrate.errors import (
    GuestBusyError,
    GuestGoneError,
    MigrateError,
    QemuError,
    RemoteProtocolError,
    UnsupportedHostError,
)
from migrate.guest.dirty_log import OwnScan
from migrate.guest.features import check_cpuid_supported
from migrate.guest.port import Guest
from migrate.guest.protocol import PACKET_MAX_BYTES
from migrate.guest.qemu.attach import attach, machine_type_of
from migrate.guest.qemu.command import check_qemu_spec
from migrate.guest.qemu.faults import Faults, InjectedFaults
from migrate.guest.qemu.features import cpuid_of
from migrate.guest.qemu.launch import last_words, launch
from migrate.guest.qemu.process import Mapping, find_mapping
from migrate.guest.userfaultfd import Userfaultfd
from migrate.guest.watched import Watched
from migrate.units import format_bytes
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

if TYPE_CHECKING:
    import subprocess

_INCOMING = "inmigrate"
_CAPABILITIES = {"x-ignore-shared": True, "events": True}
# The state was saved, but QEMU has not yet come to rest.
_SAVING = "finish-migrate"
_REST_S = 10.0
# What a packet of the guest protocol and a Switchover have room for, besides the rest of them.
STATE_MAX_BYTES = PACKET_MAX_BYTES - (4 << 10)


class QemuGuest(Guest):
    """One QEMU.

    Args:
        description: The guest; one with an empty `regions` begins its life here, or runs already.
        directory: What stands for {dir} in its options; made, and removed by `end`.
        scan: Whether the kernel can log the writes of a process.
        on_end: Called when QEMU has ended by itself.

    Raises:
        MigrateError: this host cannot run it, or not take it over; one that runs already runs on.
    """

    def __init__(
        self, description: types.GuestDescription, directory: Path, scan: OwnScan, on_end: Callable[[], None]
    ) -> None:
        super().__init__(description)
        self.no_dirty_log = scan.obstacle
        self._directory = directory
        self._saved_stream: bytes | None = None
        self._stream_fd: int | None = None
        self._owners_capabilities: dict[str, bool] = {}
        self._is_loading = False
        self._mapping: Mapping | None = None
        self._is_ours = not description.spec.qemu.qmp_socket
        self._has_run = not self._is_incoming
        directory.mkdir(mode=0o700, exist_ok=True)
        if self._is_ours:
            self._launch(description.machine_type)
        else:
            self._attach()
        try:
            self._machine_type = description.machine_type or machine_type_of(self._qmp)
            self._cpuid = cpuid_of(self._qmp)
            # Once: later on, QEMU may wait for pages that come only after we have answered.
            cpus = sorted(self._qmp.call("query-cpus-fast"), key=lambda cpu: cpu["cpu-index"])
            self._vcpu_thread_ids: list[int] = [cpu["thread-id"] for cpu in cpus]
            self._process = Watched(self._pid, lambda: None if self._is_loading else on_end(), "QEMU")
            self._qmp.on_event = self._on_event
            if self._is_ours:
                self._qmp.set_capabilities(_CAPABILITIES)
            if self._is_incoming:
                check_cpuid_supported(description.cpuid, self._cpuid)
                self._await_incoming()
            elif self._is_ours:
                self.resume()
            if self._is_ours:
                self._prepare_stream()
        except BaseException:
            self._abandon()
            raise

    # ---- how it begins ----

    def _launch(self, machine_type: str) -> None:
        launched = launch(self._spec, self._directory, machine_type)
        self._qmp, self._pid, self.memfd = launched.qmp, launched.pid, launched.ram_fd
        self._faults: Faults = launched.faults
        self._child: subprocess.Popen[bytes] | None = launched.child

    def _attach(self) -> None:
        found = attach(self._spec.qemu.qmp_socket)
        self._qmp, self._pid, self.memfd = found.qmp, found.pid, found.ram_fd
        self._spec.memory_bytes, self._spec.vcpus = found.memory_bytes, found.vcpus
        self._spec.qemu.options[:] = found.options
        self._spec.qemu.ram_id = found.ram_id
        self._is_running = found.is_running
        self._faults = faults = InjectedFaults(self._pid, is_ours=False)
        self._child = None
        try:
            check_qemu_spec(self._spec)
            # What would be missing at its migration is better known now.
            faults.check()
            self._find_mapping()
        except MigrateError:
            self._abandon()
            raise

    def _await_incoming(self) -> None:
        status = self._qmp.call("query-status")["status"]
        if status != _INCOMING:
            raise QemuError(f"QEMU is in state {status}, it does not wait for a migration")
        with mmap.mmap(self.memfd, self._spec.memory_bytes) as ram:
            # What QEMU wrote when it made the machine: the source's pages are all that counts.
            ram.madvise(mmap.MADV_REMOVE)

    def _find_mapping(self) -> Mapping:
        if self._mapping is None:
            self._mapping = find_mapping(self._pid, self.memfd)
            if self._mapping.length_bytes < self._spec.memory_bytes:
                raise UnsupportedHostError("QEMU has not mapped all of its RAM")
        return self._mapping

    # ---- what it is ----

    def describe(self) -> types.GuestDescription:
        """The guest, and what it occupies now; without what only this host knows of it."""
        description = super().describe()
        description.cpuid.extend(self._cpuid)
        description.machine_type = self._machine_type
        description.spec.qemu.qmp_socket = ""
        return description

    def vcpu_thread_ids(self) -> list[int]:
        """The thread of each vCPU, as its faults name it: one for all, where TCG runs them by turns."""
        return self._vcpu_thread_ids

    def _on_event(self, name: str) -> None:
        if name in {"STOP", "RESUME"}:
            self._is_running = name == "RESUME"

    # ---- vCPUs and devices ----

    def _stop(self) -> None:
        if not self._is_ours and not self._owners_capabilities:
            self._owners_capabilities = self._qmp.set_capabilities(_CAPABILITIES)
        self._qmp.call("stop")

    def _go(self) -> None:
        if self._saved_stream is not None:
            self._await_rest()
        self._qmp.call("cont")
        self._saved_stream = None

    def resume(self) -> None:
        """Let the vCPUs run; its owner's capabilities are as they were."""
        with self._lock:
            super().resume()
            if self._owners_capabilities:
                self._qmp.set_capabilities(self._owners_capabilities)
                self._owners_capabilities = {}

    def _await_rest(self) -> None:
        """Wait until QEMU has come to rest after its state was saved, which takes milliseconds, and is not told."""
        until_s = time.monotonic() + _REST_S
        while self._qmp.call("query-status")["status"] == _SAVING:
            if time.monotonic() > until_s:
                raise GuestBusyError("QEMU does not come to rest after it saved its state")

    def _save(self, state: pb.MachineState) -> int:
        """QEMU's own stream, RAM left out."""
        if self._saved_stream is None:  # QEMU saves once for each time that it stops
            self._saved_stream = self._stream_through("migrate", b"")
        state.qemu_stream = self._saved_stream
        if state.ByteSize() > STATE_MAX_BYTES:
            raise QemuError(
                f"the state of its devices is {format_bytes(state.ByteSize())}, which is more than"
                f" {format_bytes(STATE_MAX_BYTES)}",
                remedy="leave out the boot ROMs of network cards (romfile=), and graphics cards",
            )
        return 0

    def _load(self, state: pb.MachineState) -> None:
        """Have QEMU take over a stream; if it does not, it is fit for nothing."""
        if not state.qemu_stream:
            raise RemoteProtocolError("the state is no QEMU's")
        self._is_loading = True
        try:
            self._stream_through("migrate-incoming", state.qemu_stream)
        except GuestGoneError as error:  # it ends, and says why where it says everything
            raise last_words(self._directory, "take the state", is_incoming=True) from error
        self._is_loading = False

    def _prepare_stream(self) -> None:
        """Give QEMU the file of its next stream, which takes time, before the vCPUs stop."""
        if self._stream_fd is None:
            fd = os.memfd_create("migrate-state", os.MFD_CLOEXEC)
            try:
                self._qmp.hand_over(fd)
            except MigrateError:
                os.close(fd)
                raise
            self._stream_fd = fd

    def _stream_through(self, command: str, stream: bytes) -> bytes:
        """Have QEMU read a stream, or write one, which is returned."""
        self._prepare_stream()
        fd, self._stream_fd = self._stream_fd, None
        assert fd is not None  # noqa: S101 - it was prepared
        with os.fdopen(fd, "rb"):
            # QEMU reads, or writes, from the beginning: its descriptor shares our offset.
            os.pwrite(fd, stream, 0)
            self._qmp.migrate(command)
            return os.pread(fd, os.fstat(fd).st_size, 0)

    # ---- pages ----

    def disarm(self) -> None:
        """Let RAM go: holes read as zero from now on, and nothing of ours is left in QEMU. Repeatable."""
        with self._lock:
            super().disarm()
            if self._is_ours and self._is_running:
                # For its next journey; if not now, then when it is needed.
                with contextlib.suppress(MigrateError):
                    self._prepare_stream()

    def _find_ram(self) -> int:
        return self._find_mapping().hva

    def _open_uffd(self, *, with_wp: bool) -> Userfaultfd:
        return self._faults.open(with_wp=with_wp)

    # ---- how it ends ----

    def end(self) -> None:
        """End QEMU, whoever started it, and remove the directory. Idempotent."""
        self._process.kill()
        self._remove_directory()

    def _abandon(self) -> None:
        """It could not be made: end what is ours, and let be what is not."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._qmp.close()
        os.close(self.memfd)
        self._remove_directory()

    def _remove_directory(self) -> None:
        for path in self._directory.iterdir() if self._directory.exists() else ():
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            self._directory.rmdir()
