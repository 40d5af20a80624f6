"""The end of a migration: written down before it is shown, and one line in the log that says who holds the guest."""

import logging

import pytest

from migrate.errors import GuestLostError, LocalProtocolError, MigrationAbortedError, StateDirError
from migrate.session.ledger import Ledger
from migrate.session.record import MigrationRecord
from migrate.session.states import Event, Machine, Side, State
from migrate.telemetry.clock import Clock
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import types_pb2 as types

ABORTED = MigrationAbortedError("no room there")
LOST = GuestLostError("its pages died")


class Pages:
    """A journal that keeps what was written, and may be full."""

    def __init__(self):
        self.written = []
        self.is_full = False
        self.shown = None

    def save(self, migration):
        if self.is_full:
            raise StateDirError("the state directory cannot be written")
        kept = saved.SavedMigration()
        kept.CopyFrom(migration)
        self.written.append((kept, None if self.shown is None else self.shown()))


@pytest.fixture
def journal():
    return Pages()


@pytest.fixture
def ledger_of(journal):
    def make(side, state):
        record = MigrationRecord(Machine(side, state), types.Migration(migration_id="m", guest="g"), Clock())
        journal.shown = lambda: record.state
        return Ledger(record, saved.SavedMigration(migration_id="m"), journal)

    return make


@pytest.mark.parametrize(
    ("side", "state", "event", "error", "level", "words"),
    [
        (
            Side.SOURCE,
            State.POSTCOPY,
            Event.END,
            None,
            logging.INFO,
            "migration m of guest g has ended at its source: COMPLETED; the guest is at the destination",
        ),
        (
            Side.SOURCE,
            State.PRECOPY,
            Event.REFUSED,
            ABORTED,
            logging.WARNING,
            (
                "migration m of guest g has ended at its source: FAILED; the guest is at the source: "
                "MigrationAbortedError: no room there"
            ),
        ),
        (
            Side.DESTINATION,
            State.PRECOPY,
            Event.ABORTED,
            ABORTED,
            logging.WARNING,
            (
                "migration m of guest g has ended at its destination: CANCELLED; the guest is at the source: "
                "MigrationAbortedError: no room there"
            ),
        ),
        (
            Side.DESTINATION,
            State.POSTCOPY,
            Event.GUEST_LOST,
            LOST,
            logging.ERROR,
            (
                "migration m of guest g has ended at its destination: FAILED; the guest is lost: "
                "GuestLostError: its pages died"
            ),
        ),
        (
            Side.DESTINATION,
            State.POSTCOPY_PAUSED,
            Event.POISONED,
            LOST,
            logging.WARNING,
            (
                "migration m of guest g has ended at its destination: FAILED; the guest is at the destination: "
                "GuestLostError: its pages died"
            ),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Event) else "",
)
def test_end_is_one_line_of_the_log(ledger_of, caplog, side, state, event, error, level, words):
    ledger = ledger_of(side, state)
    caplog.set_level(logging.INFO)
    ledger.end_anyhow(event, error)
    assert [(entry.levelno, entry.getMessage()) for entry in caplog.records] == [(level, words)]


def test_end_is_written_before_it_is_shown(ledger_of, journal):
    ledger = ledger_of(Side.SOURCE, State.POSTCOPY)
    ledger.end(Event.END)
    ((entry, shown),) = journal.written
    assert (entry.final.state, entry.final.holder) == (
        types.MIGRATION_STATE_COMPLETED,
        types.GUEST_HOLDER_DESTINATION,
    )
    assert shown is State.POSTCOPY
    assert ledger.record.state is State.COMPLETED


def test_end_that_cannot_be_written_has_not_happened(ledger_of, journal, caplog):
    ledger = ledger_of(Side.SOURCE, State.POSTCOPY)
    caplog.set_level(logging.INFO)
    journal.is_full = True
    with pytest.raises(StateDirError):
        ledger.end(Event.END)
    assert ledger.record.state is State.POSTCOPY
    assert not ledger.entry.HasField("final")
    assert caplog.records == []
    journal.is_full = False
    ledger.end(Event.END)
    assert ledger.record.state is State.COMPLETED


def test_end_that_has_happened_is_shown_though_it_cannot_be_written(ledger_of, journal, caplog):
    ledger = ledger_of(Side.DESTINATION, State.POSTCOPY)
    caplog.set_level(logging.INFO)
    journal.is_full = True
    ledger.end_anyhow(Event.GUEST_LOST, LOST)
    assert ledger.record.state is State.FAILED
    assert journal.written == []
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING, logging.ERROR]


def test_end_that_the_table_does_not_know_writes_nothing(ledger_of, journal):
    ledger = ledger_of(Side.SOURCE, State.SETUP)
    with pytest.raises(LocalProtocolError):
        ledger.end_anyhow(Event.END)
    assert journal.written == []
    assert ledger.record.state is State.SETUP
