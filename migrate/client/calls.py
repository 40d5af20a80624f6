"""The calls of a daemon, each described once: what both clients make them of."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from migrate.errors import DaemonLostError
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import types_pb2 as types

CALL_DEADLINE_S = 60.0
CANCEL_DEADLINE_S = 90.0
RECOVER_DEADLINE_S = 120.0
# An audit compares every page of the working set.
AUDIT_DEADLINE_S = 900.0
AWAY_S = 30.0
"""A daemon that is started again takes up its migrations; whoever follows one waits so long for that."""

LOOK_S = 0.2
"""How often a daemon that is away is looked for."""

GUESTS, MIGRATIONS = "guests", "migrations"

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Call(Generic[_Result]):
    """One call.

    Attributes:
        service: GUESTS or MIGRATIONS.
        method: As the proto has it.
        request: What is sent.
        result: Takes what matters out of an answer.
        deadline_s: When it is given up; None for streams, which end when they end.
    """

    service: str
    method: str
    request: Message
    result: Callable[[Any], _Result]
    deadline_s: float | None = CALL_DEADLINE_S


def _nothing(_response: Any) -> None:
    return None


def _guest(response: Any) -> types.Guest:
    found: types.Guest = response.guest
    return found


def _migration(response: Any) -> types.Migration:
    found: types.Migration = response.migration
    return found


def _part(response: Any) -> types.TracePart:
    found: types.TracePart = response.part
    return found


def _statistics(response: Any) -> types.GuestStatistics:
    found: types.GuestStatistics = response.statistics
    return found


# ---- guests ----


def create_guest(spec: types.GuestSpec) -> Call[types.Guest]:
    """CreateGuest."""
    return Call(GUESTS, "CreateGuest", guest.CreateGuestRequest(spec=spec), _guest)


def attach_guest(name: str, qmp_socket: str, program_socket: str) -> Call[types.Guest]:
    """CreateGuest, of a QEMU or a program that runs already."""
    if program_socket:
        process = types.ProcessSpec(socket=program_socket)
        return create_guest(types.GuestSpec(name=name, kind=types.GUEST_KIND_PROCESS, process=process))
    qemu = types.QemuSpec(qmp_socket=qmp_socket)
    return create_guest(types.GuestSpec(name=name, kind=types.GUEST_KIND_QEMU, qemu=qemu))


def list_guests() -> Call[list[types.Guest]]:
    """ListGuests."""
    return Call(GUESTS, "ListGuests", guest.ListGuestsRequest(), lambda response: [*response.guests])


def get_guest(name: str) -> Call[types.Guest]:
    """GetGuest."""
    return Call(GUESTS, "GetGuest", guest.GetGuestRequest(name=name), _guest)


def pause_guest(name: str) -> Call[None]:
    """PauseGuest."""
    return Call(GUESTS, "PauseGuest", guest.PauseGuestRequest(name=name), _nothing)


def resume_guest(name: str) -> Call[None]:
    """ResumeGuest."""
    return Call(GUESTS, "ResumeGuest", guest.ResumeGuestRequest(name=name), _nothing)


def delete_guest(name: str) -> Call[None]:
    """DeleteGuest."""
    return Call(GUESTS, "DeleteGuest", guest.DeleteGuestRequest(name=name), _nothing)


def audit_guest(name: str) -> Call[types.GuestStatistics]:
    """AuditGuest."""
    return Call(GUESTS, "AuditGuest", guest.AuditGuestRequest(name=name), _statistics, AUDIT_DEADLINE_S)


def watch_statistics(name: str, interval_us: int) -> Call[types.GuestStatistics]:
    """WatchGuestStatistics, a stream; of one answer, if the interval is 0."""
    request = guest.WatchGuestStatisticsRequest(name=name, interval_us=interval_us)
    return Call(GUESTS, "WatchGuestStatistics", request, _statistics, None if interval_us else CALL_DEADLINE_S)


# ---- migrations ----


def start_migration(request: operator.StartMigrationRequest) -> Call[str]:
    """StartMigration."""
    return Call(MIGRATIONS, "StartMigration", request, lambda response: str(response.migration_id))


def get_migration(migration_id: str) -> Call[types.Migration]:
    """GetMigration."""
    return Call(MIGRATIONS, "GetMigration", operator.GetMigrationRequest(migration_id=migration_id), _migration)


def list_migrations() -> Call[list[types.Migration]]:
    """ListMigrations."""
    return Call(MIGRATIONS, "ListMigrations", operator.ListMigrationsRequest(), lambda response: [*response.migrations])


def watch_migration(migration_id: str, *, live: bool) -> Call[types.Migration]:
    """WatchMigration, a stream."""
    request = operator.WatchMigrationRequest(migration_id=migration_id, live=live)
    return Call(MIGRATIONS, "WatchMigration", request, _migration, None)


def watch_trace(migration_id: str) -> Call[types.TracePart]:
    """WatchTrace, a stream."""
    return Call(MIGRATIONS, "WatchTrace", operator.WatchTraceRequest(migration_id=migration_id), _part, None)


def start_switchover(migration_id: str) -> Call[None]:
    """StartSwitchover."""
    return Call(MIGRATIONS, "StartSwitchover", operator.StartSwitchoverRequest(migration_id=migration_id), _nothing)


def cancel_migration(migration_id: str) -> Call[types.Migration]:
    """CancelMigration."""
    request = operator.CancelMigrationRequest(migration_id=migration_id)
    return Call(MIGRATIONS, "CancelMigration", request, _migration, CANCEL_DEADLINE_S)


def recover_migration(migration_id: str, to: str | None) -> Call[types.Migration]:
    """RecoverMigration."""
    request = operator.RecoverMigrationRequest(migration_id=migration_id, to=to or "")
    return Call(MIGRATIONS, "RecoverMigration", request, _migration, RECOVER_DEADLINE_S)


class Absence:
    """How long a daemon has been away from one who follows a migration.

    Args:
        migration_id: Which.
        away_s: How long it may be.
    """

    def __init__(self, migration_id: str, away_s: float) -> None:
        self._migration_id = migration_id
        self._away_s = away_s
        self._since_s: float | None = None

    def is_over(self) -> None:
        """It answers."""
        self._since_s = None

    def goes_on(self, lost: DaemonLostError) -> None:
        """It does not answer.

        Raises:
            DaemonLostError: for too long.
        """
        now_s = time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        if now_s - self._since_s > self._away_s:
            raise DaemonLostError(
                f"{lost.message}; what became of migration {self._migration_id} is not known here",
                remedy=f"once the daemon answers again, ask with `migrate status {self._migration_id}`",
            ) from lost
