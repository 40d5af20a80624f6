"""Native and stock gRPC at either end of the page call: the same pages, the same errors, whoever talks to whom."""

import contextlib
import os
import socket
import threading
from concurrent import futures

import grpc
import h2.config
import h2.connection
import h2.events
import pytest

from migrate.config import Endpoint
from migrate.daemon.status import ErrorInterceptor
from migrate.errors import ChannelError, IntegrityError, RemoteProtocolError
from migrate.native._native import lib
from migrate.native.compression import Compression
from migrate.pager.fetcher import FetchTerms, NativeFetcher, make_fetcher
from migrate.pager.grpcio_fetcher import GrpcioFetcher
from migrate.pageserver.servicer import PageServicer
from migrate.telemetry.clock import Clock
from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import page_service_pb2_grpc as rpc
from migrate.v1 import types_pb2 as types
from tests.harness.destination import Destination
from tests.harness.h2_peer import PATH, PeerStream, prefixed
from tests.harness.memory import (
    METADATA,
    MIGRATION_ID,
    PAGE,
    TOKEN,
    ServedMemory,
    pages_of,
    requests_for,
    runs_of,
    stock_fetch,
    stock_status,
)
from tests.harness.waiting import wait_until

PAGES = 1024
TRANSPORTS = {"native": types.PAGE_TRANSPORT_NATIVE_GRPC, "grpcio": types.PAGE_TRANSPORT_GRPCIO}
uffd = pytest.mark.uffd
servers = pytest.mark.parametrize("server", ["native", "grpcio"])
clients = pytest.mark.parametrize("client", list(TRANSPORTS))


@pytest.fixture(scope="module")
def served():
    """One memory behind both servers, as in a daemon."""
    made = ServedMemory(PAGES)
    made.source.take_digests()
    stock = grpc.server(futures.ThreadPoolExecutor(8), interceptors=[ErrorInterceptor()])
    rpc.add_PageServiceServicer_to_server(PageServicer(made.exports), stock)
    made.endpoints = {
        "native": made.endpoint,
        "grpcio": Endpoint("127.0.0.1", stock.add_insecure_port("127.0.0.1:0")),
    }
    stock.start()
    yield made
    stock.stop(0).wait()
    made.close()


class Fetching:
    """A destination that fetches with the transport of that name; the error, if there was one."""

    def __init__(
        self,
        client,
        endpoint,
        *,
        pages=PAGES,
        verify=False,
        cap=0,
        migration_id=MIGRATION_ID,
        token=TOKEN,
        compression=Compression.NONE,
    ):
        self.destination = Destination(pages)
        self.errors = []
        terms = FetchTerms(endpoint, migration_id, token, verify, cap, compression)
        self.fetcher = make_fetcher(TRANSPORTS[client], terms, Clock(), self.errors.append)
        assert isinstance(self.fetcher, NativeFetcher if client == "native" else GrpcioFetcher)

    def __enter__(self):
        self.fetcher.connect()
        self.fetcher.start(self.destination.pager)
        return self

    def __exit__(self, *_):
        self.destination.pager.stop()
        self.fetcher.close()
        self.destination.close()

    def error(self):
        return wait_until(lambda: self.errors, 10, "the failure to be told")[0]


# ---- pages ----


@uffd
@servers
@clients
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
def test_every_page_arrives_urgent_or_in_the_background(served, server, client, verify):
    touched = (900, 1, 63, 5, 1023, 128, 500, 2)
    with Fetching(client, served.endpoints[server], verify=verify, cap=8_000_000) as fetching:
        destination = fetching.destination
        destination.touch(*touched)
        destination.check_touched(served.memory, len(touched))
        fetching.fetcher.join()
        assert fetching.errors == []
        destination.check_all(served.memory)
        counters = destination.pager.counters()
        assert counters.urgent_pages > 0
        assert counters.background_pages > 0
        data_pages = sum(any(served.memory.page(page)) for page in range(PAGES))
        assert counters.zero_pages == PAGES - data_pages
        assert counters.urgent_pages + counters.background_pages == data_pages
        assert counters.verified_pages == (data_pages if verify else 0)
        assert fetching.fetcher.wire_bytes > data_pages * PAGE


