"""A source that goes away, as both transports see it: when they notice, and that another fetch brings the rest."""

import contextlib
import threading
import time
from concurrent import futures

import grpc
import pytest

from migrate.config import Endpoint
from migrate.errors import ChannelError, MigrateError
from migrate.pager.fetcher import FetchTerms, make_fetcher
from migrate.pageserver.servicer import PageServicer
from migrate.telemetry.clock import Clock
from migrate.v1 import page_service_pb2_grpc as rpc
from migrate.v1 import types_pb2 as types
from tests.harness.destination import Destination
from tests.harness.fake_source import FakeSource
from tests.harness.memory import MIGRATION_ID, TOKEN, Memory, ServedMemory
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd

PAGES = 1024
PEER_TIMEOUT_US = 1_000_000
clients = pytest.mark.parametrize("client", [types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO])


@pytest.fixture
def destination():
    made = Destination(PAGES)
    yield made
    made.pager.stop()
    made.close()


@pytest.fixture
def memory():
    made = Memory(PAGES)
    yield made
    made.close()


@pytest.fixture
def fetcher_of(destination):
    """Makes fetchers, which are closed before their pager; each with the list of its errors."""
    made = []

    def make(client, endpoint, peer_timeout_us=PEER_TIMEOUT_US):
        errors: list[MigrateError] = []
        terms = FetchTerms(
            endpoint,
            MIGRATION_ID,
            TOKEN,
            verify=False,
            max_bandwidth_bytes_per_s=0,
            peer_timeout_us=peer_timeout_us,
        )
        made.append(make_fetcher(client, terms, Clock(), errors.append))
        return made[-1], errors

    yield make
    destination.pager.stop()
    for fetcher in made:
        fetcher.close()


class Silent:
    """A source that answers so many requests of the background, then neither speaks on both links nor listens."""

    def __init__(self, memory, answers):
        self._end = threading.Event()
        self._answers = answers
        self.silent_since = []
        self.source = FakeSource(memory, on_request=self._on_request)

    def _on_request(self, _, request):
        if request.page_count > 1:
            self._answers -= 1
            if self._answers >= 0:
                return False
        self.silent_since.append(time.monotonic())
        if len(self.silent_since) == 2:
            self.source.refuse_connections()
        self._end.wait(20)
        return True

    def close(self):
        self._end.set()
        self.source.close()


@pytest.fixture
def silent(memory):
    """Makes silent sources, which are closed at the end."""
    made = []

    def make(answers):
        made.append(Silent(memory, answers))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("client", "shortest_s", "longest_s"),
    [
        (types.PAGE_TRANSPORT_NATIVE_GRPC, 0.9, 1.4),
        # A PING may have been under way already, or have to wait: grpcio sends one a second at most.
        (types.PAGE_TRANSPORT_GRPCIO, 0.4, 1.9),
    ],
)
def test_loss_of_a_source_that_falls_silent_is_known_within_the_peer_timeout(
    destination, fetcher_of, silent, client, shortest_s, longest_s
):
    lost = silent(answers=2)
    fetcher, errors = fetcher_of(client, lost.source.endpoint)
    fetcher.connect()
    fetcher.start(destination.pager)
    destination.touch(200, 800)
    wait_until(lambda: errors, 5, "the failure to be told")
    assert shortest_s < time.monotonic() - lost.silent_since[1] < longest_s
    assert type(errors[0]) is ChannelError
    assert str(lost.source.endpoint) in errors[0].message


@clients
@pytest.mark.parametrize("second", [types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO])
@pytest.mark.parametrize("answers", [0, 3])
def test_second_fetch_brings_all_that_the_first_one_had_asked_for(
    destination, memory, fetcher_of, silent, client, second, answers
):
    """Its source dies with requests in flight, two faults among them; one more comes while nobody fetches."""
    lost = silent(answers)
    fetcher, errors = fetcher_of(client, lost.source.endpoint, 400_000)
    fetcher.connect()
    fetcher.start(destination.pager)
    destination.touch(200, 800)
    wait_until(lambda: errors, 5, "the failure to be told")
    fetcher.close()
    destination.pager.ask_again()
    destination.touch(500)

    with contextlib.closing(FakeSource(memory)) as source:
        fetcher, errors = fetcher_of(second, source.endpoint)
        fetcher.connect()
        fetcher.start(destination.pager)
        assert destination.pager.wait_done(20_000_000)
        fetcher.join()
        destination.check_touched(memory, 3)
        destination.check_all(memory)
        assert errors == []
    counters = destination.pager.counters()
    assert counters.duplicate_pages == 0
    assert counters.zero_pages + counters.urgent_pages + counters.background_pages == PAGES


@pytest.mark.thorough
def test_idle_stream_to_a_server_of_ours_in_grpcio_is_kept(destination, fetcher_of):
    """Options as those of a daemon: a stock server takes so many PINGs for an attack."""
    served = ServedMemory(PAGES)
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.http2.max_ping_strikes", 0)])
    rpc.add_PageServiceServicer_to_server(PageServicer(served.exports), server)
    endpoint = Endpoint("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
    server.start()
    try:
        destination.pager.begin_precopy(destination.toucher.memfd)
        fetcher, errors = fetcher_of(types.PAGE_TRANSPORT_GRPCIO, endpoint, 200_000)
        fetcher.connect()
        fetcher.start(destination.pager)
        assert destination.pager.wait_done(20_000_000)
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 6, 10, "more PINGs than a stock server bears")
        destination.pager.go_live()
        fetcher.wake()
        fetcher.join()
        assert errors == []
    finally:
        server.stop(0).wait()
        served.close()
