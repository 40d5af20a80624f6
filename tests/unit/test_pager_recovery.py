"""What the pager does when a daemon, a fetch or the source went away; real faults of another process."""

import errno
import os
import signal

import pytest

from migrate.errors import UffdError
from migrate.native import uffd
from migrate.native.pager import PageKind, Pager
from tests.harness.toucher import PAGE, Toucher, sha256
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd

PAGES = 200
CLAIM_US = 5_000_000


def page_of(number):
    return bytes([number % 251 + 1]) * PAGE


def place(pager, *numbers, kind=PageKind.BACKGROUND):
    for number in numbers:
        pager.place_data(number, 1, page_of(number), kind, None)


def settled_pages(counters):
    return counters.zero_pages + counters.precopy_pages + counters.urgent_pages + counters.background_pages


@pytest.fixture
def toucher():
    made = Toucher(PAGES)
    yield made
    made.close()


@pytest.fixture
def pager(toucher):
    made = Pager(os.dup(toucher.uffd), toucher.hva, PAGES)
    yield made
    made.close()
    os.close(toucher.uffd)


@pytest.fixture
def successor(toucher, pager):
    """Made of the same userfaultfd; the first one must be closed by the test, or does no more."""
    made = Pager(os.dup(toucher.uffd), toucher.hva, PAGES)
    yield made
    made.close()


# ---- another daemon ----


def test_successor_finds_what_is_there_and_serves_the_fault_that_its_predecessor_had_read(toucher, pager, successor):
    pager.start_fault_thread()
    place(pager, 0, 1, 2, 70, 199)
    pager.place_zero(10, 20)
    toucher.touch(90)
    assert pager.claim_urgent(CLAIM_US) == [90]
    pager.stop()

    assert successor.find_present(toucher.memfd) == 5
    successor.start_fault_thread()
    assert successor.claim_urgent(CLAIM_US) == [90]
    assert [successor.claim_run(256) for _ in range(5)] == [(3, 67), (71, 19), (91, 108), None, None]
    place(successor, 90, kind=PageKind.URGENT)
    assert toucher.result() == (90, sha256(page_of(90)))
    place(successor, *range(3, 70), *range(71, 90), *range(91, 199))
    counters = successor.counters()
    assert (counters.missing_pages, counters.duplicate_pages) == (0, 0)
    assert (counters.background_pages, counters.urgent_pages) == (PAGES - 1, 1)
    assert settled_pages(counters) == PAGES
    assert successor.is_complete
    for page in (0, 70, 199):
        toucher.touch(page)
        assert toucher.result() == (page, sha256(page_of(page)))


def test_fault_on_a_page_that_has_come_is_woken_without_a_request(toucher, pager, successor):
    """The dead daemon had read the event, and put the page there in the way of precopy."""
    pager.start_fault_thread()
    toucher.touch(90)
    assert pager.claim_urgent(CLAIM_US) == [90]
    pager.stop()
    os.pwrite(toucher.memfd, page_of(90), 90 * PAGE)
    assert successor.find_present(toucher.memfd) == 1
    assert toucher.result() == (90, sha256(page_of(90)))
    assert successor.counters().faults == 0


def test_empty_memory_has_nothing_and_full_memory_has_all(toucher, successor):
    assert successor.find_present(toucher.memfd) == 0
    assert successor.counters().missing_pages == PAGES
    os.pwrite(toucher.memfd, b"".join(map(page_of, range(PAGES))), 0)
    assert successor.find_present(toucher.memfd) == PAGES
    assert successor.is_complete


@pytest.mark.parametrize("size_pages", [0, 7, PAGES + 50])
def test_file_of_another_size_than_the_region_counts_within_both(successor, size_pages):
    memfd = os.memfd_create("other")
    try:
        os.pwrite(memfd, bytes([1]) * (size_pages * PAGE), 0)
        assert successor.find_present(memfd) == min(size_pages, PAGES)
    finally:
        os.close(memfd)


def test_what_is_no_file_is_an_error(successor):
    reading, writing = os.pipe()
    try:
        with pytest.raises(UffdError) as caught:
            successor.find_present(reading)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(reading)
        os.close(writing)


# ---- another fetch ----


def test_all_that_was_asked_for_and_has_not_come_is_asked_for_again(toucher, pager):
    pager.start_fault_thread()
    assert pager.claim_run(100) == (0, 100)
    assert pager.claim_run(100) == (100, 100)
    assert pager.claim_run(100) is None
    place(pager, 3, 150)
    pager.ask_again()
    assert [pager.claim_run(256) for _ in range(4)] == [(0, 3), (4, 146), (151, 49), None]


