"""Conversions and suffixes, example by example."""

import pytest

from migrate import units
from migrate.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1B", 1),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1K", 1024),
        ("512MiB", 512 << 20),
        ("512 MiB", 512 << 20),
        (" 1GiB ", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("0.1MB", 100_000),
        ("2TiB", 2 << 40),
    ],
)
def test_parse_size(text, count_bytes):
    assert units.parse_size_bytes(text) == count_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "1gib", "1GiB/s", "1 2", "0x10", "1Gbit", "nan", "1,5GiB"])
def test_parse_size_invalid(text):
    with pytest.raises(ConfigError, match="a size such as"):
        units.parse_size_bytes(text)


@pytest.mark.parametrize(
    ("text", "rate_bytes_per_s"),
    [
        ("1Gbit", 125_000_000),
        ("1Gbit/s", 125_000_000),
        ("10 Mbit", 1_250_000),
        ("8bit", 1),
        ("100MB", 100_000_000),
        ("40MiB/s", 40 << 20),
        ("0", 0),
    ],
)
def test_parse_rate(text, rate_bytes_per_s):
    assert units.parse_rate_bytes_per_s(text) == rate_bytes_per_s


@pytest.mark.parametrize("text", ["", "fast", "1Gbps", "-1Mbit", "1 s"])
def test_parse_rate_invalid(text):
    with pytest.raises(ConfigError, match="a rate such as"):
        units.parse_rate_bytes_per_s(text)


@pytest.mark.parametrize(
    ("text", "duration_us"),
    [("50ms", 50_000), ("3s", 3_000_000), ("1.5us", 1), ("2min", 120_000_000), ("1h", 3600 * 10**6)],
)
def test_parse_duration(text, duration_us):
    assert units.parse_duration_us(text) == duration_us


@pytest.mark.parametrize("text", ["", "3", "3 parsecs", "-1s"])
def test_parse_duration_invalid(text):
    with pytest.raises(ConfigError, match="a duration such as"):
        units.parse_duration_us(text)


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        ((1 << 30) - 4096, "1.0 GiB"),
        ((1 << 30) - (60 << 10), "1023.9 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_format_bytes(count_bytes, text):
    assert units.format_bytes(count_bytes) == text


@pytest.mark.parametrize(
    ("duration_us", "text"),
    [(0, "0 µs"), (85.4, "85 µs"), (4200, "4.2 ms"), (1_310_000, "1.31 s"), (10**9, "1000.00 s")],
)
def test_format_duration(duration_us, text):
    assert units.format_duration_us(duration_us) == text


def test_page_conversions():
    assert [units.bytes_to_pages(count) for count in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
    assert units.pages_to_bytes(3) == 12288
    assert units.is_page_aligned(8192)
    assert not units.is_page_aligned(8193)
