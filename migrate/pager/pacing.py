"""Caps the background: how long to wait so that a rate is not exceeded. Urgent pages never wait."""

from migrate.telemetry.clock import Clock

_BURST_US = 20_000


class Pacer:
    """Spreads bytes over time; what was not used in the last 20 ms is lost, so no burst follows a pause.

    Args:
        bytes_per_s: The cap; 0 is none.
        clock: Where the time comes from.
    """

    def __init__(self, bytes_per_s: int, clock: Clock) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at_us = 0

    def delay_s(self, count_bytes: int) -> float:
        """Seconds to wait before count_bytes may be asked for; counts them as asked for."""
        if not self._bytes_per_s:
            return 0.0
        now_us = self._clock.now_us()
        start_us = max(self._free_at_us, now_us - _BURST_US)
        self._free_at_us = start_us + count_bytes * 1_000_000 // self._bytes_per_s
        return max(0, start_us - now_us) / 1_000_000
