"""A TCP proxy that is a long, narrow line: so many bytes a second towards the client, a delay both ways, first in first
out for all connections together. For kernels without netem.

    python slow_link.py UPSTREAM_HOST:PORT RATE_BYTES_PER_S DELAY_US

Prints the port that it listens on, and carries until it is ended.
"""

import heapq
import itertools
import select
import socket
import sys
import time
from collections import deque

# Little, so that what is urgent waits for no more than that of another connection's.
_CHUNK_BYTES = 16 << 10
_WAITING_BYTES_MAX = 64 << 20


class Line:
    """One direction of the line.

    Args:
        bytes_per_s: What it carries; 0 is any number.
        delay_s: How long each byte is on its way.
    """

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self._free_s = 0.0

    def arrival_s(self, count_bytes: int, now_s: float) -> float:
        """When these bytes, which are sent now, are at the other end."""
        self._free_s = max(now_s, self._free_s) + (count_bytes / self._bytes_per_s if self._bytes_per_s else 0.0)
        return self._free_s + self._delay_s


class End:
    """One socket: what is read of it goes to its peer by way of a line.

    Args:
        sock: Connected.
        line: That its bytes take.
    """

    def __init__(self, sock: socket.socket, line: Line) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.line = line
        self.peer: End = self
        self.arrived: deque[bytes] = deque()
        self.waiting_bytes = 0


def carry(listener: socket.socket, upstream: tuple[str, int], rate_bytes_per_s: float, delay_s: float) -> None:
    """Accept and carry, for ever."""
    lines = (Line(0, delay_s), Line(rate_bytes_per_s, delay_s))
    ends: dict[int, End] = {}
    on_their_way: list[tuple[float, int, End, bytes]] = []
    numbers = itertools.count()
    while True:
        timeout_s = max(0.0, on_their_way[0][0] - time.monotonic()) if on_their_way else None
        # select, for its timeout has microseconds.
        for fd in select.select([listener.fileno(), *ends], [], [], timeout_s)[0]:
            if fd == listener.fileno():
                _accept(listener, upstream, lines, ends)
            else:
                _read(fd, ends, on_their_way, numbers)
        while on_their_way and on_their_way[0][0] <= time.monotonic():
            _, _, end, data = heapq.heappop(on_their_way)
            end.arrived.append(data)
            _write(end)


def _accept(listener: socket.socket, upstream: tuple[str, int], lines: tuple[Line, Line], ends: dict[int, End]) -> None:
    client, _ = listener.accept()
    near, far = End(client, lines[0]), End(socket.create_connection(upstream), lines[1])
    near.peer, far.peer = far, near
    for end in (near, far):
        ends[end.sock.fileno()] = end


def _read(
    fd: int,
    ends: dict[int, End],
    on_their_way: list[tuple[float, int, End, bytes]],
    numbers: "itertools.count[int]",
) -> None:
    end = ends[fd]
    try:
        data = end.sock.recv(_CHUNK_BYTES)
    except BlockingIOError:
        return
    except OSError:
        data = b""
    if not data:
        del ends[fd]
    if end.peer.waiting_bytes > _WAITING_BYTES_MAX:
        raise SystemExit("the line has taken more than a path of its length holds")
    end.peer.waiting_bytes += len(data)
    arrival_s = end.line.arrival_s(len(data), time.monotonic())
    heapq.heappush(on_their_way, (arrival_s, next(numbers), end.peer, data))


def _write(end: End) -> None:
    """Give the socket what has arrived; a peer that does not read has a small window of ours to blame."""
    while end.arrived:
        data = end.arrived.popleft()
        try:
            if not data:
                end.sock.shutdown(socket.SHUT_WR)
                continue
            end.sock.setblocking(True)
            end.sock.sendall(data)
            end.sock.setblocking(False)
        except OSError:
            end.arrived.clear()
            return
        end.waiting_bytes -= len(data)


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    carry(listener, (host, int(port)), float(sys.argv[2]), float(sys.argv[3]) / 1e6)


if __name__ == "__main__":
    main()
