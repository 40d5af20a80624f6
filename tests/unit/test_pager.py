"""The C pager against a real userfaultfd in another process."""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from migrate.errors import GuestLostError, IntegrityError, RemoteProtocolError, UffdError
from migrate.native._native import ffi, lib
from migrate.native.pager import Order, PageKind, Pager, PagerStoppedError
from tests.harness.toucher import PAGE, Toucher, sha256
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd

PAGES = 64
ZERO = sha256(bytes(PAGE))
CLAIM_US = 5_000_000
NOTES_MAX = 1 << 12  # pager_internal.h


def page_of(number):
    return bytes([number % 251 + 1]) * PAGE


@pytest.fixture
def toucher():
    made = Toucher(PAGES)
    yield made
    made.close()


@pytest.fixture
def pager(toucher):
    made = Pager(toucher.uffd, toucher.hva, PAGES)
    made.start_fault_thread()
    yield made
    made.close()


def test_fault_is_claimed_placed_and_recorded(toucher, pager):
    toucher.touch(5)
    assert pager.claim_urgent(CLAIM_US) == [5]
    pager.place_data(5, 1, page_of(5), PageKind.URGENT, None)
    assert toucher.result() == (5, sha256(page_of(5)))
    (record,) = pager.drain_records()
    assert (record.page, record.kind) == (5, PageKind.URGENT)
    assert 0 < record.event_ns < record.placed_ns
    assert record.thread_id != 0
    counters = pager.counters()
    assert (counters.urgent_pages, counters.missing_pages, counters.faults) == (1, PAGES - 1, 1)


