"""A small destination: memory of another process that is armed, its pager, and a fetch into it."""

import contextlib
import os

import pytest

from migrate.native.fetcher import NativeFetch
from migrate.native.pager import Pager
from tests.harness.memory import MIGRATION_ID, PAGE, TOKEN
from tests.harness.toucher import Toucher, sha256

PAGES = 256
CONNECT_US = 5_000_000
WAIT_US = 20_000_000


class Destination:
    """Touches pages and compares them. `fetch` is the one that was started last."""

    def __init__(self, pages):
        self.toucher = Toucher(pages)
        self.pager = Pager(self.toucher.uffd, self.toucher.hva, pages)
        self.pages = pages
        self._stack = contextlib.ExitStack()
        self.fetch = None

    def start(self, endpoint, **terms):
        """Connect, and begin to fetch everything."""
        self.fetch = self.made(endpoint, **terms)
        self.fetch.connect(CONNECT_US)
        self.fetch.start(self.pager)
        return self.fetch

    def made(self, endpoint, *, migration_id=MIGRATION_ID, token=TOKEN, **terms):
        """A fetch that has not connected; it is closed with us."""
        fetch = NativeFetch(endpoint.host, endpoint.port, migration_id, token, **terms)
        self._stack.callback(fetch.close)
        return fetch

    def wait(self):
        """Until every page has come and both calls have ended."""
        assert self.fetch.wait(WAIT_US), "pages stopped coming"

    def touch(self, *pages):
        """Have pages read; does not wait for them."""
        for page in pages:
            self.toucher.touch(page)

    def check_touched(self, memory, count):
        """Take in so many results of touches; each must be the memory's page."""
        for _ in range(count):
            page, digest = self.toucher.result()
            assert digest == sha256(memory.page(page)), f"page {page} is not what the source has"

    def check_all(self, memory):
        """Every page of the guest is the memory's, by what is placed and by what a touch finds."""
        assert self.pager.counters().missing_pages == 0
        step = max(1, self.pages // 64)
        touched = range(0, self.pages, step)
        self.touch(*touched)
        self.check_touched(memory, len(touched))
        placed = os.pread(self.toucher.memfd, self.pages * PAGE, 0)
        assert placed == memory.run(0, self.pages)

    @property
    def placed_bytes(self):
        """How much of the guest's memory is populated."""
        return os.fstat(self.toucher.memfd).st_blocks * 512

    def close(self):
        if self.fetch is not None:
            self.fetch.stop()
        self._stack.close()
        self.pager.close()
        self.toucher.close()


def check_recovers(destination, memory, endpoint, **terms):
    """All pages come right, faults included, over more connections than two."""
    fetch = destination.start(endpoint, **terms)
    touched = (1, 2, 3, 5, 100, 200, 255)
    destination.touch(*touched)
    destination.wait()
    destination.check_touched(memory, len(touched))
    destination.check_all(memory)
    return fetch.counters()


def failure_of(destination, endpoint, **terms):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller looks at the type
        destination.start(endpoint, **terms).wait(20_000_000)
    return caught.value
