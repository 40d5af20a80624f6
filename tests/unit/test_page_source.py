"""Reading a memfd as runs: data, zero pages, holes; digests."""

import os

import pytest

from migrate.errors import ConfigError
from migrate.native._native import ffi, lib
from migrate.native.page_source import PageSource, RunBuffer

PAGE = 4096
PAGES = 1024


@pytest.fixture
def memfd():
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE)
    yield fd
    os.close(fd)


def put(memfd, page, byte):
    os.pwrite(memfd, bytes([byte]) * PAGE, page * PAGE)


def read(memfd, first, count):
    with PageSource(memfd, PAGES) as source:
        return [(r.first_page, r.count_pages, r.data) for r in source.read(first, count, RunBuffer(256))]


def test_hole_is_told_as_far_as_it_goes_and_stays_a_hole(memfd):
    put(memfd, 900, 1)
    assert read(memfd, 10, 5) == [(10, 890, None)]
    assert os.fstat(memfd).st_blocks * 512 == PAGE


def test_hole_at_the_end_reaches_the_end(memfd):
    assert read(memfd, 1000, 24) == [(1000, 24, None)]


def test_data_zero_pages_and_holes_are_runs(memfd):
    put(memfd, 1, 7)
    put(memfd, 2, 8)
    put(memfd, 3, 0)
    put(memfd, 6, 9)
    put(memfd, 7, 0)
    assert read(memfd, 0, 8) == [
        (0, 1, None),
        (1, 2, bytes([7]) * PAGE + bytes([8]) * PAGE),
        (3, 3, None),
        (6, 1, bytes([9]) * PAGE),
        # The zero page at the end of the request runs into the hole behind it only if the hole was looked at.
        (7, 1, None),
    ]


def test_page_that_is_zero_but_for_its_last_byte_is_data(memfd):
    os.pwrite(memfd, b"\x01", 5 * PAGE - 1)
    assert read(memfd, 4, 1) == [(4, 1, bytes(PAGE - 1) + b"\x01")]


@pytest.mark.parametrize(("first", "count"), [(0, 0), (0, 257), (PAGES, 1), (PAGES - 1, 2), (-1, 1), (2**62, 1)])
def test_request_that_cannot_be_answered_is_refused(memfd, first, count):
    with pytest.raises(ConfigError):
        read(memfd, first, count)


def test_digests_are_of_the_moment_they_were_taken(memfd):
    put(memfd, 1, 7)
    put(memfd, 2, 8)
    pages = [bytes([7]) * PAGE, bytes([8]) * PAGE]
    digests = [lib.mig_digest_page(ffi.from_buffer(page)) for page in pages]
    with PageSource(memfd, PAGES) as source:
        memory_digest = source.take_digests()
        assert memory_digest == sum(lib.mig_digest_memory_term(1 + i, d) for i, d in enumerate(digests)) % 2**64
        put(memfd, 2, 9)
        _, run, _ = source.read(0, 4, RunBuffer(256))
    assert run.data == pages[0] + bytes([9]) * PAGE
    assert run.digest == lib.mig_digest_run(ffi.new("uint64_t[]", digests), 2)
