"""Mutual TLS of the page call: whoever is not who it should be gets no page, is told why, and costs nobody else."""

import contextlib
import socket
import ssl

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from migrate.errors import ChannelError, PeerNotTrustedError
from tests.harness.certificates import FUTURE, PAST, Authority
from tests.harness.destination import PAGES, Destination, failure_of
from tests.harness.fake_source import FakeSource
from tests.harness.h2_peer import Peer, request
from tests.harness.memory import ServedMemory
from tests.harness.page_server import wait_logged
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
SERVER_ONLY, CLIENT_ONLY = (ExtendedKeyUsageOID.SERVER_AUTH,), (ExtendedKeyUsageOID.CLIENT_AUTH,)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Another authority."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def host(authority):
    return authority.issue()


@pytest.fixture
def tls(host):
    made = host.native()
    yield made
    made.close()


@pytest.fixture
def secured(tls):
    """A server; whatever a test did to it, an honest host is served at the end."""
    made = ServedMemory(PAGES, tls=tls)
    try:
        yield made
        check_fetches(made, tls)
        wait_until(lambda: made.server.counters().connections_now == 0, 10, "every connection to end")
    finally:
        made.close()


def check_fetches(served, tls, **terms):
    destination = Destination(PAGES)
    try:
        destination.start(served.endpoint, tls=tls, **terms)
        destination.touch(1, 100, 255)
        destination.wait()
        destination.check_touched(served.memory, 3)
        destination.check_all(served.memory)
    finally:
        destination.close()


def knock(endpoint, context):
    """Ask for a page, as if all were well; what was received, which is nothing of use."""
    with contextlib.suppress(OSError), Peer.connect(endpoint, context=context) as peer:
        peer.greet_server()
        peer.call()
        peer.ask(1, request(1), end=True)
        peer.receive_close()
        return bytes(peer.stream(1).data), peer.stream(1).blocks
    return b"", []


def check_refused(served, caplog, pattern):
    """It was told, counted, and never got as far as a call."""
    wait_logged(caplog, r"refused 127\.0\.0\.1 port \d+: " + pattern)
    counters = served.server.counters()
    assert (counters.handshakes_failed, counters.connections_failed) == (1, 1)
    assert (counters.calls, counters.data_pages) == (0, 0)


# ---- who may not be a client ----

