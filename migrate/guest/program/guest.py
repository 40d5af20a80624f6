"""A guest of kind process that is a program of somebody else's, behind the port that every guest has.

The program owns its memory and everything that runs in it; this process is its companion, and serves the guest protocol
in its place. Nothing but what changes the guest asks the program anything: one that waits for a page answers nobody.
"""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from migrate.errors import (
    ConfigError,
    GuestBusyError,
    GuestGoneError,
    MigrateError,
    MissingFeatureError,
    RemoteProtocolError,
    UnsupportedHostError,
)
from migrate.guest.dirty_log import OwnScan, ScanLog
from migrate.guest.memfd import is_sealed
from migrate.guest.program import wire
from migrate.guest.program.control import Control, connect
from migrate.guest.program.wire import Ask, Flag
from migrate.guest.spec import check_spec
from migrate.guest.watched import Watched
from migrate.native import uffd
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types

STATE_VERSION = 1


class ProgramGuest:
    """One program and its state: RUNNING ⇄ PAUSED, or INCOMING until it first runs.

    Args:
        description: The guest; one with an empty `regions` begins its life here, or runs already.
        program: What is started, unless it runs already.
        scan: Whether the kernel can log the writes of a process.
        on_end: Called when the program has ended by itself.

    Raises:
        MigrateError: it cannot be run here, or not be taken over; one that runs already runs on.
    """

    def __init__(
        self, description: types.GuestDescription, program: Path | None, scan: OwnScan, on_end: Callable[[], None]
    ) -> None:
        self.instance = secrets.token_hex(8)
        self._lock = threading.RLock()
        self._spec = types.GuestSpec()
        self._spec.CopyFrom(description.spec)
        self._is_ours = not description.spec.process.socket
        self._is_incoming = bool(description.regions)
        self._uffd: int | None = None
        self._dirty_log: ScanLog | None = None
        self._child: subprocess.Popen[bytes] | None = None
        if self._is_ours:
            self._start(program)
        else:
            self._control, self._pid = connect(self._spec.process.socket)
        try:
            self._greet()
            self.no_dirty_log = scan.obstacle or ("" if self._pagemap_fd >= 0 else "the program has no page map")
            self._process = Watched(self._pid, on_end, "the program")
        except BaseException:
            self._abandon()
            raise

    # ---- how it begins ----

    def _start(self, program: Path | None) -> None:
        if program is None:
            raise UnsupportedHostError("nobody said which program to start")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, wire.FD_VARIABLE: str(theirs.fileno())}
        if self._is_incoming:
            environment[wire.INCOMING_VARIABLE] = "1"
        with theirs:
            try:
                # It ends with us: nobody else could say whether it may run.
                command = ["setpriv", "--pdeathsig", "KILL", str(program)]
                self._child = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr,
                )
            except OSError as error:
                ours.close()
                raise UnsupportedHostError(f"{program} cannot be started: {error.strerror}") from error
        self._control, self._pid = Control(ours), self._child.pid

    def _greet(self) -> None:
        try:
            hello, fds = self._control.call(Ask.HELLO)
        except GuestGoneError as error:
            raise GuestGoneError(
                f"the program of guest {self._spec.name!r} hung up before it said what it is",
                remedy="its own words are in the daemon's log; one program has one companion at a time",
            ) from error
        self.memfd, self._pagemap_fd = (*fds, -1, -1)[:2]
        self._hva = hello.hva
        flags = Flag(hello.flags)
        self._has_run, self._is_running = Flag.HAS_RUN in flags, Flag.RUNNING in flags
        self._is_loaded = not self._is_incoming
        known = self._spec.process.program
        if known and hello.text != known:
            raise MissingFeatureError(f"what runs here is program {hello.text[:80]!r}, not {known!r}")
        if (Flag.INCOMING in flags) != self._is_incoming:
            raise GuestBusyError(f"program {hello.text[:80]!r} did not begin as one that arrives")
        if self._is_incoming and hello.memory_bytes != self._spec.memory_bytes:
            raise MissingFeatureError(
                f"program {known!r} has {hello.memory_bytes} bytes of memory here, {self._spec.memory_bytes} there"
            )
        self._check_memory(hello.memory_bytes)
        self._spec.process.program, self._spec.memory_bytes, self._spec.vcpus = hello.text, hello.memory_bytes, 1
        # What its destination would refuse is better known now.
        check_spec(self.describe().spec)

    def _check_memory(self, memory_bytes: int) -> None:
        """Whether the daemon may map it: memory that shrinks would end whoever looks at it."""
        is_sized = self.memfd >= 0 and is_sealed(self.memfd) and os.fstat(self.memfd).st_size == memory_bytes
        if not is_sized or self._hva % PAGE_SIZE_BYTES:
            raise ConfigError(
                "the program's memory is no memfd of a sealed size",
                remedy="use the memory that migrate's library gives (docs/embedding.md)",
            )

    # ---- what it is ----

    @property
    def is_armed(self) -> bool:
        """Whether RAM is registered, so that pages may be missing."""
        return self._uffd is not None

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
        description = types.GuestDescription(spec=self._spec, page_size_bytes=PAGE_SIZE_BYTES, regions=[region])
        description.spec.process.socket = ""
        return description

    # ---- the program itself ----

    def pause(self) -> None:
        """Have the program stand still.

        Raises:
            GuestBusyError: it never ran, or does not come to rest; it runs on.
            ProgramError: it says that it cannot.
        """
        with self._lock:
            if not self._has_run:
                raise GuestBusyError("the guest has not arrived yet")
            self._control.call_plain(Ask.PAUSE, undo=Ask.RESUME)
            self._is_running = False

    def resume(self) -> None:
        """Let the program run.

        Raises:
            GuestBusyError: its state has not been loaded.
            ProgramError: it says that it cannot.
        """
        with self._lock:
            if not self._is_loaded:
                raise GuestBusyError("the guest has not arrived yet")
            self._control.call_plain(Ask.RESUME)
            self._has_run = self._is_running = True

    def save_state(self) -> tuple[bytes, int]:
        """What a paused program says that its memory does not hold.

        Raises:
            GuestBusyError: it is not paused.
            ProgramError: it says that it cannot.
        """
        with self._lock:
            if self.state != types.GUEST_STATE_PAUSED:
                raise GuestBusyError("state is saved of a paused guest only")
            fd = self._control.call_for_fd(Ask.SAVE)
            try:
                saved = wire.read_state(fd)
            finally:
                os.close(fd)
            state = pb.MachineState(version=STATE_VERSION, kind=self._spec.kind, program_state=saved)
            return state.SerializeToString(), 0

    def load_state(self, serialized: bytes) -> None:
        """Have the program take over what it said elsewhere. It may touch its memory: pages must come.

        Raises:
            GuestBusyError: this one has a state already.
            RemoteProtocolError: not a state of such a guest; nothing was changed.
            ProgramError: it says that it cannot.
        """
        with self._lock:
            if self._is_loaded:
                raise GuestBusyError("the guest has a state already")
            state = pb.MachineState()
            try:
                state.ParseFromString(serialized)
            except DecodeError as error:
                raise RemoteProtocolError("the guest's state is not a message") from error
            if (state.version, state.kind) != (STATE_VERSION, self._spec.kind) or state.vcpus or state.mailbox:
                raise RemoteProtocolError(f"state is version {state.version} of kind {state.kind}, or no program's")
            fd = wire.state_file(state.program_state)
            try:
                self._control.call_plain(Ask.LOAD, (fd,))
            finally:
                os.close(fd)
            self._is_loaded = True

    # ---- pages ----

    def arm(self) -> tuple[int, int]:
        """Register RAM; the userfaultfd, of which the program has a copy too, and RAM's address there. Repeatable.

        Raises:
            UffdUnavailableError: none is to be had here.
        """
        with self._lock:
            if self._uffd is None:
                if self._has_run:
                    raise GuestBusyError("RAM is armed before a guest runs")
                opened = self._open_uffd(with_wp=False)
                try:
                    uffd.register_missing(opened, self._hva, self._spec.memory_bytes)
                except MigrateError:
                    self._close_uffd(opened)
                    raise
                self._uffd = opened
            return self._uffd, self._hva

    def disarm(self) -> None:
        """Let RAM go: holes read as zero from now on. Repeatable."""
        with self._lock:
            if self._uffd is not None:
                uffd.unregister(self._uffd, self._hva, self._spec.memory_bytes)
                opened, self._uffd = self._uffd, None
                self._close_uffd(opened)

    def start_dirty_log(self) -> int:
        """Note the pages that the program writes; the memfd of the log. Repeatable: the log begins anew.

        Raises:
            UnsupportedHostError: there is no such log here.
        """
        if self.no_dirty_log:
            raise UnsupportedHostError(f"the guest cannot note what it writes: {self.no_dirty_log}")
        with self._lock:
            self.stop_dirty_log()
            opened, spec = self._open_uffd(with_wp=True), self._spec
            self._dirty_log = ScanLog(
                opened, self._pagemap_fd, self._hva, spec.memory_bytes, spec.name, lambda: self._close_uffd(opened)
            )
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

    def _open_uffd(self, *, with_wp: bool) -> int:
        opened = self._control.call_for_fd(Ask.OPEN_UFFD)
        try:
            uffd.shake_hands(opened, with_missing=not with_wp, with_wp=with_wp)
        except MigrateError:
            self._close_uffd(opened)
            raise
        return opened

    def _close_uffd(self, opened: int) -> None:
        os.close(opened)
        # Nothing is registered with it any more: at worst, a descriptor stays behind.
        with contextlib.suppress(MigrateError):
            self._control.call_plain(Ask.CLOSE_UFFD)

    # ---- what it knows of itself ----

    def statistics(self) -> types.GuestStatistics:
        """Nothing: what the program does is not ours to ask."""
        return types.GuestStatistics()

    def audit(self, deadline_us: int) -> types.GuestStatistics:  # noqa: ARG002 - the port's
        """Cannot be had.

        Raises:
            UnsupportedHostError: always.
        """
        raise UnsupportedHostError(
            "a program has no workload of ours that could compare its pages", remedy="migrate with --verify"
        )

    # ---- how it ends ----

    def end(self) -> None:
        """End the program, whoever started it. Idempotent."""
        self._process.kill()

    def _abandon(self) -> None:
        """It could not be made: end what is ours, and let be what is not."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._control.close()
