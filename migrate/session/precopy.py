"""The source's side of a precopy: rounds of the dirty log, until it is time to switch over.

A round takes the log out of the guest, raises the generation under which pages are served, and only then tells the
destination which pages are stale. So whatever is served in the new generation was read after the log was taken, and
has every write that the log noted.

Where stale pages are left for postcopy (mode hybrid), the log is looked at during the pass, too: what the guest has
written already, it writes again, and need not be sent before it is there. Such pages stay in the log, so that each
costs the guest one write fault and no more.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

from migrate.errors import AttemptLostError, ChannelError, MigrateError, MigrationAbortedError, error_class
from migrate.native.exports import Exports
from migrate.session.convergence import Next, Round, Terms, next_step
from migrate.session.live import Live
from migrate.session.ports import GuestPort, PeerPort
from migrate.telemetry.clock import Clock
from migrate.units import pages_to_bytes
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_AWAIT_US = 100_000
_AWAIT_LOOKING_US = 50_000
# A block of the bitmap without a bit is left out; what is left of others goes without its zeros.
_BLOCK_BYTES = 4096
_NO_PAGES = bytes(_BLOCK_BYTES)
# Well below what gRPC takes in a message.
_REQUEST_BYTES_MAX = 1 << 20
# Fewer than this say little about a link.
_BANDWIDTH_SAMPLE_PAGES = 1024


class Precopy:
    """One guest's rounds. Not thread-safe: the session's thread owns it.

    Args:
        migration_id: Names the migration.
        attempt: And the try.
        peer_timeout_us: A destination that is silent for so long is lost.
        guest: Which keeps the log.
        peer: The destination.
        exports: Where its pages are published, under the same id.
        clock: Times the rounds.
        terms: What the operator asked for.
        live: Of the migration.
    """

    def __init__(
        self,
        migration_id: str,
        attempt: int,
        peer_timeout_us: int,
        guest: GuestPort,
        peer: PeerPort,
        exports: Exports,
        clock: Clock,
        terms: Terms,
        live: Live,
    ) -> None:
        self._migration_id = migration_id
        self._attempt = attempt
        self._peer_timeout_us = peer_timeout_us
        self._guest = guest
        self._peer = peer
        self._exports = exports
        self._clock = clock
        self._terms = terms
        self._live = live
        self._defers = terms.mode == types.MIGRATION_MODE_HYBRID
        self._told: dict[int, bytes] = {}  # where pages stay in the log: each block of it, as it was told last
        self._log_memfd: int | None = None
        self._looked_us = clock.now_us()
        self._rounds: list[Round] = []
        self._bandwidth_bytes_per_s = 0.0
        self._kept_pages = 0  # of those that came, what the last look left good
        self.generation = 0

    def begin(self) -> None:
        """Start the log, then the destination's first pass over all pages; they are published already.

        Raises:
            MigrateError: the guest keeps no log, or the destination takes no part.
        """
        self._log_memfd = self._guest.start_dirty_log()
        self._looked_us = self._clock.now_us()
        self._next_generation()
        self._invalidate([], fetch=True)

    def run(self, on_incoming: Callable[[types.Migration | None], None], is_forced: Callable[[], bool]) -> Next:
        """Send rounds until the vCPUs should stop; say how, as SWITCH_WITH_ALL or SWITCH_WITH_REST.

        Args:
            on_incoming: Told, often, how far the destination is, or None if it did not answer, after which it waits a
                little; what it raises ends the precopy.
            is_forced: Whether the switchover shall come at once.

        Raises:
            MigrationAbortedError: it does not converge, or the destination gave up.
            AttemptLostError: the destination is silent, or lost what it had.
        """
        arrived = self._await_complete(on_incoming, is_forced)
        while True:
            began_us = self._looked_us
            stale, dirty_pages = self._look()
            self._rounds.append(Round(dirty_pages, self._looked_us - began_us))
            step = (
                next_step(self._terms, self._rounds, self._bandwidth_bytes_per_s) if arrived else Next.SWITCH_WITH_REST
            )
            if step is Next.GIVE_UP:
                raise MigrationAbortedError(
                    f"the guest writes {self._rounds[-1].dirty_pages_per_s:,.0f} pages a second, faster than they"
                    " move: the rounds of the precopy do not shrink",
                    remedy="allow a longer --downtime-limit, or --on-no-convergence postcopy",
                )
            fetch = step in (Next.ANOTHER_ROUND, Next.SWITCH_WITH_ALL)
            self._invalidate(stale, fetch=fetch)
            self._kept_pages = max(0, self._kept_pages - dirty_pages)
            if fetch:
                arrived = self._await_complete(on_incoming, is_forced)
            elif is_forced():
                arrived = False
            if step is Next.SWITCH_WITH_ALL and arrived:
                return step
            if step is Next.SWITCH_WITH_REST:
                return step

    def last_round(self, *, fetch: bool) -> None:
        """The vCPUs stand still: what they wrote since the last look is the last that can be stale."""
        self._invalidate(self._look()[0], fetch=fetch)

    def end(self, *, guest_stays: bool) -> None:
        """Let go of the log; end it in the guest too, if it stays."""
        if self._log_memfd is None:
            return
        os.close(self._log_memfd)
        self._log_memfd = None
        if guest_stays:
            # A guest that cannot be asked is about to be found dead by others, who say so.
            with contextlib.suppress(MigrateError):
                self._guest.stop_dirty_log()

    # ---- parts ----

    def _next_generation(self) -> None:
        self.generation += 1
        self._exports.set_generation(self._migration_id, self.generation)

    def _look(self) -> tuple[list[transfer.StalePages], int]:
        """Take the log, raise the generation; what has become stale, and how many pages that is."""
        dirty_pages = self._guest.sync_dirty_log(keep=self._defers)
        self._looked_us = self._clock.now_us()
        self._next_generation()
        stale = list(self._stale_pages()) if dirty_pages else []
        if self._defers:
            dirty_pages = sum(int.from_bytes(part.bitmap).bit_count() for part in stale)
        return stale, dirty_pages

    def _stale_pages(self) -> Iterator[transfer.StalePages]:
        if self._log_memfd is None:
            return
        size_bytes = os.fstat(self._log_memfd).st_size
        log = os.pread(self._log_memfd, size_bytes, 0)
        for offset_bytes in range(0, size_bytes, _BLOCK_BYTES):
            block = log[offset_bytes : offset_bytes + _BLOCK_BYTES]
            told = self._told.get(offset_bytes, _NO_PAGES[: len(block)])
            # Nearly all of a large guest's blocks are none of our business, in each round.
            if block == told:
                continue
            if self._defers:
                block = self._untold(block, told, offset_bytes)
            bits = block.lstrip(b"\0")
            if bits:
                first_byte = offset_bytes + len(block) - len(bits)
                yield transfer.StalePages(first_page=first_byte * 8, bitmap=bits.rstrip(b"\0"))

    def _untold(self, block: bytes, told: bytes, offset_bytes: int) -> bytes:
        """A block of the log without the pages that the destination leaves for later already."""
        written, known = int.from_bytes(block), int.from_bytes(told)
        self._told[offset_bytes] = (written | known).to_bytes(len(block))
        return (written & ~known).to_bytes(len(block))

    def _invalidate(self, stale: list[transfer.StalePages], *, fetch: bool) -> None:
        request = transfer.InvalidateRequest(
            migration_id=self._migration_id, generation=self.generation, attempt=self._attempt
        )
        request_bytes = 0
        for part in stale:
            if request_bytes + len(part.bitmap) > _REQUEST_BYTES_MAX:
                self._peer.invalidate(request)
                del request.stale[:]
                request_bytes = 0
            request.stale.append(part)
            request_bytes += len(part.bitmap)
        request.fetch = fetch
        self._peer.invalidate(request)

    def _await_complete(
        self, on_incoming: Callable[[types.Migration | None], None], is_forced: Callable[[], bool]
    ) -> bool:
        """Wait until all that may be fetched by now has arrived; False if the switchover was forced before."""
        begun_us = heard_us = self._clock.now_us()
        await_us = _AWAIT_LOOKING_US if self._defers else _AWAIT_US
        while not is_forced():
            try:
                incoming = self._peer.get_incoming(self._migration_id, await_us, live=self._live.is_watched)
            except ChannelError as error:
                if self._clock.now_us() - heard_us > self._peer_timeout_us:
                    raise AttemptLostError(f"the destination was lost in precopy: {error.message}") from error
                on_incoming(None)
                continue
            heard_us = self._clock.now_us()
            if incoming.state in (types.MIGRATION_STATE_FAILED, types.MIGRATION_STATE_CANCELLED):
                raise gave_up(incoming)
            self._live.hand_on(incoming)
            on_incoming(incoming)
            # Pages, not bytes of the wire: they may be compressed there. Zeros cost nothing, and tell nothing.
            self._measure(incoming.pages.precopy - self._kept_pages, heard_us - begun_us)
            if missing_pages(incoming.pages) == incoming.deferred_pages:
                self._kept_pages = incoming.pages.precopy
                return True
            if self._defers:
                self._invalidate(self._look()[0], fetch=False)
        return False

    def _measure(self, moved_pages: int, duration_us: int) -> None:
        if moved_pages >= _BANDWIDTH_SAMPLE_PAGES or not self._bandwidth_bytes_per_s:
            self._bandwidth_bytes_per_s = pages_to_bytes(max(0, moved_pages)) * 1_000_000 / max(1, duration_us)


def missing_pages(pages: types.PageCounts) -> int:
    """Pages that are not counted yet: each counts once when it arrives."""
    return pages.total - pages.zero - pages.precopy - pages.urgent - pages.background


def gave_up(incoming: types.Migration) -> MigrationAbortedError:
    """The error of a destination that will not run the guest; an AttemptLostError if another try may fare better."""
    cls = AttemptLostError if issubclass(error_class(incoming.error.type), AttemptLostError) else MigrationAbortedError
    return cls(f"the destination gave up: {incoming.error.message}")