CLIENTS = {
    "another authority": (
        lambda ours, theirs: theirs.issue().trusting(ours.issue("o")),
        "certificate signed by an unknown authority",
    ),
    "expired": (lambda ours, _: ours.issue("x", valid=PAST), "certificate has expired"),
    "not yet valid": (lambda ours, _: ours.issue("x", valid=FUTURE), "certificate is not yet valid"),
    "operator": (lambda ours, _: ours.issue("x", role="operator"), "wrong role"),
    "viewer": (lambda ours, _: ours.issue("x", role="viewer"), "wrong role"),
    "hostess": (lambda ours, _: ours.issue("x", role="hostess"), "wrong role"),
    "no role": (lambda ours, _: ours.issue("x", role=None), "wrong role"),
    "no names": (lambda ours, _: ours.issue("x", role=None, names=()), "wrong role"),
    "role as a DNS name": (lambda ours, _: ours.issue("x", role=None, names=("host",)), "wrong role"),
    "server's use": (lambda ours, _: ours.issue("x", usages=SERVER_ONLY), "certificate is not for this use"),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_client_with_a_bad_certificate_gets_nothing(secured, authority, stranger, caplog, name):
    make, pattern = CLIENTS[name]
    assert knock(secured.endpoint, make(authority, stranger).client_context()) == (b"", [])
    check_refused(secured, caplog, pattern)


CONTEXTS = {
    "no certificate": ({"has_certificate": False}, "no client certificate"),
    "TLS 1.2": ({"version": ssl.TLSVersion.TLSv1_2}, "the peer does not speak TLS 1.3"),
    "no ALPN": ({"protocols": ()}, "the peer does not speak HTTP/2"),
    "HTTP/1.1 alone": ({"protocols": ("http/1.1",)}, "the peer does not speak HTTP/2"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_client_that_does_not_keep_the_rules_gets_nothing(secured, host, caplog, name):
    options, pattern = CONTEXTS[name]
    assert knock(secured.endpoint, host.client_context(**options)) == (b"", [])
    check_refused(secured, caplog, pattern)


def test_client_that_offers_more_than_http2_is_served(secured, host):
    with Peer.connect(secured.endpoint, context=host.client_context(protocols=("http/1.1", "h2", "x"))) as peer:
        assert peer.socket.selected_alpn_protocol() == "h2"
        peer.greet_server()
        peer.call()
        peer.ask(1, request(1), end=True)
        assert peer.receive_end().responses()[0].data == secured.memory.page(1)


def test_plain_text_client_gets_nothing_and_is_named(secured, caplog):
    assert knock(secured.endpoint, None) == (b"", [])
    check_refused(secured, caplog, "plain text on a TLS port")


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00" + bytes(512), b"\x17\x03\x03\x00\x10" + bytes(16)])
def test_garbage_is_refused(secured, caplog, sent):
    with socket.create_connection((secured.endpoint.host, secured.endpoint.port)) as connected:
        connected.sendall(sent)
        connected.settimeout(10)
        with contextlib.suppress(ConnectionError):
            while connected.recv(4096):
                pass
    check_refused(secured, caplog, "")


def test_client_that_hangs_up_is_refused(secured, caplog):
    socket.create_connection((secured.endpoint.host, secured.endpoint.port)).close()
    check_refused(secured, caplog, "the peer closed the connection")


def test_tls_client_at_a_plain_text_server_is_named_at_both_ends(tls, caplog):
    served = ServedMemory(PAGES)
    destination = Destination(PAGES)
    try:
        error = failure_of(destination, served.endpoint, tls=tls)
        assert type(error) is PeerNotTrustedError
        assert "the peer answers in plain text, not in TLS" in error.message
        wait_logged(caplog, r"ended the connection of 127\.0\.0\.1 port \d+: TLS on a plain-text port")
    finally:
        destination.close()
        served.close()


def test_plain_text_fetch_from_a_tls_server_is_named(secured, destination):
    error = failure_of(destination, secured.endpoint)
    assert type(error) is ChannelError
    assert "the peer speaks TLS, we do not" in error.message


# ---- the list of peers ----


@pytest.fixture
def peers(tmp_path):
    made = tmp_path / "peers"
    made.mkdir()
    return made


def test_peer_is_revoked_by_removing_its_certificate(authority, host, peers, caplog):
    allowed, other = authority.issue("allowed"), authority.issue("other")
    (peers / "hosts.pem").write_bytes(host.cert.read_bytes() + allowed.cert.read_bytes())
    (peers / "more.pem").write_bytes(other.cert.read_bytes())
    (peers / "ignored.txt").write_text("anything")
    server_tls, client_tls, other_tls = host.native(peers), allowed.native(), other.native()
    served = ServedMemory(PAGES, tls=server_tls)
    destination = Destination(PAGES)
    try:
        check_fetches(served, client_tls)
        check_fetches(served, other_tls)
        (peers / "more.pem").unlink()
        check_fetches(served, other_tls)  # nobody has looked
        server_tls.reload()
        check_fetches(served, client_tls)
        error = failure_of(destination, served.endpoint, tls=other_tls)
        assert "the peer refused our certificate: revoked" in error.message
        wait_logged(caplog, r"refused 127\.0\.0\.1 port \d+: certificate was revoked")
    finally:
        destination.close()
        served.close()
        for each in (server_tls, client_tls, other_tls):
            each.close()


def test_certificate_of_the_same_host_and_authority_is_not_the_allowed_one(authority, host, peers, destination):
    (peers / "host.pem").write_bytes(authority.issue("again").cert.read_bytes())
    with_peers = authority.issue("server").native(peers)
    client = host.native()
    served = ServedMemory(PAGES, tls=with_peers)
    try:
        assert "revoked" in failure_of(destination, served.endpoint, tls=client).message
    finally:
        served.close()
        with_peers.close()
        client.close()


def test_empty_list_of_peers_is_nobody(host, peers, destination):
    with_peers = host.native(peers)
    served = ServedMemory(PAGES, tls=with_peers)
    try:
        assert "revoked" in failure_of(destination, served.endpoint, tls=with_peers).message
    finally:
        served.close()
        with_peers.close()


# ---- who may not be a server ----

SERVERS = {
    "another authority": (
        lambda ours, theirs: theirs.issue().trusting(ours.issue("o")),
        "certificate signed by an unknown authority",
    ),
    "expired": (lambda ours, _: ours.issue("x", valid=PAST), "certificate has expired"),
    "not yet valid": (lambda ours, _: ours.issue("x", valid=FUTURE), "certificate is not yet valid"),
    "operator": (lambda ours, _: ours.issue("x", role="operator"), "wrong role"),
    "no role": (lambda ours, _: ours.issue("x", role=None), "wrong role"),
    "client's use": (lambda ours, _: ours.issue("x", usages=CLIENT_ONLY), "certificate is not for this use"),
    "another address": (lambda ours, _: ours.issue("x", names=("127.0.0.2", "localhost")), "wrong name"),
    "address as a DNS name": (lambda ours, _: ours.issue("127.0.0.1", names=("one.example",)), "wrong name"),
    "no names": (lambda ours, _: ours.issue("127.0.0.1", names=()), "wrong name"),
}


@pytest.fixture
def source(memory):
    made = []

    def make(context):
        made.append(FakeSource(memory, context=context))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("name", SERVERS)
def test_server_with_a_bad_certificate_is_told_nothing(authority, stranger, tls, destination, source, name):
    make, words = SERVERS[name]
    fake = source(make(authority, stranger).server_context())
    error = failure_of(destination, fake.endpoint, tls=tls)
    assert type(error) is PeerNotTrustedError
    assert error.grpc_status == "UNAUTHENTICATED"
    assert words in error.message
    assert str(fake.endpoint) in error.message
    assert fake.calls == []
    assert not any(peer.streams for peer in fake.peers)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version": ssl.TLSVersion.TLSv1_2}, "the peer does not speak TLS 1.3"),
        ({"protocols": ()}, "the peer does not speak HTTP/2"),
        ({"protocols": ("http/1.1",)}, "the peer does not speak HTTP/2"),
    ],
    ids=["TLS 1.2", "no ALPN", "HTTP/1.1"],
)
def test_server_that_does_not_keep_the_rules_is_told_nothing(host, tls, destination, source, options, words):
    fake = source(host.server_context(**options))
    error = failure_of(destination, fake.endpoint, tls=tls)
    assert type(error) is PeerNotTrustedError
    assert words in error.message
    assert fake.calls == []


OWN = {
    "another authority": (
        lambda ours, theirs: theirs.issue().trusting(ours.issue("o")),
        "an authority that is unknown",
    ),
    "viewer": (lambda ours, _: ours.issue("x", role="viewer"), "wrong name or role"),
    "server's use": (lambda ours, _: ours.issue("x", usages=SERVER_ONLY), "not for this use"),
}


@pytest.mark.parametrize("name", OWN)
def test_fetch_that_the_server_refuses_says_what_it_was_told(secured, authority, stranger, destination, name):
    make, words = OWN[name]
    ours = make(authority, stranger).native()
    error = failure_of(destination, secured.endpoint, tls=ours)
    ours.close()
    assert type(error) is PeerNotTrustedError
    assert "the peer refused our certificate: " in error.message
    assert words in error.message


@pytest.mark.parametrize("name", ["localhost", "one.example", "ONE.example", "127.0.0.1", "::1"])
def test_server_may_be_meant_by_any_of_its_names(secured, tls, name):
    check_fetches(secured, tls, server_name=name)


@pytest.mark.parametrize("name", ["two.example", "example", "a.one.example", "127.0.0.2", "::2", ".example", "host"])
def test_server_of_another_name_is_not_the_one(secured, tls, destination, name):
    error = failure_of(destination, secured.endpoint, tls=tls, server_name=name)
    assert type(error) in {PeerNotTrustedError, ChannelError}
    assert "name" in error.message


def test_server_that_is_not_trusted_any_more_ends_a_fetch_in_time(authority, stranger, tls, memory, destination):
    """The connection breaks, and somebody else answers in its place."""
    honest = authority.issue("honest").server_context()
    source = FakeSource(memory, context=honest, on_request=lambda *_: True)
    try:
        fetch = destination.start(source.endpoint, tls=tls, peer_timeout_us=1_000_000)
        wait_until(lambda: len(source.requests) > 0, 10, "a request")
        source.context = stranger.issue("x").trusting(authority.issue("o")).server_context()
        for peer in source.peers:
            peer.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PeerNotTrustedError, match="signed by an unknown authority"):
            fetch.wait(10_000_000)
    finally:
        destination.fetch.stop()
        source.close()


