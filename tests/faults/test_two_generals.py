"""Who runs the guest, and what happens next, for each message that is lost and each process that is killed.

docs/reliability.md tells the same as a table, and names each of these cells by its id.
"""

import os
import re
import signal
from pathlib import Path

import grpc
import pytest

from migrate.barriers import Point
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness.fault_proxy import Direction
from tests.harness.processes import guest_pids
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(60)]

TABLE = Path(__file__).parents[2] / "docs" / "reliability.md"
HELD_S = 20
BANDWIDTH_BYTES_PER_S = 64 << 20
PRECOPY = {"mode": types.MIGRATION_MODE_PRECOPY}
COMPLETED, FAILED = types.MIGRATION_STATE_COMPLETED, types.MIGRATION_STATE_FAILED
POSTCOPY, SWITCHOVER = types.MIGRATION_STATE_POSTCOPY, types.MIGRATION_STATE_SWITCHOVER
CELLS = {}


def cell(name):
    """A cell of the table, with its id."""

    def keep(function):
        assert name not in CELLS
        CELLS[name] = function
        return function

    return keep


def come_to(pair, point, **terms):
    """A migration that is held at a barrier; its id."""
    pair.source.create(memory_mib=32, vcpus=2, touch_rate_per_s=2_000)
    pair.source.wait_populated()
    pair.barriers.hold(point)
    migration_id = pair.start(**{"max_bandwidth_bytes_per_s": BANDWIDTH_BYTES_PER_S, **terms})
    pair.barriers.wait_held(point, HELD_S)
    return migration_id


def part(link):
    """Nobody comes through any more."""
    link.refuse()
    link.cut()


def wait_error(daemon, migration_id):
    """Wait until a daemon finds that something is wrong."""
    wait_until(lambda: daemon.migration(migration_id).HasField("error"), 10, "an error to be noticed")
    return daemon.migration(migration_id)


def check_next_attempt(pair, migration_id):
    """The guest runs on at the source, which was held before it tries again, and then moves all the same."""
    pair.barriers.wait_held(Point.SOURCE_PREPARING, HELD_S)
    assert pair.runners() == "source"
    lost = pair.source.migration(migration_id)
    assert (lost.state, lost.attempt, lost.error.type) == (types.MIGRATION_STATE_SETUP, 2, "AttemptLostError")
    assert (lost.holder, lost.error.holder) == (types.GUEST_HOLDER_SOURCE,) * 2
    pair.source.calm()
    pair.destination.calm()
    pair.barriers.release(Point.SOURCE_PREPARING)
    assert pair.check_moved(migration_id).attempt >= 2


def check_lost(pair, migration_id):
    """The guest is nowhere any more, and both sides say so; what is left of it never runs."""
    for daemon in (pair.source, pair.destination):
        lost = pair.wait_state(daemon, migration_id, FAILED)
        assert (lost.holder, lost.error.type) == (types.GUEST_HOLDER_NONE, "GuestLostError")
        assert lost.error.holder == types.GUEST_HOLDER_NONE
    assert pair.runners() == "nobody"
    if pair.state_of(pair.source) is not None:
        with pytest.raises(grpc.RpcError) as refused:
            pair.source.guests.ResumeGuest(guest.ResumeGuestRequest(name="g"), timeout=10)
        assert refused.value.code() == grpc.StatusCode.DATA_LOSS
    assert pair.runners() == "nobody"


# ---- Prepare ----


@cell("prepare-unreachable")
def _(pair):
    pair.source.create(memory_mib=32, touch_rate_per_s=2_000)
    pair.source.wait_populated()
    part(pair.destination.control_link)
    failed = pair.source.wait_final(pair.start())
    assert (failed.state, failed.holder) == (FAILED, types.GUEST_HOLDER_SOURCE)
    assert failed.error.type == "PeerUnreachableError"
    assert pair.runners() == "source"
    pair.destination.calm()
    pair.check_moved(pair.start())


@cell("prepare-request-lost")
def _(pair):
    migration_id = come_to(pair, Point.SOURCE_PREPARING)
    # Enough for the connection to be there, and less than the request.
    pair.destination.control_link.cut_after(300, Direction.UP)
    pair.barriers.release(Point.SOURCE_PREPARING)
    pair.barriers.hold(Point.SOURCE_PREPARING)
    pair.barriers.wait_held(Point.SOURCE_PREPARING, HELD_S)
    assert pair.state_of(pair.destination) is None
    check_next_attempt(pair, migration_id)


