"""Daemons are held at named points, and go on when they are told to."""

import os
import subprocess
import sys
import threading

import pytest

from migrate.barriers import Point
from tests.harness.barriers import Barriers, Passed
from tests.harness.waiting import wait_until

REACH = "import sys; from migrate.barriers import Point, reach; reach(Point(sys.argv[1]), sys.argv[2]); print('passed')"


@pytest.fixture
def barriers(tmp_path):
    with Barriers(tmp_path / "barriers") as made:
        yield made


@pytest.fixture
def reach(barriers):
    """Starts processes that reach a point; all are ended."""
    made = []

    def start(point, migration_id="m1"):
        command = [sys.executable, "-c", REACH, point.value, migration_id]
        made.append(subprocess.Popen(command, env={**os.environ, **barriers.env}, stdout=subprocess.PIPE))
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()
        process.stdout.close()


def has_passed(process):
    return process.communicate(timeout=20)[0] == b"passed\n"


def test_a_point_that_is_not_held_is_passed_and_seen(barriers, reach):
    process = reach(Point.SOURCE_PAUSED)
    assert has_passed(process)
    assert barriers.seen == [Passed(Point.SOURCE_PAUSED, "m1", process.pid)]


def test_the_next_one_is_held_until_released_and_others_pass(barriers, reach):
    barriers.hold(Point.SOURCE_PAUSED)
    held = reach(Point.SOURCE_PAUSED)
    assert barriers.wait_held(Point.SOURCE_PAUSED, 20) == ("m1", held.pid)
    assert has_passed(reach(Point.SOURCE_ENDED))
    assert has_passed(reach(Point.SOURCE_PAUSED, "m2"))
    assert held.poll() is None
    barriers.release(Point.SOURCE_PAUSED)
    assert has_passed(held)
    assert barriers.held(Point.SOURCE_PAUSED) is None


def test_one_that_dies_is_held_no_more_and_the_next_one_can_be(barriers, reach):
    barriers.hold(Point.DESTINATION_RUNNING)
    first = reach(Point.DESTINATION_RUNNING)
    barriers.wait_held(Point.DESTINATION_RUNNING, 20)
    first.kill()
    wait_until(lambda: barriers.held(Point.DESTINATION_RUNNING) is None, 10, "the death to be noticed")
    barriers.hold(Point.DESTINATION_RUNNING)
    second = reach(Point.DESTINATION_RUNNING)
    assert barriers.wait_held(Point.DESTINATION_RUNNING, 20) == ("m1", second.pid)


def test_release_before_anyone_is_held_holds_none(barriers, reach):
    barriers.hold(Point.SOURCE_LEFT)
    barriers.release(Point.SOURCE_LEFT)
    assert has_passed(reach(Point.SOURCE_LEFT))


def test_close_lets_everyone_go_on_and_leaves_nothing(tmp_path, barriers, reach):
    barriers.hold(Point.SOURCE_LEFT)
    held = reach(Point.SOURCE_LEFT)
    barriers.wait_held(Point.SOURCE_LEFT, 20)
    barriers.close()
    barriers.close()
    assert has_passed(held)
    # Nobody listens any more.
    assert has_passed(reach(Point.SOURCE_LEFT))
    assert list(tmp_path.iterdir()) == []
    assert "barriers" not in [thread.name for thread in threading.enumerate()]
