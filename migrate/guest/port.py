"""What the guest process serves: whatever kind of guest it is, behind the guest protocol."""

import os
import secrets
import threading
from abc import ABC, abstractmethod
from typing import Protocol

from google.protobuf.message import DecodeError

from migrate.errors import GuestBusyError, MigrateError, RemoteProtocolError, UnsupportedHostError
from migrate.guest.dirty_log import ScanLog
from migrate.guest.userfaultfd import Userfaultfd
from migrate.native import uffd
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

STATE_VERSION = 1


class DirtyLog(Protocol):
    """The pages that a guest writes, in a memfd with a bit for each."""

    memfd: int

    def sync(self, *, keep: bool) -> int:
        """Move what was noted into the memfd; how many pages that are. With `keep`, it stays noted, too."""

    def close(self) -> None:
        """Note nothing any more."""


class Guest(ABC):
    """One guest: POPULATING → RUNNING ⇄ PAUSED, or INCOMING until it first runs. Thread-safe.

    How a guest stops and goes on, what state it has besides its RAM and where its userfaultfds come from, is for its
    kind to say; when it may be asked is the same for all. Every method raises a MigrateError if it cannot be done; the
    guest is then as it was.

    Args:
        description: The guest; one with an empty `regions` begins its life here, or runs already.

    Attributes:
        instance: Tells the process apart from every other guest process, of whatever name.
        memfd: RAM.
        no_dirty_log: Why it cannot note the pages that it writes; empty if it can.
    """

    memfd: int
    no_dirty_log: str

    def __init__(self, description: types.GuestDescription) -> None:
        self.instance = secrets.token_hex(8)
        self._spec = types.GuestSpec()
        self._spec.CopyFrom(description.spec)
        self._is_incoming = bool(description.regions)
        self._is_loaded = not self._is_incoming
        self._has_run = self._is_running = False
        self._armed: Userfaultfd | None = None
        self._dirty_log: DirtyLog | None = None
        self._lock = threading.RLock()

    # ---- what it is ----

    @property
    def is_armed(self) -> bool:
        """Whether RAM is registered, so that pages may be missing."""
        return self._armed is not None

    @property
    def state(self) -> "types.GuestState.ValueType":
        """What the guest does now."""
        if not self._has_run:
            return types.GUEST_STATE_INCOMING
        return types.GUEST_STATE_RUNNING if self._is_running else types.GUEST_STATE_PAUSED

    def describe(self) -> types.GuestDescription:
        """The guest, and what it occupies now; without what only this host knows of it."""
        region = types.RamRegion(
            region=0, size_bytes=self._spec.memory_bytes, resident_bytes=os.fstat(self.memfd).st_blocks * 512
        )
        return types.GuestDescription(spec=self._spec, page_size_bytes=PAGE_SIZE_BYTES, regions=[region])

    def vcpu_thread_ids(self) -> list[int]:
        """The thread of each vCPU, as its faults name it; empty if that is not known."""
        return []

    # ---- vCPUs and devices ----

    def pause(self) -> None:
        """Stop the vCPUs; returns when none runs.

        Raises:
            GuestBusyError: it never ran, or does not come to rest; it runs on.
        """
        with self._lock:
            if not self._has_run:
                raise GuestBusyError("the guest has not arrived yet")
            self._stop()
            self._is_running = False

    def resume(self) -> None:
        """Let the vCPUs run.

        Raises:
            GuestBusyError: its state has not been loaded.
        """
        with self._lock:
            if not self._is_loaded:
                raise GuestBusyError("the guest has not arrived yet")
            self._go()
            self._has_run = self._is_running = True

    def save_state(self) -> tuple[bytes, int]:
        """State of a paused guest without its RAM, and the touches so far. The guest may run on afterwards.

        Raises:
            GuestBusyError: it is not paused.
        """
        with self._lock:
            if self.state != types.GUEST_STATE_PAUSED:
                raise GuestBusyError("state is saved of a paused guest only")
            state = pb.MachineState(version=STATE_VERSION, kind=self._spec.kind)
            touches = self._save(state)
            return state.SerializeToString(), touches

    def load_state(self, serialized: bytes) -> None:
        """Take over the state of a guest that stopped elsewhere. It may touch RAM meanwhile: pages must come.

        Raises:
            GuestBusyError: this one has a state already.
            RemoteProtocolError: not a state of such a guest; nothing was changed.
        """
        with self._lock:
            if self._is_loaded:
                raise GuestBusyError("the guest has a state already")
            state = pb.MachineState()
            try:
                state.ParseFromString(serialized)
            except DecodeError as error:
                raise RemoteProtocolError("the guest's state is not a message") from error
            if (state.version, state.kind) != (STATE_VERSION, self._spec.kind):
                raise RemoteProtocolError(f"state is version {state.version} of kind {state.kind}")
            self._load(state)
            self._is_loaded = True

    @abstractmethod
    def _stop(self) -> None:
        """Stop the vCPUs of a guest that has run."""

    @abstractmethod
    def _go(self) -> None:
        """Let the vCPUs of a guest with a state run."""

    @abstractmethod
    def _save(self, state: pb.MachineState) -> int:
        """Fill in the state of a guest that is paused; the touches so far."""

    @abstractmethod
    def _load(self, state: pb.MachineState) -> None:
        """Check a state, of this version and kind, and take it over."""

    # ---- pages ----

    def arm(self) -> tuple[int, int]:
        """Register RAM; the userfaultfd, which stays ours too, and RAM's address in its process. Repeatable.

        Raises:
            GuestBusyError: it has run.
            UffdUnavailableError: no userfaultfd is to be had.
        """
        with self._lock:
            hva = self._find_ram()
            if self._armed is None:
                if self._has_run:
                    raise GuestBusyError("RAM is armed before a guest runs")
                opened = self._open_uffd(with_wp=False)
                try:
                    uffd.register_missing(opened.fd, hva, self._spec.memory_bytes)
                except MigrateError:
                    opened.close()
                    raise
                self._armed = opened
            return self._armed.fd, hva

    def disarm(self) -> None:
        """Let RAM go: holes read as zero from now on. Repeatable."""
        with self._lock:
            if self._armed is not None:
                uffd.unregister(self._armed.fd, self._find_ram(), self._spec.memory_bytes)
                armed, self._armed = self._armed, None
                armed.close()

    def start_dirty_log(self) -> int:
        """Note the pages that are written; the memfd of the log. Repeatable: the log begins anew.

        Raises:
            UnsupportedHostError: there is no such log here.
        """
        if self.no_dirty_log:
            raise UnsupportedHostError(f"the guest cannot note what it writes: {self.no_dirty_log}")
        with self._lock:
            self.stop_dirty_log()
            self._dirty_log = self._begin_dirty_log()
            return self._dirty_log.memfd

    def sync_dirty_log(self, *, keep: bool) -> int:
        """Move what was noted into the log's memfd; how many pages that are. With `keep`, it stays noted, too.

        Raises:
            GuestBusyError: no log was begun.
        """
        with self._lock:
            if self._dirty_log is None:
                raise GuestBusyError("no dirty log was begun")
            return self._dirty_log.sync(keep=keep)

    def stop_dirty_log(self) -> None:
        """Note nothing any more. Repeatable."""
        with self._lock:
            log, self._dirty_log = self._dirty_log, None
            if log is not None:
                log.close()

    def _begin_dirty_log(self) -> DirtyLog:
        hva, spec = self._find_ram(), self._spec
        return ScanLog(self._open_uffd(with_wp=True), hva, spec.memory_bytes, spec.name)

    @abstractmethod
    def _find_ram(self) -> int:
        """RAM's address in its process."""

    @abstractmethod
    def _open_uffd(self, *, with_wp: bool) -> Userfaultfd:
        """Open a userfaultfd of RAM's process: for a dirty log, or else for missing pages."""

    # ---- what it knows of itself ----

    def statistics(self, *, with_stalls: bool = False) -> types.GuestStatistics:  # noqa: ARG002 - for those that have
        """What the guest knows of itself, without touching RAM: nothing, if what runs in it is not ours to ask."""
        return types.GuestStatistics()

    def audit(self, deadline_us: int) -> types.GuestStatistics:  # noqa: ARG002 - for those that can
        """Have the guest compare all its pages.

        Raises:
            GuestBusyError: not running, or not done in time.
            UnsupportedHostError: what runs in it is not ours to ask.
        """
        raise UnsupportedHostError(
            f"guest {self._spec.name!r} has no workload of ours that could compare its pages",
            remedy="migrate with --verify",
        )

    # ---- how it ends ----

    @abstractmethod
    def end(self) -> None:
        """End what would outlive this process. Idempotent."""
