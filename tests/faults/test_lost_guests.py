"""A guest process dies after the switchover: what is lost is called lost, at once and everywhere; the rest moves."""

import os
import re
import signal
import time

import grpc
import pytest

from migrate.barriers import Point
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness import operator
from tests.harness.daemons import CALL_S
from tests.harness.processes import guest_pids, is_alive
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(60)]

BANDWIDTH_BYTES_PER_S = 8 << 20
HELD_S = 20
# Nothing has to be waited for: a process that died is noticed at the next look at it.
AT_ONCE_S = 2.5
LOST = "GuestLostError"


def start_slow(pair, kind="kvm", **terms):
    """A guest in the middle of postcopy, with its faults flowing; the migration."""
    pair.source.create(kind=kind, memory_mib=64, vcpus=2, touch_rate_per_s=500)
    pair.source.wait_populated()
    migration_id = pair.start(max_bandwidth_bytes_per_s=BANDWIDTH_BYTES_PER_S, **terms)
    pair.wait_state(pair.destination, migration_id, types.MIGRATION_STATE_POSTCOPY)
    pair.wait_state(pair.source, migration_id, types.MIGRATION_STATE_POSTCOPY)
    wait_until(lambda: pair.destination.migration(migration_id).pages.urgent > 50, 20, "faults to be served")
    return migration_id


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(pid), 10, "the guest process to be gone")


def wait_lost(daemons, migration_id, since_s):
    """Both daemons say that it has failed, and did not need long to find out."""

    def failed():
        return all(daemon.migration(migration_id).state == types.MIGRATION_STATE_FAILED for daemon in daemons)

    wait_until(failed, HELD_S, "the migration to have failed")
    assert time.monotonic() - since_s < AT_ONCE_S


def check_lost(pair, migration_id, since_s):
    """At both daemons, at once, and wherever an operator may look."""
    daemons = (pair.source, pair.destination)
    wait_lost(daemons, migration_id, since_s)
    for daemon in daemons:
        check_lost_at(daemon, migration_id)


def check_lost_at(daemon, migration_id):
    """Everything that an operator can look at says that the guest is lost."""
    shown = daemon.migration(migration_id)
    assert (shown.holder, shown.error.type, shown.error.holder) == (
        types.GUEST_HOLDER_NONE,
        LOST,
        types.GUEST_HOLDER_NONE,
    )
    status = operator.status(daemon, migration_id)
    assert (status["state"], status["holder"]) == ("failed", "none")
    assert (status["error"]["type"], status["error"]["holder"]) == (LOST, "none")
    assert "backup" in status["error"]["remedy"]
    said = operator.ask(daemon, "status", migration_id).stdout
    assert "the guest is lost" in said
    # No call brings it back, and each says why.
    refused = operator.ask(daemon, "recover", migration_id, exit_code=1)
    assert "the guest is lost" in refused.stderr
    with pytest.raises(grpc.RpcError) as caught:
        daemon.migrations.RecoverMigration(migration.RecoverMigrationRequest(migration_id=migration_id), timeout=CALL_S)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS


def check_logged(daemon, migration_id, side):
    """One line, at level ERROR, that says who holds the guest."""
    line = (
        rf" ERROR \S+: migration {migration_id} of guest g has ended at its {side}: FAILED; the guest is lost: {LOST}"
    )
    found = wait_until(lambda: re.findall(line, daemon.log.read_text()), 5, f"a line in the log of the {side}")
    assert len(found) == 1


def refusal(call, request):
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=CALL_S)
    return caught.value.code()


