"""A connection of the page call lasts no longer than its peer is trusted."""

import datetime as dt

import pytest

from migrate.errors import PeerNotTrustedError
from tests.harness.certificates import Authority
from tests.harness.destination import CONNECT_US, PAGES, WAIT_US, Destination, failure_of
from tests.harness.h2_peer import WINDOW_MAX, Peer, Settings, request
from tests.harness.memory import ServedMemory, random_page_bytes, requests_for
from tests.harness.page_server import wait_logged
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
SECONDS = dt.timedelta(seconds=1)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def host(authority):
    return authority.issue()


@pytest.fixture
def peers(tmp_path):
    """Where the list of peers is, once a test makes it."""
    return tmp_path / "peers"


@pytest.fixture
def tls(host, peers):
    made = host.native(peers)
    yield made
    made.close()


@pytest.fixture
def served(tls):
    made = ServedMemory(PAGES, tls=tls)
    yield made
    made.close()


@pytest.fixture
def call(served):
    """Begins calls, of which a page was answered; they are closed at the end."""
    begun = []

    def begin(identity):
        peer = Peer.connect(served.endpoint, context=identity.client_context())
        begun.append(peer)
        peer.greet_server()
        peer.call()
        peer.ask(1, request(1))
        assert peer.receive(lambda: peer.stream(1).responses(), "a page")
        return peer

    yield begin
    for peer in begun:
        peer.close()


def allow(peers, *identities):
    """Make it the list of peers."""
    peers.mkdir(exist_ok=True)
    for old in peers.iterdir():
        old.unlink()
    for identity in identities:
        (peers / f"{identity.cert.stem}.pem").write_bytes(identity.cert.read_bytes())


def check_goes_on(peer):
    peer.ask(1, request(2, request_id=2), end=True)
    assert len(peer.receive_end().responses()) == 2


def check_ended(peer, caplog, words):
    peer.receive_close()
    assert not peer.stream(1).is_over
    wait_logged(caplog, rf"ended the connection of 127\.0\.0\.1 port \d+: {words}")


def test_call_of_a_peer_that_is_revoked_ends(tls, authority, host, peers, call, caplog):
    bad = authority.issue("bad")
    allow(peers, host, bad)
    tls.reload()
    good_call, bad_call = call(host), call(bad)

    allow(peers, host)
    tls.reload()

    check_ended(bad_call, caplog, "certificate was revoked")
    check_goes_on(good_call)


def test_list_of_peers_counts_from_when_it_is_made(tls, authority, host, peers, call, caplog):
    other = authority.issue("other")
    good_call, bad_call = call(host), call(other)

    allow(peers, host)
    tls.reload()

    check_ended(bad_call, caplog, "certificate was revoked")
    check_goes_on(good_call)


def test_call_ends_with_its_authority(tls, authority, host, tmp_path, call, caplog):
    begun = call(authority.issue("other"))

    host.become(Authority(tmp_path / "another").issue())
    tls.reload()

    check_ended(begun, caplog, "certificate signed by an unknown authority")


def test_call_ends_when_the_certificate_expires(authority, call, caplog):
    # Its time is told in whole seconds.
    begun = call(authority.issue("short", valid=(-60 * SECONDS, 4 * SECONDS)))

    check_ended(begun, caplog, "certificate has expired")


def test_peer_that_asked_for_much_before_it_was_revoked_does_not_get_all(tls, authority, host, peers, caplog):
    """What it does not read waits; when it reads again, it is not trusted any more."""
    bad = authority.issue("bad")
    allow(peers, host, bad)
    tls.reload()
    served = ServedMemory(PAGES, tls=tls, fill=random_page_bytes)
    try:
        with Peer.connect(served.endpoint, receive_buffer_bytes=4096, context=bad.client_context()) as peer:
            peer.opens_windows = False
            peer.greet_server({Settings.INITIAL_WINDOW_SIZE: WINDOW_MAX}, WINDOW_MAX - 65535)
            peer.call()
            peer.ask(1, *requests_for([(0, PAGES)] * 64))
            assert peer.receive(lambda: peer.stream(1).responses(), "a reply")
            allow(peers, host)
            tls.reload()
            wait_logged(caplog, "ended the connection of .*: certificate was revoked")
            peer.receive_close()
            assert sum(response.page_count for response in peer.stream(1).responses()) < 64 * PAGES
    finally:
        served.close()


def test_destination_stops_fetching_from_a_source_that_is_revoked(authority, peers, caplog):
    source, host = authority.issue("source"), authority.issue("destination")
    allow(peers, source)
    source_tls, tls = source.native(), host.native(peers)
    served = ServedMemory(PAGES, tls=source_tls, fill=random_page_bytes)
    destination = Destination(PAGES)
    try:
        fetch = destination.made(
            served.endpoint, tls=tls, peer_timeout_us=1_000_000, max_bandwidth_bytes_per_s=64 << 10
        )
        fetch.connect(CONNECT_US)
        fetch.start(destination.pager)
        wait_until(lambda: fetch.counters().background_requests, 10, "the background to begin")

        allow(peers, host)
        tls.reload()

        with pytest.raises(PeerNotTrustedError, match="certificate was revoked"):
            fetch.wait(WAIT_US)
        assert destination.pager.counters().missing_pages
        assert "revoked" in failure_of(destination, served.endpoint, tls=tls).message
    finally:
        destination.close()
        served.close()
        source_tls.close()
        tls.close()
