"""Caps the background of the grpcio transport, so that a rate is not exceeded. Urgent pages never wait."""

from migrate.native.pacing import Cap
from migrate.telemetry.clock import Clock


class Pacer:
    """Spreads bytes over time.

    Args:
        bytes_per_s: The cap; 0 is none.
        clock: Where the time comes from.
    """

    def __init__(self, bytes_per_s: int, clock: Clock) -> None:
        self._cap = Cap(bytes_per_s)
        self._clock = clock

    def delay_s(self, count_bytes: int) -> float:
        """Seconds to wait before count_bytes may be asked for; counts them as asked for."""
        return self._cap.delay_us(self._clock.now_us(), count_bytes) / 1_000_000