def check_spent(pair):
    """What is left at the source can be deleted, and nothing else."""
    wait_until(lambda: not pair.source.guest().migration_id, 10, "the source to let go of its guest")
    assert pair.source.guest().state == types.GUEST_STATE_PAUSED
    assert refusal(pair.source.guests.ResumeGuest, guest.ResumeGuestRequest(name="g")) is grpc.StatusCode.DATA_LOSS
    again = migration.StartMigrationRequest(guest="g", to=pair.destination.address, order="precopy")
    assert refusal(pair.source.migrations.StartMigration, again) is grpc.StatusCode.DATA_LOSS
    said = operator.ask(pair.source, "start", "g", "--to", pair.destination.address, exit_code=1).stderr
    assert "what is here is not whole" in said
    assert "backup" in said


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["kvm", pytest.param("process", marks=pytest.mark.thorough)])
def test_twin_that_dies_in_postcopy_is_lost_at_once_and_everywhere(pair, kind):
    migration_id = start_slow(pair, kind)
    assert pair.destination.statistics().errors == 0
    killed_s = time.monotonic()
    kill(pair.destination.guest().pid)

    check_lost(pair, migration_id, killed_s)
    check_logged(pair.destination, migration_id, "destination")
    check_logged(pair.source, migration_id, "source")
    assert pair.destination.migration(migration_id).guest_errors == 0
    assert guest_pids(pair.destination.state_dir) == []

    check_spent(pair)
    for daemon in (pair.source, pair.destination):
        daemon.kill()
        daemon.restart()
        # It is known from what was written down, before any other daemon was asked.
        check_lost_at(daemon, migration_id)
    check_spent(pair)
    operator.ask(pair.source, "guest", "delete", "g")
    wait_until(lambda: guest_pids(pair.source.state_dir) == [], 10, "the guest process to be gone")


def test_start_that_follows_exits_with_1_and_says_that_the_guest_is_lost(pair):
    pair.source.create(memory_mib=64, vcpus=2, touch_rate_per_s=500)
    pair.source.wait_populated()
    pair.barriers.hold(Point.DESTINATION_COMPLETE)
    words = ["--mode", "postcopy", "--max-bandwidth", "8MiB", "--peer-timeout", "1s"]
    with operator.following(pair.source, pair.destination, "g", *words) as followed:
        wait_until(lambda: pair.destination.guest_names() == ["g"], 20, "the twin")
        (shown,) = wait_until(pair.destination.migrations_now, 20, "the migration to arrive")
        pair.wait_state(pair.destination, shown.migration_id, types.MIGRATION_STATE_POSTCOPY)
        kill(pair.destination.guest().pid)
        result = followed.result(HELD_S)
    assert result.exit_code == 1
    assert "the guest is lost" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["kvm", pytest.param("process", marks=pytest.mark.thorough)])
def test_source_guest_that_dies_while_its_daemon_lives_costs_nothing(pair, kind):
    """The daemon has the memory, too."""
    migration_id = start_slow(pair, kind)
    kill(pair.source.guest().pid)
    arrived = pair.check_moved(migration_id)
    assert arrived.recoveries == 0


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["kvm", pytest.param("process", marks=pytest.mark.thorough)])
def test_source_guest_that_dies_with_its_daemon_is_lost_once_that_is_known(pair, kind):
    migration_id = start_slow(pair, kind)
    twin_pid = pair.destination.guest().pid
    looking = pair.look_into(pair.destination)
    source_pid = pair.source.guest().pid
    pair.source.kill()
    kill(source_pid)
    # The daemon might come back with all pages, so nobody calls them lost yet.
    paused = pair.wait_state(pair.destination, migration_id, types.MIGRATION_STATE_POSTCOPY_PAUSED)
    assert paused.holder == types.GUEST_HOLDER_SPLIT
    # Its vCPUs wait for pages, and are given nothing instead.
    seen = looking.statistics()
    assert (seen.errors, seen.first_error) == (0, "")
    assert looking.look().is_armed
    looking.close()

    pair.source.restart()
    back_s = time.monotonic()
    check_lost(pair, migration_id, back_s)
    check_logged(pair.destination, migration_id, "destination")
    check_logged(pair.source, migration_id, "source")
    # Gone while it was armed still: nothing that it lacked has ever read as zero.
    wait_until(lambda: not is_alive(twin_pid), 10, "the twin to be gone")
    assert pair.destination.migration(migration_id).guest_errors == 0
    assert (pair.source.guest_names(), pair.destination.guest_names()) == ([], [])
    asked = transfer.ResumeMigrationRequest(
        migration_id=migration_id,
        token="nobody's",  # noqa: S106 - the point of it
        control_endpoint=pair.destination.address,
    )
    assert refusal(pair.source.transfer.ResumeMigration, asked) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("point", "both"),
    [
        (Point.DESTINATION_COMPLETE, False),
        (Point.DESTINATION_DISARMED, False),
        (Point.DESTINATION_DISARMED, True),
    ],
)
def test_source_guest_and_daemon_that_die_after_the_last_page_cost_nothing(pair, point, both):
    """All pages are there, but END was not acknowledged."""
    pair.source.create(memory_mib=32, vcpus=2, touch_rate_per_s=5000)
    pair.source.wait_populated()
    pair.barriers.hold(point)
    migration_id = pair.start()
    pair.barriers.wait_held(point, HELD_S)
    source_pid = pair.source.guest().pid
    pair.source.kill()
    kill(source_pid)
    if both:
        pair.destination.kill()
    pair.source.restart()
    # It asks the destination, and is told nothing that would have it call the guest lost.
    state = pair.wait_state(
        pair.source, migration_id, *([types.MIGRATION_STATE_SWITCHOVER] if both else [types.MIGRATION_STATE_POSTCOPY])
    ).state
    assert state != types.MIGRATION_STATE_FAILED
    pair.barriers.release(point)
    if both:
        pair.destination.restart()
    pair.check_moved(migration_id)


