"""A daemon is killed at every named point of a migration, and started again: the migration carries on."""

import pytest

from migrate.barriers import Point
from migrate.v1 import types_pb2 as types

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(90)]

HELD_S = 20
BANDWIDTH_BYTES_PER_S = 200 << 20
ONLY_PRECOPY = {Point.SOURCE_PRECOPY, Point.DESTINATION_INVALIDATED}
# From here on, all modes are the same: the rest of hybrid is run with --thorough.
FIRST_COMMON = [*Point].index(Point.DESTINATION_RUNNING)
# Where mode precopy does what hybrid does not; likewise.
OWN_OF_PRECOPY = {*ONLY_PRECOPY, Point.SOURCE_PAUSED, Point.SOURCE_SWITCHING, Point.DESTINATION_SWITCHING}


def case(mode, point):
    is_common = mode == "hybrid" and [*Point].index(point) >= FIRST_COMMON
    is_thorough = is_common or (mode == "precopy" and point not in OWN_OF_PRECOPY)
    marks = [pytest.mark.thorough] if is_thorough else []
    return pytest.param(mode, point, id=f"{mode}-{point.value}", marks=marks)


CASES = [
    case(mode, point)
    for mode in ("postcopy", "hybrid", "precopy")
    for point in Point
    if mode != "postcopy" or point not in ONLY_PRECOPY
]


@pytest.mark.parametrize(("mode", "point"), CASES)
def test_daemon_that_is_killed_at_a_barrier_and_started_again_carries_on(pair, mode, point):
    pair.source.create(memory_mib=64, vcpus=2, touch_rate_per_s=20_000)
    pair.source.wait_populated()
    pair.barriers.hold(point)
    migration_id = pair.start(
        mode=types.MigrationMode.Value(f"MIGRATION_MODE_{mode.upper()}"),
        max_bandwidth_bytes_per_s=BANDWIDTH_BYTES_PER_S,
    )
    held_id, pid = pair.barriers.wait_held(point, HELD_S)
    victim = pair.of_point(point)
    assert (held_id, pid) == (migration_id, victim.process.pid)

    victim.kill()
    pair.barriers.release(point)
    victim.restart()

    pair.check_moved(migration_id)
