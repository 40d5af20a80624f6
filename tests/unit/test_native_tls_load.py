"""TLS under stress: who is slow, who floods, what arrives in pieces; nobody else notices, and nothing is kept."""

import collections
import contextlib
import gc
import os
import socket
import ssl
import struct
import threading
import time

import pytest

from migrate.config import Endpoint
from migrate.errors import ChannelError
from migrate.native.compression import Compression
from migrate.v1 import page_service_pb2 as pb
from tests.harness.certificates import Authority
from tests.harness.destination import PAGES, Destination, check_recovers
from tests.harness.fake_source import FakeSource, urgent_first
from tests.harness.h2_peer import WINDOW_MAX, Peer, Settings, request
from tests.harness.memory import PAGE, ServedMemory, pages_of, random_page_bytes, requests_for, runs_of
from tests.harness.page_server import flood_caller, wait_logged
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.uffd, pytest.mark.thorough]
HANDSHAKE_S = 5
SLOW_CONNECTIONS = 100
MIB = 1 << 20


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority")).issue()


@pytest.fixture
def tls(host):
    made = host.native()
    yield made
    made.close()


@pytest.fixture
def secured(tls):
    made = ServedMemory(PAGES, tls=tls)
    yield made
    made.close()


def fetch_all(served, tls):
    destination = Destination(PAGES)
    try:
        begin_s = time.monotonic()
        check_recovers(destination, served.memory, served.endpoint, tls=tls)
        return time.monotonic() - begin_s
    finally:
        destination.close()


