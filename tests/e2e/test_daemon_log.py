"""A daemon's JSON log, read as a machine would."""

import json

import pytest

from tests.harness.daemons import DaemonProcess

SOURCE_STATES = ["setup", "switchover", "postcopy", "completed"]


@pytest.mark.uffd
def test_json_log_tells_a_migration_from_both_sides(tmp_path):
    logs = [tmp_path / name for name in ("source.log", "destination.log")]
    source, destination = (DaemonProcess(options=("--log-format", "json"), log=log) for log in logs)
    try:
        source.create(kind="process", memory_mib=16, workload="idle")
        source.wait_populated()
        moved = source.migrate(destination)
    finally:
        source.close()
        destination.close()

    for log, side in zip(logs, ("source", "destination"), strict=True):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert "control at" in lines[0]["message"]
        events = [line for line in lines if line["event"] == "migration"]
        assert {event["migration_id"] for event in events} == {moved.migration_id}
        assert {event["side"] for event in events} == {side}
        assert [event["state"] for event in events] == SOURCE_STATES
        assert [event["previous_state"] for event in events] == [None, *SOURCE_STATES[:-1]]
        assert events[-1]["holder"] == "destination"
        assert events[0]["time"] <= events[-1]["time"]