@pytest.fixture
def compressing():
    made = ServedMemory(PAGES, compression=Compression.ZSTD)
    made.source.take_digests()
    yield made
    made.close()


@uffd
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
def test_every_page_arrives_compressed_where_that_was_agreed_on(compressing, verify):
    touched = (900, 1, 63, 5, 1023, 128, 500, 2)
    terms = {"verify": verify, "cap": 8_000_000, "compression": Compression.ZSTD}
    with Fetching("native", compressing.endpoint, **terms) as fetching:
        destination = fetching.destination
        destination.touch(*touched)
        destination.check_touched(compressing.memory, len(touched))
        fetching.fetcher.join()
        assert fetching.errors == []
        destination.check_all(compressing.memory)
        counters = destination.pager.counters()
        data_pages = counters.urgent_pages + counters.background_pages
        assert counters.verified_pages == (data_pages if verify else 0)
        assert fetching.fetcher.wire_bytes < data_pages * PAGE / 4


@uffd
@clients
def test_compressed_runs_that_were_not_agreed_on_are_a_protocol_error(compressing, client):
    with Fetching(client, compressing.endpoint) as fetching:
        error = fetching.error()
    assert type(error) is RemoteProtocolError
    assert "compressed run, but no compression was agreed on" in error.message


@uffd
@servers
@clients
def test_zero_pages_are_not_populated(served, server, client):
    with Fetching(client, served.endpoints[server]) as fetching:
        fetching.fetcher.join()
        counters = fetching.destination.pager.counters()
        assert fetching.destination.placed_bytes == (PAGES - counters.zero_pages) * PAGE


@uffd
@servers
@clients
def test_region_that_ends_within_a_hole_of_the_source_is_filled(served, server, client):
    """The hole is told as far as it goes, which is beyond the smaller region."""
    pages = PAGES - 50
    with Fetching(client, served.endpoints[server], pages=pages) as fetching:
        fetching.fetcher.join()
        assert fetching.errors == []
        fetching.destination.check_all(served.memory)


@uffd
@servers
@clients
def test_memory_that_changed_after_its_digests_is_an_integrity_error(server, client):
    changed = ServedMemory(64)
    stock = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_PageServiceServicer_to_server(PageServicer(changed.exports), stock)
    port = stock.add_insecure_port("127.0.0.1:0")
    stock.start()
    try:
        changed.source.take_digests()
        os.pwrite(changed.memory.fd, b"\x01" * PAGE, 10 * PAGE)
        endpoint = changed.endpoint if server == "native" else Endpoint("127.0.0.1", port)
        with Fetching(client, endpoint, pages=64, verify=True) as fetching:
            assert isinstance(fetching.error(), IntegrityError)
    finally:
        stock.stop(0).wait()
        changed.close()


@servers
@pytest.mark.parametrize("size", [1, 3, 4, 5, 64, 256])
def test_stock_stub_gets_the_same_replies_from_both_servers(served, server, size):
    """The messages themselves, not only what they add up to."""
    asked = runs_of(PAGES, size) if size > 1 else [(page, 1) for page in range(0, PAGES, 5)]
    assert stock_fetch(served.endpoints[server], asked) == [served.memory.run(*each) for each in asked]
    _, _, replies = stock_status(served.endpoints[server], requests_for(asked))
    _, _, reference = stock_status(served.endpoints["grpcio"], requests_for(asked))
    assert replies == reference


@servers
def test_stock_clients_share_nothing(served, server):
    """Several at once, each with an order of its own."""
    orders = [runs_of(PAGES, 16), runs_of(PAGES, 48)[::-1], [(page, 1) for page in range(1000, 0, -3)]]
    with futures.ThreadPoolExecutor(len(orders)) as pool:
        for asked, got in zip(
            orders, pool.map(lambda order: stock_fetch(served.endpoints[server], order), orders), strict=True
        ):
            assert got == [served.memory.run(*each) for each in asked]


# ---- errors ----

