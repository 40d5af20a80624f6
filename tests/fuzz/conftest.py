"""Says at the end how much the fuzzers did, where fuzzing was asked for."""

import pytest

from tests.fuzz.fuzzing import done


@pytest.fixture(autouse=True)
def _say_what_was_done(say_at_the_end):
    yield
    for name, examples, took_s in done:
        say_at_the_end(f"fuzz: {name}: {examples:,} examples in {took_s:.0f} s")
    done.clear()