@cell("prepare-answer-lost")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_PREPARED)
    assert (pair.runners(), pair.state_of(pair.destination)) == ("source", types.GUEST_STATE_INCOMING)
    pair.barriers.hold(Point.SOURCE_PREPARING)
    pair.destination.control_link.reset()
    pair.barriers.release(Point.DESTINATION_PREPARED)
    check_next_attempt(pair, migration_id)


# ---- Invalidate ----


@cell("invalidate-request-lost")
def _(pair):
    migration_id = come_to(pair, Point.SOURCE_PREPARED, **PRECOPY)
    pair.barriers.hold(Point.SOURCE_PREPARING)
    part(pair.destination.control_link)
    pair.barriers.release(Point.SOURCE_PREPARED)
    check_next_attempt(pair, migration_id)


@cell("invalidate-answer-lost")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_INVALIDATED, **PRECOPY)
    pair.barriers.hold(Point.SOURCE_PREPARING)
    pair.destination.control_link.reset()
    pair.barriers.release(Point.DESTINATION_INVALIDATED)
    check_next_attempt(pair, migration_id)


# ---- Switchover ----


@cell("switchover-request-lost")
def _(pair):
    migration_id = come_to(pair, Point.SOURCE_SWITCHING)
    pair.destination.control_link.blackhole()
    pair.barriers.release(Point.SOURCE_SWITCHING)
    # It cannot know, so it stays paused and asks.
    assert wait_error(pair.source, migration_id).state == SWITCHOVER
    assert (pair.runners(), pair.state_of(pair.source)) == ("nobody", types.GUEST_STATE_PAUSED)
    assert pair.state_of(pair.destination) == types.GUEST_STATE_INCOMING
    pair.barriers.hold(Point.SOURCE_PREPARING)
    pair.destination.control_link.reset()
    pair.destination.control_link.heal()
    check_next_attempt(pair, migration_id)


@cell("switchover-answer-lost")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_RUNNING)
    pair.barriers.hold(Point.DESTINATION_COMPLETE)
    pair.destination.control_link.blackhole()
    pair.barriers.release(Point.DESTINATION_RUNNING)
    assert wait_error(pair.source, migration_id).state == SWITCHOVER
    assert (pair.runners(), pair.state_of(pair.source)) == ("destination", types.GUEST_STATE_PAUSED)
    pair.destination.control_link.reset()
    pair.destination.control_link.heal()
    # It learns it by asking: END has not come.
    pair.wait_state(pair.source, migration_id, POSTCOPY)
    pair.barriers.release(Point.DESTINATION_COMPLETE)
    assert pair.check_moved(migration_id).attempt == 1


@cell("switchover-answer-lost-until-end")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_RUNNING)
    pair.barriers.hold(Point.DESTINATION_COMPLETE)
    part(pair.destination.control_link)
    pair.barriers.release(Point.DESTINATION_RUNNING)
    pair.barriers.wait_held(Point.DESTINATION_COMPLETE, HELD_S)
    assert wait_error(pair.source, migration_id).state == SWITCHOVER
    assert pair.runners() == "destination"
    # No question of the source ever comes through, but END does.
    pair.barriers.release(Point.DESTINATION_COMPLETE)
    assert pair.check_moved(migration_id).attempt == 1


@cell("switchover-answer-lost-while-loading")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_SWITCHING)
    link = pair.destination.control_link
    link.reset()
    assert wait_error(pair.source, migration_id).state == SWITCHOVER
    asked_bytes = link.passed_bytes[Direction.UP] + 2_000
    wait_until(lambda: link.passed_bytes[Direction.UP] > asked_bytes, 30, "the source to have asked several times")
    assert (pair.source.migration(migration_id).state, pair.runners()) == (SWITCHOVER, "nobody")
    pair.barriers.release(Point.DESTINATION_SWITCHING)
    assert pair.check_moved(migration_id).attempt == 1


