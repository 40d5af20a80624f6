"""Connections that break HTTP/2, hold it up, or use it to make work, on both ports: each costs itself, no more."""

import contextlib
import socket
import struct
import threading
import time

import grpc
import pytest
from hyperframe import frame as frames

from tests.harness.h2_peer import PREFACE, WINDOW_MAX, Peer, Settings, caller_without_a_window, frame_bytes
from tests.harness.hostile_source import HostileSource
from tests.unit.test_native_pageserver_http2 import BROKEN_FRAMES

# Longer than every run of the tests can wait for.
pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.thorough]
ABORT = "/migrate.v1.TransferService/Abort"
GET = "/migrate.v1.TransferService/GetIncoming"
FETCH = "/migrate.v1.PageService/FetchPages"
PORTS = pytest.mark.parametrize("port", ["page", "control"])


@pytest.fixture
def endpoint(victim, port):
    return victim.pages if port == "page" else victim.control


def send_quietly(peer, data):
    with contextlib.suppress(OSError):
        peer.send(data)


def is_over(peer, deadline_s=20):
    """Whether the other side closes the connection in time, whatever it says before."""
    peer.socket.settimeout(deadline_s)
    with contextlib.suppress(ConnectionError):
        peer.receive_close()
    return peer.is_closed


# ---- what is not HTTP/2, or breaks it ----

NOT_HTTP2 = {
    "garbage": bytes(range(256)) * 64,
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "wrong preface": b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n" + bytes(64),
    "garbage after the preface": PREFACE + b"\xff" * 512,
    "16 MiB of garbage": b"\xa5" * (16 << 20),
}


@PORTS
@pytest.mark.parametrize("name", NOT_HTTP2)
def test_who_does_not_speak_http2_is_sent_away(victim, endpoint, name):
    with Peer.connect(endpoint) as peer:
        sender = threading.Thread(target=send_quietly, args=(peer, NOT_HTTP2[name]))
        sender.start()
        assert is_over(peer)
        sender.join()


@PORTS
@pytest.mark.parametrize("name", BROKEN_FRAMES)
def test_frame_that_breaks_http2_ends_the_connection_or_is_nothing(victim, endpoint, port, name):
    sent, _ = BROKEN_FRAMES[name]
    with Peer.connect(endpoint) as peer:
        peer.greet_server()
        peer.call(path=FETCH)
        send_quietly(peer, sent)
        if name not in TOLERATED[port]:
            assert is_over(peer)
            assert port == "control" or peer.goaway.error_code != 0


# What is taken, and nothing is done about. The call on the page port was refused: what still comes of it is dropped.
TOLERATED_BY_GRPC = {
    "oversized unknown frame",
    "DATA on stream 0",
    "DATA on an idle stream",
    "HEADERS on an even stream",
    "RST_STREAM of an idle stream",
    "PUSH_PROMISE from a client",
    "connection window beyond 2^31",
    "WINDOW_UPDATE of nothing",
    "padding longer than the frame",
    "PING of seven bytes",
}
TOLERATED = {"page": {"padding longer than the frame"}, "control": TOLERATED_BY_GRPC}


# ---- floods ----


def headers_of(peer, path):
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
    return peer.encoder.encode([*fields, ("content-type", "application/grpc"), ("te", "trailers")])


def rapid_reset(peer, path):
    """CVE-2023-44487."""
    sent = b""
    for stream_id in range(1, 20_001, 2):
        sent += frames.HeadersFrame(stream_id, headers_of(peer, path), flags=["END_HEADERS"]).serialize()
        sent += frames.RstStreamFrame(stream_id, error_code=8).serialize()
    return sent


def continuations(peer, path):
    """CVE-2024-27316: a header block that never ends."""
    block = peer.encoder.encode([("x", "y" * 1000)])
    return (
        frames.HeadersFrame(1, headers_of(peer, path)).serialize()
        + frames.ContinuationFrame(1, block).serialize() * 20_000
    )


def empty_continuations(peer, path):
    first = frames.HeadersFrame(1, headers_of(peer, path)).serialize()
    return first + frames.ContinuationFrame(1, b"").serialize() * 50_000


def hpack_bomb(peer, path):
    """One large field in the table, referred to again and again."""
    block = headers_of(peer, path) + b"\x40\x01x" + b"\x7f\x81\x1e" + b"y" * 4000 + b"\xbe" * 8000
    return frame_bytes(len(block), 1, 4, 1, block)


