"""What this host can do: the checks behind `migrate doctor`, and what `migrate demo` and the daemon choose by.

Features are probed for, never inferred from kernel versions.
"""

import errno
import fcntl
import grp
import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import UffdUnavailableError
from migrate.units import format_bytes

KVM = "kvm"
PROCESS = "process"
QEMU = "qemu"
ALL_KINDS = (KVM, PROCESS, QEMU)

_KVM_API_VERSION = 12
_KVM_GET_API_VERSION = 0xAE00
_KVM_CHECK_EXTENSION = 0xAE03
# What our VMM calls, by the names and numbers of linux/kvm.h.
_KVM_CAPABILITIES = {
    "KVM_CAP_USER_MEMORY": 3,
    "KVM_CAP_EXT_CPUID": 7,
    "KVM_CAP_MP_STATE": 14,
    "KVM_CAP_SYNC_MMU": 16,
    "KVM_CAP_VCPU_EVENTS": 41,
    "KVM_CAP_DEBUGREGS": 50,
    "KVM_CAP_XSAVE": 55,
    "KVM_CAP_XCRS": 56,
    "KVM_CAP_GET_TSC_KHZ": 61,
    "KVM_CAP_IMMEDIATE_EXIT": 136,
}
_MEMORY_FLOOR_BYTES = 512 << 20

KVM_DEVICE = Path("/dev/kvm")
UFFD_DEVICE = Path("/dev/userfaultfd")
PROC = Path("/proc")


@dataclass(frozen=True)
class Check:
    """One thing that a host has or lacks."""

    name: str
    ok: bool
    detail: str
    # What to do about it; empty if nothing needs to be done.
    remedy: str = ""
    # Guest kinds that cannot move without it; empty means that it is only good to know.
    required_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class HostCapabilities:
    """All checks, and what follows from them."""

    checks: tuple[Check, ...]

    @property
    def guest_kinds(self) -> tuple[str, ...]:
        """Kinds of guest that can live here and move here."""
        return tuple(kind for kind in ALL_KINDS if not self.obstacles(kind))

    @property
    def has_kvm(self) -> bool:
        """Whether /dev/kvm can be used, userfaultfd aside."""
        return all(check.ok for check in self.checks if check.name.startswith("kvm"))

    @property
    def has_kernel_faults(self) -> bool:
        """Whether a userfaultfd that sees kernel faults is to be had."""
        return all(check.ok for check in self.checks if check.name == "uffd-kernel-faults")

    def obstacles(self, kind: str) -> tuple[Check, ...]:
        """The failed checks that keep a kind of guest from living here."""
        return tuple(check for check in self.checks if kind in check.required_for and not check.ok)


def probe_host() -> HostCapabilities:
    """Look at this host as this user. Opens devices and closes them again; changes nothing."""
    return HostCapabilities(
        checks=(
            _check_platform(),
            _check_native(),
            *_check_kvm(),
            _check_uffd_device(),
            _check_uffd("uffd-kernel-faults", user_mode_only=False, required_for=(KVM, QEMU)),
            _check_uffd("uffd-user-faults", user_mode_only=True, required_for=(PROCESS,)),
            _check_memfd(),
            _check_memory(),
            _check_seccomp(),
            _check_congestion_control(),
            _check_user(),
            _check_core_pattern(),
            *_qemu_checks(),
        )
    )


def _check_platform() -> Check:
    machine = platform.machine()
    ok = platform.system() == "Linux" and machine == "x86_64"
    return Check(
        name="platform",
        ok=ok,
        detail=f"{platform.system()} {platform.release()} on {machine}, Python {platform.python_version()}",
        remedy="" if ok else "use Linux on x86_64",
        required_for=ALL_KINDS,
    )


def _check_native() -> Check:
    try:
        from migrate.native import _native  # noqa: F401, PLC0415  # whether it can be loaded is the question
    except ImportError as exc:
        return Check(
            name="native-extension",
            ok=False,
            detail=f"cannot be loaded: {exc}",
            remedy="build it with `pip install --no-build-isolation -e .`, or run scripts/test",
            required_for=ALL_KINDS,
        )
    return Check(name="native-extension", ok=True, detail="loaded", required_for=ALL_KINDS)


def _check_kvm() -> tuple[Check, ...]:
    try:
        fd = os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return (
            Check(
                name="kvm-device",
                ok=False,
                detail=f"{KVM_DEVICE}: {exc.strerror}",
                remedy=_device_remedy(KVM_DEVICE)
                if exc.errno in {errno.EACCES, errno.EPERM}
                else _kvm_remedy(exc.errno),
                required_for=(KVM,),
            ),
        )
    try:
        return (
            Check(name="kvm-device", ok=True, detail=f"{KVM_DEVICE} can be opened", required_for=(KVM,)),
            _check_kvm_version(fd),
            _check_kvm_capabilities(fd),
        )
    finally:
        os.close(fd)


def _kvm_remedy(errno_value: int | None) -> str:
    if errno_value == errno.ENOENT:
        return "load kvm_intel or kvm_amd, or turn on nested virtualisation; guests of kind process need no KVM"
    return "see the kernel log; guests of kind process need no KVM"


def _device_remedy(device: Path) -> str:
    """What gives this user a device that is there."""
    try:
        status = device.stat()
        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        group, is_for_group = "", False
    else:
        is_for_group = status.st_gid != 0 and bool(status.st_mode & stat.S_IWGRP)
    if is_for_group:
        return f"add this user to group {group}, which may use {device}"
    return (
        f"give {device} to a group by a udev rule (docs/examples/99-migrate.rules) and add this user to it, or pass "
        "the device into the container"
    )


