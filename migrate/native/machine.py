"""A machine of our own: vCPU threads in C that run the workload, under KVM or as plain threads of this process."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from migrate.errors import GuestBusyError, KvmError, KvmUnavailableError, NativeError, RemoteProtocolError
from migrate.native._native import ffi, lib
from migrate.v1 import types_pb2 as types

_CPUID_MAX = 256
_CPUID_FIELDS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")

PARAMS_GPA: int = lib.MIG_PARAMS_GPA
PAGE_TABLE_GPA: int = lib.MIG_PAGE_TABLE_GPA
VCPUS_MAX: int = lib.MIG_VCPUS_MAX
STALL_BUCKETS: int = lib.MIG_STALL_BUCKETS
MAILBOX_BYTES: int = ffi.sizeof("struct mig_mailbox")


@dataclass(frozen=True, slots=True)
class PayloadParams:
    """What the workload is told; the fields of struct mig_payload_params (native/payload.h)."""

    distribution: int
    write_threshold: int
    working_pages: int
    first_page: int
    table_gpa: int
    state_gpa: int
    vcpus: int
    ticks_per_touch: int
    checks_fpu: int


def supported_cpuid() -> list[types.CpuidEntry]:
    """The CPUID table that KVM can give a vCPU here.

    Raises:
        KvmUnavailableError: /dev/kvm is not to be had.
    """
    entries = ffi.new("struct mig_cpuid_entry[]", _CPUID_MAX)
    found = lib.mig_kvm_supported_cpuid(entries, _CPUID_MAX)
    if found < 0:
        error = KvmError("/dev/kvm", -found)
        raise KvmUnavailableError(
            f"KVM is not available on this host: {error.message}",
            remedy="give this user read and write access to /dev/kvm, or use --kind process",
        )
    return [types.CpuidEntry(**{f: getattr(entries[i], f) for f in _CPUID_FIELDS}) for i in range(found)]


class Machine:
    """vCPU threads over RAM and mailboxes mapped in this process, parked at first. Lives as long as the process.

    Args:
        ram_hva: Where RAM is mapped.
        ram_bytes: Its size.
        mailbox_hva: Where the mailboxes are mapped, one for each vCPU.
        vcpus: How many.
        cpuid: The vCPUs' CPUID table; empty for plain threads.

    Raises:
        KvmError: KVM refused.
    """

    def __init__(
        self, ram_hva: int, ram_bytes: int, mailbox_hva: int, vcpus: int, cpuid: Sequence[types.CpuidEntry]
    ) -> None:
        entries = ffi.new("struct mig_cpuid_entry[]", [{f: getattr(e, f) for f in _CPUID_FIELDS} for e in cpuid])
        ret, operation = ffi.new("struct mig_machine **"), ffi.new("char **")
        self._ram: Any = ffi.cast("char *", ram_hva)
        self._mailboxes: Any = ffi.cast("struct mig_mailbox *", mailbox_hva)
        rc = lib.mig_machine_create(
            self._ram, ram_bytes, self._mailboxes, vcpus, entries, len(cpuid), ret, ffi.cast("const char **", operation)
        )
        if rc < 0:
            raise KvmError(ffi.string(operation[0]).decode(), -rc)
        self._machine = ret[0]
        self.vcpus = vcpus
        self.is_kvm = bool(cpuid)
        self.tsc_khz: int = lib.mig_machine_tsc_khz(self._machine)

    def boot(self, params: PayloadParams, code_gpa: int, stack_gpa: int, seed: int) -> None:
        """Write the workload's parameters, page tables and code into RAM, and put the vCPUs at their start.

        Only for a machine whose life begins here; RAM must not be armed.

        Raises:
            KvmError: KVM refused the registers.
        """
        in_ram = ffi.cast("struct mig_payload_params *", self._ram + PARAMS_GPA)
        for name in PayloadParams.__slots__:
            setattr(in_ram, name, getattr(params, name))
        for index in range(self.vcpus):
            state = ffi.cast("struct mig_payload_state *", self._ram + params.state_gpa + index * 4096)
            state.random = (seed * VCPUS_MAX + index) * 0x9E3779B97F4A7C15 % 2**64
        rc = lib.mig_machine_boot(self._machine, code_gpa, stack_gpa)
        if rc < 0:
            raise KvmError("set the vCPUs' first registers", -rc)

    def resume(self) -> None:
        """Let the vCPUs run."""
        lib.mig_machine_resume(self._machine)

    def pause(self, timeout_us: int) -> None:
        """Stop the vCPUs between two instructions.

        Raises:
            GuestBusyError: one did not stop in time, as one that waits for a page; all run on.
        """
        rc = lib.mig_machine_pause(self._machine, timeout_us)
        if rc == -errno.ETIMEDOUT:
            raise GuestBusyError("a vCPU did not stop in time; it may wait for a page", remedy="try again")
        if rc < 0:
            raise NativeError("pause the vCPUs", -rc)

    @property
    def failure(self) -> str:
        """What ended a vCPU for good; empty if all live."""
        text: str = ffi.string(lib.mig_machine_failure(self._machine)).decode()
        return text

    def thread_ids(self) -> list[int]:
        """The thread of each vCPU, as the kernel names it."""
        return [lib.mig_machine_thread_id(self._machine, index) for index in range(self.vcpus)]

    def start_dirty_log(self) -> None:
        """Log which pages the vCPUs write.

        Raises:
            KvmError: it cannot be done; errno.ENOTSUP where there are no vCPUs.
        """
        _check_kvm("start the dirty log", lib.mig_machine_start_dirty_log(self._machine))

    def sync_dirty_log(self, bitmap: Any, *, keep: bool = False) -> int:
        """Move the pages written since the last time into a bitmap, a writable buffer; return how many there are.

        With `keep`, they stay in the log, too.
        """
        words = ffi.from_buffer("uint64_t[]", bitmap, require_writable=True)
        return _check_kvm("read the dirty log", lib.mig_machine_sync_dirty_log(self._machine, words, keep))

    def stop_dirty_log(self) -> None:
        """End it."""
        _check_kvm("stop the dirty log", lib.mig_machine_stop_dirty_log(self._machine))

    def mailbox(self, vcpu: int) -> Any:
        """The mailbox of one vCPU, a struct mig_mailbox."""
        return self._mailboxes[vcpu]

    def forget_stalls(self, vcpu: int) -> None:
        """Let a vCPU that comes from elsewhere time its touches from here on."""
        mailbox = self._mailboxes[vcpu]
        mailbox.stop = mailbox.stall_max_ticks = 0
        ffi.buffer(mailbox.stall_histogram)[:] = bytes(ffi.sizeof(mailbox.stall_histogram))

    def mailboxes_bytes(self) -> Any:
        """All mailboxes as one writable buffer."""
        return ffi.buffer(self._mailboxes, self.vcpus * MAILBOX_BYTES)

    def get_vcpu(self, vcpu: int) -> dict[str, bytes]:
        """State of a paused vCPU, by item.

        Raises:
            KvmError: KVM refused.
        """
        state = {}
        for name, item, size_bytes in _items():
            data = ffi.new("char[]", size_bytes)
            rc = lib.mig_vcpu_get_item(self._machine, vcpu, item, data)
            if rc < 0:
                raise KvmError(f"read vCPU {vcpu}'s {name}", -rc)
            state[name] = bytes(ffi.buffer(data))
        return state

    def set_vcpu(self, vcpu: int, state: dict[str, bytes]) -> None:
        """Load the state of a vCPU that never ran.

        Raises:
            KvmError: KVM refused.
        """
        for name, item, _ in _items():
            rc = lib.mig_vcpu_set_item(self._machine, vcpu, item, ffi.from_buffer(state[name]))
            if rc < 0:
                raise KvmError(f"set vCPU {vcpu}'s {name}", -rc)


def check_vcpu_state(state: dict[str, bytes]) -> None:
    """Whether a state has just the items that a vCPU has, each of its size.

    Raises:
        RemoteProtocolError: it has not.
    """
    expected = {name: size_bytes for name, _, size_bytes in _items()}
    found = {name: len(data) for name, data in state.items()}
    if found != expected:
        raise RemoteProtocolError(f"vCPU state has items {found}, expected {expected}")


def _items() -> list[tuple[str, int, int]]:
    return [
        (ffi.string(lib.mig_vcpu_item_name(item)).decode(), item, lib.mig_vcpu_item_bytes(item))
        for item in range(lib.mig_vcpu_item_count())
    ]


def _check_kvm(operation: str, rc: int) -> int:
    if rc < 0:
        raise KvmError(operation, -rc)
    return rc
