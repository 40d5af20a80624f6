"""The daemon's end of the guest protocol."""

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from migrate.error_info import error_of
from migrate.errors import GuestGoneError, MigrateError, RemoteProtocolError
from migrate.guest import protocol
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

_TIMEOUT_S = 30.0


class GuestClient:
    """A connection to one guest process. Thread-safe: calls take turns.

    Every call raises what the guest raised, or GuestGoneError if its process is dead.

    Args:
        socket_path: Where the guest listens.
        attach: Take the guest over from whichever daemon had it, which can change nothing any more.

    Attributes:
        instance: Tells the process apart from every other guest process, of whatever name; empty if not attached.
        pid: The process.
    """

    def __init__(self, socket_path: Path, *, attach: bool = False) -> None:
        self._path = socket_path
        self._connection = self._connect()
        self._lock = threading.Lock()
        self.pid = protocol.peer_pid(self._connection)
        self.instance = ""
        if attach:
            try:
                self.instance = self._plain(pb.GuestRequest(attach=pb.AttachRequest())).attach.instance
            except MigrateError:
                self.close()
                raise

    def look(self) -> pb.DescribeResponse:
        """What the guest says of itself, without its memory. Unless it `is_armed`, one that has run misses no page."""
        return self._plain(pb.GuestRequest(describe=pb.DescribeRequest())).describe

    def describe(self) -> tuple[types.GuestDescription, "types.GuestState.ValueType", int, list[int]]:
        """Description, state, pid, and the memfd of each region, which the caller closes."""
        response, fds = self._call(pb.GuestRequest(describe=pb.DescribeRequest()))
        description = response.describe.description
        if not fds or len(description.regions) != len(fds):
            _close(fds)
            raise RemoteProtocolError(
                f"the guest described {len(description.regions)} regions with {len(fds)} descriptors"
            )
        return description, response.describe.state, response.describe.pid, fds

    def pause(self) -> None:
        """Stop the vCPUs."""
        self._plain(pb.GuestRequest(pause=pb.PauseRequest()))

    def resume(self) -> None:
        """Let the vCPUs run."""
        self._plain(pb.GuestRequest(resume=pb.ResumeRequest()))

    def save_state(self) -> tuple[bytes, int]:
        """State of a paused guest, and its touches so far."""
        response = self._plain(pb.GuestRequest(save_state=pb.SaveStateRequest())).save_state
        return response.state, response.touches

    def load_state(self, state: bytes) -> None:
        """State for a guest that never ran."""
        self._plain(pb.GuestRequest(load_state=pb.LoadStateRequest(state=state)))

    def arm(self) -> tuple[int, list[int]]:
        """The userfaultfd, which the caller closes, and each region's address in the guest process."""
        response, fd = self._with_descriptor(pb.GuestRequest(arm=pb.ArmRequest()))
        if not response.arm.region_hva:
            _close([fd])
            raise RemoteProtocolError("the guest armed no region")
        return fd, list(response.arm.region_hva)

    def start_dirty_log(self) -> int:
        """Note the pages that are written from now on; the memfd of the log, which the caller closes.

        Its bit 0 of byte 0 is page 0; `sync_dirty_log` fills it in.
        """
        return self._with_descriptor(pb.GuestRequest(start_dirty_log=pb.StartDirtyLogRequest()))[1]

    def sync_dirty_log(self, *, keep: bool = False) -> int:
        """Move what was noted into the log's memfd; how many pages that are. With `keep`, it stays noted, too."""
        request = pb.GuestRequest(sync_dirty_log=pb.SyncDirtyLogRequest(keep=keep))
        return self._plain(request).sync_dirty_log.dirty_pages

    def stop_dirty_log(self) -> None:
        """Note nothing any more."""
        self._plain(pb.GuestRequest(stop_dirty_log=pb.StopDirtyLogRequest()))

    def disarm(self) -> None:
        """Let holes read as zero."""
        self._plain(pb.GuestRequest(disarm=pb.DisarmRequest()))

    def statistics(self, *, with_stalls: bool = False) -> types.GuestStatistics:
        """What the guest knows about itself, with every bucket of its stalls if wanted."""
        request = pb.GuestRequest(statistics=pb.StatisticsRequest(with_stalls=with_stalls))
        return self._plain(request).statistics.statistics

    def audit(self, deadline_us: int) -> types.GuestStatistics:
        """Have every page of the working set compared. On a connection of its own: it takes its time."""
        connection = self._connect()
        try:
            connection.settimeout(deadline_us / 1_000_000 + _TIMEOUT_S)
            request = pb.GuestRequest(audit=pb.AuditRequest(deadline_us=deadline_us))
            response, fds = _exchange(connection, request)
            _close(fds)
            return response.audit.statistics
        finally:
            connection.close()

    def shutdown(self) -> None:
        """End the guest process."""
        self._plain(pb.GuestRequest(shutdown=pb.ShutdownRequest()))

    def close(self) -> None:
        """Let go of the connection; the guest lives on."""
        self._connection.close()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        protocol.make_room(connection)
        connection.settimeout(_TIMEOUT_S)
        try:
            with protocol.short_path(self._path) as path:
                connection.connect(path)
        except OSError as error:
            connection.close()
            raise GuestGoneError(f"no guest listens at {self._path.name}: {error.strerror}") from error
        return connection

    def _with_descriptor(self, request: pb.GuestRequest) -> tuple[pb.GuestResponse, int]:
        response, fds = self._call(request)
        if len(fds) != 1:
            _close(fds)
            raise RemoteProtocolError(f"the guest answered with {len(fds)} descriptors, not one")
        return response, fds[0]

    def _plain(self, request: pb.GuestRequest) -> pb.GuestResponse:
        response, fds = self._call(request)
        _close(fds)
        return response

    def _call(self, request: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
        with self._lock:
            return _exchange(self._connection, request)


def _exchange(connection: socket.socket, request: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    """The answer to a request, and the descriptors that came with it, which are the caller's."""
    protocol.send(connection, request)
    response, fds = protocol.receive(connection, pb.GuestResponse())
    asked = request.WhichOneof("request")
    if not response.HasField("error") and response.WhichOneof("response") == asked:
        return response, fds
    _close(fds)
    if response.HasField("error"):
        raise error_of(response.error)
    raise RemoteProtocolError(f"the guest gave another answer than one to {asked}")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
