"""The trace of a migration on its way: gathered at the destination, handed over to the source, and read there.

Nothing here is in the way of a fault or of a page: what cannot be kept or handed over is counted as lost, and the
migration goes on.
"""

import contextlib
import threading
import zlib
from collections import deque

from migrate.errors import ChannelError, MigrateError
from migrate.native.pager import RECORD_BYTES, FaultBatch, PagerCounters
from migrate.session.figures import page_counts
from migrate.session.ports import PeerPort
from migrate.session.states import State
from migrate.telemetry.clock import Clock
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

KEPT_BYTES_MAX = 64 << 20
"""Of faults that nobody has taken: a million of them."""

# What is handed over at once is less than a call may be (daemon/limits.py).
_PART_BYTES_MAX = (1 << 20) // RECORD_BYTES * RECORD_BYTES
_BITMAP_BYTES_MAX = 256 << 10
_HAND_OVER_US = 1_000_000
_SAMPLE_US = 100_000
_SAMPLES_MAX = 2048
_UNREAD_US = 60_000_000


class TraceFeed:
    """What the destination has seen and not handed over yet. Thread-safe.

    Args:
        migration_id: Of what is traced.
        token: Proves to the source that we are its destination.
        clock: Times it.
    """

    def __init__(self, migration_id: str, token: str, clock: Clock) -> None:
        self._migration_id = migration_id
        self._token = token
        self._clock = clock
        self._lock = threading.Lock()
        self._origin_us = self._handed_over_us = clock.now_us()
        self._faults = bytearray()
        self._bitmaps: dict[str, bytes] = {}
        self._rest = types.TracePart(origin_ns=self._origin_us * 1000)
        self._sampled_us, self._sampled_missing_pages = 0, -1
        self._sample_us = _SAMPLE_US
        self._is_refused = False

    def add_faults(self, batch: FaultBatch) -> None:
        """Faults that were served."""
        raw = batch.raw
        with self._lock:
            if len(self._faults) + len(raw) > KEPT_BYTES_MAX:
                self._rest.lost_faults += len(batch)
            else:
                self._faults += raw

    def add_state(self, state: State) -> None:
        """The destination has come to it."""
        with self._lock:
            self._rest.states.add(at_ns=self._clock.now_us() * 1000, state=types.MigrationState.ValueType(state.value))

    def wants_sample(self, missing_pages: int) -> bool:
        """Whether the last one is old enough, or nothing is missing since. Of what has not changed, there is one."""
        if not missing_pages:
            return self._sampled_missing_pages != 0
        return self._clock.now_us() - self._sampled_us >= self._sample_us

    def add_sample(self, counters: PagerCounters, missing_map: bytes, wire_bytes: int) -> None:
        """How far the pages are now."""
        with self._lock:
            self._sampled_us, self._sampled_missing_pages = self._clock.now_us(), counters.missing_pages
            self._rest.progress.add(
                at_ns=self._sampled_us * 1000,
                pages=page_counts(counters),
                missing_pages=counters.missing_pages,
                missing_map=missing_map,
                bytes_on_wire=wire_bytes,
            )
            if len(self._rest.progress) >= _SAMPLES_MAX:
                # A precopy that takes its time: half as many from now on, and of those before.
                del self._rest.progress[::2]
                self._sample_us *= 2

    def add_threads(self, vcpu_thread_ids: list[int]) -> None:
        """Who runs the vCPUs."""
        with self._lock:
            self._rest.vcpu_thread_ids.extend(vcpu_thread_ids)

    def add_bitmap(self, name: str, bitmap: bytes) -> None:
        """A set of pages, a bit for each: the field of TracePart that it goes to, once there is time to compress it."""
        with self._lock:
            self._bitmaps[name] = bitmap

    def add_stalls(self, statistics: types.GuestStatistics) -> None:
        """What the guest counted."""
        with self._lock:
            self._rest.stalls.extend(statistics.stalls)

    @property
    def is_due(self) -> bool:
        """Whether what is kept has been gathered for a second, up to the last sample."""
        return self._sampled_us - self._handed_over_us >= _HAND_OVER_US

    def hand_over_now_and_then(self, peer: PeerPort) -> None:
        """As hand_over, if that is due; what does not arrive is kept for the next time."""
        if not self.is_due:
            return
        with contextlib.suppress(ChannelError):
            self.hand_over(peer)
        self._handed_over_us = self._clock.now_us()

    def hand_over(self, peer: PeerPort, *, is_last: bool = False) -> None:
        """Give the source all there is now. One that does not want it is asked no more.

        Raises:
            ChannelError: it cannot be reached now.
        """
        parts = list(iter(self._next_part, None))
        if is_last:
            parts.append(types.TracePart(is_last=True))
        while parts and not self._is_refused:
            try:
                peer.record_trace(
                    transfer.RecordTraceRequest(migration_id=self._migration_id, token=self._token, part=parts[0])
                )
            except ChannelError:
                self._take_back(parts)
                raise
            except MigrateError:
                self._is_refused = True
            parts.pop(0)

    def _next_part(self) -> types.TracePart | None:
        with self._lock:
            for name, bitmap in self._bitmaps.items():
                compressed = zlib.compress(bitmap, level=1)
                if len(compressed) < _BITMAP_BYTES_MAX:  # a terabyte of RAM may have more
                    setattr(self._rest, name, compressed)
            self._bitmaps.clear()
            if not self._faults and self._rest == types.TracePart():
                return None
            part, self._rest = self._rest, types.TracePart()
            part.faults = bytes(self._faults[:_PART_BYTES_MAX])
            del self._faults[:_PART_BYTES_MAX]
            return part

    def _take_back(self, parts: list[types.TracePart]) -> None:
        with self._lock:
            for part in reversed(parts):
                self._faults[:0] = part.faults
                part.ClearField("faults")
                part.ClearField("is_last")
                part.MergeFrom(self._rest)
                self._rest = part


class TraceInbox:
    """What has come to the source and was not read yet. Thread-safe; there is one reader.

    Args:
        clock: Says how long nobody has read.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._used_us = clock.now_us()
        self._changed = threading.Condition()
        self._parts: deque[types.TracePart] = deque()
        self._kept_bytes = 0
        self._lost_faults = 0
        self._is_whole = False

    def add(self, part: types.TracePart) -> None:
        """The next part, if there is room for it."""
        with self._changed:
            self._used_us = self._clock.now_us()
            if self._is_whole:
                return
            count_bytes = part.ByteSize()
            if self._kept_bytes + count_bytes <= KEPT_BYTES_MAX:
                self._kept_bytes += count_bytes
                self._parts.append(part)
            else:
                self._lost_faults += len(part.faults) // RECORD_BYTES
            self._is_whole = part.is_last
            self._changed.notify_all()

    def take(self, timeout_s: float) -> types.TracePart | None:
        """The next part, which is forgotten here; None if none comes in time, or at all."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._is_whole, timeout_s)
            if not self._parts:
                return None
            self._used_us = self._clock.now_us()
            part = self._parts.popleft()
            self._kept_bytes -= part.ByteSize()
            part.lost_faults += self._lost_faults
            self._lost_faults = 0
            return part

    def forget_unread(self) -> None:
        """Nothing will come any more: what nobody has wanted for a minute is lost."""
        with self._changed:
            if self._clock.now_us() - self._used_us > _UNREAD_US:
                self._lost_faults += sum(len(part.faults) for part in self._parts) // RECORD_BYTES
                self._parts.clear()
                self._kept_bytes = 0

    @property
    def is_read(self) -> bool:
        """Whether all of it has come, and was taken."""
        with self._changed:
            return self._is_whole and not self._parts