BAD_CALLS = {
    "wrong token": ((*METADATA[:1], ("authorization", "Bearer x")), (1, 1, 0)),
    "no token": (METADATA[:1], (1, 1, 0)),
    "other scheme": ((*METADATA[:1], ("authorization", "Basic t")), (1, 1, 0)),
    "unknown migration": ((("migration-id", "other"), METADATA[1]), (1, 1, 0)),
    "no migration": (METADATA[1:], (1, 1, 0)),
    "another region": (METADATA, (1, 1, 1)),
    "no page": (METADATA, (1, 0, 0)),
    "257 pages": (METADATA, (1, 257, 0)),
    "behind the end": (METADATA, (PAGES, 1, 0)),
    "across the end": (METADATA, (PAGES - 1, 2, 0)),
    "far away": (METADATA, (2**64 - 1, 1, 0)),
}
RANGES = ("no page", "257 pages", "behind the end", "across the end", "far away")
CODES = {
    **dict.fromkeys(("wrong token", "no token", "other scheme"), grpc.StatusCode.PERMISSION_DENIED),
    **dict.fromkeys(("unknown migration", "no migration"), grpc.StatusCode.NOT_FOUND),
    **dict.fromkeys(("another region", *RANGES), grpc.StatusCode.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_both_servers_refuse_with_the_same_code(served, name):
    metadata, (first, count, region) = BAD_CALLS[name]
    bad = pb.FetchPagesRequest(request_id=1, first_page=first, page_count=count, region=region)
    for endpoint in served.endpoints.values():
        code, _, replies = stock_status(endpoint, [bad], metadata)
        assert code is CODES[name]
        assert replies == []


@pytest.mark.parametrize("name", BAD_CALLS)
def test_both_servers_refuse_with_the_same_words(served, name):
    metadata, (first, count, region) = BAD_CALLS[name]
    bad = pb.FetchPagesRequest(request_id=1, first_page=first, page_count=count, region=region)
    native, stock = (stock_status(served.endpoints[server], [bad], metadata)[1] for server in ("native", "grpcio"))
    assert native == stock


@servers
@pytest.mark.parametrize("name", ["another region", *RANGES])
def test_replies_before_a_bad_request_are_delivered(served, server, name):
    asked = [(0, 256), (300, 7)]
    _, (first, count, region) = BAD_CALLS[name]
    bad = pb.FetchPagesRequest(request_id=3, first_page=first, page_count=count, region=region)
    code, _, replies = stock_status(served.endpoints[server], [*requests_for(asked), bad])
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert pages_of(replies, asked) == [served.memory.run(*each) for each in asked]


@uffd
@servers
@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"token": "x"}, "PERMISSION_DENIED: the token is not this migration's"),
        ({"migration_id": "other"}, "NOT_FOUND: no pages are served here for migration 'other'"),
        ({"pages": PAGES + 8}, "INVALID_ARGUMENT: "),
    ],
    ids=["token", "migration", "range"],
)
def test_both_clients_tell_the_servers_error_in_the_same_words(served, server, terms, words):
    for client in TRANSPORTS:
        with Fetching(client, served.endpoints[server], **terms) as fetching:
            error = fetching.error()
            assert type(error) is ChannelError
            assert words in error.message
            assert str(served.endpoints[server]) in error.message


@pytest.mark.parametrize("client", ["native", pytest.param("grpcio", marks=pytest.mark.thorough)])
def test_nobody_there_is_a_channel_error_with_a_remedy(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    terms = FetchTerms(Endpoint("127.0.0.1", port), MIGRATION_ID, TOKEN, verify=False, max_bandwidth_bytes_per_s=0)
    fetcher = make_fetcher(TRANSPORTS[client], terms, Clock(), lambda _: None)
    try:
        with pytest.raises(ChannelError) as caught:
            fetcher.connect()
        assert "--page-listen" in caught.value.remedy
    finally:
        fetcher.close()


# ---- a third implementation of HTTP/2, which forgives nothing ----


class StrictPeer:
    """h2 at one end of a connection: it raises when the other end breaks a rule."""

    def __init__(self, connected, *, is_client):
        self.socket = connected
        self.socket.settimeout(10)
        self.connection = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=is_client, header_encoding="utf-8")
        )
        self.connection.local_settings.max_frame_size = 1 << 20
        self.connection.initiate_connection()
        self.streams = {}
        self.flush()

    def flush(self):
        self.socket.sendall(self.connection.data_to_send())

    def receive(self):
        """Take in what comes; the events that matter to a server."""
        data = self.socket.recv(1 << 16)
        events = self.connection.receive_data(data) if data else [h2.events.ConnectionTerminated()]
        for event in events:
            stream = self.streams.setdefault(getattr(event, "stream_id", 0) or 0, PeerStream())
            if isinstance(event, h2.events.DataReceived):
                stream.data += event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                stream.blocks.append(dict(event.headers))
            elif isinstance(event, h2.events.StreamEnded):
                stream.is_ended = True
        self.flush()
        return events

    def send(self, stream_id, data):
        """As far as the windows go; waits for them to open."""
        while data:
            room = min(
                self.connection.local_flow_control_window(stream_id), self.connection.max_outbound_frame_size, len(data)
            )
            if room <= 0:
                self.receive()
                continue
            self.connection.send_data(stream_id, data[:room])
            self.flush()
            data = data[room:]


