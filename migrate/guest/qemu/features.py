"""What QEMU lets its vCPUs do: it does not compare that itself, and runs a guest whose features are gone."""

from typing import Any

from migrate.errors import QemuError
from migrate.guest.qemu.qmp import Qmp
from migrate.v1 import types_pb2 as types

_REGISTERS = {"EAX": "eax", "EBX": "ebx", "ECX": "ecx", "EDX": "edx"}


def cpuid_of(qmp: Qmp) -> list[types.CpuidEntry]:
    """The features of the first vCPU, which all have, as rows of a CPUID table (property feature-words)."""
    path = qmp.call("query-cpus-fast")[0]["qom-path"]
    try:
        words = qmp.call("qom-get", path=path, property="feature-words")
    except QemuError:
        return []  # a machine without such a thing
    rows: dict[tuple[int, int], types.CpuidEntry] = {}
    for word in words:
        key = (int(word["cpuid-input-eax"]), int(word.get("cpuid-input-ecx", 0)))
        row = rows.setdefault(key, types.CpuidEntry(function=key[0], index=key[1]))
        setattr(row, _register_of(word), int(word["features"]))
    return list(rows.values())


def _register_of(word: dict[str, Any]) -> str:
    return _REGISTERS[str(word["cpuid-register"])]
