"""Facts about this host that change while it runs."""

from pathlib import Path


def available_bytes() -> int:
    """Memory that can be had without swapping: MemAvailable of /proc/meminfo (Documentation/filesystems/proc.rst)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
