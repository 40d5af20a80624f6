"""What the guest process serves: whatever kind of guest it is, behind the guest protocol."""

from typing import Protocol

from migrate.v1 import types_pb2 as types


class Guest(Protocol):
    """One guest: POPULATING → RUNNING ⇄ PAUSED, or INCOMING until it first runs. Thread-safe.

    Every method raises a MigrateError if it cannot be done; the guest is then as it was.

    Attributes:
        instance: Tells the process apart from every other guest process, of whatever name.
    """

    instance: str

    @property
    def memfd(self) -> int:
        """RAM."""

    @property
    def is_armed(self) -> bool:
        """Whether RAM is registered, so that pages may be missing."""

    @property
    def no_dirty_log(self) -> str:
        """Why it cannot note the pages that it writes; empty if it can."""

    @property
    def state(self) -> "types.GuestState.ValueType":
        """What the guest does now."""

    def describe(self) -> types.GuestDescription:
        """The guest, and what it occupies now."""

    def pause(self) -> None:
        """Stop the vCPUs; returns when none runs."""

    def resume(self) -> None:
        """Let the vCPUs run."""

    def save_state(self) -> tuple[bytes, int]:
        """State of a paused guest without its RAM, and the touches so far."""

    def load_state(self, serialized: bytes) -> None:
        """Take over the state of a guest that stopped elsewhere; only a guest that never ran."""

    def arm(self) -> tuple[int, int]:
        """Register RAM; the userfaultfd, which stays ours too, and RAM's address in its process. Repeatable."""

    def disarm(self) -> None:
        """Let RAM go: holes read as zero from now on. Repeatable."""

    def start_dirty_log(self) -> int:
        """Note the pages that are written; the memfd of the log. Repeatable: the log begins anew."""

    def sync_dirty_log(self, *, keep: bool) -> int:
        """Move what was noted into the log's memfd; how many pages that are. With `keep`, it stays noted, too."""

    def stop_dirty_log(self) -> None:
        """Note nothing any more. Repeatable."""

    def statistics(self) -> types.GuestStatistics:
        """What the guest knows of itself, without touching RAM."""

    def audit(self, deadline_us: int) -> types.GuestStatistics:
        """Have the guest compare all its pages."""

    def end(self) -> None:
        """End what would outlive this process. Idempotent."""
