"""The guests of this host: their processes, their names, and which migration is moving them."""

import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from migrate.daemon.limits import GUESTS_MAX
from migrate.daemon.programs import Programs
from migrate.errors import (
    LOST_REMEDY,
    AlreadyExistsError,
    GuestBusyError,
    GuestGoneError,
    GuestHolder,
    GuestLostError,
    LimitError,
    MigrateError,
    NotEnoughMemoryError,
    NotFoundError,
    RemoteProtocolError,
)
from migrate.guest.client import GuestClient
from migrate.guest.qemu.command import check_arriving_options
from migrate.guest.spawn import GuestProcess, adopt_guest, start_guest
from migrate.guest.spec import check_spec, is_others_process, is_program, runs_already
from migrate.telemetry.host import available_bytes
from migrate.units import format_bytes
from migrate.v1 import types_pb2 as types

_log = logging.getLogger(__name__)
# Freeing the RAM of a large guest takes a while.
_LEAVE_S = 10.0
# END is a round trip, unless the source is away.
_END_S = 2.0


@dataclass(slots=True)
class HostedGuest:
    """One guest process and our connection to it.

    Attributes:
        is_ending: All of it is here, and its migration is about to have ended.
        is_leaving: Its end has begun, which frees the name last.
        is_spent: Its vCPUs have run elsewhere, or pages of it are lost: it can be deleted, and nothing else.
    """

    spec: types.GuestSpec
    process: GuestProcess
    client: GuestClient
    migration_id: str = ""
    is_ending: bool = False
    is_leaving: bool = False
    is_spent: bool = False


