"""Watching a migration at both ends: the map of missing pages and the fault latencies of now, and only for who asks."""

from contextlib import closing

import pytest

from migrate.client import Client, pages_present
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.operator import check_runs
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
MEMORY_MIB = 24
SLOW_BYTES_PER_S = 6 << 20


@pytest.fixture
def moving(source, destination):
    """A migration that takes some seconds."""
    name = "watched"
    source.create(name, kind="process", memory_mib=MEMORY_MIB, touch_rate_per_s=200)
    source.wait_populated(name)
    migration_id = source.start(destination, name, max_bandwidth_bytes_per_s=SLOW_BYTES_PER_S)
    wait_until(lambda: migration_id in [m.migration_id for m in destination.list()], 10, "the destination to prepare")
    yield migration_id
    source.wait_completed(migration_id)
    wait_until(lambda: not destination.guest(name).migration_id, 10, "the destination to let go")
    check_runs(destination, name)
    with Client(destination.address) as client:
        client.guests.delete(name)


def watch(daemon, migration_id):
    """Every answer to one who watches, to the end."""
    with Client(daemon.address) as client, closing(client.migrations.watch(migration_id, live=True)) as watched:
        return list(watched)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_the_map_of_missing_pages_empties(moving, source, destination, end):
    seen = watch(source if end == "source" else destination, moving)

    maps = [migration.live.missing_map for migration in seen if migration.HasField("live")]
    assert len(maps) > 5
    assert {len(shares) for shares in maps} == {256}
    missing = [sum(shares) for shares in maps]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > missing[-1]
    # What is not there yet according to the counts is missing in the map, up to what came between the two.
    middle = next(m for m in seen if m.HasField("live") and pages_present(m.pages) > m.pages.total // 2)
    share = 1 - pages_present(middle.pages) / middle.pages.total
    assert sum(middle.live.missing_map) / (255 * 256) == pytest.approx(share, abs=0.1)
    assert max(migration.live.fault_latency_us.count for migration in seen) > 0
    assert seen[-1].state == types.MIGRATION_STATE_COMPLETED


def test_who_does_not_ask_is_not_told(moving, source, destination):
    with Client(source.address) as here, Client(destination.address) as there:
        followed = list(here.migrations.follow(moving))
        listed = [*here.migrations.list(), *there.migrations.list(), here.migrations.get(moving)]

    assert not any(migration.HasField("live") for migration in [*followed, *listed])


def test_nothing_stays_of_what_was_watched(moving, source, destination):
    watch(source, moving)

    assert not source.migration(moving).HasField("live")
    assert not destination.migration(moving).HasField("live")


def test_list_with_peers_tells_both_ends(moving, source, destination):
    for asked in (source, destination):
        ends = [
            end
            for end in cli.json_of(cli.run("list", "--peers", "--json", daemon=asked))
            if end["migration_id"] == moving
        ]
        assert [(end["side"], end["daemon"]) for end in ends] == [
            ("source", source.address),
            ("destination", destination.address),
        ]
        assert {end["guest"] for end in ends} == {"watched"}


@pytest.mark.parametrize("end", ["source", "destination"])
def test_status_watch_ends_with_the_migration(moving, source, destination, end):
    watched = cli.run("status", moving, "--watch", daemon=source if end == "source" else destination)

    assert watched.exit_code == 0
    assert any(line.startswith("postcopy ") for line in watched.stderr.splitlines())
    assert watched.stderr.splitlines()[-1].startswith("completed 100%")
    assert "completed" in watched.stdout