FLOODS = {
    "PING": lambda peer, path: frames.PingFrame(0, opaque_data=bytes(8)).serialize() * 200_000,
    "SETTINGS": lambda peer, path: Settings(0).serialize() * 200_000,
    "table sizes": lambda peer, path: (
        (
            Settings(0, settings={Settings.HEADER_TABLE_SIZE: 1}).serialize()
            + Settings(0, settings={Settings.HEADER_TABLE_SIZE: WINDOW_MAX}).serialize()
        )
        * 20_000
    ),
    "rapid reset": rapid_reset,
    "CONTINUATION": continuations,
    "empty CONTINUATION": empty_continuations,
    "HPACK bomb": hpack_bomb,
    "PRIORITY": lambda peer, path: frames.PriorityFrame(1, depends_on=3, stream_weight=1).serialize() * 100_000,
    "WINDOW_UPDATE": lambda peer, path: frames.WindowUpdateFrame(0, window_increment=1).serialize() * 100_000,
    "empty DATA": lambda peer, path: (
        frames.HeadersFrame(1, headers_of(peer, path), flags=["END_HEADERS"]).serialize()
        + frames.DataFrame(1, b"").serialize() * 100_000
    ),
    "unknown frames": lambda peer, path: frame_bytes(16, 0xFA, 0, 0, bytes(16)) * 100_000,
}


@PORTS
@pytest.mark.parametrize("name", FLOODS)
def test_flood_harms_nobody_else(victim, endpoint, port, name):
    with Peer.connect(endpoint, receive_buffer_bytes=4096) as peer:
        peer.greet_server()
        sent = FLOODS[name](peer, FETCH if port == "page" else ABORT)
        sender = threading.Thread(target=send_quietly, args=(peer, sent))
        sender.start()
        for _ in range(5):
            victim.check_well()
        with contextlib.suppress(OSError):  # it was ended already
            peer.socket.shutdown(socket.SHUT_RDWR)
        sender.join()


# ---- who is slow ----


def slow_bytes(endpoint):
    """A preface of which a byte comes now and then."""
    peer = Peer.connect(endpoint)
    for byte in PREFACE[:10]:
        peer.send(bytes([byte]))
    return peer


def greeted(endpoint):
    peer = Peer.connect(endpoint)
    peer.greet_server()
    return peer


def calling(path):
    def connect(endpoint):
        peer = greeted(endpoint)
        for stream_id in range(1, 31, 2):
            peer.call(stream_id, path=path)
        return peer

    return connect


def in_a_message(endpoint):
    peer = calling(GET)(endpoint)
    peer.data(1, struct.pack(">BI", 0, 1 << 20) + b"x")
    return peer


def in_headers(endpoint):
    peer = greeted(endpoint)
    peer.send_frames(frames.HeadersFrame(1, b"\x83"))
    return peer


SLOW = {
    "TCP alone": Peer.connect,
    "half a preface": slow_bytes,
    "idle": greeted,
    "calls without a request": calling(ABORT),
    "page calls without a request": calling(FETCH),
    "in the middle of a message": in_a_message,
    "in the middle of headers": in_headers,
    "no window": caller_without_a_window,
}


@PORTS
@pytest.mark.parametrize("name", SLOW)
def test_sixty_slow_connections_hold_up_nobody(victim, endpoint, name):
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(SLOW[name](endpoint))
        for _ in range(5):
            started_s = time.monotonic()
            victim.check_well()
            assert time.monotonic() - started_s < 5
        if endpoint is victim.pages:
            return
        with HostileSource(victim) as source:  # honest, this time
            source.prepare()
            source.invalidate()
            started_s = time.monotonic()
            while (pages := source.incoming().pages).zero + pages.precopy < pages.total:
                assert time.monotonic() - started_s < 20


def test_call_whose_request_does_not_come_is_cancelled(victim):
    with greeted(victim.control) as peer:
        peer.call(path=ABORT)
        stream = peer.receive_end(1)
        assert stream.status[0] == grpc.StatusCode.CANCELLED.value[0]


def test_call_beyond_the_32nd_of_a_connection_is_refused(victim):
    with Peer.connect(victim.control) as peer:
        peer.acknowledges = False
        peer.greet_server()
        peer.receive(lambda: peer.is_greeted)
        assert peer.settings[Settings.MAX_CONCURRENT_STREAMS] == 32
        for stream_id in range(1, 200, 2):
            peer.call(stream_id, path=ABORT)
        peer.receive(lambda: peer.is_closed or any(each.is_over for each in peer.streams.values()))


@PORTS
def test_connections_beyond_the_limit_are_closed_and_the_others_stay(victim, endpoint, port):
    count_max = {"page": 64, "control": 1024}[port]
    with contextlib.ExitStack() as stack:
        address = (endpoint.host, endpoint.port)
        made = [stack.enter_context(socket.create_connection(address)) for _ in range(count_max + 40)]
        assert closed_of(made) >= 40
        victim.check_well()


def closed_of(made):
    deadline_s = time.monotonic() + 5
    closed = set()
    while len(closed) < 40 and time.monotonic() < deadline_s:
        for number, connected in enumerate(made):
            connected.setblocking(False)
            try:
                data = connected.recv(1 << 12)
            except BlockingIOError:
                continue
            except ConnectionError:
                data = b""
            if not data:
                closed.add(number)
    return len(closed)


def test_handshake_that_takes_longer_than_ten_seconds_is_ended(victim):
    with slow_bytes(victim.control) as peer:
        assert is_over(peer, 20)