def _check_uffd_device() -> Check:
    name = "uffd-device"
    try:
        os.close(os.open(UFFD_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        detail = f"{UFFD_DEVICE} is not there; the system call decides"
        return Check(name, ok=False, detail=detail, remedy="Linux 6.1 has it; CAP_SYS_PTRACE does without")
    except OSError as exc:
        remedy = _device_remedy(UFFD_DEVICE)
        return Check(name, ok=False, detail=f"{UFFD_DEVICE}: {exc.strerror}", remedy=remedy)
    return Check(name, ok=True, detail=f"{UFFD_DEVICE} can be opened: no capability is needed")


def _check_kvm_version(fd: int) -> Check:
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
    except OSError as exc:
        return Check("kvm-api", ok=False, detail=f"{exc.strerror}", remedy="see the kernel log", required_for=(KVM,))
    ok = version == _KVM_API_VERSION
    return Check(
        name="kvm-api",
        ok=ok,
        detail=f"version {version}",
        remedy="" if ok else f"use a kernel with version {_KVM_API_VERSION} of the KVM interface",
        required_for=(KVM,),
    )


def _check_kvm_capabilities(fd: int) -> Check:
    missing = [name for name, number in _KVM_CAPABILITIES.items() if not _kvm_extension(fd, number)]
    return Check(
        name="kvm-capabilities",
        ok=not missing,
        detail=f"missing: {', '.join(missing)}" if missing else f"all {len(_KVM_CAPABILITIES)} that are needed",
        remedy="use a newer kernel, or a hypervisor that passes these on" if missing else "",
        required_for=(KVM,),
    )


def _kvm_extension(fd: int, number: int) -> bool:
    try:
        return fcntl.ioctl(fd, _KVM_CHECK_EXTENSION, number) > 0
    except OSError:
        return False


def _check_uffd(name: str, *, user_mode_only: bool, required_for: tuple[str, ...]) -> Check:
    try:
        # A host without the extension still deserves the rest of the report.
        from migrate.native.uffd import open_uffd  # noqa: PLC0415
    except ImportError:
        return Check(
            name,
            ok=False,
            detail="unknown while the native extension is not built",
            remedy="build the native extension first",
            required_for=required_for,
        )
    try:
        os.close(open_uffd(user_mode_only=user_mode_only))
    except UffdUnavailableError as error:
        return Check(name, ok=False, detail=error.message, remedy=error.remedy, required_for=required_for)
    return Check(
        name,
        ok=True,
        detail="opens, with missing faults on shared memory, thread id and exact address",
        required_for=required_for,
    )


def _check_memfd() -> Check:
    try:
        fd = os.memfd_create("migrate-probe", os.MFD_CLOEXEC)
    except OSError as exc:
        return Check(
            name="memfd",
            ok=False,
            detail=f"memfd_create: {exc.strerror}",
            remedy="allow memfd_create in the seccomp profile",
            required_for=ALL_KINDS,
        )
    os.close(fd)
    return Check(name="memfd", ok=True, detail="can be created", required_for=ALL_KINDS)


def _check_memory() -> Check:
    available_bytes = _meminfo_bytes("MemAvailable")
    ok = available_bytes >= _MEMORY_FLOOR_BYTES
    return Check(
        name="memory",
        ok=ok,
        detail=f"{format_bytes(available_bytes)} available",
        remedy="" if ok else f"free memory until {format_bytes(_MEMORY_FLOOR_BYTES)} are available",
    )


def _check_seccomp() -> Check:
    filtered = _first_field(PROC / "self" / "status", "Seccomp") == "2"
    return Check(
        name="seccomp",
        ok=True,
        detail="this process runs under a seccomp filter, as in a container" if filtered else "no filter",
        remedy="if userfaultfd or KVM is refused, the container's seccomp profile may be why" if filtered else "",
    )


def _check_congestion_control() -> Check:
    algorithm = _read(PROC / "sys/net/ipv4/tcp_congestion_control") or "unknown"
    slow = algorithm == "bbr"
    return Check(
        name="tcp-congestion-control",
        ok=True,
        detail=algorithm,
        remedy="cubic moves pages faster than bbr on loopback and on short links" if slow else "",
    )


def _check_user() -> Check:
    if os.geteuid():
        return Check("user", ok=True, detail=f"uid {os.geteuid()}, not root")
    return Check(
        "user",
        ok=False,
        detail="root, which a daemon need not be",
        remedy="run it as a user of its own, with access to the two devices: docs/examples/migrate.service",
    )


def _check_core_pattern() -> Check:
    pattern = _read(PROC / "sys/kernel/core_pattern") or "unknown"
    piped = pattern.startswith("|")
    return Check(
        name="core-pattern",
        ok=True,
        detail=f"core dumps go to the program {pattern[1:].split()[0]}" if piped and pattern[1:] else pattern,
        remedy="guests leave none; of a daemon it would get one whatever its limit is" if piped else "",
    )


def _qemu_checks() -> tuple[Check, ...]:
    from migrate.guest.qemu.probe import check_qemu  # noqa: PLC0415  # it is made of our checks

    return check_qemu()


def _meminfo_bytes(field: str) -> int:
    text = _first_field(PROC / "meminfo", field)
    kib = text.removesuffix("kB").strip()
    return int(kib) * 1024 if kib.isdigit() else 0


def _first_field(path: Path, field: str) -> str:
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
