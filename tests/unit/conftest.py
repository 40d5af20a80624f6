"""A native page server and its peers; a native fetch's destination and the sources that it meets."""

import pytest

from migrate.native.pageserver import PageServerPatience
from tests.harness.destination import PAGES as FETCHED_PAGES
from tests.harness.destination import Destination
from tests.harness.fake_source import FakeSource
from tests.harness.h2_peer import Peer
from tests.harness.memory import Memory, ServedMemory, runs_of, stock_fetch
from tests.harness.page_server import PAGES
from tests.harness.waiting import wait_until


@pytest.fixture
def patience():
    """How long the server bears with peers: as usual, unless a test says otherwise."""
    return PageServerPatience.usual()


@pytest.fixture
def served(patience):
    """The server; whatever a test did to it, a stock client is served at the end, and nobody is left."""
    made = ServedMemory(PAGES, patience=patience)
    try:
        yield made
        asked = [*runs_of(PAGES), *((page, 1) for page in range(0, PAGES, 97))]
        got = stock_fetch(made.endpoint, asked)
        assert got == [made.memory.run(first, count) for first, count in asked]
        wait_until(lambda: made.server.counters().connections_now == 0, 10, "every connection to end")
    finally:
        made.close()


@pytest.fixture
def peer(served):
    with Peer.connect(served.endpoint) as made:
        yield made


@pytest.fixture
def caller(peer):
    """A peer that has said hello and begun a call on stream 1."""
    peer.greet_server()
    peer.call()
    return peer


@pytest.fixture
def memory():
    made = Memory(FETCHED_PAGES)
    yield made
    made.close()


@pytest.fixture
def destination():
    made = Destination(FETCHED_PAGES)
    yield made
    made.close()


@pytest.fixture
def source(memory):
    """Makes fake sources of the memory, which are closed at the end; what went wrong in them fails the test."""
    made = []

    def make(**behaviour):
        made.append(FakeSource(memory, **behaviour))
        return made[-1]

    yield make
    for each in made:
        each.close()
