"""Fuzzers in Python: hypothesis for a few examples in every run of the tests, and for as long as --fuzz says.

A fuzzer is a test function. One that is parametrized has its time for all its parameters together.
"""

import faulthandler
import os
import time

from hypothesis import HealthCheck, example, given, settings

FUZZ_S = float(os.environ.get("MIGRATE_FUZZ_SECONDS", "0"))
# What is found takes hypothesis up to five minutes to make small.
LIMIT_S = 180 + int(2 * FUZZ_S) + (300 if FUZZ_S else 0)
EXAMPLES = 60
_EXAMPLES_AT_A_TIME = 5000

# What the test that runs has done, if fuzzing was asked for: its name, examples, seconds.
done = []


class _Fuzzer:
    """A target that counts, and that does nothing any more once its time is up, unless it has found something."""

    def __init__(self, target, until_s):
        self._target = target
        self._until_s = until_s
        self._is_found = False
        self.count = 0

    @property
    def left_s(self):
        return self._until_s - time.monotonic()

    def __call__(self, value):
        if FUZZ_S and self.left_s <= 0 and not self._is_found:
            return
        self.count += 1
        try:
            self._target(value)
        except BaseException:
            self._is_found = True
            raise


def _attempt(fuzzer, strategy, found, count):
    def attempt(value):
        fuzzer(value)

    for value in found:
        attempt = example(value)(attempt)
    settings(
        max_examples=count,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=False,
        print_blob=True,
    )(given(strategy)(attempt))()


def fuzz(target, strategy, *, examples=EXAMPLES, found=(), shares=1):
    """Call a target with what a strategy draws: a few examples, or, where fuzzing is asked for, until time is up.

    Args:
        target: Takes one value.
        strategy: Draws the values, others in every run.
        examples: How many are a few.
        found: Values that found something once; they come first.
        shares: How many calls like this one the fuzzer's time is for.
    """
    began_s = time.monotonic()
    fuzzer = _Fuzzer(target, began_s + FUZZ_S / shares)

    if FUZZ_S:
        faulthandler.cancel_dump_traceback_later()  # it takes longer than a test should
    count = examples
    while True:
        _attempt(fuzzer, strategy, found, count)
        left_s = fuzzer.left_s
        if not FUZZ_S or left_s <= 0:
            break
        # What is drawn when time is up is in vain.
        rate_per_s = fuzzer.count / (time.monotonic() - began_s)
        count = min(max(int(rate_per_s * left_s), 1), _EXAMPLES_AT_A_TIME)
    if FUZZ_S:
        name = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].removesuffix(" (call)")
        done.append((name, fuzzer.count, time.monotonic() - began_s))
