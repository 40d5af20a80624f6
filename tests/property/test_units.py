"""Conversions and suffixes, for all values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import units
from migrate.errors import ConfigError

ADDRESSABLE = st.integers(0, 2**64 - 1)
SIZE_SUFFIXES = st.sampled_from(["", "B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB", "K", "M", "G", "T"])


@given(ADDRESSABLE)
def test_pages_hold_the_bytes_and_not_a_page_more(count_bytes):
    held_bytes = units.pages_to_bytes(units.bytes_to_pages(count_bytes))

    assert count_bytes <= held_bytes < count_bytes + units.PAGE_SIZE_BYTES


@given(ADDRESSABLE)
def test_aligned_means_that_rounding_changes_nothing(offset_bytes):
    rounded_bytes = units.pages_to_bytes(units.bytes_to_pages(offset_bytes))

    assert units.is_page_aligned(offset_bytes) == (rounded_bytes == offset_bytes)


@given(st.integers(0, 2**32), SIZE_SUFFIXES)
def test_sizes_are_exact_multiples_of_their_suffix(count, suffix):
    assert units.parse_size_bytes(f"{count}{suffix}") == count * units.parse_size_bytes(f"1{suffix}")


@given(st.integers(0, 2**50))
def test_bit_rates_are_an_eighth(rate_bits_per_s):
    assert units.parse_rate_bytes_per_s(f"{rate_bits_per_s}bit") == rate_bits_per_s // 8


@given(st.text())
def test_parsers_answer_or_refuse(text):
    for parse in (units.parse_size_bytes, units.parse_rate_bytes_per_s, units.parse_duration_us):
        try:
            count = parse(text)
        except ConfigError:
            continue
        assert count >= 0


@given(st.integers(0, 2**63))
def test_formatted_sizes_are_close(count_bytes):
    number, suffix = units.format_bytes(count_bytes).split(" ")

    assert float(number) * units.parse_size_bytes(f"1{suffix}") == pytest.approx(count_bytes, rel=0.06)
