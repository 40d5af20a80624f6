"""A disk or a memory is full in the middle of a migration: the source's guest runs on, and nothing is left behind."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.barriers import Point
from migrate.v1 import types_pb2 as types
from tests.harness import operator
from tests.harness.processes import guest_pids
from tests.harness.recoverable import recoverable_pair
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(60)]

HELD_S = 20
DISK_BYTES = 64 << 10
MEMORY_MIB = 32
# A file system of our own that only the daemon, and those who look through its root, can see.
SMALL_DISK = f'mount -t tmpfs -o size={DISK_BYTES},mode=700 tmpfs "$0" && exec "$@"'


@contextlib.contextmanager
def small_disk(tmp_path, side):
    """Both daemons, the state directory of one of them on a small disk of its own."""
    directory = tmp_path / side
    directory.mkdir()
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", SMALL_DISK, str(directory)]
    with recoverable_pair(tmp_path, **{f"of_{side}": {"prefix": prefix}}) as pair:
        yield pair


def ballast_of(daemon):
    return Path(f"/proc/{daemon.process.pid}/root{daemon.state_dir}/ballast")


def fill_disk(daemon):
    """Write until there is no more space."""
    with ballast_of(daemon).open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    assert os.statvfs(ballast_of(daemon)).f_bavail == 0


def empty_disk(daemon):
    ballast_of(daemon).unlink()


def limit(daemon, what, limit_bytes):
    """What a running daemon may use from now on; the guests that it starts inherit it. Raised again with None."""
    _, hard_bytes = resource.prlimit(daemon.process.pid, what)
    resource.prlimit(daemon.process.pid, what, (hard_bytes if limit_bytes is None else limit_bytes, hard_bytes))


def create(pair, kind="kvm", memory_mib=MEMORY_MIB, **spec):
    pair.source.create(kind=kind, memory_mib=memory_mib, vcpus=2, touch_rate_per_s=5000, **spec)
    pair.source.wait_populated()
    return pair.source.guest().pid


def check_stayed(pair, migration_id, pid, *words):
    """It has failed, and says what ran out, and where; the guest runs at the source, the destination has nothing."""
    shown = pair.wait_state(pair.source, migration_id, types.MIGRATION_STATE_FAILED)
    assert (shown.holder, shown.error.holder) == (types.GUEST_HOLDER_SOURCE,) * 2
    for word in words:
        assert word in shown.error.message
    assert shown.guest_errors == 0
    wait_until(lambda: not pair.source.guest().migration_id, 10, "the source to let its guest be moved again")
    assert pair.source.guest().pid == pid
    pair.check_runs(pair.source)
    assert operator.status(pair.source, migration_id)["holder"] == "source"
    check_nothing_left(pair)


def check_nothing_left(pair):
    wait_until(lambda: guest_pids(pair.destination.state_dir) == [], 10, "the twin to be gone")
    assert pair.destination.guest_names() == []
    sockets = Path(f"/proc/{pair.destination.process.pid}/root{pair.destination.state_dir}/guests")
    assert [found.name for found in sockets.iterdir()] == []


def check_moves_now(pair, **terms):
    """There is space again."""
    return pair.check_moved(pair.start(**terms))


@pytest.mark.root
@pytest.mark.parametrize("kind", ["kvm", pytest.param("process", marks=pytest.mark.thorough)])
def test_disk_of_the_destination_that_is_full_before_prepare_leaves_the_guest(tmp_path, kind):
    with small_disk(tmp_path, "destination") as pair:
        pid = create(pair, kind)
        fill_disk(pair.destination)
        migration_id = pair.start()
        check_stayed(
            pair,
            migration_id,
            pid,
            "the destination could not prepare",
            str(pair.destination.state_dir),
            "No space left on device",
        )
        empty_disk(pair.destination)
        check_moves_now(pair)


@pytest.mark.root
@pytest.mark.parametrize("mode", ["postcopy", "hybrid", "precopy"])
def test_disk_of_the_destination_that_is_full_at_the_switchover_leaves_the_guest(tmp_path, mode):
    """That the vCPUs may run could not be written down, so they do not."""
    terms = {"mode": types.MigrationMode.Value(f"MIGRATION_MODE_{mode.upper()}")}
    with small_disk(tmp_path, "destination") as pair:
        pid = create(pair)
        pair.barriers.hold(Point.DESTINATION_SWITCHING)
        migration_id = pair.start(**terms)
        pair.barriers.wait_held(Point.DESTINATION_SWITCHING, HELD_S)
        fill_disk(pair.destination)
        pair.barriers.release(Point.DESTINATION_SWITCHING)
        words = (str(pair.destination.state_dir), "No space left on device")
        check_stayed(pair, migration_id, pid, "the destination could not run", *words)
        assert Point.DESTINATION_RUNNING not in [passed.point for passed in pair.barriers.seen]
        empty_disk(pair.destination)
        check_moves_now(pair, **terms)


@pytest.mark.root
def test_disk_of_the_destination_that_is_full_at_end_changes_nothing(tmp_path):
    """Its guest is there, as the next daemon would find out by itself."""
    with small_disk(tmp_path, "destination") as pair:
        create(pair)
        pair.barriers.hold(Point.DESTINATION_COMPLETE)
        migration_id = pair.start()
        pair.barriers.wait_held(Point.DESTINATION_COMPLETE, HELD_S)
        fill_disk(pair.destination)
        pair.barriers.release(Point.DESTINATION_COMPLETE)
        pair.check_moved(migration_id)


@pytest.mark.root
def test_end_is_acknowledged_once_the_source_can_write_it_down(tmp_path):
    """Until then it keeps every page; a daemon that forgot END would keep a guest whose other half runs elsewhere."""
    with small_disk(tmp_path, "source") as pair:
        pid = create(pair)
        pair.barriers.hold(Point.DESTINATION_COMPLETE)
        migration_id = pair.start()
        pair.barriers.wait_held(Point.DESTINATION_COMPLETE, HELD_S)
        fill_disk(pair.source)
        pair.barriers.release(Point.DESTINATION_COMPLETE)

        def refused():
            shown = pair.destination.migration(migration_id)
            return shown if shown.error.type == "StateDirError" else None

        shown = wait_until(refused, 10, "END to be refused")
        assert "No space left on device" in shown.error.message
        assert str(pair.source.state_dir) in shown.error.message
        assert (shown.state, shown.holder) == (types.MIGRATION_STATE_POSTCOPY, types.GUEST_HOLDER_SPLIT)
        assert pair.source.migration(migration_id).state == types.MIGRATION_STATE_POSTCOPY
        assert pair.source.guest().pid == pid
        empty_disk(pair.source)
        pair.check_moved(migration_id)


@pytest.mark.root
def test_disk_of_the_source_that_is_full_refuses_a_migration_and_a_cancellation(tmp_path):
    with small_disk(tmp_path, "source") as pair:
        create(pair)
        fill_disk(pair.source)
        refused = operator.ask(pair.source, "start", "g", "--to", pair.destination.address, exit_code=1).stderr
        assert "No space left on device" in refused
        assert pair.source.migrations_now() == []
        assert pair.source.guest().migration_id == ""
        empty_disk(pair.source)

        pair.barriers.hold(Point.SOURCE_PRECOPY)
        migration_id = pair.start(mode=types.MIGRATION_MODE_HYBRID)
        pair.barriers.wait_held(Point.SOURCE_PRECOPY, HELD_S)
        fill_disk(pair.source)
        assert "No space left on device" in operator.ask(pair.source, "cancel", migration_id, exit_code=1).stderr
        empty_disk(pair.source)
        pair.barriers.release(Point.SOURCE_PRECOPY)
        pair.check_moved(migration_id)


@pytest.mark.parametrize("kind", ["kvm", pytest.param("process", marks=pytest.mark.thorough)])
def test_destination_whose_memory_is_out_in_prepare_leaves_the_guest(pair, kind):
    """The twin may not map as much address space as its RAM needs."""
    pid = create(pair, kind, memory_mib=8192, working_set_mib=16)
    mapped_bytes = int(Path(f"/proc/{pair.destination.process.pid}/statm").read_text().split()[0]) * 4096
    limit(pair.destination, resource.RLIMIT_AS, mapped_bytes + (1 << 30))
    migration_id = pair.start()
    check_stayed(pair, migration_id, pid, "the destination could not prepare", "Cannot allocate memory")
    limit(pair.destination, resource.RLIMIT_AS, None)
    check_moves_now(pair)


@pytest.mark.parametrize("mode", ["hybrid", "precopy"])
def test_destination_whose_memory_is_full_in_the_middle_of_the_precopy_leaves_the_guest(pair, mode):
    """No page can be written behind the first megabyte of the twin's memory."""
    terms = {"mode": types.MigrationMode.Value(f"MIGRATION_MODE_{mode.upper()}")}
    pid = create(pair)
    pair.barriers.hold(Point.SOURCE_PRECOPY)
    migration_id = pair.start(max_bandwidth_bytes_per_s=16 << 20, **terms)
    pair.barriers.wait_held(Point.SOURCE_PRECOPY, HELD_S)
    pair.barriers.release(Point.SOURCE_PRECOPY)
    wait_until(lambda: pair.destination.migration(migration_id).pages.precopy > 300, 20, "pages to arrive")
    limit(pair.destination, resource.RLIMIT_FSIZE, 1 << 20)
    check_stayed(pair, migration_id, pid, "the destination", "File too large")
    limit(pair.destination, resource.RLIMIT_FSIZE, None)
    check_moves_now(pair, **terms)