def test_all_is_counted_when_no_page_is_missing(toucher, pager):
    """Counters are read without a lock, by whoever wants to know whether it is over; others wait for it meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        for _ in range(200):
            with contextlib.closing(Pager(os.dup(toucher.uffd), toucher.hva, PAGES)) as fresh:
                fresh.place_zero(0, 1)
                waiting = pool.submit(fresh.wait_done, CLAIM_US)
                placing = pool.submit(fresh.place_zero, 0, PAGES)
                while (counters := fresh.counters()).missing_pages:
                    pass
                assert (counters.zero_pages, counters.duplicate_pages) == (PAGES, 0)
                placing.result(10)
                assert waiting.result(10)


def test_stages_of_a_fault_are_recorded_in_their_order(toucher, pager):
    toucher.touch(5)
    assert pager.claim_urgent(CLAIM_US) == [5]
    pager.note_sent(time.monotonic_ns())
    pager.note_read(4, 2, 777)
    pager.place_data(5, 1, page_of(5), PageKind.URGENT, None)
    assert toucher.result() == (5, sha256(page_of(5)))
    (record,) = pager.drain_records()
    assert 0 < record.event_ns <= record.taken_ns <= record.sent_ns <= record.replied_ns <= record.placed_ns
    assert record.read_ns == 777


def test_fault_on_a_page_that_the_background_asked_for_has_no_request_of_its_own(toucher, pager):
    assert pager.claim_run(8) == (0, 8)
    toucher.touch(5)
    wait_until(lambda: pager.counters().faults == 1, 5, "the fault")
    pager.place_data(0, 8, b"".join(map(page_of, range(8))), PageKind.BACKGROUND, None)
    assert toucher.result() == (5, sha256(page_of(5)))
    (record,) = pager.drain_records()
    assert (record.taken_ns, record.sent_ns, record.read_ns, record.kind) == (0, 0, 0, PageKind.BACKGROUND)
    assert record.event_ns <= record.replied_ns <= record.placed_ns


def test_maps_of_missing_pages_and_of_zeros(pager):
    pager.place_data(3, 2, page_of(3) + page_of(4), PageKind.BACKGROUND, None)
    pager.place_zero(10, 5)
    missing, zero = (int.from_bytes(pager.copy_map(known_zero=known), "little") for known in (False, True))
    assert zero == sum(1 << page for page in range(10, 15))
    assert missing == (1 << PAGES) - 1 - zero - (1 << 3) - (1 << 4)


def test_two_faults_on_one_page_are_one_request_and_two_records(toucher, pager):
    toucher.touch(5)
    assert pager.claim_urgent(CLAIM_US) == [5]
    toucher.touch(5)
    wait_until(lambda: pager.counters().faults == 2, 5, "the second fault")
    assert pager.claim_urgent(0) == []
    pager.place_data(5, 1, page_of(5), PageKind.URGENT, None)
    assert [toucher.result() for _ in range(2)] == [(5, sha256(page_of(5)))] * 2
    assert len(pager.drain_records()) == 2


def test_fault_on_page_in_flight_waits_for_the_background(toucher, pager):
    assert pager.claim_run(16) == (0, 16)
    toucher.touch(3)
    wait_until(lambda: pager.counters().faults == 1, 5, "the fault")
    assert pager.claim_urgent(0) == []
    pager.place_data(0, 16, b"".join(map(page_of, range(16))), PageKind.BACKGROUND, None)
    assert toucher.result() == (3, sha256(page_of(3)))
    assert next(iter(pager.drain_records())).kind is PageKind.BACKGROUND
    assert pager.counters().background_pages == 16


def test_background_runs_ascend_and_skip_what_was_asked_for(toucher, pager):
    toucher.touch(10)
    assert pager.claim_urgent(CLAIM_US) == [10]
    assert pager.claim_run(8) == (0, 8)
    assert pager.claim_run(8) == (8, 2)
    assert pager.claim_run(40) == (11, 40)
    assert pager.claim_run(40) == (51, 13)
    assert pager.claim_run(40) is None
    pager.place_data(10, 1, page_of(10), PageKind.URGENT, None)
    toucher.result()


def test_zero_page_is_placed_only_when_touched(toucher, pager):
    pager.place_zero(0, PAGES)
    assert pager.wait_done(0)
    assert os.fstat(toucher.memfd).st_blocks == 0
    toucher.touch(7)
    assert toucher.result() == (7, ZERO)
    assert os.fstat(toucher.memfd).st_blocks * 512 == PAGE
    assert pager.counters().zero_pages == PAGES


def test_zero_run_wakes_who_waits_in_it(toucher, pager):
    toucher.touch(7)
    assert pager.claim_urgent(CLAIM_US) == [7]
    pager.place_zero(0, PAGES)
    assert toucher.result() == (7, ZERO)
    assert next(iter(pager.drain_records())).kind is PageKind.ZERO


def test_zero_run_never_hides_a_present_page(toucher, pager):
    pager.place_data(7, 1, page_of(7), PageKind.BACKGROUND, None)
    pager.place_zero(0, PAGES)
    toucher.touch(7)
    assert toucher.result() == (7, sha256(page_of(7)))
    counters = pager.counters()
    assert (counters.zero_pages, counters.background_pages, counters.missing_pages) == (PAGES - 1, 1, 0)


def test_page_that_is_there_already_is_kept_counted_and_its_waiter_woken(toucher, pager):
    toucher.touch(20)
    assert pager.claim_urgent(CLAIM_US) == [20]
    # Another mapping of the memfd fills the page cache behind the pager's back: COPY answers EEXIST, and wakes nobody.
    os.pwrite(toucher.memfd, page_of(99), 20 * PAGE)
    pager.place_data(18, 4, b"".join(map(page_of, range(18, 22))), PageKind.BACKGROUND, None)
    assert toucher.result() == (20, sha256(page_of(99)))
    assert pager.counters().background_pages == 4


def test_duplicate_run_is_counted_and_changes_nothing(toucher, pager):
    pager.place_data(0, 2, page_of(1) * 2, PageKind.BACKGROUND, None)
    pager.place_data(0, 4, page_of(2) * 4, PageKind.URGENT, None)
    toucher.touch(0)
    assert toucher.result() == (0, sha256(page_of(1)))
    counters = pager.counters()
    assert (counters.background_pages, counters.urgent_pages, counters.duplicate_pages) == (2, 2, 2)


def run_digest(pages):
    digests = ffi.new("uint64_t[]", [lib.mig_digest_page(ffi.from_buffer(page)) for page in pages])
    return lib.mig_digest_run(digests, len(pages))


def test_verified_run_is_placed_and_summed(toucher, pager):
    pages = [page_of(1), page_of(2)]
    pager.place_data(3, 2, b"".join(pages), PageKind.BACKGROUND, run_digest(pages))
    counters = pager.counters()
    expected = sum(
        lib.mig_digest_memory_term(3 + i, lib.mig_digest_page(ffi.from_buffer(page))) for i, page in enumerate(pages)
    )
    assert counters.verified_pages == 2
    assert counters.memory_digest == expected % 2**64


def test_wrong_digest_places_nothing(toucher, pager):
    with pytest.raises(IntegrityError):
        pager.place_data(3, 1, page_of(4), PageKind.URGENT, run_digest([page_of(3)]))
    assert os.fstat(toucher.memfd).st_blocks == 0
    assert pager.counters().missing_pages == PAGES


@pytest.mark.parametrize(("first", "count"), [(PAGES, 1), (PAGES - 1, 2), (2**63, 1), (0, PAGES + 1)])
def test_run_outside_the_region_is_refused(pager, first, count):
    with pytest.raises(RemoteProtocolError):
        pager.place_data(first, count, bytes(count * PAGE), PageKind.URGENT, None)
    with pytest.raises(RemoteProtocolError):
        pager.place_zero(first, count)
    assert pager.counters().missing_pages == PAGES


def test_short_data_is_refused(pager):
    with pytest.raises(RemoteProtocolError):
        pager.place_data(0, 2, bytes(PAGE), PageKind.URGENT, None)


def test_dead_guest_is_reported(toucher, pager):
    toucher.process.kill()
    toucher.process.wait()
    with pytest.raises(GuestLostError):
        pager.place_data(0, 1, page_of(0), PageKind.URGENT, None)


def test_stop_ends_waiting_calls(pager):
    outcome = []

    def wait():
        try:
            pager.claim_urgent(60_000_000)
        except PagerStoppedError:
            outcome.append("stopped")

    thread = threading.Thread(target=wait)
    thread.start()
    pager.stop()
    thread.join(5)
    assert outcome == ["stopped"]


def test_claim_urgent_ends_when_nothing_is_missing(pager):
    pager.place_zero(0, PAGES)
    with pytest.raises(PagerStoppedError):
        pager.claim_urgent(CLAIM_US)


def test_fault_storm_of_many_threads_is_settled(toucher, pager):
    for page in range(PAGES):
        toucher.touch(page)
    placed = 0
    while placed < PAGES:
        for page in pager.claim_urgent(CLAIM_US):
            pager.place_data(page, 1, page_of(page), PageKind.URGENT, None)
            placed += 1
    results = dict(toucher.result() for _ in range(PAGES))
    assert results == {page: sha256(page_of(page)) for page in range(PAGES)}
    assert pager.counters().urgent_pages == PAGES


def test_the_map_has_a_byte_for_each_part_of_ram(pager):
    assert pager.missing_map(4) == bytes([255] * 4)

    pager.place_data(0, 16, bytes(range(1, 17)) * PAGE, PageKind.BACKGROUND, None)
    pager.place_zero(16, 8)
    pager.place_zero(63, 1)

    assert pager.missing_map(4) == bytes([0, 127, 255, 1 + 15 * 253 // 16])
    assert pager.missing_map(256) == bytes([0] * 24 + [255] * 39 + [0])


@pytest.mark.parametrize("cells", [1, 3, 7, 63])
def test_the_map_covers_every_page_once(pager, cells):
    """Also where pages do not divide evenly."""
    pager.place_zero(0, PAGES - 1)
    assert [share > 0 for share in pager.missing_map(cells)] == [False] * (cells - 1) + [True]
    pager.place_zero(PAGES - 1, 1)
    assert pager.missing_map(cells) == bytes(cells)


# ---- a policy beside it ----


@pytest.fixture
def suggested(toucher):
    made = Pager(toucher.uffd, toucher.hva, PAGES, Order.SUGGESTED)
    made.start_fault_thread()
    yield made
    made.close()


def test_a_policy_hears_of_faults_on_missing_pages(toucher, suggested):
    assert suggested.claim_run(8) == (0, 8)
    suggested.place_data(0, 2, page_of(0) * 2, PageKind.BACKGROUND, None)
    faults = []
    for page in (20, 5):
        toucher.touch(page)
        faults += suggested.wait_faults(CLAIM_US).faults
    toucher.touch(0)
    assert toucher.result()[0] == 0
    assert [(page, was_requested) for page, _, _, was_requested in faults] == [(20, False), (5, True)]
    assert all(event_ns and thread_id for _, event_ns, thread_id, _ in faults)
    assert suggested.wait_faults(0) == ([], 0, 0)


def test_a_policy_names_pages(suggested):
    suggested.suggest([(40, 4), (9, 1)])
    assert suggested.wait_faults(0).queued == 2
    assert [suggested.claim_run(64) for _ in range(3)] == [(40, 4), (9, 1), (0, 9)]


def test_a_policy_keeps_the_rest_back_and_lets_it_go(suggested):
    suggested.suggest([(40, 1)], hold_us=60_000_000)
    assert 0.9 < suggested.held_s <= 1
    assert suggested.claim_run(64) == (40, 1)
    assert suggested.claim_run(64) is None
    suggested.suggest([])
    assert suggested.held_s == 0
    assert suggested.claim_run(64) == (0, 40)


@pytest.mark.parametrize("run", [(PAGES, 1), (PAGES - 1, 2), (3, 0), (1, 2**64 - 1)])
def test_a_suggestion_outside_the_region_is_refused(suggested, run):
    with pytest.raises(UffdError):
        suggested.suggest([(40, 1), run], hold_us=1000)
    assert suggested.claim_run(1) == (0, 1), "nothing was taken of it"


def test_a_policy_is_asked_again_when_its_runs_run_out(suggested):
    suggested.suggest([(40, 1), (42, 1)])
    suggested.claim_run(64)
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(suggested.wait_faults(30_000_000)))
    thread.start()
    suggested.claim_run(64)
    thread.join(5)
    assert outcome == [([], 0, 0)]


def test_faults_that_no_policy_takes_are_dropped_and_counted(toucher, suggested):
    """The oldest go. A vCPU that is woken for nothing faults again."""
    for page in range(PAGES):
        toucher.touch(page)
    for faults in range(PAGES, NOTES_MAX + 2 * PAGES, PAGES):
        wait_until(lambda faults=faults: suggested.counters().faults >= faults, 5, "the faults")
        assert lib.mig_uffd_wake(toucher.uffd, toucher.hva, PAGES * PAGE) == 0
    wait_until(lambda: suggested.counters().faults >= NOTES_MAX + 2 * PAGES, 5, "the last faults")
    heard, lost, _ = suggested.wait_faults(0)
    assert lost == suggested.counters().faults - NOTES_MAX
    while more := suggested.wait_faults(0).faults:
        heard += more
    assert len(heard) == NOTES_MAX
    assert all(was_requested for *_, was_requested in heard)
    suggested.place_zero(0, PAGES)
    for _ in range(PAGES):
        toucher.result()


def test_a_stopped_pager_stops_its_policy(suggested):
    suggested.stop()
    with pytest.raises(PagerStoppedError):
        suggested.wait_faults(30_000_000)


def test_a_policy_ends_when_nothing_is_missing(suggested):
    assert [suggested.missing.is_missing(page) for page in (0, PAGES - 1, PAGES, -1)] == [True, True, False, False]
    suggested.place_zero(0, PAGES - 2)
    assert (suggested.missing.next(0), suggested.missing.count(0, PAGES)) == (PAGES - 2, 2)
    suggested.place_zero(0, PAGES)
    assert suggested.missing.next(0) is None
    with pytest.raises(PagerStoppedError):
        suggested.wait_faults(30_000_000)
