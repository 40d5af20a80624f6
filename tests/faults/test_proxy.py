"""The bad network does what its name says, over real sockets."""

import contextlib
import os
import random
import socket
import struct
import threading
import time

import pytest

from tests.harness.fault_proxy import Direction, FaultProxy
from tests.harness.waiting import wait_until

DATA = random.Random(1).randbytes(1 << 20)  # noqa: S311 - the same bytes each time
SILENCE_S = 0.2


class EchoServer:
    """Sends everything back; remembers how each connection ended."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self.ends = []
        self._threads = []
        self._sockets = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._sockets.append(connection)
                self._threads.append(threading.Thread(target=self._echo, args=[connection], daemon=True))
                self._threads[-1].start()

    def _echo(self, connection):
        try:
            while data := connection.recv(1 << 16):
                connection.sendall(data)
            self.ends.append("end")
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.ends.append(type(error).__name__)

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(5)
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for connection in self._sockets:
            connection.close()


@pytest.fixture
def server():
    made = EchoServer()
    yield made
    made.close()


@pytest.fixture
def proxy(server):
    with FaultProxy(server.address, random.Random(7)) as made:  # noqa: S311 - the same faults each time
        yield made


@pytest.fixture
def client(proxy):
    with connect(proxy) as made:
        yield made


def connect(proxy):
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def receive(client, count):
    """So many bytes, or fewer if the end comes before."""
    got = bytearray()
    while len(got) < count and (data := client.recv(count - len(got))):
        got += data
    return bytes(got)


def echo(client, data=b"hello"):
    client.sendall(data)
    return receive(client, len(data))


def send_beside(client, data):
    """Send in a thread, for what comes back must be read meanwhile; an end is not an error here."""

    def send():
        with contextlib.suppress(OSError):
            client.sendall(data)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def echo_beside(client, data):
    thread = send_beside(client, data)
    got = receive(client, len(data))
    thread.join(10)
    return got


def is_silent(client):
    client.settimeout(SILENCE_S)
    try:
        return client.recv(1) is None
    except TimeoutError:
        return True
    finally:
        client.settimeout(10)


def flipped_bits(before, after):
    assert len(before) == len(after)
    return [(at, x ^ y) for at, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]


def test_everything_passes_unchanged_and_ends_are_passed_on(server, proxy, client):
    assert echo_beside(client, DATA * 8) == DATA * 8
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    assert server.ends == ["end"]
    wait_until(lambda: proxy.connections == 0, 5, "the connection to be forgotten")
    assert proxy.passed_bytes == dict.fromkeys(Direction, len(DATA) * 8)


def test_cut_ends_every_connection_and_new_ones_are_welcome(server, proxy, client):
    with connect(proxy) as other:
        assert (echo(client), echo(other)) == (b"hello", b"hello")
        proxy.cut()
        assert (client.recv(1), other.recv(1)) == (b"", b"")
    wait_until(lambda: server.ends == ["end", "end"], 5, "the server to see both ends")
    with connect(proxy) as third:
        assert echo(third) == b"hello"


def test_reset_is_seen_by_both_ends(server, proxy, client):
    assert echo(client) == b"hello"
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_until(lambda: server.ends == ["ConnectionResetError"], 5, "the server to see the reset")


@pytest.mark.parametrize("n_bytes", [0, 1, 4097, 300_000])
@pytest.mark.parametrize("direction", Direction)
def test_cut_after_passes_exactly_so_many_bytes(proxy, client, direction, n_bytes):
    assert echo(client) == b"hello"
    # It counts what it has sent, which may have come by then.
    wait_until(lambda: proxy.passed_bytes[Direction.DOWN] == len(b"hello"), 5, "the proxy to count")
    before_bytes = dict(proxy.passed_bytes)
    proxy.cut_after(n_bytes, direction)
    thread = send_beside(client, DATA)
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(1 << 16):
            got += data
    thread.join(10)
    wait_until(lambda: proxy.passed_bytes[direction] - before_bytes[direction] == n_bytes, 5, "the proxy to count")
    assert got == DATA[: len(got)]
    assert len(got) <= n_bytes or direction is Direction.UP
    with connect(proxy) as other:
        assert echo(other) == b"hello"


def test_cut_after_may_reset(proxy, client):
    proxy.cut_after(3, Direction.UP, reset=True)
    client.sendall(b"hello")
    with pytest.raises(ConnectionResetError):
        receive(client, 5)


def test_half_closed_direction_ends_and_the_other_one_goes_on(server, proxy, client):
    assert echo(client) == b"hello"
    proxy.half_close(Direction.DOWN)
    assert client.recv(1) == b""
    client.sendall(b"still heard")
    wait_until(lambda: proxy.passed_bytes[Direction.UP] == len(b"hellostill heard"), 5, "the server to be told")
    assert server.ends == []
    client.shutdown(socket.SHUT_WR)
    wait_until(lambda: server.ends == ["end"], 5, "the server to see the end")


def test_half_closed_up_ends_the_server_alone(server, proxy, client):
    assert echo(client) == b"hello"
    proxy.half_close(Direction.UP)
    wait_until(lambda: server.ends == ["end"], 5, "the server to see the end")
    # It ends its own side for that.
    assert client.recv(1) == b""


def test_blackhole_swallows_old_and_new_connections_until_it_heals(server, proxy, client):
    assert echo(client) == b"hello"
    proxy.blackhole()
    client.sendall(b"anyone?")
    with connect(proxy) as other:
        other.sendall(b"there?")
        assert is_silent(client)
        assert is_silent(other)
        assert server.ends == []
        proxy.heal()
        assert receive(client, 7) == b"anyone?"
        assert receive(other, 6) == b"there?"


def test_an_end_does_not_leave_a_blackhole(server, proxy, client):
    assert echo(client) == b"hello"
    proxy.blackhole()
    client.close()
    with connect(proxy) as other:
        assert is_silent(other)
    assert server.ends == []
    proxy.heal()
    wait_until(lambda: "end" in server.ends, 5, "the server to see the end")


def test_refused_connections_are_refused_and_accepted_again_on_the_same_port(proxy, client):
    assert echo(client) == b"hello"
    proxy.refuse()
    # Once more is once.
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert echo(client) == b"hello"
    proxy.accept()
    with connect(proxy) as other:
        assert echo(other) == b"hello"


@pytest.mark.parametrize("direction", Direction)
def test_corrupt_next_flips_one_bit(proxy, client, direction):
    proxy.corrupt_next(direction)
    [(_, bits)] = flipped_bits(DATA, echo_beside(client, DATA))
    assert bits.bit_count() == 1
    assert proxy.corrupted == {each: int(each is direction) for each in Direction}
    assert echo_beside(client, DATA) == DATA


@pytest.mark.parametrize("direction", Direction)
def test_corrupt_after_flips_one_bit_of_that_byte(proxy, client, direction):
    assert echo(client) == b"hello"
    proxy.corrupt_after(700_001, direction)
    [(at, bits)] = flipped_bits(DATA, echo_beside(client, DATA))
    assert (at, bits.bit_count()) == (700_001, 1)


def test_calm_forgets_what_is_still_to_come(proxy, client):
    for direction in Direction:
        proxy.cut_after(100, direction)
        proxy.corrupt_next(direction)
        proxy.corrupt_after(200, direction)
    proxy.blackhole()
    proxy.calm()
    assert echo_beside(client, DATA) == DATA


def test_the_same_seed_flips_the_same_bits(server):
    got = []
    for _ in range(2):
        with FaultProxy(server.address, random.Random(3)) as proxy, connect(proxy) as client:  # noqa: S311
            proxy.corrupt_after(1, Direction.UP)
            proxy.corrupt_after(5, Direction.DOWN)
            got.append(echo(client, bytes(16)))
    assert got[0] == got[1] != bytes(16)


@pytest.mark.alone
def test_rate_is_kept_in_each_direction(proxy, client):
    proxy.set_rate(4 << 20)
    began_s = time.monotonic()
    assert echo_beside(client, DATA) == DATA
    assert 0.22 < time.monotonic() - began_s < 1
    proxy.set_rate(0)
    assert echo_beside(client, DATA) == DATA


@pytest.mark.alone
def test_delay_is_added_both_ways_and_costs_no_throughput(proxy, client):
    proxy.set_delay(0.1)
    began_s = time.monotonic()
    assert echo(client) == b"hello"
    assert 0.2 <= time.monotonic() - began_s < 0.5
    began_s = time.monotonic()
    assert echo_beside(client, DATA * 4) == DATA * 4
    assert time.monotonic() - began_s < 1
    proxy.heal()
    assert echo(client) == b"hello"


def test_upstream_that_is_not_there_resets_the_client_until_retargeted(server):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        gone = "{}:{}".format(*nobody.getsockname())
    with FaultProxy(gone) as proxy:
        # So quickly that it may hit the connect.
        with pytest.raises(ConnectionResetError), connect(proxy) as client:
            client.recv(1)
        proxy.retarget(server.address)
        with connect(proxy) as client:
            assert echo(client) == b"hello"


def test_a_reset_of_one_end_reaches_the_other(server, proxy, client):
    assert echo(client) == b"hello"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    wait_until(lambda: server.ends == ["ConnectionResetError"], 5, "the server to see the reset")


def test_close_leaves_no_socket_and_no_thread(server):
    before = len(os.listdir("/proc/self/fd"))
    for state in ("idle", "blackhole", "refusing"):
        proxy = FaultProxy(server.address)
        with connect(proxy) as client:
            assert echo(client) == b"hello"
            if state == "blackhole":
                proxy.blackhole()
            elif state == "refusing":
                proxy.refuse()
            proxy.close()
            proxy.close()
            assert client.recv(1) == b""
    assert [thread.name for thread in threading.enumerate() if "fault-proxy" in thread.name] == []
    # The echo server keeps its own.
    assert len(os.listdir("/proc/self/fd")) - before <= 3


@pytest.mark.alone
def test_it_is_faster_than_a_migration_needs():
    total_bytes = 256 << 20
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        FaultProxy("{}:{}".format(*listener.getsockname())) as proxy,
        connect(proxy) as client,
    ):
        upstream, _ = listener.accept()
        thread = send_beside(client, bytes(total_bytes))
        got_bytes, buffer = 0, bytearray(1 << 20)
        began_s = time.monotonic()
        with upstream:
            while got_bytes < total_bytes:
                got_bytes += upstream.recv_into(buffer)
        elapsed_s = time.monotonic() - began_s
        thread.join(10)
    # 300 MB/s are needed; a machine that is busy with other tests is given some slack.
    assert total_bytes / elapsed_s > 150e6


def test_calls_after_close_do_nothing(server):
    proxy = FaultProxy(server.address)
    proxy.close()
    # It most likely has the number of the descriptor that was closed.
    reused_fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        for call in (proxy.cut, proxy.reset, proxy.blackhole, proxy.heal, proxy.calm, proxy.refuse):
            call()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(reused_fd)
    finally:
        os.close(reused_fd)
