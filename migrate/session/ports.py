"""What a session needs of the world, as small protocols: the guest on this host, the peer daemon, the memories served.

The daemon hands in the real ones; nothing in a session knows how a message travels.
"""

from collections.abc import Callable
from typing import Protocol

from migrate.config import Endpoint
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import guest_protocol_pb2 as guest
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types


class GuestPort(Protocol):
    """A guest process on this host (migrate.guest.client.GuestClient)."""

    instance: str
    """Tells the process apart from every other guest process, of whatever name."""

    def look(self) -> guest.DescribeResponse:
        """What the guest says of itself, without its memory. Unless it `is_armed`, one that has run misses no page."""
        ...

    def describe(self) -> tuple[types.GuestDescription, "types.GuestState.ValueType", int, list[int]]:
        """Description, state, pid, and the memfd of each region, which the caller closes."""
        ...

    def pause(self) -> None:
        """Stop the vCPUs."""
        ...

    def resume(self) -> None:
        """Let the vCPUs run."""
        ...

    def save_state(self) -> tuple[bytes, int]:
        """State of a paused guest, and its touches so far."""
        ...

    def load_state(self, state: bytes) -> None:
        """State for a guest that never ran."""
        ...

    def arm(self) -> tuple[int, list[int]]:
        """The userfaultfd, which the caller closes, and each region's address in the guest process."""
        ...

    def start_dirty_log(self) -> int:
        """Note the pages that are written from now on; the memfd of the log, which the caller closes."""
        ...

    def sync_dirty_log(self, *, keep: bool = False) -> int:
        """Move what was noted into the log's memfd; how many pages that are. With `keep`, it stays noted, too."""
        ...

    def stop_dirty_log(self) -> None:
        """Note nothing any more."""
        ...

    def disarm(self) -> None:
        """Let holes read as zero."""
        ...

    def statistics(self, *, with_stalls: bool = False) -> types.GuestStatistics:
        """What the guest knows about itself, with every bucket of its stalls if wanted."""
        ...


class PeerPort(Protocol):
    """The other daemon's TransferService. Every method raises what the peer raised, or ChannelError."""

    def prepare(self, request: transfer.PrepareRequest) -> transfer.PrepareResponse:
        """Build the empty twin."""
        ...

    def invalidate(self, request: transfer.InvalidateRequest) -> None:
        """Say which pages are stale."""
        ...

    def switch_over(self, request: transfer.SwitchoverRequest) -> transfer.SwitchoverResponse:
        """Hand over the state; returns when the guest runs there."""
        ...

    def get_incoming(self, migration_id: str, await_complete_us: int = 0, *, live: bool = False) -> types.Migration:
        """The migration as the destination sees it, at once, or when no page is missing or the time is over.

        With `live`, it has what those who watch want to know.
        """
        ...

    def complete(self, request: transfer.CompleteRequest) -> None:
        """END."""
        ...

    def record_trace(self, request: transfer.RecordTraceRequest) -> None:
        """Hand over a part of a trace."""
        ...

    def abort(self, migration_id: str, reason: str, attempt: int) -> None:
        """Undo Prepare; returns only if this attempt and those before it never ran there and never will."""
        ...

    def resume_migration(self, request: transfer.ResumeMigrationRequest) -> transfer.ResumeMigrationResponse:
        """Say where we are now, and hear how far the other side is."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class Journal(Protocol):
    """Where a session writes down what must outlive its daemon (migrate.daemon.state_dir.StateDir)."""

    def save(self, migration: saved.SavedMigration) -> None:
        """Write it down; once this returns, it is found again whatever happens to the host.

        Raises:
            StateDirError: it could not be written; what was there before still is.
        """
        ...

    def forget(self, migration_id: str) -> None:
        """It ended long ago, and nobody asks any more."""
        ...


PeerOf = Callable[[Endpoint, str, float], PeerPort]
"""Connects to a daemon: its endpoint, its role, and the seconds of silence after which it is lost."""
