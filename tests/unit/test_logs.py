"""A daemon's log: one event for each step of a migration, and JSON that machines can rely on."""

import json
import logging
import re
import sys
from datetime import datetime
from pathlib import Path

import pytest

from migrate.errors import GuestLostError, PostcopyPausedError
from migrate.session.record import MigrationRecord
from migrate.session.states import Event, Machine, Side, State
from migrate.telemetry.clock import Clock
from migrate.telemetry.logs import JsonFormatter
from migrate.v1 import types_pb2 as types

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
LINE_KEYS = ["time", "level", "logger", "message", "event"]
EVENT_KEYS = [
    *("migration_id", "guest", "side", "previous_state", "state", "holder", "peer", "attempt"),
    *("error_type", "error_message"),
]


@pytest.fixture
def lines(caplog):
    """Reads the log so far as JSON."""
    caplog.set_level(logging.INFO)
    return lambda: [json.loads(JsonFormatter().format(record)) for record in caplog.records]


def record_of(state=State.SETUP):
    migration = types.Migration(migration_id="m-1", guest="alpha", peer="192.0.2.2:7400", attempt=1)
    return MigrationRecord(Machine(Side.SOURCE, state), migration, Clock())


def test_every_step_is_one_event_with_the_same_keys(lines):
    record = record_of()
    record.on(Event.PRECOPY)
    record.update(lambda migration: migration.pages.MergeFrom(types.PageCounts(precopy=1)))
    record.on(Event.SWITCHOVER)
    record.on(Event.RUNNING)
    record.on(Event.LINK_LOST, PostcopyPausedError("the destination is silent"))
    record.on(Event.RUNNING)
    record.on(Event.END)

    found = lines()
    assert [(line["previous_state"], line["state"]) for line in found] == [
        (None, "setup"),
        ("setup", "precopy"),
        ("precopy", "switchover"),
        ("switchover", "postcopy"),
        ("postcopy", "postcopy_paused"),
        ("postcopy_paused", "postcopy"),
        ("postcopy", "completed"),
    ]
    for line in found:
        assert list(line) == LINE_KEYS + EVENT_KEYS
        assert (line["event"], line["migration_id"], line["guest"]) == ("migration", "m-1", "alpha")
        assert (line["side"], line["peer"], line["attempt"]) == ("source", "192.0.2.2:7400", 1)
    paused = found[4]
    assert (paused["level"], paused["holder"]) == ("WARNING", "split")
    assert (paused["error_type"], paused["error_message"]) == ("PostcopyPausedError", "the destination is silent")
    # What was got over is no reason of what follows.
    assert {line["error_type"] for line in found if line is not paused} == {None}
    assert (found[-1]["level"], found[-1]["holder"]) == ("INFO", "destination")


def test_lost_guest_is_an_error(lines):
    record_of(State.POSTCOPY).on(Event.GUEST_LOST, GuestLostError("its process died"))

    last = lines()[-1]
    assert (last["level"], last["state"], last["holder"]) == ("ERROR", "failed", "none")
    assert last["error_type"] == "GuestLostError"
    assert last["message"].endswith("at its source: FAILED; the guest is lost: GuestLostError: its process died")


def test_another_attempt_is_an_event_though_the_state_is_the_same(lines):
    record_of().on(Event.RETRY)

    assert [(line["previous_state"], line["state"]) for line in lines()] == [(None, "setup"), ("setup", "setup")]


def test_record_of_the_past_says_nothing(lines):
    final = types.Migration(side=types.MIGRATION_SIDE_SOURCE, state=types.MIGRATION_STATE_COMPLETED)
    MigrationRecord.of_ended(final, Clock())

    assert lines() == []


def test_other_lines_have_the_common_keys_and_fit_on_a_line(lines):
    try:
        int("of no\nkind")
    except ValueError:
        logging.getLogger("migrate.x").exception("it was “%s”", "so")

    record = logging.LogRecord("migrate.x", logging.ERROR, __file__, 1, "two\nlines", (), sys.exc_info())
    assert "\n" not in JsonFormatter().format(record)
    line = lines()[0]
    assert list(line) == [*LINE_KEYS, "exception"]
    assert (line["event"], line["message"]) == (None, "it was “so”")
    assert "ValueError" in line["exception"]
    assert datetime.fromisoformat(line["time"]).utcoffset().total_seconds() == 0


def test_keys_are_those_of_the_document():
    section = OPERATIONS.read_text().split("### The log\n")[1].split("\n### ")[0]

    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    documented = [key for cell in cells for key in re.findall(r"`(\w+)`", cell)]
    assert documented == [*LINE_KEYS, "exception", *EVENT_KEYS]