@pytest.mark.alone
def test_three_deaths_before_the_twin_was_disarmed_lose_the_guest(pair):
    """Which of the pages that are not there are zero was known to the daemon that died, and to nobody else."""
    pair.source.create(memory_mib=32, vcpus=2, touch_rate_per_s=5000)
    pair.source.wait_populated()
    pair.barriers.hold(Point.DESTINATION_COMPLETE)
    migration_id = pair.start()
    pair.barriers.wait_held(Point.DESTINATION_COMPLETE, HELD_S)
    source_pid = pair.source.guest().pid
    pair.source.kill()
    kill(source_pid)
    pair.destination.kill()
    pair.restart(pair.source, pair.destination)
    back_s = time.monotonic()
    check_lost(pair, migration_id, back_s)


@pytest.mark.alone
def test_twin_that_dies_with_its_daemon_in_postcopy_is_lost_once_that_is_back(pair):
    migration_id = start_slow(pair)
    twin_pid = pair.destination.guest().pid
    pair.destination.kill()
    kill(twin_pid)
    pair.wait_state(pair.source, migration_id, types.MIGRATION_STATE_POSTCOPY_PAUSED)
    pair.destination.restart()
    back_s = time.monotonic()
    check_lost(pair, migration_id, back_s)
    check_logged(pair.destination, migration_id, "destination")
    check_logged(pair.source, migration_id, "source")
    check_spent(pair)


def test_source_guest_that_dies_before_the_switchover_is_lost_there_alone(pair):
    """It ran there when it died: no copy is whole, and the destination keeps nothing."""
    pair.source.create(memory_mib=64, vcpus=2, touch_rate_per_s=500)
    pair.source.wait_populated()
    pair.barriers.hold(Point.SOURCE_PREPARED)
    migration_id = pair.start()
    pair.barriers.wait_held(Point.SOURCE_PREPARED, HELD_S)
    kill(pair.source.guest().pid)
    pair.barriers.release(Point.SOURCE_PREPARED)
    shown = pair.wait_state(pair.source, migration_id, types.MIGRATION_STATE_FAILED)
    assert "guest" in shown.error.message
    wait_until(lambda: guest_pids(pair.destination.state_dir) == [], 10, "the destination to keep nothing")
    arrived = pair.destination.migration(migration_id)
    assert (arrived.state, arrived.holder) == (types.MIGRATION_STATE_CANCELLED, types.GUEST_HOLDER_SOURCE)
    assert pair.source.guest_names() == []
