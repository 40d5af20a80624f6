"""Says at the end how much the fuzzers did, where fuzzing was asked for."""

import pytest

from tests.conftest import SAID_AT_THE_END
from tests.fuzz.fuzzing import FUZZ_S, done


@pytest.fixture(autouse=True)
def _say_what_was_done(record_property):
    yield
    while done:
        name, examples, took_s = done.pop(0)
        if FUZZ_S:
            record_property(SAID_AT_THE_END, f"fuzz: {name}: {examples:,} examples in {took_s:.0f} s")
