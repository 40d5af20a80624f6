"""The page call through TLS between native and stock gRPC, which seals with another library: the same pages."""

import contextlib
from concurrent import futures

import grpc
import pytest

from migrate.config import Endpoint
from migrate.daemon.status import ErrorInterceptor
from migrate.errors import ChannelError, PeerNotTrustedError
from migrate.native.compression import Compression
from migrate.pager.fetcher import FetchTerms, make_fetcher
from migrate.pageserver.servicer import PageServicer
from migrate.telemetry.clock import Clock
from migrate.v1 import page_service_pb2_grpc as rpc
from migrate.v1 import types_pb2 as types
from tests.harness.certificates import Authority
from tests.harness.destination import Destination, check_recovers, failure_of
from tests.harness.memory import (
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
uffd = pytest.mark.uffd
# Of a stream, and of a frame.
WINDOWS = {"small": (8 << 10, 16 << 10), "usual": (None, None), "big": (16 << 20, 1 << 20)}
windows = pytest.mark.parametrize("window", WINDOWS)


def options_of(window):
    lookahead_bytes, frame_bytes = WINDOWS[window]
    if lookahead_bytes is None:
        return ()
    return (
        ("grpc.http2.lookahead_bytes", lookahead_bytes),
        ("grpc.http2.max_frame_size", frame_bytes),
        ("grpc.http2.bdp_probe", 0),
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def host(authority):
    return authority.issue()


@pytest.fixture(scope="module")
def tls(host):
    made = host.native()
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(tls):
    """A memory behind the native server."""
    made = ServedMemory(PAGES, tls=tls, peer_name="one.example")
    made.source.take_digests()
    yield made
    made.close()


@contextlib.contextmanager
def stock_server(exports, credentials, options=()):
    """The stock server of the same exports; its endpoint."""
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[ErrorInterceptor()], options=options)
    rpc.add_PageServiceServicer_to_server(PageServicer(exports), server)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield Endpoint("127.0.0.1", port)
    finally:
        server.stop(0).wait()


@pytest.fixture
def destination():
    made = Destination(PAGES)
    yield made
    made.close()


# ---- a stock client ----


@windows
@pytest.mark.parametrize("size", [1, 3, 64, 256])
def test_stock_client_gets_every_page(served, host, window, size):
    asked = runs_of(PAGES, size) if size > 1 else [(page, 1) for page in range(0, PAGES, 5)]
    got = stock_fetch(served.endpoint, asked, credentials=host.channel_credentials(), options=options_of(window))
    assert got == [served.memory.run(*each) for each in asked]


def test_stock_client_gets_compressed_pages(tls, host):
    compressing = ServedMemory(PAGES, tls=tls, compression=Compression.ZSTD)
    try:
        code, _, replies = stock_status(
            compressing.endpoint, requests_for(runs_of(PAGES)), credentials=host.channel_credentials()
        )
        assert code is grpc.StatusCode.OK
        assert any(each.WhichOneof("content") == "compressed" for each in replies)
        assert pages_of(replies, runs_of(PAGES)) == [compressing.memory.run(*each) for each in runs_of(PAGES)]
    finally:
        compressing.close()


@pytest.mark.parametrize("role", ["operator", "viewer", None])
def test_stock_client_that_is_no_host_gets_nothing(served, authority, role):
    other = authority.issue("other", role=role)
    before = served.server.counters()
    code, _, replies = stock_status(
        served.endpoint, requests_for([(1, 1)]), timeout=3, credentials=other.channel_credentials()
    )
    assert code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert replies == []
    wait_until(
        lambda: served.server.counters().handshakes_failed > before.handshakes_failed, 10, "the refusal to be counted"
    )
    after = served.server.counters()
    assert (after.calls, after.data_pages) == (before.calls, before.data_pages)


def test_stock_client_of_another_host_is_denied_as_with_a_wrong_token(served, authority):
    other = authority.issue("other", names=("two.example", "127.0.0.1"))
    code, details, replies = stock_status(
        served.endpoint, requests_for([(1, 1)]), credentials=other.channel_credentials()
    )
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert "for another host" in details
    assert replies == []


@pytest.mark.parametrize("has_certificate", [False, True], ids=["no certificate", "plain text"])
def test_stock_client_without_a_certificate_gets_nothing(served, host, has_certificate):
    credentials = None if has_certificate else grpc.ssl_channel_credentials(host.ca.read_bytes())
    code, _, replies = stock_status(served.endpoint, requests_for([(1, 1)]), timeout=3, credentials=credentials)
    assert code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert replies == []


# ---- a stock server ----


@uffd
@windows
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
def test_native_client_gets_every_page_of_a_stock_server(served, host, tls, destination, window, verify):
    with stock_server(served.exports, host.server_credentials(), options_of(window)) as endpoint:
        check_recovers(destination, served.memory, endpoint, tls=tls, verify=verify)
        counters = destination.pager.counters()
        data_pages = counters.urgent_pages + counters.background_pages
        assert counters.verified_pages == (data_pages if verify else 0)
        destination.fetch.stop()


@uffd
def test_native_client_does_not_trust_a_stock_server_of_another_name(served, authority, tls, destination):
    other = authority.issue("other", names=("two.example",))
    with stock_server(served.exports, other.server_credentials()) as endpoint:
        error = failure_of(destination, endpoint, tls=tls)
        assert type(error) is PeerNotTrustedError
        assert "wrong name" in error.message


@uffd
def test_native_client_of_an_unknown_authority_gets_nothing_of_a_stock_server(served, host, destination, tmp_path):
    stranger = Authority(tmp_path / "stranger").issue().trusting(host).native()
    with stock_server(served.exports, host.server_credentials()) as endpoint:
        error = failure_of(destination, endpoint, tls=stranger)
        stranger.close()
        assert isinstance(error, ChannelError)
        assert "it may not trust our certificate" in error.message  # which it does not say


# ---- native at both ends, as a daemon uses it ----


@uffd
@pytest.mark.parametrize("compression", [Compression.NONE, Compression.ZSTD])
def test_fetcher_takes_tls_in_its_terms(tls, compression):
    made = ServedMemory(PAGES, tls=tls, compression=compression, peer_name="localhost")
    made.source.take_digests()
    destination = Destination(PAGES)
    errors = []
    # A name, which the certificate is for.
    endpoint = Endpoint("localhost", made.endpoint.port)
    terms = FetchTerms(
        endpoint, MIGRATION_ID, TOKEN, verify=True, max_bandwidth_bytes_per_s=0, compression=compression, tls=tls
    )
    fetcher = make_fetcher(types.PAGE_TRANSPORT_NATIVE_GRPC, terms, Clock(), errors.append)
    try:
        fetcher.connect()
        fetcher.start(destination.pager)
        fetcher.join()
        assert errors == []
        destination.check_all(made.memory)
        data_pages = sum(any(made.memory.page(page)) for page in range(PAGES))
        assert (fetcher.wire_bytes > data_pages * PAGE) == (compression is Compression.NONE)
        wait_until(lambda: made.server.counters().connections_now == 0, 10, "both connections to end")
    finally:
        fetcher.close()
        destination.close()
        made.close()


@uffd
def test_fetcher_that_is_not_trusted_says_what_to_do(served, authority):
    viewer = authority.issue("viewer", role="viewer").native()
    terms = FetchTerms(served.endpoint, MIGRATION_ID, TOKEN, verify=False, max_bandwidth_bytes_per_s=0, tls=viewer)
    fetcher = make_fetcher(types.PAGE_TRANSPORT_NATIVE_GRPC, terms, Clock(), lambda _: None)
    try:
        with pytest.raises(PeerNotTrustedError) as caught:
            fetcher.connect()
        assert "do not trust each other" in caught.value.message
        assert "one authority" in caught.value.remedy
    finally:
        fetcher.close()
        viewer.close()
