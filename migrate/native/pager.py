"""The destination's data path: fault thread, missing bitmap, placement. All work is done in C with the GIL dropped."""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from migrate.errors import GuestLostError, IntegrityError, RemoteProtocolError, UffdError
from migrate.native._native import ffi, lib
from migrate.native.bitmap import MissingView

_CLAIM_MAX = 256
_DRAIN_MAX = 4096
_EVENT, _PLACED, _KIND = 1, 6, 7
_NOTES_MAX = 1024

RECORD_BYTES: int = ffi.sizeof("struct mig_fault_record")
"""Of a fault, as it lies in C and travels (TracePart.faults)."""
_RECORD_WORDS = RECORD_BYTES // 8

SUGGESTIONS_MAX: int = lib.MIG_ORDER_SUGGESTIONS
"""Runs that a policy may have in the queue."""
HOLD_MAX_US: int = lib.MIG_ORDER_HOLD_US_MAX
"""How long a policy may keep back what it has not named, before it must say so again."""


class PageKind(IntEnum):
    """What brought a page."""

    ZERO = 0
    URGENT = 1
    BACKGROUND = 2
    PRESENT = 3


_PRESENT = PageKind.PRESENT.value


@dataclass(frozen=True, slots=True)
class PagerCounters:
    """How far the pages have come; `missing_pages` of 0 is the end."""

    total_pages: int
    missing_pages: int
    deferred_pages: int
    zero_pages: int
    precopy_pages: int
    urgent_pages: int
    background_pages: int
    duplicate_pages: int
    stale_pages: int
    verified_pages: int
    faults: int
    lost_records: int
    memory_digest: int


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """One fault, stage by stage, in CLOCK_MONOTONIC nanoseconds.

    Attributes:
        page: The missing page.
        event_ns: The kernel's event was read.
        taken_ns: The urgent queue gave it out; 0 if the page had been asked for before, or needed no request.
        sent_ns: The request was written to the socket; 0 likewise.
        read_ns: How long the source took to answer; 0 if it did not say.
        replied_ns: The reply was complete; 0 if none was needed.
        placed_ns: The page was there.
        thread_id: Who faulted.
        kind: What brought the page.
    """

    page: int
    event_ns: int
    taken_ns: int
    sent_ns: int
    read_ns: int
    replied_ns: int
    placed_ns: int
    thread_id: int
    kind: PageKind


class FaultBatch:
    """Fault records as they lie in C, read without making an object of each.

    Args:
        raw: struct mig_fault_record, back to back.
    """

    def __init__(self, raw: bytes) -> None:
        self._words = memoryview(raw).cast("Q")

    def __len__(self) -> int:
        return len(self._words) // _RECORD_WORDS

    @property
    def raw(self) -> bytes:
        """The records as they lie in C, which is how they travel (TracePart.faults)."""
        return self._words.tobytes()

    def __iter__(self) -> Iterator[FaultRecord]:
        for index in range(0, len(self._words), _RECORD_WORDS):
            page, event, taken, sent, read, replied, placed, last = self._words[index : index + _RECORD_WORDS]
            kind, thread_id = divmod(last, 1 << 32)
            yield FaultRecord(page, event, taken, sent, read, replied, placed, thread_id, PageKind(kind))

    def latencies_us(self) -> list[float]:
        """Kernel event read to page placed, of every fault whose page had not come before its event was read."""
        columns = (self._words[column::_RECORD_WORDS] for column in (_EVENT, _PLACED, _KIND))
        return [(placed - event) / 1000 for event, placed, last in zip(*columns, strict=True) if last >> 32 != _PRESENT]


class FaultNotes(NamedTuple):
    """What a policy hears.

    Attributes:
        faults: For each its page, event_ns, thread_id, and whether the page had been asked for.
        lost: Faults that were dropped since the last call, because nobody took them.
        queued: Runs that were suggested and have not been used up.
    """

    faults: list[tuple[int, int, int, bool]]
    lost: int
    queued: int


