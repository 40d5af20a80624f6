"""One event in the log for every step of a migration, and what is counted of it."""

import logging

from migrate.error_info import error_info
from migrate.errors import GuestHolder, MigrateError
from migrate.telemetry.totals import TOTALS
from migrate.v1 import types_pb2 as types

EVENT_ATTRIBUTE = "event"
"""The attribute of a log record that holds an event's keys and values."""

_ENDS = (types.MIGRATION_STATE_COMPLETED, types.MIGRATION_STATE_CANCELLED, types.MIGRATION_STATE_FAILED)

_log = logging.getLogger("migrate.events")


def note_begun(migration: types.Migration) -> None:
    """A migration, or an attempt of one, begins here, or is taken up."""
    TOTALS.note_begun(migration)
    words = f"at its {_side_word(migration)}: begins as {_state_word(migration.state).upper()}"
    _write(logging.INFO, migration, None, words, None)


def note_step(migration: types.Migration, before: int, error: MigrateError | None) -> None:
    """A migration has taken a step, perhaps because of an error."""
    TOTALS.note_step(migration, before)
    if error is not None:
        TOTALS.note_error("migration", error.type_name)
    if migration.state in _ENDS:
        _write_end(migration, before)
        return
    words = f"at its {_side_word(migration)}: {_state_word(before).upper()} → {_state_word(migration.state).upper()}"
    level = logging.INFO if error is None else logging.WARNING
    _write(level, migration, before, words, None if error is None else error_info(error))


def note_past(final: types.Migration) -> None:
    """A migration is found to have ended while no daemon was there."""
    _write_end(final, None)


def _write_end(final: types.Migration, before: int | None) -> None:
    """How it ended, and who holds the guest now: a lost one is an error, nothing else is."""
    level = logging.INFO if final.state == types.MIGRATION_STATE_COMPLETED else logging.WARNING
    if final.holder == types.GUEST_HOLDER_NONE:
        level = logging.ERROR
    holder = GuestHolder(final.holder).describe()
    words = f"has ended at its {_side_word(final)}: {_state_word(final.state).upper()}; {holder}"
    # An error that was got over is shown still, and is not why this ended.
    _write(level, final, before, words, final.error if level != logging.INFO and final.HasField("error") else None)


def _write(
    level: int, migration: types.Migration, before: int | None, words: str, error: types.ErrorInfo | None
) -> None:
    if not _log.isEnabledFor(level):
        return
    _log.log(
        level,
        "migration %s of guest %s %s%s",
        migration.migration_id,
        migration.guest,
        words,
        "" if error is None else f": {error.type}: {error.message}",
        extra={
            EVENT_ATTRIBUTE: {
                "event": "migration",
                "migration_id": migration.migration_id,
                "guest": migration.guest,
                "side": _side_word(migration),
                "previous_state": None if before is None else _state_word(before),
                "state": _state_word(migration.state),
                "holder": types.GuestHolder.Name(migration.holder).removeprefix("GUEST_HOLDER_").lower(),
                "peer": migration.peer or None,
                "attempt": migration.attempt,
                "error_type": None if error is None else error.type,
                "error_message": None if error is None else error.message,
            }
        },
    )


def _side_word(migration: types.Migration) -> str:
    return types.MigrationSide.Name(migration.side).removeprefix("MIGRATION_SIDE_").lower()


def _state_word(state: int) -> str:
    return types.MigrationState.Name(types.MigrationState.ValueType(state)).removeprefix("MIGRATION_STATE_").lower()
