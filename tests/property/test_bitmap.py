"""The C bitmap against a Python set."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from migrate.native._native import ffi, lib


class BitmapMachine(RuleBasedStateMachine):
    """Every operation on both; they never differ."""

    @initialize(bits=st.integers(1, 300))
    def create(self, bits):
        self.bits = bits
        self.bitmap = ffi.new("struct mig_bitmap *")
        assert lib.mig_bitmap_init(self.bitmap, bits) == 0
        self.model = set()

    @rule(data=st.data())
    def set_range(self, data):
        first, count = self.draw_range(data)
        new = set(range(first, first + count)) - self.model
        assert lib.mig_bitmap_set_range(self.bitmap, first, count) == len(new)
        self.model |= new

    @rule(data=st.data())
    def clear_range(self, data):
        first, count = self.draw_range(data)
        gone = set(range(first, first + count)) & self.model
        assert lib.mig_bitmap_clear_range(self.bitmap, first, count) == len(gone)
        self.model -= gone

    @rule(data=st.data())
    def find(self, data):
        start = data.draw(st.integers(0, self.bits + 70))
        expected_set = min((b for b in self.model if b >= start), default=self.bits)
        expected_clear = min((b for b in range(start, self.bits) if b not in self.model), default=self.bits)
        assert lib.mig_bitmap_next_set(self.bitmap, start) == expected_set
        assert lib.mig_bitmap_next_clear(self.bitmap, start) == expected_clear

    @rule(data=st.data())
    def count(self, data):
        first, count = self.draw_range(data)
        assert lib.mig_bitmap_count(self.bitmap, first, count) == len(self.model & set(range(first, first + count)))

    def draw_range(self, data):
        first = data.draw(st.integers(0, self.bits - 1))
        return first, data.draw(st.integers(0, self.bits - first))

    @precondition(lambda self: hasattr(self, "bitmap"))
    @invariant()
    def same(self):
        found, bit = set(), lib.mig_bitmap_next_set(self.bitmap, 0)
        while bit < self.bits:
            found.add(bit)
            bit = lib.mig_bitmap_next_set(self.bitmap, bit + 1)
        assert found == self.model

    def teardown(self):
        if hasattr(self, "bitmap"):
            lib.mig_bitmap_deinit(self.bitmap)


TestBitmap = BitmapMachine.TestCase


def test_empty_range_changes_nothing():
    bitmap = ffi.new("struct mig_bitmap *")
    assert lib.mig_bitmap_init(bitmap, 64) == 0
    assert lib.mig_bitmap_set_range(bitmap, 10, 0) == 0
    assert lib.mig_bitmap_next_set(bitmap, 0) == 64
    lib.mig_bitmap_deinit(bitmap)


@pytest.mark.parametrize("bits", [1, 63, 64, 65, 128])
def test_last_bit_is_found(bits):
    bitmap = ffi.new("struct mig_bitmap *")
    assert lib.mig_bitmap_init(bitmap, bits) == 0
    lib.mig_bitmap_set_range(bitmap, bits - 1, 1)
    assert lib.mig_bitmap_next_set(bitmap, 0) == bits - 1
    lib.mig_bitmap_deinit(bitmap)
