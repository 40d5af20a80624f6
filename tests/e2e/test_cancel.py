"""Cancelled migrations: the guest runs on at the source as if nothing had been, and the destination keeps nothing."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from migrate.barriers import Point
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.barriers import Barriers
from tests.harness.daemons import FINAL, two_daemons
from tests.harness.operator import ask, check_moved, check_runs, delete_everywhere, start, start_detached, status
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]

MEMORY_MIB = 32
# No round is ever small enough for a downtime below that of a switchover by itself: only a cancellation ends it.
ENDLESS = ("--mode", "precopy", "--on-no-convergence", "wait", "--max-bandwidth", "100MB/s", "--downtime-limit", "1ms")
# Setup takes a quarter of a second, and the first pass over all pages a third.
LATEST_US = 900_000
MOMENTS = 12
BLOCKS_THOROUGH, MOMENTS_OF_BLOCK = 10, 20
# RAM and dirty log.
MEMFDS_OF_GUEST_MAX = 2


@pytest.fixture(scope="module")
def barriers(tmp_path_factory):
    with Barriers(tmp_path_factory.mktemp("barriers") / "socket") as held:
        yield held


@pytest.fixture(scope="module")
def daemons(barriers):
    with two_daemons(env=barriers.env) as pair:
        yield pair


@pytest.fixture
def writer(source, destination):
    """A guest at the source that writes at full speed; none is left on either side."""
    source.create("writer", memory_mib=MEMORY_MIB, vcpus=2, write_ratio=1.0)
    source.wait_populated("writer")
    yield "writer"
    delete_everywhere("writer", source, destination)


def children(pid):
    """Processes of a parent; those that ended and wait to be waited for count, too."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def memfds(pid):
    """The memfds that a process has open."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:
            continue
        if target.startswith("/memfd:"):
            found.append(target)
    return found


def cancel(source, migration_id):
    """`migrate cancel`; what it prints."""
    return cli.json_of(ask(source, "cancel", migration_id, "--json"))


def check_cancelled(source, destination, name, report):
    """The guest runs on at the source, and the destination has no guest, no process and no memory of it."""
    assert (report["state"], report["holder"]) == ("cancelled", "source")
    assert (report["downtime_us"], report["guest_touches_at_switchover"], report["error"]) == (0, 0, None)
    assert name not in destination.guest_names()
    assert children(destination.process.pid) == []
    for daemon in (source, destination):
        pid = daemon.process.pid
        wait_until(lambda pid=pid: memfds(pid) == [], 10, "a daemon to close the RAM that it moved from or to")
    found = source.guest(name)
    assert (found.state, found.migration_id) == (types.GUEST_STATE_RUNNING, "")
    assert len(memfds(found.pid)) <= MEMFDS_OF_GUEST_MAX
    check_runs(source, name)


def check_moves(source, destination, name):
    """The guest moves to the same destination at once, as if it had never been tried, and back for the next test."""
    check_moved(source, destination, name, start(source, destination, name, "--mode", "hybrid", "--verify"))
    check_moved(destination, source, name, start(destination, source, name, "--mode", "postcopy"))


def wait_for_moment(source, migration_id, moment_us):
    """By the migration's own clock, which stops at its end."""

    def has_come():
        found = source.migration(migration_id)
        return found.total_us >= moment_us or found.state in FINAL

    wait_until(has_come, 20, "the moment to cancel")


def check_moments(source, destination, name, seed, count):
    """Cancel at so many random moments; return the states that were hit."""
    chooser = random.Random(seed)  # noqa: S311 - the same moments each time
    hit = set()
    for _ in range(count):
        migration_id = start_detached(source, destination, name, *ENDLESS)
        wait_for_moment(source, migration_id, chooser.randrange(LATEST_US))
        hit.add(source.migration(migration_id).state)
        check_cancelled(source, destination, name, cancel(source, migration_id))
    check_moves(source, destination, name)
    return hit


def test_cancel_at_any_moment_leaves_the_guest_at_the_source(source, destination, writer):
    hit = check_moments(source, destination, writer, seed=0, count=MOMENTS)
    assert hit == {types.MIGRATION_STATE_SETUP, types.MIGRATION_STATE_PRECOPY}


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(1, BLOCKS_THOROUGH + 1))
def test_cancel_at_many_moments_leaves_the_guest_at_the_source(source, destination, writer, seed):
    check_moments(source, destination, writer, seed, MOMENTS_OF_BLOCK)