class Order(IntEnum):
    """In which order the background asks (native/order.h). Values equal enum mig_order_kind."""

    PRECOPY = 0
    FOLLOW = 1
    BUBBLE = 2
    SUGGESTED = 3


class PagerStoppedError(Exception):
    """A waiting call ended because the pager was stopped, or no page is missing any more."""


class Pager:
    """All pages of one armed region, missing at first.

    Takes over the userfaultfd. Every method but `close` may be called from any thread.

    Args:
        uffd: The userfaultfd that the region is registered with.
        region_hva: Where the guest process has it.
        pages: Its length.
        order: Of the background.
    """

    def __init__(self, uffd: int, region_hva: int, pages: int, order: Order = Order.PRECOPY) -> None:
        ret = ffi.new("struct mig_pager **")
        _check("make a pager", lib.mig_pager_create(uffd, region_hva, pages, order, ret))
        self._pager = ret[0]
        self._notes: Any = ffi.new("struct mig_fault_note[]", _NOTES_MAX) if order is Order.SUGGESTED else None
        self._records: Any = ffi.new("struct mig_fault_record[]", _DRAIN_MAX)
        self.pages = pages

    @property
    def handle(self) -> Any:
        """The C object, for other facades."""
        return self._pager

    # ---- precopy ----

    def begin_precopy(self, memfd: int, *, verify: bool = False) -> None:
        """Until `go_live`, write pages into a memfd, which stays the caller's: the region's memory, empty."""
        lib.mig_pager_begin_precopy(self._pager, memfd, verify)

    def invalidate(self, generation: int, first_page: int, stale: bytes, *, defer: bool = False) -> None:
        """Pages whose bit is set in `stale`, whose lowest bit is first_page's, were written before a generation.

        What was read of them in an earlier one is dropped: they are missing again, and their memory is freed. With
        `defer`, nothing is taken of them until the guest lives here; without, all that was deferred is asked for again.

        Raises:
            RemoteProtocolError: outside the region, an older generation than before, or the guest lives here already.
        """
        count_pages = min(len(stale) * 8, self.pages - first_page)
        if count_pages < 0 or int.from_bytes(stale[count_pages // 8 :], "little") >> count_pages % 8:
            raise RemoteProtocolError(f"stale pages from {first_page} do not lie within the guest's {self.pages}")
        rc = lib.mig_pager_invalidate(self._pager, generation, first_page, count_pages, ffi.from_buffer(stale), defer)
        if rc == -errno.EPROTO:
            raise RemoteProtocolError(f"pages cannot be invalidated by generation {generation} any more")
        _check_run(first_page, count_pages, rc)

    def go_live(self) -> None:
        """The guest is about to run here: pages are placed from now on, and no more can be invalidated."""
        lib.mig_pager_go_live(self._pager)

    @property
    def is_complete(self) -> bool:
        """Whether the guest lives here and misses nothing."""
        complete: bool = lib.mig_pager_is_complete(self._pager)
        return complete

    # ---- faults, claims, placement ----

    def start_fault_thread(self) -> None:
        """Read faults in a thread of the pager's own; the native fetch reads them itself. Idempotent."""
        _check("start the fault thread", lib.mig_pager_start_fault_thread(self._pager))

    def claim_urgent(self, timeout_us: int) -> list[int]:
        """Wait for faults on pages that nobody asked for; the caller must ask for them. Empty after the timeout.

        Raises:
            PagerStoppedError: stopped, or nothing is missing.
            UffdError: the fault thread failed.
        """
        pages = ffi.new("uint64_t[]", _CLAIM_MAX)
        found = _check("read page faults", lib.mig_pager_claim_urgent(self._pager, pages, _CLAIM_MAX, timeout_us))
        return list(pages[0:found])

    def claim_run(self, max_pages: int) -> tuple[int, int] | None:
        """Claim the next run of missing pages that nobody asked for: (first page, pages), or None if there is none."""
        first = ffi.new("uint64_t *")
        count = lib.mig_pager_claim_run(self._pager, max_pages, first)
        return (first[0], count) if count else None

    def note_sent(self, sent_ns: int) -> None:
        """The requests for all pages that claim_urgent gave out are on the wire."""
        lib.mig_pager_note_sent(self._pager, sent_ns)

    def note_read(self, first_page: int, count_pages: int, read_ns: int) -> None:
        """The source took so long to answer for these pages, which are about to be placed."""
        lib.mig_pager_note_read(self._pager, first_page, count_pages, read_ns)

    def give_back(self, first_page: int, count_pages: int) -> None:
        """A request will not be answered: what is missing of its pages must be asked for again, by whoever comes."""
        _check("queue pages again", lib.mig_pager_give_back(self._pager, first_page, count_pages))

    def place_data(
        self,
        first_page: int,
        count_pages: int,
        data: bytes,
        kind: PageKind,
        digest: int | None,
        generation: int = 0,
    ) -> None:
        """Place a run of pages that was read in a generation; with a digest, only if it is theirs.

        Raises:
            RemoteProtocolError: the run does not lie within the region, or is not as long as it says.
            IntegrityError: wrong digest; nothing was placed.
            GuestLostError: the guest process is gone.
        """
        if len(data) != count_pages * lib.MIG_PAGE_SIZE_BYTES:
            raise RemoteProtocolError(f"a run of {count_pages} pages came with {len(data)} bytes")
        rc = lib.mig_pager_place_data(
            self._pager,
            generation,
            first_page,
            count_pages,
            ffi.from_buffer(data),
            kind,
            digest is not None,
            digest or 0,
        )
        if rc == -errno.EBADMSG:
            raise IntegrityError(f"pages {first_page} to {first_page + count_pages} do not have the source's digest")
        _check_run(first_page, count_pages, rc)

    def place_zero(self, first_page: int, count_pages: int, generation: int = 0) -> None:
        """Learn that a run of pages was zero in a generation.

        Raises:
            RemoteProtocolError: the run does not lie within the region.
            GuestLostError: the guest process is gone.
        """
        _check_run(first_page, count_pages, lib.mig_pager_place_zero(self._pager, generation, first_page, count_pages))

    # ---- a policy: of order SUGGESTED alone ----

    def wait_faults(self, timeout_us: int) -> FaultNotes:
        """Wait for faults on missing pages, or until few suggestions are left. For one thread alone.

        Raises:
            PagerStoppedError: stopped, or nothing is missing.
            UffdError: faults are read no longer.
        """
        lost, queued = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        rc = lib.mig_pager_wait_faults(self._pager, self._notes, _NOTES_MAX, timeout_us, lost, queued)
        notes = self._notes[0 : _check("read page faults", rc)]
        faults = [(note.page, note.event_ns, note.thread_id, bool(note.was_requested)) for note in notes]
        return FaultNotes(faults, lost[0], queued[0])

    def suggest(self, runs: Sequence[tuple[int, int]], hold_us: int = 0) -> None:
        """Have these runs, (first page, pages), asked for next, and all else kept back for a while.

        Whoever fetches must be woken afterwards.

        Args:
            runs: What of each is missing and has not been asked for when its turn comes. Those that find no room among
                SUGGESTIONS_MAX are dropped.
            hold_us: From now on; HOLD_MAX_US at most.

        Raises:
            UffdError: a run does not lie within the region; none was taken.
        """
        given = ffi.new("struct mig_page_run[]", runs)
        _check("suggest pages", lib.mig_pager_suggest(self._pager, given, len(runs), hold_us))

    @property
    def held_s(self) -> float:
        """How long `claim_run` keeps back what no policy has named; 0 if it does not."""
        held_ns: int = lib.mig_pager_held_ns(self._pager)
        return held_ns / 1e9

    @property
    def missing(self) -> MissingView:
        """The pages that are missing, until the pager is closed."""
        return MissingView(lib.mig_pager_missing(self._pager))

    # ---- when something went away ----

    def find_present(self, memfd: int) -> int:
        """For a guest whose last daemon died: the pages that its memory has are not missing. How many those are.

        Called before anything else. They count as background pages, and holes as missing, known zeros too. Faults whose
        events the dead daemon had read come again.

        Raises:
            UffdError: it cannot be seen.
        """
        ret = ffi.new("uint64_t *")
        _check("find the pages that are there", lib.mig_pager_find_present(self._pager, memfd, ret))
        pages: int = ret[0]
        return pages

    def ask_again(self) -> None:
        """The fetch has failed and was stopped, another one will take its place: it asks for all that has not come."""
        _check("queue pages again", lib.mig_pager_ask_again(self._pager))

    def poison_missing(self) -> int:
        """No fetch will bring what is missing: who touches it gets a memory error. Returns how many pages those are.

        They stay counted as missing. Known zeros are placed until the pager is stopped.

        Raises:
            UffdError: errno.EINVAL where the kernel has no UFFDIO_POISON.
        """
        ret = ffi.new("uint64_t *")
        _check("UFFDIO_POISON", lib.mig_pager_poison_missing(self._pager, ret))
        pages: int = ret[0]
        return pages

    # ---- how far it is ----

    def wait_done(self, timeout_us: int) -> bool:
        """Wait until no page is missing but those that are deferred; False after the timeout.

        Raises:
            PagerStoppedError: stopped.
            UffdError: the fault thread failed.
        """
        return bool(_check("read page faults", lib.mig_pager_wait_done(self._pager, timeout_us)))

    def counters(self) -> PagerCounters:
        """Read all counters, each right by itself; all together once no page is missing."""
        shared = lib.mig_pager_counters(self._pager)
        return PagerCounters(**{name: getattr(shared, name) for name in PagerCounters.__slots__})

    def missing_map(self, cells_max: int) -> bytes:
        """The region in equal parts, a byte each: the share of its pages that is missing, 0 for none to 255 for all."""
        cells = min(cells_max, self.pages)
        shares = ffi.new("uint8_t[]", cells)
        lib.mig_pager_missing_map(self._pager, cells, shares)
        return bytes(ffi.buffer(shares))

    def copy_map(self, *, known_zero: bool = False) -> bytes:
        """A bit for each page, lowest bit first: those missing, or those that the source has told to be zero."""
        copied = ffi.new("uint8_t[]", (self.pages + 7) // 8)
        lib.mig_pager_copy_map(self._pager, known_zero, copied)
        return bytes(ffi.buffer(copied))

    def drain_records(self) -> "FaultBatch":
        """Take out the fault records gathered since the last call, oldest first."""
        drained = bytearray()
        while count := lib.mig_pager_drain_records(self._pager, self._records, _DRAIN_MAX):
            drained += ffi.buffer(self._records, count * RECORD_BYTES)
        return FaultBatch(bytes(drained))

    def stop(self) -> None:
        """End the fault thread and every waiting call. Idempotent."""
        lib.mig_pager_stop(self._pager)

    def close(self) -> None:
        """Stop and free. No other call may be under way."""
        lib.mig_pager_destroy(self._pager)
        self._pager = ffi.NULL


def _check(operation: str, rc: int) -> int:
    if rc == -errno.ECANCELED:
        raise PagerStoppedError
    if rc < 0:
        raise UffdError(operation, -rc)
    return rc


def _check_run(first_page: int, count_pages: int, rc: int) -> None:
    if rc == -errno.EINVAL:
        raise RemoteProtocolError(f"{count_pages} pages from {first_page} do not lie within the guest's memory")
    if rc == -errno.ESRCH:
        raise GuestLostError("the guest process at the destination is gone")
    _check("place pages", rc)