# ---- whose pages they are ----


@pytest.mark.parametrize("peer_name", ["", "127.0.0.1", "one.example", "localhost", "::1"])
def test_pages_go_to_the_host_that_the_migration_names(tls, peer_name):
    served = ServedMemory(PAGES, tls=tls, peer_name=peer_name)
    try:
        check_fetches(served, tls)
    finally:
        served.close()


@pytest.mark.parametrize("peer_name", ["two.example", "127.0.0.2", "::2", ".example", "*.example", "host"])
def test_pages_go_to_no_other_host(tls, destination, peer_name):
    served = ServedMemory(PAGES, tls=tls, peer_name=peer_name)
    try:
        error = failure_of(destination, served.endpoint, tls=tls)
        assert type(error) is ChannelError
        assert "PERMISSION_DENIED: the migration's pages are for another host" in error.message
        counters = served.server.counters()
        assert (counters.data_pages, counters.handshakes_failed) == (0, 0)
    finally:
        served.close()


def test_name_of_the_peer_does_not_stand_in_for_the_token(tls, destination, caplog):
    served = ServedMemory(PAGES, tls=tls, peer_name="one.example")
    secret = "hush-hush"  # noqa: S105
    try:
        error = failure_of(destination, served.endpoint, tls=tls, token=secret)
        assert "PERMISSION_DENIED: the token is not this migration's" in error.message
        wait_logged(caplog, "refused a call of")
        assert secret not in caplog.text + error.message
    finally:
        served.close()


def test_without_tls_the_peer_has_no_name(destination):
    served = ServedMemory(PAGES, peer_name="two.example")
    try:
        destination.start(served.endpoint)
        destination.wait()
        destination.check_all(served.memory)
    finally:
        served.close()