@pytest.mark.parametrize("mode", ["postcopy", "hybrid", "precopy"])
def test_cancel_is_done_or_too_late(source, destination, writer, mode):
    """Moments around the switchover of a migration that does not wait for us: either all of it, or nothing."""
    chooser = random.Random(mode)  # noqa: S311 - the same moments each time
    for _ in range(6):
        migration_id = start_detached(source, destination, writer, "--mode", mode)
        wait_for_moment(source, migration_id, chooser.randrange(500_000))
        result = cli.run("cancel", migration_id, "--json", daemon=source)
        if result.exit_code == 0:
            check_cancelled(source, destination, writer, cli.json_of(result))
            continue
        assert "cannot be cancelled; the guest is" in result.stderr
        assert source.wait_final(migration_id).state == types.MIGRATION_STATE_COMPLETED
        check_moved(source, destination, writer, status(source, migration_id))
        check_moved(destination, source, writer, start(destination, source, writer, "--mode", "postcopy"))


@pytest.mark.parametrize("mode", ["postcopy", "hybrid", "precopy"])
def test_cancel_during_setup_is_harmless(source, destination, barriers, writer, mode):
    barriers.hold(Point.SOURCE_PREPARING)
    migration_id = start_detached(source, destination, writer, "--mode", mode)
    barriers.wait_held(Point.SOURCE_PREPARING, 20)
    assert source.migration(migration_id).state == types.MIGRATION_STATE_SETUP
    with ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(cancel, source, migration_id)
        wait_until(
            lambda: source.migration(migration_id).state == types.MIGRATION_STATE_CANCELLING, 20, "it to be cancelled"
        )
        barriers.release(Point.SOURCE_PREPARING)
        check_cancelled(source, destination, writer, cancelled.result(30))
    check_moves(source, destination, writer)


def test_cancel_twice_is_harmless(source, destination, writer):
    migration_id = start_detached(source, destination, writer, *ENDLESS)
    wait_until(lambda: source.migration(migration_id).generation > 2, 20, "the precopy to wait")
    check_cancelled(source, destination, writer, cancel(source, migration_id))
    check_cancelled(source, destination, writer, cancel(source, migration_id))


def test_cancel_by_many_at_once_is_harmless(source, destination, writer):
    migration_id = start_detached(source, destination, writer, *ENDLESS)
    wait_until(lambda: source.migration(migration_id).generation > 2, 20, "the precopy to wait")
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(source.cancel(migration_id).state), daemon=True)
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [types.MIGRATION_STATE_CANCELLED] * len(threads)
    check_cancelled(source, destination, writer, status(source, migration_id))


def test_cancelled_guest_is_offered_to_the_next_migration_at_once(source, destination, writer):
    for _ in range(5):
        migration_id = start_detached(source, destination, writer, *ENDLESS)
        wait_until(lambda: source.migration(migration_id).generation > 0, 20, "the precopy to begin")  # noqa: B023
        assert cancel(source, migration_id)["state"] == "cancelled"
    check_moves(source, destination, writer)


def test_cancel_after_the_switchover_names_the_holder(source, destination):
    source.create("late", memory_mib=MEMORY_MIB, vcpus=2)
    source.wait_populated("late")
    # Slow enough to be met half-way.
    words = ("--mode", "postcopy", "--max-bandwidth", "10MB/s")
    migration_id = start_detached(source, destination, "late", *words)
    wait_until(lambda: source.migration(migration_id).state == types.MIGRATION_STATE_POSTCOPY, 20, "the switchover")
    refused = ask(source, "cancel", migration_id, exit_code=1)
    assert "the guest is split" in refused.stderr
    assert source.wait_final(migration_id).state == types.MIGRATION_STATE_COMPLETED
    check_moved(source, destination, "late", status(source, migration_id))
    refused = ask(source, "cancel", migration_id, exit_code=1)
    assert "the guest is at the destination" in refused.stderr
    destination.guests.DeleteGuest(guest.DeleteGuestRequest(name="late"), timeout=30)


def test_cancel_of_what_was_never_begun_is_refused(source):
    refused = ask(source, "cancel", "nothing", exit_code=1)
    assert "no migration 'nothing'" in refused.stderr
