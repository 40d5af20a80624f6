"""Fuzzers in Python: hypothesis for a few seconds in every run of the tests, and for as long as --fuzz says."""

import faulthandler
import os
import time

from hypothesis import HealthCheck, given, settings

FUZZ_S = float(os.environ.get("MIGRATE_FUZZ_SECONDS", "0"))
EXAMPLES = 60


def fuzz(target, strategy, *, examples=EXAMPLES):
    """Call a target with what a strategy draws: so many examples, or, where fuzzing is asked for, until time is up."""
    attempt = settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )(given(strategy)(target))
    if FUZZ_S:
        faulthandler.cancel_dump_traceback_later()  # it takes longer than a test should
    until_s = time.monotonic() + FUZZ_S
    attempt()
    while time.monotonic() < until_s:
        attempt()
