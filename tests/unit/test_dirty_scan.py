"""The dirty log of any process: whatever changed is in it, and what did not mostly is not."""

import errno
import os

import pytest

from migrate.errors import DirtyScanError, DirtyScanUnavailableError, GuestGoneError
from migrate.native import inject, uffd
from migrate.native.dirty_scan import DirtyScan, check_dirty_scan, open_pagemap
from tests.harness.waiting import wait_until
from tests.harness.writer import PAGE, Writer

pytestmark = pytest.mark.uffd
PAGES = 4096
THREADS = 3


def _why_not():
    try:
        check_dirty_scan()
    except DirtyScanUnavailableError as error:
        return str(error)
    return ""


if reason := _why_not():
    pytestmark = pytest.mark.skip(reason=reason)


class Watched:
    """A process whose memory is compared with what its log says."""

    def __init__(self, pages):
        self.writer = Writer(pages)
        self.pages = pages
        remote = inject.open_uffd_in(self.writer.pid)
        self.uffd, self.target_fd = remote.fd, remote.target_fd
        uffd.shake_hands(self.uffd, with_missing=True, with_wp=True)
        self.pagemap = open_pagemap(self.writer.pid)
        self.before = self.writer.read()
        self.scan = DirtyScan(self.uffd, self.pagemap, self.writer.hva, pages * PAGE)

    def close(self):
        self.scan.stop()
        for fd in (self.uffd, self.pagemap):
            os.close(fd)
        self.writer.close()

    def dirty(self, **options):
        """The pages of one sync."""
        bitmap = bytearray(-(-self.pages // 64) * 8)
        count = self.scan.sync(bitmap, **options)
        dirty = {page for page in range(self.pages) if bitmap[page // 8] >> page % 8 & 1}
        assert count == len(dirty)
        return dirty

    def changed(self):
        """The pages that have changed since the last time."""
        before, self.before = self.before, self.writer.read()
        spans = [slice(page * PAGE, (page + 1) * PAGE) for page in range(self.pages)]
        return {page for page, span in enumerate(spans) if before[span] != self.before[span]}


@pytest.fixture
def watched():
    process = Watched(PAGES)
    yield process
    process.close()


def test_an_untouched_process_is_clean(watched):
    assert watched.dirty() == set()


def test_what_is_written_is_in_the_log_once(watched):
    pages = [0, 63, 64, 1000, PAGES - 1]
    watched.writer.do(do="write", pages=pages, version=1)

    assert watched.dirty() == set(pages)
    assert watched.dirty() == set()
    watched.writer.do(do="write", pages=pages[:2], version=2)
    assert watched.dirty() == set(pages[:2])


def test_a_page_that_is_read_is_clean(watched):
    watched.writer.do(do="read", pages=[1, 2, 3])

    assert watched.dirty() == set()


def test_what_is_kept_stays_in_the_log(watched):
    watched.writer.do(do="write", pages=[5, 9], version=1)

    assert watched.dirty(keep=True) == {5, 9}
    watched.writer.do(do="write", pages=[10], version=1)
    assert watched.dirty(keep=True) == {5, 9, 10}
    assert watched.dirty() == {5, 9, 10}
    assert watched.dirty() == set()


def test_pages_that_are_more_than_one_answer_holds():
    watched = Watched(4 * PAGES)
    try:
        pages = list(range(0, watched.pages, 3))
        watched.writer.do(do="write", pages=pages, version=1)
        assert watched.dirty() == set(pages)
        assert watched.dirty() == set()
    finally:
        watched.close()


def test_a_written_page_that_is_punched_out_stays_in_the_log(watched):
    watched.writer.do(do="write", pages=list(range(600)), version=1)

    watched.writer.do(do="punch", pages=list(range(600)))

    assert watched.dirty() == set(range(600))
    assert watched.dirty() == set()


def test_a_page_table_of_holes_stays_in_the_log(watched):
    """Whoever balloons gives back whole page tables, which the kernel may free."""
    pages = list(range(512 * 3))
    watched.writer.do(do="write", pages=pages, version=1)

    watched.writer.do(do="punch", pages=pages)
    watched.writer.do(do="drop")

    assert set(pages) <= watched.dirty()
    assert watched.dirty() == set()


def test_a_clean_page_that_is_punched_out_is_not_seen(watched):
    """Known, and said in the module: the kernel keeps its mark for it."""
    watched.writer.do(do="write", pages=[3], version=1)
    watched.dirty()

    watched.writer.do(do="punch", pages=[3])

    assert watched.dirty() == set()


@pytest.mark.parametrize("evict", ["evict", "drop"])
def test_a_written_page_that_is_evicted_stays_in_the_log(watched, evict):
    watched.writer.do(do="write", pages=list(range(64)), version=1)
    watched.dirty()
    watched.writer.do(do="write", pages=list(range(32)), version=2)

    watched.writer.do(do=evict)

    dirty = watched.dirty()
    assert set(range(32)) <= dirty
    assert watched.dirty() == set()


def test_nothing_is_missed_while_threads_write(watched):
    """A page read after a sync holds all that the sync told of; so what changes between two reads is in the next."""
    watched.writer.do(do="start", threads=THREADS, seed=1)
    known = watched.writer.read()
    copy = bytearray(known)
    clean_pages = 0
    for _ in range(40):
        wanted = watched.writer.do(do="count") + 200
        wait_until(lambda wanted=wanted: watched.writer.do(do="count") >= wanted, 20, "writes")
        dirty = watched.dirty()
        clean_pages += PAGES - len(dirty)
        for page in dirty:
            copy[page * PAGE : (page + 1) * PAGE] = os.pread(watched.writer.memfd, PAGE, page * PAGE)
    watched.writer.do(do="stop")
    for page in watched.dirty():
        copy[page * PAGE : (page + 1) * PAGE] = os.pread(watched.writer.memfd, PAGE, page * PAGE)

    assert copy == watched.writer.read(), "what was read along is what is there"
    assert clean_pages > 0


def test_what_changed_between_two_syncs_is_in_the_second(watched):
    """The same with the process at rest during each sync, page by page."""
    for seed in range(20):
        watched.writer.do(do="start", threads=THREADS, seed=seed)
        wait_until(lambda: watched.writer.do(do="count") >= 300, 20, "writes")
        watched.writer.do(do="stop")
        dirty, changed = watched.dirty(), watched.changed()
        assert changed
        assert changed <= dirty
        assert len(dirty) < PAGES


def test_writes_past_its_page_tables_are_not_seen(watched):
    """Known, and said in the module: an ordinary write(2) to the file by somebody else."""
    os.pwrite(watched.writer.memfd, b"x", 7 * PAGE)

    assert 7 not in watched.dirty()


def test_a_log_that_was_ended_can_begin_anew(watched):
    watched.scan.stop()
    watched.scan.stop()
    watched.writer.do(do="write", pages=[1], version=1)
    watched.scan = DirtyScan(watched.uffd, watched.pagemap, watched.writer.hva, PAGES * PAGE)

    assert watched.dirty() == set()
    watched.writer.do(do="write", pages=[2], version=1)
    assert watched.dirty() == {2}


def test_a_bitmap_that_is_too_short_is_refused(watched):
    with pytest.raises(ValueError, match="512"):
        watched.scan.sync(bytearray(504))


def test_a_process_that_has_ended(watched):
    watched.writer.process.kill()
    watched.writer.process.wait()

    with pytest.raises(DirtyScanError) as raised:
        watched.dirty()

    assert raised.value.errno == errno.ESRCH
    with pytest.raises(GuestGoneError):
        open_pagemap(watched.writer.pid)


def test_a_range_that_is_not_there(watched):
    with pytest.raises(DirtyScanError):
        DirtyScan(watched.uffd, watched.pagemap, 1 << 46, PAGE)
