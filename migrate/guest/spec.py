"""What a guest may be, of whichever kind."""

import re

from migrate.errors import ConfigError
from migrate.guest.layout import check_workload_spec
from migrate.guest.qemu.command import check_qemu_spec
from migrate.units import format_bytes
from migrate.v1 import types_pb2 as types

MEMORY_MIN_BYTES = 16 << 20
MEMORY_MAX_BYTES = 128 << 30
_MEMORY_STEP_BYTES = 2 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHECKS = {
    types.GUEST_KIND_KVM: check_workload_spec,
    types.GUEST_KIND_PROCESS: check_workload_spec,
    types.GUEST_KIND_QEMU: check_qemu_spec,
}


def is_program(spec: types.GuestSpec) -> bool:
    """Whether it is a program of somebody else's, which opted in."""
    return spec.kind == types.GUEST_KIND_PROCESS and spec.HasField("process")


def runs_already(spec: types.GuestSpec) -> bool:
    """Whether it is to be taken over: then its RAM and vCPUs are what they are."""
    return bool(spec.kind == types.GUEST_KIND_QEMU and spec.qemu.qmp_socket) or (
        is_program(spec) and bool(spec.process.socket)
    )


def is_others_process(spec: types.GuestSpec) -> bool:
    """Whether what runs is not the guest process itself, but one beside it."""
    return spec.kind == types.GUEST_KIND_QEMU or is_program(spec)


def check_spec(spec: types.GuestSpec) -> None:
    """Whether such a guest can exist.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    if not _NAME.fullmatch(spec.name):
        raise ConfigError(f"{spec.name[:80]!r} is no guest name: 1 to 64 of letters, digits, '.', '_' and '-'")
    if spec.kind not in _CHECKS:
        raise ConfigError("a guest is of kind kvm, process or qemu")
    if runs_already(spec):
        return
    if is_program(spec) and not _NAME.fullmatch(spec.process.program):
        raise ConfigError(f"{spec.process.program[:80]!r} is no name of a program")
    if not MEMORY_MIN_BYTES <= spec.memory_bytes <= MEMORY_MAX_BYTES or spec.memory_bytes % _MEMORY_STEP_BYTES:
        raise ConfigError(
            f"a guest's memory is a multiple of 2 MiB from {format_bytes(MEMORY_MIN_BYTES)}"
            f" to {format_bytes(MEMORY_MAX_BYTES)}, not {spec.memory_bytes} bytes"
        )
    if not is_program(spec):
        _CHECKS[spec.kind](spec)
