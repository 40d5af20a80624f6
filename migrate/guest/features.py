"""Whether a host can give a vCPU what its guest was told that it has."""

from collections.abc import Sequence

from migrate.errors import MissingFeatureError
from migrate.v1 import types_pb2 as types

# (leaf, subleaf) → the registers that are sets of feature bits (Intel SDM volume 2, CPUID).
_FEATURE_REGISTERS = {
    (0x1, 0): ("ecx", "edx"),
    (0x7, 0): ("ebx", "ecx", "edx"),
    (0x7, 1): ("eax",),
    (0xD, 0): ("eax", "edx"),
    (0xD, 1): ("eax",),
    (0x80000001, 0): ("ecx", "edx"),
}
# State of the moment, not features: OSXSAVE and OSPKE mirror CR4.
_NAMED_MAX = 64
_IGNORED = {(0x1, 0, "ecx"): 1 << 27, (0x7, 0, "ecx"): 1 << 4}


def check_cpuid_supported(wanted: Sequence[types.CpuidEntry], supported: Sequence[types.CpuidEntry]) -> None:
    """Whether every feature bit of a guest's CPUID table exists here.

    Raises:
        MissingFeatureError: names the bits that do not.
    """
    here = {(entry.function, entry.index): entry for entry in supported}
    missing = []
    for entry in wanted:
        key = (entry.function, entry.index)
        for register in _FEATURE_REGISTERS.get(key, ()):
            have = getattr(here[key], register) if key in here else 0
            lacking = getattr(entry, register) & ~have & ~_IGNORED.get((*key, register), 0)
            missing += [f"{key[0]:#x}.{key[1]}:{register}[{bit}]" for bit in range(32) if lacking >> bit & 1]
    if missing:
        more = f" and {len(missing) - _NAMED_MAX} more" if len(missing) > _NAMED_MAX else ""
        raise MissingFeatureError(
            f"the destination's vCPUs lack features that the guest uses: CPUID {', '.join(missing[:_NAMED_MAX])}{more}",
            remedy="migrate to a host with the same or a newer CPU",
        )