@pytest.mark.parametrize("mode", ["hybrid", "precopy"])
def test_twin_that_is_killed_in_the_precopy_leaves_the_guest(pair, mode):
    """As a host does that runs out of memory."""
    terms = {"mode": types.MigrationMode.Value(f"MIGRATION_MODE_{mode.upper()}")}
    pid = create(pair)
    pair.barriers.hold(Point.DESTINATION_INVALIDATED)
    migration_id = pair.start(**terms)
    pair.barriers.wait_held(Point.DESTINATION_INVALIDATED, HELD_S)
    (twin_pid,) = guest_pids(pair.destination.state_dir)
    os.kill(twin_pid, signal.SIGKILL)
    pair.barriers.release(Point.DESTINATION_INVALIDATED)
    check_stayed(pair, migration_id, pid, "the destination could not run the guest: its process there died")
    check_moves_now(pair, **terms)


def test_twin_that_is_killed_while_it_is_built_leaves_the_guest(pair):
    pid = create(pair)
    pair.barriers.hold(Point.DESTINATION_BUILT)
    migration_id = pair.start()
    pair.barriers.wait_held(Point.DESTINATION_BUILT, HELD_S)
    (twin_pid,) = guest_pids(pair.destination.state_dir)
    os.kill(twin_pid, signal.SIGKILL)
    pair.barriers.release(Point.DESTINATION_BUILT)
    check_stayed(pair, migration_id, pid, "the destination could not prepare for the guest: its process there died")
    check_moves_now(pair)


@pytest.mark.root
def test_daemon_that_cannot_use_its_state_directory_says_so_and_ends(tmp_path):
    (tmp_path / "state").mkdir()
    words = [sys.executable, "-m", "migrate", "daemon", "--listen", "127.0.0.1:0", "--state-dir", "/proc/state"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "the state directory /proc/state cannot be used" in ended.stderr