def test_native_server_satisfies_a_strict_client(served):
    asked = [*runs_of(PAGES), (3, 1), (900, 5)] * 2
    with socket.create_connection((served.endpoint.host, served.endpoint.port)) as connected:
        peer = StrictPeer(connected, is_client=True)
        fields = [(":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "x")]
        fields += [("content-type", "application/grpc"), ("te", "trailers"), *METADATA]
        for stream_id in (1, 3, 5):
            peer.connection.send_headers(stream_id, fields)
            peer.send(stream_id, b"".join(map(prefixed, requests_for(asked))))
            peer.connection.end_stream(stream_id)
            peer.flush()
        while not all(peer.streams.get(i, PeerStream()).is_ended for i in (1, 3, 5)):
            peer.receive()
        for stream_id in (1, 3, 5):
            stream = peer.streams[stream_id]
            assert stream.status == (0, "")
            assert pages_of(stream.responses(), asked) == [served.memory.run(*each) for each in asked]
        peer.connection.close_connection()
        peer.flush()


class StrictSource:
    """Answers with zero runs, on h2; every rule that the client breaks is an error."""

    def __init__(self):
        self.errors, self.threads = [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("127.0.0.1", self.listener.getsockname()[1])
        self.accepting = threading.Thread(target=self.accept)
        self.accepting.start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self.listener.accept()
                self.threads.append(threading.Thread(target=self.serve, args=(connected,)))
                self.threads[-1].start()

    def serve(self, connected):
        try:
            with connected:
                self.serve_peer(StrictPeer(connected, is_client=False))
        except ConnectionError:
            pass
        except Exception as error:  # noqa: BLE001 - shown by close, in the test's thread
            self.errors.append(error)

    def serve_peer(self, peer):
        while True:
            for event in peer.receive():
                if isinstance(event, h2.events.ConnectionTerminated):
                    return
                if isinstance(event, h2.events.RequestReceived):
                    peer.connection.send_headers(
                        event.stream_id, [(":status", "200"), ("content-type", "application/grpc")]
                    )
                elif isinstance(event, h2.events.DataReceived):
                    self.answer(peer, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    peer.connection.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
            peer.flush()

    def answer(self, peer, stream_id):
        stream = peer.streams[stream_id]
        for raw in stream.raw_messages():
            del stream.data[: len(prefixed(raw))]
            request = pb.FetchPagesRequest.FromString(raw)
            reply = pb.FetchPagesResponse(
                request_id=request.request_id,
                first_page=request.first_page,
                page_count=request.page_count,
                data=b"\x05" * (request.page_count * PAGE),
            )
            peer.send(stream_id, prefixed(reply))

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.accepting.join()
        self.listener.close()
        for thread in self.threads:
            thread.join()
        assert self.errors == []


@uffd
def test_native_client_satisfies_a_strict_server():
    source = StrictSource()
    destination = Destination(PAGES)
    try:
        destination.start(source.endpoint)
        destination.touch(3, 900)
        destination.wait()
        assert destination.pager.counters().missing_pages == 0
        assert destination.placed_bytes == PAGES * PAGE
    finally:
        destination.close()
        source.close()


def test_limits_are_the_same_in_c_and_python():
    from migrate import config

    assert lib.MIG_REQUEST_PAGES_MAX == config.REQUEST_PAGES_MAX
