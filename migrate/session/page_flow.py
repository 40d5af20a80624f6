"""The pages of one incoming guest: its pager, which knows what is missing, and the fetcher that feeds it now.

A fetcher ends for good when its link does; the pager, and with it every fault that waits, lives on, and another fetcher
takes over.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from migrate.config import Endpoint
from migrate.errors import ChannelError, MigrateError
from migrate.native.pager import FaultBatch, FaultNotes, Pager, PagerCounters, PagerStoppedError
from migrate.pager.fetcher import Fetcher, FetchTerms
from migrate.telemetry.clock import Clock

FetcherOf = Callable[[int, FetchTerms, Clock, Callable[[MigrateError], None]], Fetcher]

# Calls that wait in the pager return at once when it is stopped.
_USERS_LEAVE_S = 30.0


class PageFlow:
    """Thread-safe, but for `arm`, `take_over` and `close`.

    Args:
        transport: A migrate.v1.PageTransport.
        terms: What is fetched, and from where at first.
        clock: Times pacing.
        fetcher_of: Makes a fetcher.
        on_failure: Told, once for each fetcher, why pages have stopped coming.
    """

    def __init__(
        self,
        transport: int,
        terms: FetchTerms,
        clock: Clock,
        fetcher_of: FetcherOf,
        on_failure: Callable[[MigrateError], None],
    ) -> None:
        self._transport = transport
        self._terms = terms
        self._clock = clock
        self._fetcher_of = fetcher_of
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._users = 0  # calls that wait in the pager
        self._pager: Pager | None = None
        self._past_wire_bytes = 0
        self._number = 0
        self._is_fetching = False
        self._failure: MigrateError | None = None
        self._fetcher = self._make_fetcher(terms)

    def arm(self, pager: Pager) -> None:
        """These pages are missing; the pager is ours from now on."""
        with self._changed:
            self._pager = pager

    @property
    def is_armed(self) -> bool:
        """Whether there is a pager."""
        return self._pager is not None

    @property
    def failure(self) -> MigrateError | None:
        """Why pages do not come now; None if they do."""
        return self._failure

    def connect(self) -> None:
        """Open the connections.

        Raises:
            ChannelError: the source's page service cannot be reached.
        """
        self._fetcher.connect()

    def fetch(self) -> None:
        """Begin to ask for what is missing, or look again if that has begun."""
        with self.using() as pager:
            if pager is None:
                return
            if self._is_fetching:
                self._fetcher.wake()
            else:
                self._is_fetching = True
                self._fetcher.start(pager)

    def suggest(self, runs: Sequence[tuple[int, int]], hold_us: int) -> None:
        """Have these runs asked for next, and all else kept back for a while (Pager.suggest).

        Raises:
            PagerStoppedError: the pager is closed.
        """
        with self.using_running() as pager:
            pager.suggest(runs, hold_us)
            with self._changed:  # so that it is the fetcher of now, which is not closed meanwhile
                if self._is_fetching:
                    self._fetcher.wake()

    def wait_faults(self, timeout_us: int) -> FaultNotes:
        """Wait for faults, for a policy (Pager.wait_faults).

        Raises:
            PagerStoppedError: the pager is stopped or closed, or nothing is missing.
        """
        with self.using_running() as pager:
            return pager.wait_faults(timeout_us)

    def take_over(self, endpoint: Endpoint) -> None:
        """Have a new fetcher ask for everything that has not come, from where the pages are served now.

        Raises:
            MigrateError: it cannot; the old one, if its faults are still served, serves on.
        """
        terms = replace(self._terms, endpoint=endpoint)
        before, fetcher = self._fetcher, self._make_fetcher(terms)
        try:
            fetcher.connect()
        except MigrateError:
            fetcher.close()
            raise
        with self.using() as pager:
            if pager is None:
                fetcher.close()
                raise ChannelError("the pager is closed")
            with self._changed:  # nobody reads a fetcher's figures while it is closed
                self._past_wire_bytes += before.wire_bytes
                self._terms, self._fetcher = terms, fetcher
            before.close()
            self._failure = None
            pager.ask_again()
            self._is_fetching = True
            fetcher.start(pager)

    def join(self) -> None:
        """Wait until the page calls have ended by themselves, as they do once no page is missing."""
        if self._is_fetching:
            self._fetcher.join()

    @contextlib.contextmanager
    def using(self) -> Iterator[Pager | None]:
        """A scope in which the pager is not closed; None if it has been."""
        with self._changed:
            pager = self._pager
            self._users += pager is not None
        try:
            yield pager
        finally:
            if pager is not None:
                with self._changed:
                    self._users -= 1
                    self._changed.notify_all()

    @contextlib.contextmanager
    def using_running(self) -> Iterator[Pager]:
        """The same, for those who have nothing to do without a pager.

        Raises:
            PagerStoppedError: there is none any more.
        """
        with self.using() as pager:
            if pager is None:
                raise PagerStoppedError
            yield pager

    def counters(self) -> PagerCounters | None:
        """How far the pages are; None if there is no pager any more."""
        with self.using() as pager:
            return None if pager is None else pager.counters()

    def missing_map(self, cells_max: int) -> bytes:
        """Where pages are missing (Pager.missing_map); empty if there is no pager."""
        with self.using() as pager:
            return b"" if pager is None else pager.missing_map(cells_max)

    def copy_map(self, *, known_zero: bool = False) -> bytes:
        """Which pages are missing, or known to be zero (Pager.copy_map); empty if there is no pager."""
        with self.using() as pager:
            return b"" if pager is None else pager.copy_map(known_zero=known_zero)

    def drain_records(self) -> FaultBatch:
        """Faults that were served since the last call."""
        with self.using() as pager:
            return FaultBatch(b"") if pager is None else pager.drain_records()

    @property
    def wire_bytes(self) -> int:
        """Bytes of all page calls so far, both ways."""
        with self.using() as pager, self._changed:
            return self._past_wire_bytes + (0 if pager is None else self._fetcher.wire_bytes)

    def stop(self) -> None:
        """Every call that waits in the pager returns."""
        with self.using() as pager:
            if pager is not None:
                pager.stop()

    def close(self) -> None:
        """Stop, close the connections, free the pager. Idempotent."""
        self.stop()
        with self._changed:
            pager, self._pager = self._pager, None
            self._changed.wait_for(lambda: not self._users, _USERS_LEAVE_S)
        self._fetcher.close()
        if pager is not None:
            pager.close()

    def _make_fetcher(self, terms: FetchTerms) -> Fetcher:
        self._number += 1
        number = self._number
        return self._fetcher_of(self._transport, terms, self._clock, lambda error: self._note_failure(number, error))

    def _note_failure(self, number: int, error: MigrateError) -> None:
        if number == self._number:
            self._failure = error
            self._on_failure(error)
