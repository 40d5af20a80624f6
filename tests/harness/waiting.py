"""Waiting for a thing, never for a time."""

import time

import pytest

_PAUSE_MIN_S, _PAUSE_MAX_S = 0.002, 0.01


def wait_until(predicate, deadline_s, what):
    """Look at a predicate until it holds; fail with `what` was awaited if it never does."""
    began = time.monotonic()
    while not (value := predicate()):
        waited_s = time.monotonic() - began
        if waited_s > deadline_s:
            pytest.fail(f"waited {deadline_s} s in vain for {what}")
        # Most predicates ask a daemon, and what is waited for needs its CPU, too.
        time.sleep(min(max(waited_s / 20, _PAUSE_MIN_S), _PAUSE_MAX_S))
    return value
