"""A TCP proxy that is a bad network: it delays, throttles, cuts, resets, swallows, corrupts and refuses on demand.

One thread with a poll loop carries all connections to one upstream address. What a test asks for is done in that
thread, between two turns of the loop, and is done when the call returns. Everything random comes from the
`random.Random` given.

    with FaultProxy(daemon.page_address, random.Random(7)) as proxy:
        ...                                  # peers connect to proxy.address
        proxy.cut_after(1_000_000, Direction.DOWN)
"""

import contextlib
import os
import queue
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from concurrent.futures import Future
from enum import Enum

_CHUNK_BYTES = 256 << 10
# What may wait in a direction of a connection: enough to be quick, and, behind a delay, for what is on its way.
_QUEUE_BYTES, _DELAYED_QUEUE_BYTES = 256 << 10, 16 << 20
# A throttled link sends this often, so that it is slow and not jerky.
_RATE_STEP_S, _RATE_STEP_BYTES_MIN = 0.005, 512
_LINGER_RESET = struct.pack("ii", 1, 0)
_BACKLOG = 128
_CALL_S = 10


class Direction(Enum):
    """Where bytes go."""

    UP = "to the upstream"
    DOWN = "to the client"


class FaultProxy:
    """Listens on a port of loopback, and passes on to `upstream` (HOST:PORT) until told otherwise. A context manager.

    Args:
        upstream: Where connections are passed on to.
        chooser: Says which bits are flipped.
    """

    def __init__(self, upstream, chooser=None):
        self._chooser = chooser or random.Random(0)  # noqa: S311 - the same faults each time
        self._upstream = _parsed(upstream)
        self._listener = _bound_listener()
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._asked = queue.SimpleQueue()
        # Guards what keeps a call from a descriptor that close() has closed.
        self._lock = threading.Lock()
        self._links = []
        self._is_open, self._listens, self._is_blackhole = True, True, False
        self._delay_s, self._rate_bytes_per_s = 0.0, 0.0
        self._free_at = dict.fromkeys(Direction, 0.0)
        self._cut_at = dict.fromkeys(Direction)
        self._corrupt_at = {direction: [] for direction in Direction}
        self._corrupt_next = dict.fromkeys(Direction, 0)
        # Bytes so far: read, and passed on.
        self._read_bytes = dict.fromkeys(Direction, 0)
        self.passed_bytes = dict.fromkeys(Direction, 0)
        self.corrupted = dict.fromkeys(Direction, 0)
        self.accepted = 0
        self._thread = threading.Thread(target=self._run, name=f"fault-proxy-{self.address}", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # ---- faults ----

    def cut(self):
        """Close every connection, as if both ends had hung up. New ones are welcome."""
        self._call(self._drop_all, False)

    def reset(self):
        """Reset every connection (RST). New ones are welcome."""
        self._call(self._drop_all, True)

    def cut_after(self, n_bytes, direction, *, reset=False):
        """Pass on so many bytes more in a direction, whatever the connection, then cut every one, or reset them."""

        def arm():
            self._cut_at[direction] = (self.passed_bytes[direction] + n_bytes, reset)

        self._call(arm)

    def half_close(self, direction):
        """End one direction of every connection: what follows in it is swallowed, and the other one goes on."""

        def end():
            for link in list(self._links):
                pipe = link.pipes[direction]
                pipe.swallow()
                self._finish(link, pipe)

        self._call(end)

    def blackhole(self):
        """Neither read nor write any more, on connections that are there or come: peers hear not even an end."""
        self._call(setattr, self, "_is_blackhole", True)

    def heal(self):
        """Lift a blackhole, a refusal, a delay and a rate. Connections of before go on where they were."""

        def lift():
            self._is_blackhole = False
            self._delay_s, self._rate_bytes_per_s = 0.0, 0.0
            self._free_at = dict.fromkeys(Direction, 0.0)
            self._listen()

        self._call(lift)

    def calm(self):
        """Heal, and forget the cuts and flips that are still to come."""

        def forget():
            self._cut_at = dict.fromkeys(Direction)
            self._corrupt_at = {direction: [] for direction in Direction}
            self._corrupt_next = dict.fromkeys(Direction, 0)

        self.heal()
        self._call(forget)

    def refuse(self):
        """Refuse new connections; those that are there go on."""

        def refuse():
            if self._listens:
                # The socket keeps its port, and connections to it are refused.
                self._listener.shutdown(socket.SHUT_RDWR)
                self._listens = False

        self._call(refuse)

    def accept(self):
        """Accept connections again."""
        self._call(self._listen)

    def corrupt_next(self, direction):
        """Flip a random bit of the next piece that passes in a direction."""

        def arm():
            self._corrupt_next[direction] += 1

        self._call(arm)

    def corrupt_after(self, n_bytes, direction):
        """Flip a random bit of the byte that comes after so many more of a direction, whatever the connection."""
        self._call(lambda: self._corrupt_at[direction].append(self._read_bytes[direction] + n_bytes))

    def set_rate(self, bytes_per_s):
        """Carry no more than this in each direction; 0 is as fast as it goes."""
        self._call(setattr, self, "_rate_bytes_per_s", bytes_per_s)

    def set_delay(self, delay_s):
        """Keep everything that comes from now on for so long, in each direction."""
        self._call(setattr, self, "_delay_s", delay_s)

    def retarget(self, upstream):
        """New connections go elsewhere."""
        self._call(setattr, self, "_upstream", _parsed(upstream))

    @property
    def connections(self):
        """How many there are."""
        return len(self._links)

    def close(self):
        """Close everything; no socket and no thread is left. Idempotent."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            os.eventfd_write(self._wake_fd, 1)
        self._thread.join(_CALL_S)
        assert not self._thread.is_alive()
        os.close(self._wake_fd)

    # ---- the loop ----

    def _call(self, function, *arguments):
        """Have the thread do something, and wait until it has; nothing is left to do once all is closed."""
        done = Future()
        with self._lock:
            if not self._is_open:
                return
            self._asked.put((function, arguments, done))
            os.eventfd_write(self._wake_fd, 1)
        done.result(_CALL_S)

    def _run(self):
        try:
            while self._is_open:
                self._turn()
        finally:
            self._drop_all(False)
            self._listener.close()
            # What was asked for just before the end is as good as done.
            self._do_what_is_asked()

    def _turn(self):
        readable, writable = self._wait()
        if self._wake_fd in readable:
            os.eventfd_read(self._wake_fd)
            self._do_what_is_asked()
            return
        for link in list(self._links):
            for pipe in link.pipes.values():
                try:
                    if pipe.outlet.fileno() in writable:
                        self._write(link, pipe)
                    if pipe.inlet.fileno() in readable:
                        self._read(link, pipe)
                except BlockingIOError:
                    continue
                except OSError:
                    # One end is gone or was never there: the other one is told so.
                    self._drop(link, reset=True)
        if self._listener.fileno() in readable:
            self._accept()

    def _wait(self):
        """Wait until something can be done; which descriptors can be read and written."""
        reads, writes, timeout_s = {self._wake_fd}, set(), None
        if not self._is_blackhole:
            now_s = time.monotonic()
            if self._listens:
                reads.add(self._listener.fileno())
            for link in self._links:
                for direction, pipe in link.pipes.items():
                    if self._has_room(pipe):
                        reads.add(pipe.inlet.fileno())
                    if pipe.queue:
                        left_s = max(pipe.queue[0][0], self._free_at[direction]) - now_s
                        if left_s <= 0:
                            writes.add(pipe.outlet.fileno())
                        else:
                            timeout_s = min(left_s, timeout_s or left_s)
        poller = select.poll()
        for fd in reads | writes:
            poller.register(fd, (select.POLLIN if fd in reads else 0) | (select.POLLOUT if fd in writes else 0))
        ready = poller.poll(None if timeout_s is None else timeout_s * 1000 + 0.5)
        broken = select.POLLERR | select.POLLHUP
        return (
            {fd for fd, events in ready if fd in reads and events & (select.POLLIN | broken)},
            {fd for fd, events in ready if fd in writes and events & (select.POLLOUT | broken)},
        )

    def _has_room(self, pipe):
        room = _DELAYED_QUEUE_BYTES if self._delay_s else _QUEUE_BYTES
        return not pipe.has_ended and pipe.queued_bytes < room

    def _do_what_is_asked(self):
        with contextlib.suppress(queue.Empty):
            while True:
                function, arguments, done = self._asked.get_nowait()
                try:
                    done.set_result(function(*arguments))
                except Exception as error:  # noqa: BLE001 - it is the caller's
                    done.set_exception(error)

    def _listen(self):
        if not self._listens:
            self._listener.listen(_BACKLOG)
            self._listens = True

    def _accept(self):
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listener.accept()
            upstream = socket.socket()
            for end in (client, upstream):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A connection that fails is found when it is read or written.
            upstream.connect_ex(self._upstream)
            self._links.append(_Link(client, upstream))
            self.accepted += 1

    def _read(self, link, pipe):
        data = pipe.inlet.recv(_CHUNK_BYTES)
        if not data:
            pipe.has_ended = True
            self._finish(link, pipe)
            return
        direction = pipe.direction
        data = self._corrupted(data, direction)
        self._read_bytes[direction] += len(data)
        if not pipe.is_swallowed:
            pipe.put(time.monotonic() + self._delay_s, data)

    def _write(self, link, pipe):
        if not pipe.queue:
            return
        direction = pipe.direction
        piece = pipe.queue[0][1]
        if self._rate_bytes_per_s:
            piece = piece[: max(int(self._rate_bytes_per_s * _RATE_STEP_S), _RATE_STEP_BYTES_MIN)]
        cut = self._cut_at[direction]
        if cut is not None:
            piece = piece[: cut[0] - self.passed_bytes[direction]]
        sent_bytes = pipe.outlet.send(piece) if len(piece) else 0
        pipe.take(sent_bytes)
        self.passed_bytes[direction] += sent_bytes
        if self._rate_bytes_per_s:
            free_at = max(self._free_at[direction], time.monotonic())
            self._free_at[direction] = free_at + sent_bytes / self._rate_bytes_per_s
        if cut is not None and self.passed_bytes[direction] >= cut[0]:
            self._cut_at[direction] = None
            self._drop_all(cut[1])
        else:
            self._finish(link, pipe)

    def _corrupted(self, data, direction):
        """What becomes of a piece that was read."""
        first = self._read_bytes[direction]
        hits = [at - first for at in self._corrupt_at[direction] if at < first + len(data)]
        self._corrupt_at[direction] = [at for at in self._corrupt_at[direction] if at >= first + len(data)]
        hits += [self._chooser.randrange(len(data)) for _ in range(self._corrupt_next[direction])]
        self._corrupt_next[direction] = 0
        if not hits:
            return data
        changed = bytearray(data)
        for at in hits:
            changed[at] ^= 1 << self._chooser.randrange(8)
        self.corrupted[direction] += len(hits)
        return bytes(changed)

    def _finish(self, link, pipe):
        """Pass an end on once everything before it has been, and forget a connection that has ended both ways."""
        if pipe.has_ended and not pipe.queue and not pipe.is_swallowed:
            pipe.swallow()
        if all(each.has_ended and each.is_swallowed for each in link.pipes.values()):
            self._drop(link, reset=False)

    def _drop(self, link, *, reset):
        if link in self._links:
            self._links.remove(link)
        for end in link.ends:
            if reset:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            end.close()

    def _drop_all(self, reset):
        for link in list(self._links):
            self._drop(link, reset=reset)


class _Link:
    """One connection: two sockets, and a pipe for each direction."""

    def __init__(self, client, upstream):
        self.ends = (client, upstream)
        self.pipes = {
            Direction.UP: _Pipe(Direction.UP, client, upstream),
            Direction.DOWN: _Pipe(Direction.DOWN, upstream, client),
        }


class _Pipe:
    """One direction of one connection. Pieces wait in `queue` until their time has come, and leave in order."""

    def __init__(self, direction, inlet, outlet):
        self.direction = direction
        self.inlet, self.outlet = inlet, outlet
        self.queue = deque()
        self.queued_bytes = 0
        # The inlet said its end; the outlet was told so, and nothing goes there any more.
        self.has_ended, self.is_swallowed = False, False

    def put(self, due_s, data):
        self.queue.append((due_s, memoryview(data)))
        self.queued_bytes += len(data)

    def take(self, count_bytes):
        due_s, piece = self.queue.popleft()
        if count_bytes < len(piece):
            self.queue.appendleft((due_s, piece[count_bytes:]))
        self.queued_bytes -= count_bytes

    def swallow(self):
        self.is_swallowed = True
        self.queue.clear()
        self.queued_bytes = 0
        with contextlib.suppress(OSError):
            self.outlet.shutdown(socket.SHUT_WR)


def _bound_listener():
    """A listener that keeps its port while it refuses, which only one that was bound to it by number does."""
    with socket.socket() as first:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.1", 0))
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(first.getsockname())
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _parsed(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