class GuestRegistry:
    """All guests of a daemon, by name. Thread-safe.

    Args:
        socket_dir: Where the guests' sockets live.
        qemu_dirs: Where files of QEMU guests that arrive may lie.
        programs: What may be started as a guest; nothing, if it is not said.
    """

    def __init__(self, socket_dir: Path, qemu_dirs: Sequence[Path] = (), programs: Programs | None = None) -> None:
        self._socket_dir = socket_dir
        self._qemu_dirs = qemu_dirs
        self._programs = programs or Programs(None)
        self._guests: dict[str, HostedGuest] = {}
        self._reserved: set[str] = set()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def adopt(self) -> None:
        """Take over the guests that a daemon before us left; those that have died meanwhile leave no trace."""
        for socket_path in sorted(self._socket_dir.glob("*.sock")):
            try:
                guest = _adopt(socket_path)
            except GuestGoneError:
                socket_path.unlink(missing_ok=True)
            except MigrateError as error:
                _log.error("the guest at %s is left alone: %s", socket_path, error)
            else:
                with self._lock:
                    self._guests[guest.spec.name] = guest

    def create(self, spec: types.GuestSpec) -> types.Guest:
        """Start a guest of this host.

        Raises:
            ConfigError: the spec makes no sense.
            AlreadyExistsError: the name is taken.
            NotEnoughMemoryError: its working set does not fit.
            UnsupportedHostError: this host cannot run its kind.
        """
        check_spec(spec)
        if runs_already(spec):
            return self.describe(self._start(spec, spec, ""))  # its memory is here already
        needed_bytes = spec.workload.working_set_bytes or spec.memory_bytes
        if needed_bytes > available_bytes():
            raise NotEnoughMemoryError(
                f"the guest would occupy {format_bytes(needed_bytes)}, {format_bytes(available_bytes())} are available",
                remedy="give it a smaller --working-set or --memory",
            )
        return self.describe(self._start(spec, spec, ""))

    def create_incoming(self, description: types.GuestDescription, migration_id: str) -> HostedGuest:
        """Start the empty twin of a guest that arrives.

        Raises:
            AlreadyExistsError: the name is taken.
            MissingFeatureError: this host lacks a vCPU feature.
            PermissionDeniedError: its QEMU would use what is not for guests.
            UnsupportedHostError: this host cannot run its kind, or has no such program.
        """
        if runs_already(description.spec):
            # Not for a peer to say which sockets of this host are called.
            raise RemoteProtocolError("a guest that arrives cannot run here already")
        check_spec(description.spec)
        if description.spec.kind == types.GUEST_KIND_QEMU:
            check_arriving_options(description.spec.qemu.options, self._qemu_dirs)
        return self._start(description.spec, description, migration_id)

    def find(self, name: str) -> HostedGuest:
        """The guest of that name.

        Raises:
            NotFoundError: there is none.
        """
        with self._lock:
            guest = self._guests.get(name)
        if guest is None or guest.is_leaving:
            raise NotFoundError(f"no guest named {name[:80]!r} is on this host", remedy="see `migrate guest list`")
        return guest

    def list(self) -> list[types.Guest]:
        """All guests, by name. One that just died is left out."""
        with self._lock:
            guests = [self._guests[name] for name in sorted(self._guests) if not self._guests[name].is_leaving]
        listed = []
        for guest in guests:
            try:
                listed.append(self.describe(guest))
            except GuestGoneError:
                continue
        return listed

    def describe(self, guest: HostedGuest) -> types.Guest:
        """What an operator sees of a guest."""
        seen = guest.client.look()
        return types.Guest(
            spec=guest.spec,
            state=seen.state,
            pid=seen.pid,
            resident_bytes=sum(region.resident_bytes for region in seen.description.regions),
            migration_id=guest.migration_id,
        )

    def all(self) -> Sequence[HostedGuest]:
        """Every guest that does not leave."""
        with self._lock:
            return [guest for guest in self._guests.values() if not guest.is_leaving]

    def find_instance(self, instance: str) -> "HostedGuest | None":
        """The guest whose process is that one, of whatever name."""
        return next((guest for guest in self.all() if instance and guest.client.instance == instance), None)

    def claim(self, name: str, migration_id: str) -> HostedGuest:
        """Bind a guest to a migration; it cannot be paused, resumed, deleted or moved otherwise meanwhile.

        Raises:
            NotFoundError: there is no such guest.
            GuestBusyError: another migration is moving it.
            GuestLostError: it is fit for nothing but to be deleted.
        """
        guest = self.find(name)
        with self._changed:
            self._await_end(guest)
            _check_free(guest)
            guest.migration_id = migration_id
        return guest

    def note_ending(self, guest: HostedGuest) -> None:
        """Its claim is about to be undone: who wants the guest waits a little."""
        with self._lock:
            guest.is_ending = True

    def release(self, guest: HostedGuest) -> None:
        """Undo a claim: the guest is an ordinary one again."""
        with self._changed:
            guest.migration_id = ""
            guest.is_ending = False
            self._changed.notify_all()

    def spend(self, guest: HostedGuest) -> None:
        """Undo a claim, but never let the vCPUs run again."""
        with self._lock:
            guest.migration_id = ""
            guest.is_spent = True

    def operate(self, name: str, *, to_delete: bool = False) -> HostedGuest:
        """The guest of that name, for an operator's change.

        Raises:
            NotFoundError: there is no such guest.
            GuestBusyError: a migration is moving it.
            GuestLostError: it is fit for nothing but to be deleted.
        """
        guest = self.find(name)
        with self._changed:
            self._await_end(guest)
            if not (to_delete and guest.is_spent):
                _check_free(guest)
        return guest

    def remove(self, guest: HostedGuest) -> None:
        """End a guest, free its RAM and its name."""
        with self._lock:
            guest.is_leaving = True
        if is_others_process(guest.spec):
            # One that was taken over is no child of the guest process, so it does not end with it.
            with contextlib.suppress(MigrateError):
                guest.client.shutdown()
        guest.client.close()
        guest.process.kill()
        with self._changed:
            if self._guests.get(guest.spec.name) is guest:
                del self._guests[guest.spec.name]
            self._changed.notify_all()

    def close(self) -> None:
        """End all guests that were started here; those that were taken over run on."""
        with self._lock:
            guests = list(self._guests.values())
        for guest in guests:
            guest.client.close()
            guest.process.kill()

    def _start(
        self, spec: types.GuestSpec, start_from: types.GuestSpec | types.GuestDescription, migration_id: str
    ) -> HostedGuest:
        socket_path = self._socket_dir / f"{spec.name}.sock"
        program = None
        if is_program(spec) and not runs_already(spec):
            program = self._programs.path_of(spec.process.program)
        with self._changed:
            # Nobody sees a guest that leaves, so its name must not seem to be taken: it may be on its way back already.
            self._changed.wait_for(lambda: not self._is_leaving(spec.name), _LEAVE_S)
            if spec.name in self._guests or spec.name in self._reserved:
                raise AlreadyExistsError(f"a guest named {spec.name!r} is on this host already")
            if len(self._guests) + len(self._reserved) >= GUESTS_MAX:
                raise LimitError(
                    f"this daemon has {GUESTS_MAX} guests, which is its limit", remedy="delete some, or use another"
                )
            self._reserved.add(spec.name)
        try:
            process = start_guest(start_from, socket_path, program)
            try:
                client = GuestClient(socket_path, attach=True)
            except MigrateError:
                process.kill()
                raise
            # A guest that was taken over says itself what it is.
            guest = HostedGuest(client.look().description.spec, process, client, migration_id)
            with self._lock:
                self._guests[spec.name] = guest
            return guest
        finally:
            with self._lock:
                self._reserved.discard(spec.name)

    def _await_end(self, guest: HostedGuest) -> None:
        """A guest that has arrived is free once its source has heard so; to those who ask there, it is by now."""
        self._changed.wait_for(lambda: not guest.is_ending, _END_S)

    def _is_leaving(self, name: str) -> bool:
        guest = self._guests.get(name)
        return guest is not None and guest.is_leaving


def _adopt(socket_path: Path) -> HostedGuest:
    process, client = adopt_guest(socket_path)
    try:
        spec = client.look().description.spec
        if spec.name != socket_path.stem:
            raise RemoteProtocolError(f"its process says that it is {spec.name[:80]!r}")
        check_spec(spec)
    except MigrateError:
        client.close()
        process.leave()
        raise
    return HostedGuest(spec, process, client)


def _check_free(guest: HostedGuest) -> None:
    if guest.is_spent:
        # Not that it is lost: a guest that was given lost pages runs on at the destination.
        raise GuestLostError(
            f"a migration of guest {guest.spec.name!r} failed after its vCPUs had left: what is here is not whole",
            holder=GuestHolder.UNSPECIFIED,
            remedy=f"delete it, and {LOST_REMEDY}",
        )
    if guest.migration_id:
        raise GuestBusyError(f"guest {guest.spec.name!r} is being moved by migration {guest.migration_id}")
