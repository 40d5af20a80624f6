"""Whether two copies of a guest ever run, asked of the processes themselves, whatever the daemons believe."""

import contextlib
import os
import socket
import threading
import time

from migrate.errors import MigrateError
from migrate.guest import protocol
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

_INTERVAL_S = 0.02
_ANSWER_S = 5
_JOIN_S = 15
_RUNS = (types.GUEST_STATE_RUNNING, types.GUEST_STATE_POPULATING)


class CopiesWatch:
    """Looks at the guest processes of two state directories until it is closed. A context manager.

    Two copies ran if the one at the destination ran between two looks at the source that both saw it run: either they
    ran at one time, or the guest went back to the source after it had run elsewhere.

    Attributes:
        looks: How often both were looked at.
        seen_twice: When two copies ran, in seconds after the beginning.
    """

    def __init__(self, source_socket, destination_socket):
        self._source, self._destination = _Eye(source_socket), _Eye(destination_socket)
        self.looks, self.seen_twice = 0, []
        self._began_s = time.monotonic()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="copies-watch", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Stop looking. Idempotent."""
        self._is_over.set()
        self._thread.join(_JOIN_S)
        assert not self._thread.is_alive()

    def _run(self):
        try:
            while not self._is_over.wait(_INTERVAL_S):
                self.looks += 1
                if self._source.sees_it_run() and self._destination.sees_it_run() and self._source.sees_it_run():
                    self.seen_twice.append(round(time.monotonic() - self._began_s, 3))
        finally:
            self._source.close()
            self._destination.close()


class _Eye:
    """A connection of its own to whichever guest process listens at a path."""

    def __init__(self, path):
        self._path = path
        self._connection = None
        self._instance = None

    def sees_it_run(self):
        # A process that was replaced answers no more, or still: the path says which one counts.
        with contextlib.suppress(OSError, MigrateError):
            self._connect()
            request = pb.GuestRequest(describe=pb.DescribeRequest())
            protocol.send(self._connection, request)
            response, fds = protocol.receive(self._connection, pb.GuestResponse())
            for fd in fds:
                os.close(fd)
            return response.describe.state in _RUNS
        self.close()
        return False

    def _connect(self):
        found = self._path.stat().st_ino
        if self._connection is not None and found == self._instance:
            return
        self.close()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.settimeout(_ANSWER_S)
        with protocol.short_path(self._path) as path:
            self._connection.connect(path)
        self._instance = found

    def close(self):
        if self._connection is not None:
            self._connection.close()
        self._connection = None