@cell("switchover-failed-and-answer-lost")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_SWITCHING)
    part(pair.destination.control_link)
    for pid in guest_pids(pair.destination.state_dir):
        os.kill(pid, signal.SIGKILL)
    pair.barriers.release(Point.DESTINATION_SWITCHING)
    pair.wait_state(pair.destination, migration_id, FAILED)
    assert (pair.source.migration(migration_id).state, pair.runners()) == (SWITCHOVER, "nobody")
    pair.barriers.hold(Point.SOURCE_PREPARING)
    pair.destination.calm()
    check_next_attempt(pair, migration_id)


@cell("switchover-twin-killed-before-it-may-run")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_SWITCHING)
    pair.barriers.hold(Point.SOURCE_PREPARING)
    kill_with_guest(pair.destination, pair)
    assert (pair.source.migration(migration_id).state, pair.runners()) == (SWITCHOVER, "nobody")
    pair.destination.restart()
    check_next_attempt(pair, migration_id)


@cell("switchover-twin-killed-when-it-may-run")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_MAY_RUN)
    kill_with_guest(pair.destination, pair)
    assert pair.runners() == "nobody"
    pair.destination.restart()
    # It has not run, but nobody is left who knows.
    check_lost(pair, migration_id)


@cell("switchover-twin-killed-when-it-runs")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_RUNNING)
    assert pair.runners() == "destination"
    kill_with_guest(pair.destination, pair)
    assert (pair.source.migration(migration_id).state, pair.runners()) == (SWITCHOVER, "nobody")
    pair.destination.restart()
    check_lost(pair, migration_id)


@cell("switchover-guest-killed-before")
def _(pair):
    migration_id = come_to(pair, Point.SOURCE_SWITCHING)
    kill_with_guest(pair.source, pair)
    assert pair.runners() == "nobody"
    pair.source.restart()
    lost = pair.wait_state(pair.source, migration_id, FAILED)
    assert (lost.holder, lost.error.type) == (types.GUEST_HOLDER_NONE, "GuestLostError")
    # The destination was told in time that it will never run it.
    pair.wait_state(pair.destination, migration_id, types.MIGRATION_STATE_CANCELLED)
    assert (pair.state_of(pair.source), pair.state_of(pair.destination)) == (None, None)


@cell("switchover-guest-killed-after")
def _(pair):
    migration_id = come_to(pair, Point.SOURCE_RUNNING, max_bandwidth_bytes_per_s=4 << 20)
    assert pair.runners() == "destination"
    kill_with_guest(pair.source, pair)
    assert pair.runners() == "destination"
    pair.source.restart()
    # What is missing must never read as zero.
    check_lost(pair, migration_id)
    assert pair.state_of(pair.destination) is None


def kill_with_guest(daemon, pair):
    daemon.kill()
    pair.kill_guest(daemon)


# ---- postcopy ----


# GetIncoming is lost in test_lost_links.


def _lose_resume(pair, direction):
    migration_id = come_to(pair, Point.SOURCE_RUNNING, max_bandwidth_bytes_per_s=24 << 20)
    pair.barriers.release(Point.SOURCE_RUNNING)
    part(pair.source.page_link)
    pair.wait_state(pair.destination, migration_id, types.MIGRATION_STATE_POSTCOPY_PAUSED)
    # It asks where the pages are, again and again.
    link = pair.source.control_link
    wait_until(lambda: link.accepted, 10, "the destination to ask")
    before = link.accepted
    link.cut_after(7, direction)
    wait_until(lambda: link.accepted > before, 10, "the destination to ask again")
    assert pair.runners() == "destination"
    pair.source.calm()
    assert pair.check_moved(migration_id).recoveries == 1


cell("resume-request-lost")(lambda pair: _lose_resume(pair, Direction.UP))
cell("resume-answer-lost")(lambda pair: _lose_resume(pair, Direction.DOWN))


# ---- Complete ----


@cell("complete-request-lost")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_DISARMED)
    part(pair.source.control_link)
    pair.barriers.release(Point.DESTINATION_DISARMED)
    assert wait_error(pair.destination, migration_id).state == POSTCOPY
    assert (pair.runners(), pair.state_of(pair.source)) == ("destination", types.GUEST_STATE_PAUSED)
    assert pair.source.migration(migration_id).state == POSTCOPY
    pair.source.calm()
    pair.check_moved(migration_id)


