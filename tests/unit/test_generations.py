"""Pages that are written at the source while they move: which bytes of them count, before the guest comes and after."""

import os

import pytest

from migrate.errors import IntegrityError, RemoteProtocolError
from migrate.native._native import ffi, lib
from migrate.native.pager import PageKind, Pager, PagerStoppedError
from tests.harness.toucher import PAGE, Toucher, sha256
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd

PAGES = 64
PAGE_X = 9
CLAIM_US = 5_000_000


def page_of(number):
    return bytes([number % 251 + 1]) * PAGE


OLD, NEW = page_of(1), page_of(2)


@pytest.fixture
def toucher():
    made = Toucher(PAGES)
    yield made
    made.close()


def precopy_pager(toucher, *, verify=False):
    made = Pager(toucher.uffd, toucher.hva, PAGES)
    made.begin_precopy(toucher.memfd, verify=verify)
    made.start_fault_thread()
    return made


@pytest.fixture
def pager(toucher):
    made = precopy_pager(toucher)
    yield made
    made.close()


@pytest.fixture
def verifying_pager(toucher):
    made = precopy_pager(toucher, verify=True)
    yield made
    made.close()


def stale_bits(*pages):
    """The bitmap of an Invalidate, from page 0 on."""
    return sum(1 << page for page in pages).to_bytes(PAGES // 8, "little")


def in_memfd(toucher, page):
    return os.pread(toucher.memfd, PAGE, page * PAGE)


def data_pages(toucher):
    """Which pages of the memfd are no holes."""
    found = []
    offset = 0
    while True:
        try:
            offset = os.lseek(toucher.memfd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return found
        end = os.lseek(toucher.memfd, offset, os.SEEK_HOLE)
        found += range(offset // PAGE, end // PAGE)
        offset = end


def digest_terms(pages):
    """What pages, by their numbers, add to the memory's digest."""
    return sum(lib.mig_digest_memory_term(page, lib.mig_digest_page(ffi.from_buffer(data))) for page, data in pages)


def run_digest(*pages):
    digests = ffi.new("uint64_t[]", [lib.mig_digest_page(ffi.from_buffer(page)) for page in pages])
    return lib.mig_digest_run(digests, len(pages))


# ---- the crossed reply: read in generation 1, arrives after Invalidate of generation 2 ----


def cross_before_the_switchover(pager, *, told_generation):
    """Page X is asked for and read in generation 1, then written and invalidated; then its old bytes arrive."""
    pager.invalidate(1, 0, b"")
    assert pager.claim_run(PAGES) == (0, PAGES)
    pager.invalidate(2, 0, stale_bits(PAGE_X))
    pager.place_data(PAGE_X, 1, OLD, PageKind.BACKGROUND, None, told_generation)


def test_crossed_reply_is_dropped_and_its_page_asked_for_again(toucher, pager):
    cross_before_the_switchover(pager, told_generation=1)
    counters = pager.counters()
    assert (counters.stale_pages, counters.precopy_pages, counters.missing_pages) == (1, 0, PAGES)
    assert data_pages(toucher) == []

    assert pager.claim_run(PAGES) == (PAGE_X, 1)
    pager.place_data(PAGE_X, 1, NEW, PageKind.BACKGROUND, None, 2)
    counters = pager.counters()
    assert (counters.stale_pages, counters.precopy_pages, counters.missing_pages) == (1, 1, PAGES - 1)
    assert in_memfd(toucher, PAGE_X) == NEW


def test_old_reply_told_as_new_leaves_wrong_bytes(toucher, pager):
    """What a source that ignored generations would do: the check above can fail."""
    cross_before_the_switchover(pager, told_generation=2)
    assert pager.counters().stale_pages == 0
    pager.place_data(PAGE_X, 1, NEW, PageKind.BACKGROUND, None, 2)
    assert in_memfd(toucher, PAGE_X) == OLD
    assert pager.counters().duplicate_pages == 1


def cross_the_switchover(toucher, pager, *, told_generation):
    """The same, but the old bytes arrive when the guest lives here and waits for the page."""
    pager.invalidate(1, 0, b"")
    assert pager.claim_run(PAGES) == (0, PAGES)
    pager.invalidate(2, 0, stale_bits(PAGE_X))
    pager.go_live()
    toucher.touch(PAGE_X)
    assert pager.claim_urgent(CLAIM_US) == [PAGE_X]
    pager.place_data(PAGE_X, 1, OLD, PageKind.BACKGROUND, None, told_generation)


def test_reply_that_crosses_the_switchover_is_dropped_and_its_fault_waits_on(toucher, pager):
    cross_the_switchover(toucher, pager, told_generation=1)
    counters = pager.counters()
    assert (counters.stale_pages, counters.background_pages, counters.missing_pages) == (1, 0, PAGES)
    assert data_pages(toucher) == []

    pager.place_data(PAGE_X, 1, NEW, PageKind.URGENT, None, 2)
    assert toucher.result() == (PAGE_X, sha256(NEW))
    assert pager.counters().urgent_pages == 1


def test_old_reply_told_as_new_wakes_the_guest_to_wrong_bytes(toucher, pager):
    """The check above can fail, and what it would miss is a guest that read old memory."""
    cross_the_switchover(toucher, pager, told_generation=2)
    assert toucher.result() == (PAGE_X, sha256(OLD))
    pager.place_data(PAGE_X, 1, NEW, PageKind.URGENT, None, 2)
    assert in_memfd(toucher, PAGE_X) == OLD


def test_page_whose_crossed_reply_was_dropped_after_the_switchover_is_asked_for_again(toucher, pager):
    pager.invalidate(1, 0, b"")
    assert pager.claim_run(PAGES) == (0, PAGES)
    pager.invalidate(2, 0, stale_bits(PAGE_X))
    assert pager.claim_run(PAGES) == (PAGE_X, 1)
    pager.go_live()
    assert pager.claim_run(PAGES) is None
    pager.place_data(0, PAGES, OLD * PAGES, PageKind.BACKGROUND, None, 1)
    assert pager.counters().missing_pages == 1
    assert pager.claim_run(PAGES) == (PAGE_X, 1)
    pager.place_data(PAGE_X, 1, NEW, PageKind.BACKGROUND, None, 2)
    assert pager.wait_done(0)
    assert in_memfd(toucher, PAGE_X) == NEW


def test_crossed_zero_reply_is_dropped_and_its_fault_waits_on(toucher, pager):
    pager.invalidate(1, 0, b"")
    assert pager.claim_run(PAGES) == (0, PAGES)
    pager.invalidate(2, 0, stale_bits(PAGE_X))
    pager.go_live()
    toucher.touch(PAGE_X)
    assert pager.claim_urgent(CLAIM_US) == [PAGE_X]
    pager.place_zero(0, PAGES, 1)
    counters = pager.counters()
    assert (counters.stale_pages, counters.zero_pages, counters.missing_pages) == (1, PAGES - 1, 1)
    pager.place_data(PAGE_X, 1, NEW, PageKind.URGENT, None, 2)
    assert toucher.result() == (PAGE_X, sha256(NEW))


def test_page_of_a_fault_that_waits_for_a_reply_of_a_lying_source_is_asked_for_again(toucher, pager):
    """Asked for in generation 2, answered as of generation 1, which an honest source never does."""
    pager.invalidate(1, 0, b"")
    pager.invalidate(2, 0, stale_bits(PAGE_X))
    assert pager.claim_run(PAGES) == (0, PAGES)
    pager.go_live()
    toucher.touch(PAGE_X)
    wait_until(lambda: pager.counters().faults == 1, 5, "the fault")
    pager.place_data(0, PAGES, OLD * PAGES, PageKind.BACKGROUND, None, 1)
    assert pager.counters().missing_pages == 1
    assert pager.claim_run(PAGES) == (PAGE_X, 1)
    pager.place_data(PAGE_X, 1, NEW, PageKind.BACKGROUND, None, 2)
    assert toucher.result() == (PAGE_X, sha256(NEW))


def test_run_is_taken_apart_into_what_is_stale_and_what_is_good(toucher, pager):
    pager.invalidate(1, 0, b"")
    assert pager.claim_run(8) == (0, 8)
    pager.invalidate(2, 0, stale_bits(0, 3, 4, 7))
    pager.place_data(0, 8, b"".join(map(page_of, range(8))), PageKind.BACKGROUND, None, 1)
    assert data_pages(toucher) == [1, 2, 5, 6]
    assert all(in_memfd(toucher, page) == page_of(page) for page in (1, 2, 5, 6))
    assert pager.counters().stale_pages == 4
    assert [pager.claim_run(2) for _ in range(3)] == [(0, 1), (3, 2), (7, 2)]


def test_page_that_was_never_invalidated_takes_a_reply_of_any_generation(toucher, pager):
    pager.invalidate(1, 0, b"")
    pager.invalidate(7, 0, stale_bits(PAGE_X))
    pager.place_data(0, 1, page_of(5), PageKind.BACKGROUND, None, 1)
    assert in_memfd(toucher, 0) == page_of(5)
    assert pager.counters().stale_pages == 0


# ---- precopy: what is written where, counted as what ----


def test_precopy_writes_the_memfd_and_counts_apart(toucher, pager):
    pager.place_data(3, 2, page_of(3) + page_of(4), PageKind.BACKGROUND, None, 1)
    pager.place_zero(10, 5, 1)
    assert data_pages(toucher) == [3, 4]
    counters = pager.counters()
    assert (counters.precopy_pages, counters.zero_pages, counters.background_pages) == (2, 5, 0)
    assert counters.missing_pages == PAGES - 7
    assert not pager.is_complete


def test_invalidated_pages_are_holes_that_are_missing(toucher, pager):
    pager.place_data(0, 16, b"".join(map(page_of, range(16))), PageKind.BACKGROUND, None, 1)
    pager.place_zero(16, PAGES - 16, 1)
    assert pager.wait_done(0)
    lost = (0, 2, 3, 9, 15, 20, 63)
    pager.invalidate(2, 0, stale_bits(*lost))
    assert data_pages(toucher) == [page for page in range(16) if page not in lost]
    assert os.fstat(toucher.memfd).st_blocks * 512 == 11 * PAGE
    counters = pager.counters()
    assert (counters.precopy_pages, counters.zero_pages, counters.missing_pages) == (11, PAGES - 18, 7)
    asked = set()
    while run := pager.claim_run(PAGES):
        asked |= set(range(run[0], run[0] + run[1]))
    assert asked == set(lost)


def test_bitmap_of_an_invalidation_begins_at_its_first_page(toucher, pager):
    pager.place_data(0, PAGES, NEW * PAGES, PageKind.BACKGROUND, None, 1)
    pager.invalidate(2, 40, b"\x05")
    assert set(range(PAGES)) - set(data_pages(toucher)) == {40, 42}


def test_page_that_was_data_may_come_back_as_zero_and_the_other_way_round(toucher, pager):
    pager.place_data(5, 1, OLD, PageKind.BACKGROUND, None, 1)
    pager.place_zero(6, 1, 1)
    pager.invalidate(2, 0, stale_bits(5, 6))
    pager.place_zero(5, 1, 2)
    pager.place_data(6, 1, NEW, PageKind.BACKGROUND, None, 2)
    assert data_pages(toucher) == [6]
    counters = pager.counters()
    assert (counters.zero_pages, counters.precopy_pages, counters.missing_pages) == (1, 1, PAGES - 2)


def test_present_page_is_not_written_again(toucher, pager):
    pager.place_zero(4, 1, 1)
    pager.place_data(5, 1, NEW, PageKind.BACKGROUND, None, 1)
    pager.place_data(3, 4, OLD * 4, PageKind.BACKGROUND, None, 1)
    assert data_pages(toucher) == [3, 5, 6]
    assert in_memfd(toucher, 5) == NEW
    assert pager.counters().duplicate_pages == 2


def test_deferred_pages_are_neither_asked_for_nor_taken_until_the_guest_is_here(toucher, pager):
    pager.place_data(0, 8, OLD * 8, PageKind.BACKGROUND, None, 1)
    pager.invalidate(2, 0, stale_bits(3, 4, 20), defer=True)
    assert pager.counters().deferred_pages == 3
    asked = set()
    while run := pager.claim_run(PAGES):
        asked |= set(range(run[0], run[0] + run[1]))
    assert asked == set(range(8, PAGES)) - {20}
    # Later writes to them are not told, so that even a reply of the latest generation is too old.
    pager.place_data(3, 1, OLD, PageKind.BACKGROUND, None, 2)
    pager.place_zero(20, 1, 2)
    assert data_pages(toucher) == [0, 1, 2, 5, 6, 7]
    assert pager.counters().stale_pages == 2
    assert pager.claim_run(PAGES) is None
    pager.invalidate(3, 0, b"", defer=True)
    pager.go_live()
    assert pager.counters().deferred_pages == 0
    assert [pager.claim_run(PAGES), pager.claim_run(PAGES)] == [(3, 2), (20, 1)]
    pager.place_data(3, 2, NEW * 2, PageKind.BACKGROUND, None, 3)
    toucher.touch(3)
    assert toucher.result() == (3, sha256(NEW))


def test_the_pass_is_over_when_all_but_deferred_pages_have_come(pager):
    pager.place_data(0, 32, OLD * 32, PageKind.BACKGROUND, None, 1)
    pager.invalidate(2, 0, stale_bits(1, 40), defer=True)
    assert not pager.wait_done(0)
    pager.place_zero(32, PAGES - 32, 2)
    assert pager.wait_done(0)
    counters = pager.counters()
    assert (counters.missing_pages, counters.deferred_pages) == (2, 2)
    assert not pager.is_complete


def test_a_round_that_fetches_ends_what_was_deferred(pager):
    pager.place_data(0, PAGES, OLD * PAGES, PageKind.BACKGROUND, None, 1)
    pager.invalidate(2, 0, stale_bits(7), defer=True)
    assert pager.claim_run(PAGES) is None
    pager.invalidate(3, 0, stale_bits(9))
    assert [pager.claim_run(PAGES), pager.claim_run(PAGES)] == [(7, 1), (9, 1)]


def test_pages_count_as_precopy_until_the_guest_is_here(toucher, pager):
    pager.place_data(0, 1, OLD, PageKind.BACKGROUND, None, 1)
    pager.go_live()
    assert pager.claim_run(8) == (1, 8)
    pager.place_data(1, 1, NEW, PageKind.BACKGROUND, None, 1)
    counters = pager.counters()
    assert (counters.precopy_pages, counters.background_pages) == (1, 1)
    toucher.touch(0)
    toucher.touch(1)
    assert dict(toucher.result() for _ in range(2)) == {0: sha256(OLD), 1: sha256(NEW)}


def test_precopied_pages_are_complete_only_once_the_guest_is_here(pager):
    pager.place_zero(0, PAGES, 1)
    assert pager.wait_done(0)
    assert not pager.is_complete
    assert pager.claim_urgent(0) == []
    pager.go_live()
    assert pager.is_complete
    with pytest.raises(PagerStoppedError):
        pager.claim_urgent(CLAIM_US)


def test_nothing_is_invalidated_once_the_guest_is_here(toucher, pager):
    pager.place_data(5, 1, NEW, PageKind.BACKGROUND, None, 1)
    pager.go_live()
    with pytest.raises(RemoteProtocolError):
        pager.invalidate(2, 0, stale_bits(5))
    assert data_pages(toucher) == [5]


def test_round_older_than_one_before_is_refused(toucher, pager):
    pager.place_data(5, 1, NEW, PageKind.BACKGROUND, None, 1)
    pager.invalidate(3, 0, b"")
    with pytest.raises(RemoteProtocolError):
        pager.invalidate(2, 0, stale_bits(5))
    assert data_pages(toucher) == [5]
    pager.invalidate(3, 0, stale_bits(5))
    assert data_pages(toucher) == []


@pytest.mark.parametrize(
    ("first_page", "stale"),
    [(PAGES - 1, b"\x02"), (PAGES + 1, b""), (0, bytes(PAGES // 8) + b"\1"), (PAGES - 9, b"\0\2")],
)
def test_stale_pages_outside_the_region_are_refused(toucher, pager, first_page, stale):
    pager.place_data(PAGES - 1, 1, NEW, PageKind.BACKGROUND, None, 1)
    with pytest.raises(RemoteProtocolError):
        pager.invalidate(2, first_page, stale)
    assert pager.counters().missing_pages == PAGES - 1


# ---- verification ----


def test_digest_of_an_invalidated_page_leaves_the_sum(toucher, verifying_pager):
    pager = verifying_pager
    pages = [page_of(number) for number in range(4)]
    pager.place_data(0, 4, b"".join(pages), PageKind.BACKGROUND, run_digest(*pages), 1)
    pager.place_zero(4, 2, 1)
    assert pager.counters().memory_digest == digest_terms(enumerate(pages)) % 2**64
    pager.invalidate(2, 0, stale_bits(1, 2, 4))
    counters = pager.counters()
    assert counters.memory_digest == digest_terms([(0, pages[0]), (3, pages[3])]) % 2**64
    assert counters.verified_pages == 2
    pager.place_data(1, 1, NEW, PageKind.BACKGROUND, run_digest(NEW), 2)
    assert pager.counters().memory_digest == digest_terms([(0, pages[0]), (1, NEW), (3, pages[3])]) % 2**64


def test_digest_of_a_dropped_reply_is_not_counted(toucher, verifying_pager):
    pager = verifying_pager
    pager.invalidate(1, 0, b"")
    pager.invalidate(2, 0, stale_bits(1))
    pages = [page_of(0), OLD, page_of(2)]
    pager.place_data(0, 3, b"".join(pages), PageKind.BACKGROUND, run_digest(*pages), 1)
    counters = pager.counters()
    assert (counters.stale_pages, counters.verified_pages) == (1, 2)
    assert counters.memory_digest == digest_terms([(0, pages[0]), (2, pages[2])]) % 2**64


def test_wrong_digest_in_precopy_writes_nothing(toucher, verifying_pager):
    with pytest.raises(IntegrityError):
        verifying_pager.place_data(0, 1, OLD, PageKind.BACKGROUND, run_digest(NEW), 1)
    assert data_pages(toucher) == []
    assert verifying_pager.counters().missing_pages == PAGES
