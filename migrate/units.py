"""The only shifts and masks: pages, bytes and addresses, and the suffixes that people type.

Every quantity in this code base carries its unit in its name; these functions are where one unit becomes another.
"""

import re
from decimal import Decimal

from migrate.errors import ConfigError

PAGE_SHIFT = 12
PAGE_SIZE_BYTES = 1 << PAGE_SHIFT

_BYTE_SUFFIXES = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}
_BIT_SUFFIXES = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9, "Tbit": 10**12}
_DURATION_SUFFIXES_US = {"us": 1, "ms": 10**3, "s": 10**6, "min": 60 * 10**6, "h": 3600 * 10**6}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def bytes_to_pages(count_bytes: int) -> int:
    """Pages that hold count_bytes, the last one perhaps in part."""
    return (count_bytes + PAGE_SIZE_BYTES - 1) >> PAGE_SHIFT


def pages_to_bytes(count_pages: int) -> int:
    """Bytes of count_pages whole pages."""
    return count_pages << PAGE_SHIFT


def is_page_aligned(offset_bytes: int) -> bool:
    """Whether an offset, address or length is a whole number of pages."""
    return offset_bytes & (PAGE_SIZE_BYTES - 1) == 0


def parse_size_bytes(text: str) -> int:
    """Read a size such as `512MiB`, `1GiB` or `4096`.

    Raises:
        ConfigError: not a size.
    """
    return _parse(text, _BYTE_SUFFIXES, "a size such as 512MiB or 1GiB")


def parse_rate_bytes_per_s(text: str) -> int:
    """Read a rate such as `1Gbit`, `100MB` or `40MiB`, each a second, as bytes a second.

    Raises:
        ConfigError: not a rate.
    """
    bare = text.strip().removesuffix("/s")
    for suffix in _BIT_SUFFIXES:
        if bare.endswith(suffix):
            return _parse(bare, _BIT_SUFFIXES, "a rate such as 1Gbit or 100MiB") // 8
    return _parse(bare, _BYTE_SUFFIXES, "a rate such as 1Gbit or 100MiB")


def parse_duration_us(text: str) -> int:
    """Read a duration such as `50ms` or `3s`, as microseconds.

    Raises:
        ConfigError: not a duration.
    """
    return _parse(text, _DURATION_SUFFIXES_US, "a duration such as 50ms or 3s")


def format_bytes(count_bytes: float) -> str:
    """Write a size for people: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        digits = 0 if unit == "B" else 1
        if abs(round(count_bytes, digits)) < 1 << 10:
            return f"{count_bytes:.{digits}f} {unit}"
        count_bytes /= 1 << 10
    return f"{count_bytes:.1f} TiB"


def format_duration_us(duration_us: float) -> str:
    """Write a duration for people: `85 µs`, `4.2 ms`, `1.31 s`."""
    if duration_us < 10**3:
        return f"{duration_us:.0f} µs"
    if duration_us < 10**6:
        return f"{duration_us / 10**3:.1f} ms"
    return f"{duration_us / 10**6:.2f} s"


def _parse(text: str, suffixes: dict[str, int], expected: str) -> int:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2] not in suffixes:
        raise ConfigError(f"{text!r} is not {expected}")
    return int(Decimal(match[1]) * suffixes[match[2]])
