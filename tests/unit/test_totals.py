"""What a process counts: histograms, and figures that fall while a counter may not."""

import pytest

from migrate.telemetry.totals import Buckets, Totals
from migrate.v1 import types_pb2 as types

SOURCE = types.MIGRATION_SIDE_SOURCE


def migration(state=types.MIGRATION_STATE_PRECOPY, side=SOURCE, **fields):
    return types.Migration(migration_id="m", side=side, state=state, **fields)


def test_buckets_count_up_to_and_including_their_bound():
    buckets = Buckets([10.0, 20.0])

    buckets.add([20.0, 1.0, 10.0, 20.5])
    buckets.add([])
    buckets.add([5.0])

    assert buckets.read() == ([3, 4, 5], pytest.approx(56.5))


def test_figures_count_once_though_they_fall_and_rise_again():
    totals = Totals()
    totals.note_begun(migration())

    for precopy in (100, 70, 100, 120):
        totals.note_figures(migration(pages=types.PageCounts(precopy=precopy), bytes_on_wire=precopy * 4096))

    assert totals.pages()[SOURCE, "precopy"] == 120
    assert totals.wire_bytes()[SOURCE] == 120 * 4096


def test_another_attempt_counts_what_it_brings():
    totals = Totals()
    totals.note_begun(migration())
    totals.note_figures(migration(bytes_on_wire=100))

    totals.note_step(migration(types.MIGRATION_STATE_SETUP), types.MIGRATION_STATE_PRECOPY)
    totals.note_figures(migration(bytes_on_wire=30))

    assert totals.wire_bytes()[SOURCE] == 130
    assert totals.retries() == 1
    assert totals.started() == {SOURCE: 1}


def test_end_counts_what_came_last_and_nothing_after_it():
    totals = Totals()
    totals.note_begun(migration())
    ended = migration(types.MIGRATION_STATE_COMPLETED, downtime_us=4_000, bytes_on_wire=50)

    totals.note_step(ended, types.MIGRATION_STATE_POSTCOPY)
    totals.note_figures(migration(types.MIGRATION_STATE_COMPLETED, bytes_on_wire=80))

    assert totals.ended() == {(SOURCE, types.MIGRATION_STATE_COMPLETED): 1}
    assert totals.wire_bytes()[SOURCE] == 50
    assert totals.downtime.read()[0][-1] == 1


def test_downtime_is_that_of_completed_migrations_at_their_source():
    totals = Totals()
    for state, side in (
        (types.MIGRATION_STATE_FAILED, SOURCE),
        (types.MIGRATION_STATE_COMPLETED, types.MIGRATION_SIDE_DESTINATION),
    ):
        totals.note_step(migration(state, side, downtime_us=4_000), types.MIGRATION_STATE_POSTCOPY)
    # A source that was started again in its switchover does not know how long that took.
    totals.note_step(migration(types.MIGRATION_STATE_COMPLETED), types.MIGRATION_STATE_POSTCOPY)

    assert totals.downtime.read()[0][-1] == 0


def test_a_pause_counts_when_it_begins():
    totals = Totals()
    totals.note_step(migration(types.MIGRATION_STATE_POSTCOPY_PAUSED), types.MIGRATION_STATE_POSTCOPY)
    totals.note_step(migration(types.MIGRATION_STATE_POSTCOPY_RECOVER), types.MIGRATION_STATE_POSTCOPY_PAUSED)

    assert totals.pauses() == {SOURCE: 1}
