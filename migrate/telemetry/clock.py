"""The clock, injected wherever time is measured, so that tests can hold it."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    """Monotonic time in microseconds."""

    now_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000
