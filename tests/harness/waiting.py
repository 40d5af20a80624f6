"""Waiting for a thing, never for a time."""

import time

import pytest


def wait_until(predicate, deadline_s, what):
    """Look at a predicate until it holds; fail with `what` was awaited if it never does."""
    deadline = time.monotonic() + deadline_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {deadline_s} s in vain for {what}")
        time.sleep(0.002)
    return value
