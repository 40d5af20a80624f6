"""A migration's figures and state, kept by its session and shown to operators."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from migrate.error_info import error_info, wire_holder
from migrate.errors import LOST_REMEDY, GuestBusyError, GuestHolder, GuestLostError, MigrateError
from migrate.session.live import Live
from migrate.session.states import Event, Machine, Side, State
from migrate.telemetry.clock import Clock
from migrate.telemetry.steps import note_begun, note_step
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import types_pb2 as types

if TYPE_CHECKING:
    from migrate.session.tracing import TraceInbox


class MigrationRecord:
    """One migration on one side: its state machine, its message, and those who wait for it to change. Thread-safe.

    The lock also serialises the steps that must not cross: a switchover and an abort that meet, for one.

    Args:
        machine: Its place in the state table.
        migration: What is known of it; the record's from now on.
        clock: Times its phases, from now on.
        is_past: Whether it ended before this daemon was started.
    """

    def __init__(self, machine: Machine, migration: types.Migration, clock: Clock, *, is_past: bool = False) -> None:
        self._machine = machine
        self._migration = migration
        self._clock = clock
        self._started_us = clock.now_us()
        self._entered_us: dict[State, int] = {machine.state: self._started_us}
        self._has_final_times = is_past
        self._foreseen_us: int | None = None
        self._version = 0
        self.live = Live()
        self.trace: TraceInbox | None = None
        """At the source, if it is traced."""
        self.on_step: Callable[[State], None] = lambda _state: None
        """Told the state after each change of it."""
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        migration.side = types.MigrationSide.ValueType(machine.side.value)
        migration.page_size_bytes = PAGE_SIZE_BYTES
        with self._changed:
            self._publish()
            if not is_past:
                note_begun(migration)

    @property
    def migration_id(self) -> str:
        """The id, the same on both sides."""
        return self._migration.migration_id

    @property
    def state(self) -> State:
        """Where the migration is now."""
        return self._machine.state

    @property
    def holder(self) -> GuestHolder:
        """Who holds the guest now."""
        return self._machine.holder

    @property
    def peer(self) -> str:
        """Control address of the other daemon; empty if there is none."""
        with self.lock:
            return self._migration.peer

    @property
    def is_final(self) -> bool:
        """Whether it is over."""
        return self._machine.is_final

    def can(self, event: Event) -> bool:
        """Whether an event is allowed now."""
        with self.lock:
            return self._machine.can(event)

    def on(self, event: Event, error: MigrateError | None = None) -> None:
        """Take a step of the state table, with the error that caused it.

        Raises:
            LocalProtocolError: not allowed now.
        """
        with self._changed:
            before = self._machine.state
            self._machine.on(event)
            if self._machine.state is State.SETUP:
                # Another attempt: phases are those of the one that succeeds, the total is that of all.
                self._entered_us.clear()
            # An end is shown as it was written down.
            ended_us = self._foreseen_us if self.is_final else None
            self._entered_us.setdefault(self._machine.state, self._clock.now_us() if ended_us is None else ended_us)
            if error is not None:
                self._set_error(error)
            self._publish()
            if self._machine.state is not before or event is Event.RETRY:
                self.on_step(self._machine.state)
                note_step(self._migration, before.value, error)

    def note_error(self, error: MigrateError) -> None:
        """Show an error that does not change the state."""
        with self._changed:
            self._set_error(error)
            self._publish()

    def update(self, change: Callable[[types.Migration], None]) -> None:
        """Change figures."""
        with self._changed:
            change(self._migration)
            self._publish()

    @classmethod
    def of_ended(cls, final: types.Migration, clock: Clock) -> "MigrationRecord":
        """The record of a migration that ended before this daemon was started."""
        machine = Machine(Side(final.side), State(final.state), GuestHolder(final.holder))
        return cls(machine, final, clock, is_past=True)

    def snapshot(self) -> types.Migration:
        """The migration as it is now, times included."""
        with self.lock:
            migration = types.Migration()
            migration.CopyFrom(self._migration)
            if self._has_final_times:
                return migration
            end_us = self._entered_us.get(self._machine.state, 0) if self.is_final else self._clock.now_us()
            self._fill_times(migration, end_us)
            return migration

    def foresee(self, event: Event, error: MigrateError | None = None) -> types.Migration:
        """The migration as it will be after an event, to be written down before that is seen.

        Raises:
            LocalProtocolError: the event is not allowed now.
        """
        with self.lock:
            after = Machine(self._machine.side, self._machine.state, self._machine.holder)
            after.on(event)
            migration = types.Migration()
            migration.CopyFrom(self._migration)
            self._foreseen_us = self._clock.now_us()
            self._fill_times(migration, self._foreseen_us)
            migration.state = types.MigrationState.ValueType(after.state.value)
            migration.holder = wire_holder(after.holder)
            if error is not None:
                migration.error.CopyFrom(error_info(error, after.holder))
            return migration

    def wait_changed(self, seen_version: int, timeout_s: float) -> int:
        """Wait until something changed since a version, or the timeout; return the version now."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen_version, timeout_s)
            return self._version

    def wait_state(self, wanted: Callable[[State], bool], timeout_s: float) -> bool:
        """Wait until the state is wanted; False after the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: wanted(self._machine.state), timeout_s)

    def _fill_times(self, migration: types.Migration, end_us: int) -> None:
        migration.total_us = end_us - self._started_us
        if State.PRECOPY in self._entered_us:
            precopy_end_us = self._entered_us.get(State.SWITCHOVER, end_us)
            migration.precopy_us = precopy_end_us - self._entered_us[State.PRECOPY]
        if State.POSTCOPY in self._entered_us:
            migration.postcopy_us = end_us - self._entered_us[State.POSTCOPY]

    def _set_error(self, error: MigrateError) -> None:
        self._migration.error.CopyFrom(error_info(error, self.holder))

    def _publish(self) -> None:
        self._migration.state = types.MigrationState.ValueType(self._machine.state.value)
        self._migration.holder = wire_holder(self._machine.holder)
        if self._migration.HasField("error"):
            # An error that was got over is shown still, but the guest may have moved on since.
            self._migration.error.holder = self._migration.holder
        self._version += 1
        self._changed.notify_all()


def nothing_to_recover(record: MigrationRecord) -> MigrateError:
    """Why pages of a migration cannot be had to flow again."""
    if record.holder is GuestHolder.NONE:
        return GuestLostError(record.snapshot().error.message or "the guest is lost", remedy=LOST_REMEDY)
    return GuestBusyError(f"there is nothing to recover in state {record.state.name}", holder=record.holder)