def hello(host):
    """What a client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        host.client_context().wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


# ---- handshakes that take long ----


def test_slow_handshakes_do_not_disturb_an_honest_fetch(secured, host, tls, caplog):
    said = hello(host)
    done = threading.Event()
    with contextlib.ExitStack() as stack:
        endpoint = (secured.endpoint.host, secured.endpoint.port)
        slow = [stack.enter_context(socket.create_connection(endpoint)) for _ in range(SLOW_CONNECTIONS)]

        def dribble():
            for byte in said:
                for each in slow:
                    with contextlib.suppress(OSError):
                        each.send(bytes([byte]))
                if done.wait(1):
                    return

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            wait_until(lambda: secured.server.counters().connections == SLOW_CONNECTIONS, 10, "all to be accepted")
            assert min(fetch_all(secured, tls) for _ in range(3)) < HANDSHAKE_S
            wait_logged(caplog, "it took long to prove who it is, and others wait")
            wait_until(lambda: secured.server.counters().connections_now == 0, 10, "all to be turned away")
            wait_logged(caplog, "the TLS handshake took too long")
        finally:
            done.set()
            thread.join()
    assert secured.server.counters().handshakes_failed == SLOW_CONNECTIONS


def test_server_closes_in_the_middle_of_a_handshake(tls, host):
    served = ServedMemory(PAGES, tls=tls)
    with socket.create_connection((served.endpoint.host, served.endpoint.port)) as connected:
        connected.sendall(hello(host)[:50])
        wait_until(lambda: served.server.counters().connections_now == 1, 10, "the connection")
        begin_s = time.monotonic()
        served.close()
        assert time.monotonic() - begin_s < HANDSHAKE_S - 1


def test_source_that_never_says_hello_is_waited_for_as_long_as_was_said(tls, destination):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1])
        begin_s = time.monotonic()
        with pytest.raises(ChannelError, match="the TLS handshake took too long"):
            destination.made(endpoint, tls=tls).connect(300_000)
        assert time.monotonic() - begin_s < HANDSHAKE_S


# ---- bytes in pieces ----


class Pieces:
    """Hands bytes on, so many at a time.

    Args:
        endpoint: Where to.
        piece_bytes: At most so many are handed on with one send.
    """

    def __init__(self, endpoint, piece_bytes):
        self.endpoint, self.piece_bytes = endpoint, piece_bytes
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.here = type(endpoint)("127.0.0.1", self.listener.getsockname()[1])
        self.sockets, self.threads = [], []
        self._start(self._accept)

    def _start(self, target, *arguments):
        self.threads.append(threading.Thread(target=target, args=arguments))
        self.threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection((self.endpoint.host, self.endpoint.port))
                for each in (near, far):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.sockets += [near, far]
                self._start(self._hand_on, near, far)
                self._start(self._hand_on, far, near)

    def _hand_on(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(self.piece_bytes):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self):
        for each in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for each in (self.listener, *self.sockets):
            each.close()


@pytest.mark.parametrize("piece_bytes", [61, 1461, 16384 + 5, 70_001])
def test_records_may_arrive_in_any_pieces(secured, tls, destination, piece_bytes):
    pieces = Pieces(secured.endpoint, piece_bytes)
    try:
        check_recovers(destination, secured.memory, pieces.here, tls=tls, peer_timeout_us=20_000_000)
    finally:
        destination.fetch.stop()
        pieces.close()


@pytest.mark.parametrize("frame_bytes", [7, 4096, 16384])
def test_fetch_takes_records_of_any_size(host, tls, memory, destination, frame_bytes):
    """Each frame is a record, and many of them arrive together."""
    pages = 16 if frame_bytes == 7 else PAGES

    def answer(call, asked):
        for response in call.answers(asked):
            call.headers()
            data = pb.FetchPagesResponse.SerializeToString(response)
            size = frame_bytes if asked.first_page < pages else 16384
            whole = struct.pack(">BI", 0, len(data)) + data
            for at in range(0, len(whole), size):
                call.peer.data(call.stream_id, whole[at : at + size])
        return True

    source = FakeSource(memory, on_request=urgent_first(answer), context=host.server_context())
    try:
        check_recovers(destination, memory, source.endpoint, tls=tls)
    finally:
        destination.fetch.stop()
        source.close()


def test_record_that_was_tampered_with_breaks_the_connection_alone(secured, tls, destination):
    """A bit is flipped in what the first connections carry; those that come after are left alone."""

    class Flipping(Pieces):
        flips = 2

        def _hand_on(self, source, sink):
            carried = 0
            with contextlib.suppress(OSError):
                while data := source.recv(self.piece_bytes):
                    carried += len(data)
                    if carried > 100_000 and self.flips:
                        self.flips -= 1
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

    flipping = Flipping(secured.endpoint, 8192)
    try:
        counters = check_recovers(destination, secured.memory, flipping.here, tls=tls)
        assert counters.reconnects >= 1
    finally:
        destination.fetch.stop()
        flipping.close()


# ---- much ----


def test_peer_that_does_not_read_is_given_up_and_disturbs_nobody(secured, host, tls, monkeypatch):
    made = Peer.connect
    monkeypatch.setattr(Peer, "connect", lambda *a, **k: made(*a, **k, context=host.client_context()))
    with flood_caller(secured):
        fetch_all(secured, tls)


@pytest.mark.parametrize("window", [1000, 16384, 65535, 4 * MIB])
def test_windows_of_any_size_are_filled(secured, host, window):
    asked = [*runs_of(PAGES), (3, 1), (200, 5)]
    with Peer.connect(secured.endpoint, context=host.client_context()) as peer:
        peer.greet_server({Settings.INITIAL_WINDOW_SIZE: window}, window)
        peer.call()
        peer.ask(1, *requests_for(asked), end=True)
        stream = peer.receive_end()
        assert stream.status == (0, "")
        assert pages_of(stream.responses(), asked) == [secured.memory.run(*each) for each in asked]


def test_pages_that_do_not_compress_come_right(tls, destination):
    served = ServedMemory(PAGES, tls=tls, compression=Compression.ZSTD, fill=random_page_bytes)
    try:
        check_recovers(destination, served.memory, served.endpoint, tls=tls, compression=Compression.ZSTD)
    finally:
        served.close()


def test_keys_are_renewed_before_they_wear_out(secured, host):
    """More than two times 256 MiB on one connection, which Python's TLS takes."""
    answer_bytes = sum(PAGE for page in range(PAGES) if any(secured.memory.page(page)))
    asked_bytes, got_bytes = 0, 0
    context, said = host.client_context(), collections.Counter()
    context._msg_callback = lambda *message: said.update([str(getattr(message[4], "name", ""))])
    with Peer.connect(secured.endpoint, context=context) as peer:
        peer.greet_server({Settings.INITIAL_WINDOW_SIZE: WINDOW_MAX}, WINDOW_MAX - 65535)
        peer.opens_windows = False
        peer.call()
        stream = peer.stream(1)
        while got_bytes < 600 * MIB:
            if asked_bytes <= got_bytes + 8 * MIB:
                peer.ask(1, *(request(0, PAGES) for _ in range(16)))
                asked_bytes += 16 * answer_bytes
            peer.receive_some()
            got_bytes += len(stream.data)
            stream.data.clear()
        peer.reset(1)
    assert said["KEY_UPDATE"] == 2
    assert said["NEWSESSION_TICKET"] == 0


# ---- what is kept ----


def resident_bytes():
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * PAGE


def test_nothing_is_kept_of_who_was_refused_or_left(secured, host, tls):
    def visit(count):
        for number in range(count):
            with (
                contextlib.suppress(OSError),
                Peer.connect(secured.endpoint, context=host.client_context(has_certificate=number % 2 == 0)) as peer,
            ):
                peer.greet_server()
                peer.call()
                peer.ask(1, request(1), end=True)
                peer.receive(lambda: peer.stream(1).is_over)
            with socket.create_connection((secured.endpoint.host, secured.endpoint.port)) as plain:
                plain.send(b"PRI * HTTP/2.0\r\n\r\n")
            tls.reload()
        gc.collect()
        wait_until(lambda: secured.server.counters().connections_now == 0, 10, "every connection to end")

    visit(40)
    fds, before_bytes = len(os.listdir("/proc/self/fd")), resident_bytes()
    visit(300)
    assert len(os.listdir("/proc/self/fd")) == fds
    assert resident_bytes() - before_bytes < 8 * MIB
