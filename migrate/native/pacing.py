"""How much the background asks for, and when: the receiver-driven window, and the cap of --max-bandwidth."""

from typing import Any

from migrate.native._native import ffi, lib


class Cap:
    """Spreads bytes over time; what was not used in the last 20 ms is lost, so no burst follows a pause.

    Args:
        bytes_per_s: The cap; 0 is none.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self._cap: Any = ffi.new("struct mig_cap *", {"bytes_per_s": bytes_per_s})

    def delay_us(self, now_us: int, count_bytes: int) -> int:
        """Microseconds to wait before count_bytes may be asked for; counts them as asked for."""
        delay_us: int = lib.mig_cap_delay_us(self._cap, now_us, count_bytes)
        return delay_us


class Window:
    """The background's bytes in flight, as a function of what is measured. The native fetch runs the same code.

    Args:
        now_ns: The time at the beginning.
        base_rtt_ns: The round trip before the background begins; 0 if it is not known.
    """

    def __init__(self, now_ns: int, base_rtt_ns: int) -> None:
        self._window: Any = ffi.new("struct mig_window *")
        lib.mig_window_init(self._window, now_ns, base_rtt_ns)

    def on_delivery(self, count_bytes: int) -> None:
        """Background bytes arrived."""
        lib.mig_window_on_delivery(self._window, count_bytes)

    def is_due(self, now_ns: int, rtt_count: int) -> bool:
        """Whether an epoch with so many urgent round trips is over."""
        return bool(lib.mig_window_is_due(self._window, now_ns, rtt_count))

    def tick(self, now_ns: int, rtt_count: int, smallest_rtt_ns: int) -> None:
        """An epoch is over: take in how many urgent round trips it had, and the smallest."""
        rtts = ffi.new("struct mig_rtts *", {"count": rtt_count, "smallest_ns": smallest_rtt_ns})
        lib.mig_window_tick(self._window, now_ns, rtts[0])

    @property
    def count_bytes(self) -> int:
        """How much may be in flight."""
        count_bytes: int = self._window.bytes
        return count_bytes

    @property
    def kept_bytes(self) -> int:
        """Ask for more only while no more than this is in flight."""
        kept_bytes: int = self._window.kept_bytes
        return kept_bytes

    @property
    def run_pages(self) -> int:
        """How much to ask for at a time."""
        run_pages: int = self._window.run_pages
        return run_pages

    @property
    def queue_ns(self) -> int:
        """How long an urgent page waits behind the background, as far as that can be told."""
        queue_ns: int = self._window.queue_ns
        return queue_ns