def test_page_that_faults_wait_for_is_queued_again_once(toucher, pager):
    """One was asked for urgently, one by the background, one is in the queue still; two wait for the first."""
    pager.start_fault_thread()
    toucher.touch(90)
    assert pager.claim_urgent(CLAIM_US) == [90]
    assert pager.claim_run(8) == (0, 8)
    for number, page in enumerate((90, 5, 120), 2):
        toucher.touch(page)
        wait_until(lambda n=number: pager.counters().faults == n, 5, "the fault")
    pager.ask_again()
    assert sorted(pager.claim_urgent(CLAIM_US)) == [5, 90, 120]
    assert pager.claim_urgent(0) == []
    assert pager.claim_run(8) == (0, 5)
    assert pager.claim_run(8) == (6, 8)
    pager.ask_again()
    place(pager, 90, kind=PageKind.URGENT)
    assert sorted(pager.claim_urgent(CLAIM_US)) == [5, 120]
    place(pager, 5, 120, kind=PageKind.URGENT)
    assert {toucher.result()[0] for _ in range(4)} == {5, 90, 120}
    assert len(pager.drain_records()) == 4
    assert pager.counters().duplicate_pages == 0


def test_deferred_pages_are_not_asked_for_again_until_the_guest_is_here(toucher, pager):
    pager.begin_precopy(toucher.memfd)
    pager.place_data(0, PAGES, b"".join(map(page_of, range(PAGES))), PageKind.BACKGROUND, None)
    pager.invalidate(1, 40, b"\x0f")
    assert pager.claim_run(8) == (40, 4)
    pager.invalidate(2, 64, b"\x03", defer=True)
    pager.ask_again()
    assert pager.claim_run(8) == (40, 4)
    assert pager.claim_run(8) is None
    pager.go_live()
    assert pager.claim_run(8) == (64, 2)


def test_fault_thread_is_started_once(pager):
    """As each of two fetches of the transport grpcio does."""
    before = set(os.listdir("/proc/self/task"))
    pager.start_fault_thread()
    pager.start_fault_thread()
    # Threads of other tests may end meanwhile.
    assert len(set(os.listdir("/proc/self/task")) - before) == 1


# ---- no source any more ----


def died_of(toucher):
    toucher.process.wait(10)
    return -toucher.process.returncode


def test_fault_that_waits_for_a_lost_page_meets_a_memory_error(toucher, pager):
    pager.start_fault_thread()
    place(pager, 1)
    toucher.touch(90)
    assert pager.claim_urgent(CLAIM_US) == [90]
    assert pager.poison_missing() == PAGES - 1
    assert died_of(toucher) == signal.SIGBUS
    assert len(pager.drain_records()) == 0
    assert pager.counters().missing_pages == PAGES - 1


def test_lost_page_that_is_touched_later_is_a_memory_error_and_the_rest_is_as_it_was(toucher, pager):
    pager.start_fault_thread()
    place(pager, 1, 64)
    pager.place_zero(100, 2)
    # In the guest's page table, though the pager does not know it.
    os.pwrite(toucher.memfd, page_of(20), 20 * PAGE)
    toucher.touch(20)
    toucher.result()
    assert pager.poison_missing() == PAGES - 5
    for page, content in ((1, page_of(1)), (64, page_of(64)), (20, page_of(20)), (101, bytes(PAGE))):
        toucher.touch(page)
        assert toucher.result() == (page, sha256(content))
    assert os.fstat(toucher.memfd).st_blocks * 512 == 4 * PAGE
    toucher.touch(65)
    assert died_of(toucher) == signal.SIGBUS


def test_poison_stays_when_the_range_is_let_go(toucher, pager):
    pager.start_fault_thread()
    assert pager.poison_missing() == PAGES
    uffd.unregister(toucher.uffd, toucher.hva, PAGES * PAGE)
    toucher.touch(65)
    assert died_of(toucher) == signal.SIGBUS


def test_fault_whose_event_was_not_read_meets_a_memory_error_and_no_zero_page(toucher, pager):
    """Nobody reads events while the pages are poisoned; afterwards somebody does."""
    toucher.touch(90)
    wait_until(lambda: len(os.listdir(f"/proc/{toucher.process.pid}/task")) > 1, 5, "the touching thread")
    assert pager.poison_missing() == PAGES
    pager.start_fault_thread()
    assert died_of(toucher) == signal.SIGBUS
    assert os.fstat(toucher.memfd).st_blocks == 0


def test_poison_where_nothing_is_registered_is_an_error_that_changes_nothing(toucher, pager):
    pager.start_fault_thread()
    elsewhere = Pager(os.dup(toucher.uffd), toucher.hva + (1 << 40), PAGES)
    with pytest.raises(UffdError, match="UFFDIO_POISON"):
        elsewhere.poison_missing()
    elsewhere.close()
    toucher.touch(90)
    assert pager.claim_urgent(CLAIM_US) == [90]
    place(pager, 90, kind=PageKind.URGENT)
    assert toucher.result() == (90, sha256(page_of(90)))
