"""A guest's own histogram of its stalls, read out of its process: finer than what it says of itself."""

import re
from pathlib import Path

from migrate.native._native import ffi
from migrate.native.machine import MAILBOX_BYTES
from migrate.telemetry.histogram import bucket_midpoint_ticks

# Memory that the process made for itself and its threads, which is nobody's file.
_SHARED = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-s .* /dev/zero \(deleted\)")


def stalls_us(pid, vcpus, max_us):
    """Every stall of all vCPUs since the switchover as a list of {microseconds: count}, one a vCPU.

    The rate of the TSC follows from the longest stall, which the guest gave as `max_us`.
    """
    boxes = _read(pid, vcpus)
    ticks_per_us = max(box.stall_max_ticks for box in boxes) / max_us
    return [
        {
            bucket_midpoint_ticks(bucket) / ticks_per_us: count
            for bucket, count in enumerate(box.stall_histogram)
            if count
        }
        for box in boxes
    ]


def _read(pid, vcpus):
    wanted_bytes = vcpus * MAILBOX_BYTES
    for first, end in _SHARED.findall(Path(f"/proc/{pid}/maps").read_text()):
        hva = int(first, 16)
        if int(end, 16) - hva == wanted_bytes:
            with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(hva)
                data = memory.read(wanted_bytes)
            boxes = ffi.new("struct mig_mailbox[]", vcpus)
            ffi.memmove(boxes, data, wanted_bytes)
            return boxes
    raise AssertionError(f"process {pid} has no mailboxes of {vcpus} vCPUs")
