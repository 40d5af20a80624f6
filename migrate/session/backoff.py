"""Pauses between tries: longer each time, and never the same for two who lost the same thing at the same moment."""

import random

RETRY_FIRST_S = 0.1
RETRY_MAX_S = 2.0
_FACTOR = 2.0


class Backoff:
    """Pauses of one thing that is tried again. Not thread-safe.

    Args:
        first_s: The first pause is at most this long.
        max_s: And none is longer than this.
        rng: Draws the jitter: each pause is drawn from its upper half.
    """

    def __init__(self, first_s: float, max_s: float, rng: random.Random) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._rng = rng
        self._next_s = first_s

    def next_s(self) -> float:
        """How long to pause now."""
        pause_s, self._next_s = self._next_s, min(self._next_s * _FACTOR, self._max_s)
        return self._rng.uniform(pause_s / 2, pause_s)

    def reset(self) -> None:
        """It worked: the next pause is a first one."""
        self._next_s = self._first_s


def between_tries() -> Backoff:
    """Pauses of whoever tries to reach a peer again."""
    return Backoff(RETRY_FIRST_S, RETRY_MAX_S, random.Random())  # noqa: S311 - jitter, no secret
