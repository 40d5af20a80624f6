"""A guest of kind kvm or process: RAM, the vCPUs of native/machine.py over it, and the workload that they run.

GIL rule: once RAM is armed, no Python here dereferences it. Statistics come from the mailboxes, which are not RAM.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable

from migrate.errors import (
    GuestBusyError,
    RemoteProtocolError,
    UffdUnavailableError,
)
from migrate.guest.dirty_log import OwnScan, make_bitmap
from migrate.guest.features import check_cpuid_supported
from migrate.guest.layout import layout_of, payload_params
from migrate.guest.memfd import sealed_memfd
from migrate.guest.port import DirtyLog, Guest
from migrate.guest.spec import check_spec
from migrate.guest.userfaultfd import Userfaultfd
from migrate.native import uffd
from migrate.native.machine import MAILBOX_BYTES, Machine, check_vcpu_state, supported_cpuid
from migrate.telemetry.histogram import STALL_MIN_US, distribution_of_ticks, durations_of_ticks
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

_PAUSE_TIMEOUT_US = 5_000_000
_AUDIT_POLL_S = 0.002


class WorkloadGuest(Guest):
    """One guest and its workload.

    Args:
        description: The guest; a description with an empty `regions` begins its life here.
        scan: How this process can log its own writes: the dirty log of kind process.

    Raises:
        MigrateError: this host cannot run it.
    """

    def __init__(self, description: types.GuestDescription, scan: OwnScan) -> None:
        super().__init__(description)
        spec = self._spec
        check_spec(spec)
        self._cpuid = self._choose_cpuid(description)
        self.memfd = sealed_memfd(f"migrate-{spec.name}", spec.memory_bytes)
        self._ram = mmap.mmap(self.memfd, spec.memory_bytes)
        self._ram.madvise(mmap.MADV_NOHUGEPAGE)
        self._ram.madvise(mmap.MADV_DONTDUMP)
        self._mailboxes = mmap.mmap(-1, spec.vcpus * MAILBOX_BYTES)
        self._ram_hva = ctypes.addressof(ctypes.c_char.from_buffer(self._ram))
        mailbox_hva = ctypes.addressof(ctypes.c_char.from_buffer(self._mailboxes))
        self._machine = Machine(self._ram_hva, spec.memory_bytes, mailbox_hva, spec.vcpus, self._cpuid)
        self._scan = scan
        self.no_dirty_log = "" if self._machine.is_kvm else scan.obstacle
        if not self._is_incoming:
            layout = layout_of(spec)
            params = payload_params(spec, layout, self._machine.tsc_khz)
            self._machine.boot(params, layout.code_gpa, layout.stack_gpa, spec.workload.seed)
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
    def state(self) -> "types.GuestState.ValueType":
        """What the guest does now."""
        state = super().state
        if state != types.GUEST_STATE_RUNNING:
            return state
        populated = all(self._machine.mailbox(index).populated for index in range(self._spec.vcpus))
        return types.GUEST_STATE_RUNNING if populated else types.GUEST_STATE_POPULATING

    def describe(self) -> types.GuestDescription:
        """The guest, and what it occupies now."""
        description = super().describe()
        description.cpuid.extend(self._cpuid)
        return description

    def vcpu_thread_ids(self) -> list[int]:
        """The thread of each vCPU, as its faults name it."""
        return self._machine.thread_ids()

    def _stop(self) -> None:
        self._machine.pause(_PAUSE_TIMEOUT_US)

    def _go(self) -> None:
        self._machine.resume()

    def _save(self, state: pb.MachineState) -> int:
        state.mailbox = bytes(self._machine.mailboxes_bytes())
        for index in range(self._spec.vcpus):
            items = self._machine.get_vcpu(index) if self._machine.is_kvm else {}
            state.vcpus.add(items=[pb.StateItem(name=name, data=data) for name, data in items.items()])
        return self._touches()

    def _load(self, state: pb.MachineState) -> None:
        vcpus = self._check_state(state)
        for index, items in enumerate(vcpus):
            if self._machine.is_kvm:
                self._machine.set_vcpu(index, items)
        self._machine.mailboxes_bytes()[:] = state.mailbox
        for index in range(self._spec.vcpus):
            # Stalls are those of this host; everything else goes on where it was.
            self._machine.forget_stalls(index)

    def _check_state(self, state: pb.MachineState) -> list[dict[str, bytes]]:
        if len(state.vcpus) != self._spec.vcpus or len(state.mailbox) != self._spec.vcpus * MAILBOX_BYTES:
            raise RemoteProtocolError(f"state of {len(state.vcpus)} vCPUs and {len(state.mailbox)} bytes of mailbox")
        vcpus = [{item.name: item.data for item in vcpu.items} for vcpu in state.vcpus]
        for items in vcpus:
            if self._machine.is_kvm:
                check_vcpu_state(items)
            elif items:
                raise RemoteProtocolError("a guest of kind process has no vCPU state")
        return vcpus

    def _find_ram(self) -> int:
        return self._ram_hva

    def _open_uffd(self, *, with_wp: bool) -> Userfaultfd:
        # Write-protection lifts itself, whoever writes: no fault is ever reported, so user mode suffices.
        opened = uffd.open_uffd(user_mode_only=True, with_wp=True) if with_wp else self._open_for_missing()
        return Userfaultfd(opened, self._scan.pagemap_fd, lambda: os.close(opened))

    def _open_for_missing(self) -> int:
        try:
            return uffd.open_uffd(user_mode_only=False)
        except UffdUnavailableError:
            if self._machine.is_kvm:
                raise
            # Its threads are user code, so this suffices.
            return uffd.open_uffd(user_mode_only=True)

    def _begin_dirty_log(self) -> DirtyLog:
        return _KvmLog(self._machine, self._spec) if self._machine.is_kvm else super()._begin_dirty_log()

    def _touches(self) -> int:
        return _sum_u64(self._machine.mailbox(index).touches for index in range(self._spec.vcpus))

    def statistics(self, *, with_stalls: bool = False) -> types.GuestStatistics:
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
        stalls = durations_of_ticks(buckets, self._machine.tsc_khz, STALL_MIN_US) if with_stalls else []
        return types.GuestStatistics(
            touches=self._touches(),
            writes=_sum_u64(box.writes for box in boxes),
            errors=_sum_u64([*(box.errors for box in boxes), bool(self._machine.failure)]),
            stall_us=distribution_of_ticks(buckets, self._machine.tsc_khz, max_ticks, STALL_MIN_US),
            audits=min(box.audit_done for box in boxes),
            first_error=first_error,
            stalls=[types.StallCount(stall_us=stall_us, count=count) for stall_us, count in stalls],
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