@cell("complete-answer-lost")
def _(pair):
    migration_id = come_to(pair, Point.SOURCE_ENDED)
    part(pair.source.control_link)
    pair.barriers.release(Point.SOURCE_ENDED)
    pair.wait_state(pair.source, migration_id, COMPLETED)
    wait_until(lambda: pair.state_of(pair.source) is None, 10, "the source to free the guest")
    assert wait_error(pair.destination, migration_id).state == POSTCOPY
    assert pair.runners() == "destination"
    pair.source.calm()
    pair.check_moved(migration_id)


@cell("complete-guest-killed-when-all-is-there")
def _(pair):
    migration_id = come_to(pair, Point.DESTINATION_COMPLETE)
    kill_with_guest(pair.source, pair)
    pair.source.restart()
    pair.wait_state(pair.source, migration_id, POSTCOPY)
    asked_bytes = pair.destination.control_link.passed_bytes[Direction.UP] + 1_000
    # It looks several times, and draws no conclusion of its own.
    wait_until(lambda: pair.destination.control_link.passed_bytes[Direction.UP] > asked_bytes, 10, "it to ask")
    assert pair.source.migration(migration_id).state == POSTCOPY
    assert pair.runners() == "destination"
    pair.barriers.release(Point.DESTINATION_COMPLETE)
    pair.check_moved(migration_id)


# ---- kills: of the other daemon than the one at a step, and of both; test_killed_daemons has the one's own ----

STEPS = list(Point)


def runner_at(point):
    """Who runs the guest when a migration is at a point."""
    if STEPS.index(point) < STEPS.index(Point.SOURCE_PAUSED):
        return "source"
    return "nobody" if STEPS.index(point) < STEPS.index(Point.DESTINATION_RUNNING) else "destination"


def _kill(pair, point, words):
    precopy = point in (Point.SOURCE_PRECOPY, Point.DESTINATION_INVALIDATED)
    migration_id = come_to(pair, point, **(PRECOPY if precopy else {}))
    killed = [pair.source, pair.destination] if words == "both" else [getattr(pair, words)]
    for daemon in killed:
        daemon.kill()
    assert pair.runners() == runner_at(point)
    pair.restart(*killed)
    pair.barriers.release(point)
    pair.check_moved(migration_id)


def _add_kills():
    other = {"source": "destination", "destination": "source"}
    alone = (
        Point.SOURCE_PREPARED,
        Point.DESTINATION_PREPARED,
        Point.SOURCE_PRECOPY,
        Point.DESTINATION_INVALIDATED,
        Point.SOURCE_SWITCHING,
        Point.DESTINATION_SWITCHING,
        Point.DESTINATION_RUNNING,
        Point.DESTINATION_COMPLETE,
        Point.SOURCE_ENDING,
        Point.SOURCE_ENDED,
    )
    both = (
        Point.DESTINATION_PREPARED,
        Point.DESTINATION_INVALIDATED,
        Point.SOURCE_SWITCHING,
        Point.DESTINATION_SWITCHING,
        Point.DESTINATION_MAY_RUN,
        Point.DESTINATION_RUNNING,
        Point.DESTINATION_DISARMED,
        Point.SOURCE_ENDED,
        Point.DESTINATION_ACKNOWLEDGED,
    )
    for point in alone:
        victim = other[point.value.partition(".")[0]]
        cell(f"{victim}-killed-at-{point.value}")(lambda pair, p=point, v=victim: _kill(pair, p, v))
    for point in both:
        cell(f"both-killed-at-{point.value}")(lambda pair, p=point: _kill(pair, p, "both"))


_add_kills()


@pytest.mark.parametrize("name", CELLS)
def test_cell(proxied, name):
    CELLS[name](proxied)


def test_table_names_every_cell_and_every_point():
    words = set(re.findall(r"`([a-z.-]+)`", TABLE.read_text()))
    assert {name for name in CELLS if name not in words} == set()
    assert {point.value for point in Point if point.value not in words} == set()
    # And nothing that looks like a cell and is none.
    verbs = ("-lost", "-killed-", "-unreachable")
    assert {word for word in words if any(verb in word for verb in verbs)} - set(CELLS) == set()
