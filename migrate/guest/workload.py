"""A guest of kind kvm or process: RAM, the vCPUs of native/machine.py over it, and the workload that they run.

GIL rule: once RAM is armed, no Python here dereferences it. Statistics come from the mailboxes, which are not RAM.
"""

import ctypes
import mmap
import os
import secrets
import threading
import time
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from migrate.errors import (
    GuestBusyError,
    MigrateError,
    RemoteProtocolError,
    UffdUnavailableError,
    UnsupportedHostError,
)
from migrate.guest.dirty_log import OwnScan, ScanLog, make_bitmap
from migrate.guest.features import check_cpuid_supported
from migrate.guest.layout import layout_of, payload_params
from migrate.guest.memfd import sealed_memfd
from migrate.guest.spec import check_spec
from migrate.native import uffd
from migrate.native.machine import MAILBOX_BYTES, Machine, check_vcpu_state, supported_cpuid
from migrate.telemetry.histogram import distribution_of_ticks
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

STATE_VERSION = 1
STALL_MIN_US = 15.0
_PAUSE_TIMEOUT_US = 5_000_000
_AUDIT_POLL_S = 0.002


class WorkloadGuest:
    """One guest and its state: POPULATING → RUNNING ⇄ PAUSED, or INCOMING until it first runs.

    Args:
        description: The guest; a description with an empty `regions` begins its life here.
        scan: How this process can log its own writes: the dirty log of kind process.

    Raises:
        MigrateError: this host cannot run it.
    """

    def __init__(self, description: types.GuestDescription, scan: OwnScan) -> None:
        spec = description.spec
        check_spec(spec)
        self.instance = secrets.token_hex(8)
        self._incoming = bool(description.regions)
        self._cpuid = self._choose_cpuid(description)
        self._spec = spec
        self.memfd = sealed_memfd(f"migrate-{spec.name}", spec.memory_bytes)
        self._ram = mmap.mmap(self.memfd, spec.memory_bytes)
        self._ram.madvise(mmap.MADV_NOHUGEPAGE)
        self._ram.madvise(mmap.MADV_DONTDUMP)
        self._mailboxes = mmap.mmap(-1, spec.vcpus * MAILBOX_BYTES)
        self._ram_hva = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        mailbox_hva = ctypes.addressof(ctypes.c_char.from_buffer(self._mailboxes))
        self._machine = Machine(self._ram_hva, spec.memory_bytes, mailbox_hva, spec.vcpus, self._cpuid)
        self._uffd: int | None = None
        self._scan = scan
        self._dirty_log: _KvmLog | ScanLog | None = None
        self._loaded = False
        self._has_run = False
        self._running = False
        self._lock = threading.Lock()
        if not self._incoming:
            layout = layout_of(spec)
            params = payload_params(spec, layout, self._machine.tsc_khz)
            self._machine.boot(params, layout.code_gpa, layout.stack_gpa, spec.workload.seed)
            self._loaded = True
            self.resume()

    @staticmethod
    def _choose_cpuid(description: types.GuestDescription) -> list[types.CpuidEntry]:
        if description.spec.kind != types.GUEST_KIND_KVM:
            return []
        supported = supported_cpuid()
        if not description.regions:
            return supported
        if not description.cpuid:
            raise RemoteProtocolError("a guest of kind kvm came without its CPUID table")
        check_cpuid_supported(description.cpuid, supported)
        return list(description.cpuid)

    @property
    def is_armed(self) -> bool:
        """Whether RAM is registered, so that pages may be missing."""
        return self._uffd is not None

    @property
    def no_dirty_log(self) -> str:
        """Why it cannot note the pages that it writes; empty if it can."""
        return "" if self._machine.is_kvm else self._scan.obstacle

    @property
    def state(self) -> "types.GuestState.ValueType":
        """What the guest does now."""
        if not self._has_run:
            return types.GUEST_STATE_INCOMING
        if not self._running:
            return types.GUEST_STATE_PAUSED
        populated = all(self._machine.mailbox(index).populated for index in range(self._spec.vcpus))
        return types.GUEST_STATE_RUNNING if populated else types.GUEST_STATE_POPULATING

    def describe(self) -> types.GuestDescription:
        """The guest, and what it occupies now."""
        region = types.RamRegion(
            region=0, size_bytes=self._spec.memory_bytes, resident_bytes=os.fstat(self.memfd).st_blocks * 512
        )
        return types.GuestDescription(
            spec=self._spec, page_size_bytes=PAGE_SIZE_BYTES, regions=[region], cpuid=self._cpuid
        )

    def pause(self) -> None:
        """Stop the vCPUs.

        Raises:
            GuestBusyError: never ran, or a vCPU does not stop; it runs on.
        """
        with self._lock:
            if not self._has_run:
                raise GuestBusyError("the guest has not arrived yet")
            self._machine.pause(_PAUSE_TIMEOUT_US)
            self._running = False

    def resume(self) -> None:
        """Let the vCPUs run.

        Raises:
            GuestBusyError: its state has not been loaded.
        """
        with self._lock:
            if not self._loaded:
                raise GuestBusyError("the guest has not arrived yet")
            self._machine.resume()
            self._has_run = self._running = True

    def save_state(self) -> tuple[bytes, int]:
        """State and touches of a paused guest.

        Raises:
            GuestBusyError: it is not paused.
        """
        with self._lock:
            if self.state != types.GUEST_STATE_PAUSED:
                raise GuestBusyError("state is saved of a paused guest only")
            state = pb.MachineState(
                version=STATE_VERSION, kind=self._spec.kind, mailbox=bytes(self._machine.mailboxes_bytes())
            )
            for index in range(self._spec.vcpus):
                items = self._machine.get_vcpu(index) if self._machine.is_kvm else {}
                state.vcpus.add(items=[pb.StateItem(name=name, data=data) for name, data in items.items()])
            return state.SerializeToString(), self._touches()

    def load_state(self, serialized: bytes) -> None:
        """Take over the state of a guest that stopped elsewhere.

        Raises:
            GuestBusyError: this one has a state already.
            RemoteProtocolError: not a state of such a guest; nothing was changed.
        """
        with self._lock:
            if self._loaded:
                raise GuestBusyError("the guest has a state already")
            state = pb.MachineState()
            try:
                state.ParseFromString(serialized)
            except DecodeError as error:
                raise RemoteProtocolError("the guest's state is not a message") from error
            vcpus = self._check_state(state)
            for index, items in enumerate(vcpus):
                if self._machine.is_kvm:
                    self._machine.set_vcpu(index, items)
            self._machine.mailboxes_bytes()[:] = state.mailbox
            for index in range(self._spec.vcpus):
                # Stalls are those of this host; everything else goes on where it was.
                self._machine.forget_stalls(index)
            self._loaded = True

    def _check_state(self, state: pb.MachineState) -> list[dict[str, bytes]]:
        if (state.version, state.kind) != (STATE_VERSION, self._spec.kind):
            raise RemoteProtocolError(f"state is version {state.version} of kind {state.kind}")
        if len(state.vcpus) != self._spec.vcpus or len(state.mailbox) != self._spec.vcpus * MAILBOX_BYTES:
            raise RemoteProtocolError(f"state of {len(state.vcpus)} vCPUs and {len(state.mailbox)} bytes of mailbox")
        vcpus = [{item.name: item.data for item in vcpu.items} for vcpu in state.vcpus]
        for items in vcpus:
            if self._machine.is_kvm:
                check_vcpu_state(items)
            elif items:
                raise RemoteProtocolError("a guest of kind process has no vCPU state")
        return vcpus

    def arm(self) -> tuple[int, int]:
        """Register RAM; the userfaultfd, which stays ours too, and RAM's address. Repeatable.

        Raises:
            UffdUnavailableError: none is to be had here.
        """
        with self._lock:
            if self._uffd is None:
                if self._has_run:
                    raise GuestBusyError("RAM is armed before a guest runs")
                opened = self._open_uffd()
                try:
                    uffd.register_missing(opened, self._ram_hva, self._spec.memory_bytes)
                except MigrateError:
                    os.close(opened)
                    raise
                self._uffd = opened
            return self._uffd, self._ram_hva

    def _open_uffd(self) -> int:
        try:
            return uffd.open_uffd(user_mode_only=False)
        except UffdUnavailableError:
            if self._machine.is_kvm:
                raise
            # Its threads are user code, so this suffices.
            return uffd.open_uffd(user_mode_only=True)

    def disarm(self) -> None:
        """Let RAM go: holes read as zero from now on. Repeatable."""
        with self._lock:
            if self._uffd is not None:
                uffd.unregister(self._uffd, self._ram_hva, self._spec.memory_bytes)
                os.close(self._uffd)
                self._uffd = None

    def start_dirty_log(self) -> int:
        """Note the pages that the vCPUs write; the memfd of the log. Repeatable: the log begins anew.

        Raises:
            UnsupportedHostError: there is no such log here.
        """
        if self.no_dirty_log:
            raise UnsupportedHostError(f"the guest cannot note what it writes: {self.no_dirty_log}")
        with self._lock:
            self._stop_dirty_log()
            spec = self._spec
            if self._machine.is_kvm:
                self._dirty_log = _KvmLog(self._machine, spec)
            else:
                self._dirty_log = ScanLog.of_own_memory(self._scan, self._ram_hva, spec.memory_bytes, spec.name)
            return self._dirty_log.memfd

    def sync_dirty_log(self, *, keep: bool) -> int:
        """Move what was noted into the log's memfd; how many pages that are. With `keep`, it stays noted, too.

        Raises:
            GuestBusyError: no log was begun.
        """
        with self._lock:
            if self._dirty_log is None:
                raise GuestBusyError("no dirty log was begun")
            return self._dirty_log.sync(keep=keep)

    def stop_dirty_log(self) -> None:
        """Note nothing any more. Repeatable."""
        with self._lock:
            self._stop_dirty_log()

    def _stop_dirty_log(self) -> None:
        log, self._dirty_log = self._dirty_log, None
        if log is not None:
            log.close()

    def _touches(self) -> int:
        return _sum_u64(self._machine.mailbox(index).touches for index in range(self._spec.vcpus))

    def statistics(self) -> types.GuestStatistics:
        """Sums over all vCPUs, from the mailboxes alone."""
        boxes = [self._machine.mailbox(index) for index in range(self._spec.vcpus)]
        histograms = [list(box.stall_histogram) for box in boxes]
        buckets = [sum(column) for column in zip(*histograms, strict=True)]
        max_ticks = max(box.stall_max_ticks for box in boxes)
        wrong = next((box for box in boxes if box.errors), None)
        first_error = self._machine.failure
        if wrong is not None:
            first_error = (
                f"page {wrong.first_error_page:#x}: expected {wrong.first_error_expected:#x},"
                f" found {wrong.first_error_found:#x}"
            )
        return types.GuestStatistics(
            touches=self._touches(),
            writes=_sum_u64(box.writes for box in boxes),
            errors=_sum_u64([*(box.errors for box in boxes), bool(self._machine.failure)]),
            stall_us=distribution_of_ticks(buckets, self._machine.tsc_khz, max_ticks, STALL_MIN_US),
            audits=min(box.audit_done for box in boxes),
            first_error=first_error,
        )

    def audit(self, deadline_us: int) -> types.GuestStatistics:
        """Have the workload compare all its pages.

        Raises:
            GuestBusyError: not running, or not done in time.
        """
        boxes = [self._machine.mailbox(index) for index in range(self._spec.vcpus)]
        with self._lock:
            if self.state != types.GUEST_STATE_RUNNING:
                raise GuestBusyError("an audit is the work of a running guest")
            wanted = _sum_u64([max(box.audit_requested for box in boxes), 1])
            for box in boxes:
                box.audit_requested = wanted
        deadline = time.monotonic() + deadline_us / 1_000_000
        while any(box.audit_done < wanted for box in boxes):
            if time.monotonic() > deadline or self._machine.failure:
                raise GuestBusyError(f"the audit was not done in {deadline_us / 1_000_000:.0f} s")
            time.sleep(_AUDIT_POLL_S)
        return self.statistics()

    def end(self) -> None:
        """Nothing outlives this process."""


class _KvmLog:
    """Pages that the vCPUs write, as KVM notes them, in a memfd of a bit for each page."""

    def __init__(self, machine: Machine, spec: types.GuestSpec) -> None:
        self._machine = machine
        machine.start_dirty_log()
        self.memfd, self._bitmap = make_bitmap(spec.name, spec.memory_bytes)

    def sync(self, *, keep: bool) -> int:
        """As the guest has it."""
        return self._machine.sync_dirty_log(self._bitmap, keep=keep)

    def close(self) -> None:
        """Note nothing any more."""
        self._machine.stop_dirty_log()
        self._bitmap.close()
        os.close(self.memfd)


def _sum_u64(counts: Iterable[int]) -> int:
    """What vCPUs count is up to them, and need not fit once it is added up."""
    return sum(counts) % 2**64
