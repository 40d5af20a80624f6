"""A Linux guest in an unpatched QEMU crosses, in every mode, and tells itself whether it is whole."""

import pytest

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess
from tests.harness.linux_guest import GuestPort
from tests.harness.qemu_guests import MODES, NAME, MovingLinux, allowing, userfaultfds, wait_gone
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(150)]

SLOW_BYTES_PER_S = 60 << 20


@pytest.fixture(scope="module")
def linux(linux_image, tmp_path_factory):
    """One guest for all of them; a test finds it where the one before left it."""
    directory = tmp_path_factory.mktemp("linux")
    # What the guest is made of, and its console, are the same files for both.
    allowed = allowing(linux_image.kernel.parent, directory)
    source = DaemonProcess(options=allowed, state_dir=directory / "a", log=directory / "a.log")
    destination = DaemonProcess(options=allowed, state_dir=directory / "b", log=directory / "b.log")
    try:
        yield MovingLinux(linux_image, source, destination, directory)
    finally:
        for daemon in (source, destination):
            daemon.close()


@pytest.mark.parametrize("mode", MODES)
def test_linux_crosses_whole(linux, mode):
    left = linux.qemu_pid()
    linux.console.wait_for_more(ticks=5)

    moved = linux.move(mode, verify=True)

    # Sums and versions that began before, and the next, which began after.
    linux.console.wait_for_more(ticks=10, sums=2, versions=2, deadline_s=60)
    wait_gone(left)
    assert moved.verified_pages == moved.pages.total == 512 << 20 >> 12
    assert moved.mode == MODES[mode]
    if mode == "precopy":
        assert (moved.pages.urgent, moved.pages.background) == (0, 0)
        assert moved.pages.precopy
    assert userfaultfds(linux.qemu_pid()) == 0


def test_http_server_goes_on_where_the_guest_is(linux):
    before = GuestPort(linux.source.state_dir / "guests" / f"{NAME}.d" / "port")
    told, _ = before.status()
    before.close()

    linux.move()

    after = GuestPort(linux.source.state_dir / "guests" / f"{NAME}.d" / "port")
    later, _ = after.status()
    after.close()
    assert later["ticks"] >= told["ticks"]
    assert (later["errors"], later["sums_bad"]) == (0, 0)
    assert later["uptime_us"] > told["uptime_us"]


def test_pause_and_resume_reach_qemu(linux):
    linux.source.guests.PauseGuest(guest.PauseGuestRequest(name=NAME))
    assert linux.source.guest(NAME).state == types.GUEST_STATE_PAUSED
    linux.source.guests.ResumeGuest(guest.ResumeGuestRequest(name=NAME))
    assert linux.source.guest(NAME).state == types.GUEST_STATE_RUNNING
    linux.console.wait_for_more(ticks=3)


def test_cancelled_precopy_leaves_it_running_with_nothing_of_ours_inside(linux):
    qemu = linux.qemu_pid()
    migration_id = linux.source.start(
        linux.destination, NAME, mode=MODES["precopy"], max_bandwidth_bytes_per_s=SLOW_BYTES_PER_S
    )
    wait_until(lambda: linux.source.migration(migration_id).pages.precopy, 20, "pages to come")
    assert userfaultfds(qemu) == 1

    ended = linux.source.cancel(migration_id)

    assert ended.state == types.MIGRATION_STATE_CANCELLED
    assert linux.destination.guest_names() == []
    linux.console.wait_for_more(ticks=10, sums=1, versions=2, deadline_s=60)
    assert userfaultfds(qemu) == 0
    # What it wrote while nobody looked at the log comes along all the same.
    linux.move("hybrid", verify=True)
    linux.console.wait_for_more(ticks=5, sums=2, versions=2, deadline_s=60)


@pytest.mark.parametrize("victim", ["destination", "source"])
def test_daemon_killed_in_the_middle_costs_time_alone(linux, victim):
    """QEMU only waits: its userfaultfd is its own."""
    daemon = getattr(linux, victim)
    migration_id = linux.source.start(
        linux.destination, NAME, max_bandwidth_bytes_per_s=SLOW_BYTES_PER_S, peer_timeout_us=1_000_000
    )
    linux.wait_placed(migration_id, 2000)

    daemon.kill()
    daemon.restart()

    moved = linux.source.wait_completed(migration_id, 60)
    assert moved.holder == types.GUEST_HOLDER_DESTINATION
    linux.crossed()
    linux.console.wait_for_more(ticks=10, sums=2, versions=2, deadline_s=60)


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_thirty_moves_in_a_row(linux):
    for number in range(30):
        linux.move([*MODES][number % len(MODES)])
        linux.console.wait_for_more(ticks=3, versions=1, deadline_s=60)
    linux.console.wait_for_more(ticks=10, sums=2, versions=2, deadline_s=60)
