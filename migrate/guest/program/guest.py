"""A guest of kind process that is a program of somebody else's, behind the port that every guest has.

The program owns its memory and everything that runs in it; this process is its companion, and serves the guest protocol
in its place. Nothing but what changes the guest asks the program anything: one that waits for a page answers nobody.
"""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from migrate.errors import (
    ConfigError,
    GuestBusyError,
    GuestGoneError,
    MigrateError,
    MissingFeatureError,
    RemoteProtocolError,
    UnsupportedHostError,
)
from migrate.guest.dirty_log import OwnScan
from migrate.guest.memfd import is_sealed
from migrate.guest.port import Guest
from migrate.guest.program import wire
from migrate.guest.program.control import Control, connect
from migrate.guest.program.wire import Ask, Flag
from migrate.guest.spec import check_spec
from migrate.guest.userfaultfd import Userfaultfd
from migrate.guest.watched import Watched
from migrate.native import uffd
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types


class ProgramGuest(Guest):
    """One program.

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
        super().__init__(description)
        self._is_ours = not description.spec.process.socket
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

    def describe(self) -> types.GuestDescription:
        """The guest, and what it occupies now; without what only this host knows of it."""
        description = super().describe()
        description.spec.process.socket = ""
        return description

    # ---- the program itself ----

    def _stop(self) -> None:
        self._control.call_plain(Ask.PAUSE, undo=Ask.RESUME)

    def _go(self) -> None:
        self._control.call_plain(Ask.RESUME)

    def _save(self, state: pb.MachineState) -> int:
        """What the program says that its memory does not hold."""
        fd = self._control.call_for_fd(Ask.SAVE)
        try:
            state.program_state = wire.read_state(fd)
        finally:
            os.close(fd)
        return 0

    def _load(self, state: pb.MachineState) -> None:
        if state.vcpus or state.mailbox:
            raise RemoteProtocolError("the state is no program's")
        fd = wire.state_file(state.program_state)
        try:
            self._control.call_plain(Ask.LOAD, (fd,))
        finally:
            os.close(fd)

    def _find_ram(self) -> int:
        return self._hva

    def _open_uffd(self, *, with_wp: bool) -> Userfaultfd:
        """One of which the program has a copy too."""
        opened = self._control.call_for_fd(Ask.OPEN_UFFD)

        def close() -> None:
            os.close(opened)
            # Nothing is registered with it any more: at worst, a descriptor stays behind.
            with contextlib.suppress(MigrateError):
                self._control.call_plain(Ask.CLOSE_UFFD)

        try:
            uffd.shake_hands(opened, with_missing=not with_wp, with_wp=with_wp)
        except MigrateError:
            close()
            raise
        return Userfaultfd(opened, self._pagemap_fd, close)

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
