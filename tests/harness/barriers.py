"""The other end of migrate/barriers.py: holds daemons at named points of a migration.

A daemon learns of it through its environment:

    with Barriers(directory / "barriers") as barriers:
        daemon = DaemonProcess(env=barriers.env)
        barriers.hold(Point.SOURCE_SWITCHING)
        ...
        migration_id, pid = barriers.wait_held(Point.SOURCE_SWITCHING, 10)
        barriers.release(Point.SOURCE_SWITCHING)
"""

import contextlib
import select
import socket
import threading
from collections import Counter
from typing import NamedTuple

from migrate.barriers import Point
from tests.harness.waiting import wait_until

_MESSAGE_MAX_BYTES = 256
_GO_ON = b"go on"
_JOIN_S = 10


class Passed(NamedTuple):
    """A daemon that reached a point."""

    point: Point
    migration_id: str
    pid: int


class Barriers:
    """Listens where daemons say which point they have reached. A context manager.

    Args:
        path: Of the unix socket.
    """

    def __init__(self, path):
        self._path = path
        self.env = {"MIGRATE_BARRIERS": str(path)}
        # Every point that was reached, in order, those that are held included.
        self.seen = []
        self._holds = Counter()
        self._held = {}
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._woken, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="barriers", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def hold(self, point):
        """Keep the next daemon that reaches a point there; those after it pass."""
        with self._lock:
            self._holds[point] += 1

    def held(self, point):
        """The migration and the process that is held at a point, if one is, and lives."""
        with self._lock:
            found = self._held.get(point)
            return None if found is None else (found[1].migration_id, found[1].pid)

    def wait_held(self, point, deadline_s):
        """Wait until a daemon is held at a point; its migration and its process."""
        return wait_until(lambda: self.held(point), deadline_s, f"a daemon to be held at {point.value}")

    def release(self, point):
        """Let the one that is held at a point go on, or, if none is yet, hold none."""
        with self._lock:
            self._holds.pop(point, None)
            found = self._held.pop(point, None)
            if found is not None:
                _answer(found[0])

    def close(self):
        """Let everyone go on, now and later; no socket and no thread is left. Idempotent."""
        if not self._thread.is_alive():
            return
        self._waker.send(b"\0")
        self._thread.join(_JOIN_S)
        assert not self._thread.is_alive()
        for point in list(self._held):
            self.release(point)
        for end in (self._listener, self._woken, self._waker):
            end.close()
        self._path.unlink(missing_ok=True)

    def _run(self):
        connections = {}
        poller = select.poll()
        for end in (self._listener, self._woken):
            poller.register(end, select.POLLIN)
        while True:
            for fd, _ in poller.poll():
                if fd == self._woken.fileno():
                    for connection in connections.values():
                        connection.close()
                    return
                if fd == self._listener.fileno():
                    connection, _ = self._listener.accept()
                    connections[connection.fileno()] = connection
                    poller.register(connection, select.POLLIN)
                elif not self._hear(connections[fd]):
                    poller.unregister(fd)
                    connections.pop(fd).close()

    def _hear(self, connection):
        """What a daemon says; false once there is nothing more to hear from it."""
        try:
            message = connection.recv(_MESSAGE_MAX_BYTES)
        except OSError:
            message = b""
        with self._lock:
            if not message:
                # It was let go on, or it died where it was held.
                self._held = {point: held for point, held in self._held.items() if held[0] is not connection}
                return False
            name, migration_id, pid = message.decode().split()
            passed = Passed(Point(name), migration_id, int(pid))
            self.seen.append(passed)
            if self._holds[passed.point] > 0 and passed.point not in self._held:
                self._holds[passed.point] -= 1
                self._held[passed.point] = (connection, passed)
            else:
                _answer(connection)
        return True


def _answer(connection):
    with contextlib.suppress(OSError):
        connection.send(_GO_ON)
