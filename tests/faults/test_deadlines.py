"""`--deadline`: pages that stay away for so long are given up, as the operator chose; without it, both halves wait."""

import re
import time

import pytest

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness import operator
from tests.harness.daemons import CALL_S
from tests.harness.processes import guest_pids, is_alive
from tests.harness.recoverable import PEER_TIMEOUT_US
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(60)]

KINDS = ["kvm", pytest.param("process", marks=pytest.mark.thorough)]
DEADLINE_S = 2
LONG_DEADLINE_S = 10
PEER_TIMEOUT_S = PEER_TIMEOUT_US / 1_000_000
# On a busy machine.
LATE_S = 3
MEMORY_ERROR = re.compile(r"vCPU \d: memory error at guest address .*: the page was lost in a migration.*")


def start_slow(pair, kind, *options):
    """A guest in the middle of postcopy, with its faults flowing; the migration."""
    pair.source.create(kind=kind, memory_mib=32, vcpus=2, touch_rate_per_s=300)
    pair.source.wait_populated()
    words = ("--mode", "postcopy", "--peer-timeout", f"{PEER_TIMEOUT_S:.0f}s", "--max-bandwidth", "8MiB")
    migration_id = operator.start_detached(pair.source, pair.destination, "g", *words, *options)
    pair.wait_state(pair.destination, migration_id, types.MIGRATION_STATE_POSTCOPY)
    wait_until(lambda: pair.destination.migration(migration_id).pages.urgent > 20, 20, "faults to be served")
    return migration_id


def fetched_pages(pair, migration_id):
    pages = pair.destination.migration(migration_id).pages
    return pages.urgent + pages.background


def kill_source(pair):
    pair.source.kill()
    return time.monotonic()


def check_decided(pair, migration_id, killed_s):
    """It has failed once the deadline was over, not before, and soon after."""
    shown = pair.wait_state(pair.destination, migration_id, types.MIGRATION_STATE_FAILED)
    waited_s = time.monotonic() - killed_s
    assert DEADLINE_S - 0.5 <= waited_s <= DEADLINE_S + PEER_TIMEOUT_S + LATE_S
    assert shown.error.type == "GuestLostError"
    assert "longer than the deadline" in shown.error.message
    assert "as the operator chose" in shown.error.message
    return shown


def check_source_learns_it(pair, migration_id, holder):
    """The source's daemon comes back: its guest is of no more use, and it is told so."""
    pair.source.restart()
    shown = pair.wait_state(pair.source, migration_id, types.MIGRATION_STATE_FAILED)
    assert (shown.holder, shown.error.type) == (holder, "GuestLostError")
    assert "longer than the deadline" in shown.error.message
    wait_until(lambda: not pair.source.guest().migration_id, 10, "the source to let go of its guest")
    assert pair.source.guest().state == types.GUEST_STATE_PAUSED
    said = operator.ask(pair.source, "guest", "resume", "g", exit_code=1).stderr
    assert "what is here is not whole" in said
    operator.ask(pair.source, "guest", "delete", "g")
    wait_until(lambda: guest_pids(pair.source.state_dir) == [], 10, "the guest process to be gone")


@pytest.mark.parametrize("kind", KINDS)
def test_stop_ends_the_guest(pair, kind):
    migration_id = start_slow(pair, kind, "--deadline", f"{DEADLINE_S}s", "--on-deadline", "stop")
    twin_pid = pair.destination.guest().pid
    looking = pair.look_into(pair.destination)
    killed_s = kill_source(pair)
    seen = looking.statistics()
    shown = check_decided(pair, migration_id, killed_s)
    looking.close()

    assert (shown.holder, shown.guest_errors) == (types.GUEST_HOLDER_NONE, 0)
    assert (seen.errors, seen.first_error) == (0, "")
    wait_until(lambda: not is_alive(twin_pid), 10, "the twin to be gone")
    assert pair.destination.guest_names() == []
    assert operator.status(pair.destination, migration_id)["holder"] == "none"
    check_source_learns_it(pair, migration_id, types.GUEST_HOLDER_NONE)


@pytest.mark.parametrize("kind", KINDS)
def test_poison_lets_the_guest_run_on_without_its_pages(pair, kind):
    migration_id = start_slow(pair, kind, "--deadline", f"{DEADLINE_S}s", "--on-deadline", "poison")
    twin_pid = pair.destination.guest().pid
    shown = check_decided(pair, migration_id, kill_source(pair))

    assert shown.holder == types.GUEST_HOLDER_DESTINATION
    pages = shown.pages
    missing = pages.total - pages.zero - pages.precopy - pages.urgent - pages.background
    lost_pages = int(re.search(r"(\d+) pages are lost", shown.error.message)[1])
    assert 0 < lost_pages <= missing
    # Its vCPUs, which waited for such a page, or come across one, meet a memory error, and never a zero.
    wait_until(lambda: pair.destination.statistics().errors, 10, "a memory error")
    statistics = pair.destination.statistics()
    assert statistics.errors == 1
    assert MEMORY_ERROR.fullmatch(statistics.first_error), statistics.first_error
    assert is_alive(twin_pid)
    status = operator.status(pair.destination, migration_id)
    assert (status["state"], status["holder"]) == ("failed", "destination")

    # So says the daemon after this one, too; the guest is there, and can be deleted.
    pair.destination.kill()
    pair.destination.restart()
    again = pair.destination.migration(migration_id)
    assert (again.state, again.holder, again.error) == (shown.state, shown.holder, shown.error)
    check_source_learns_it(pair, migration_id, types.GUEST_HOLDER_DESTINATION)
    assert is_alive(twin_pid)
    assert pair.destination.statistics().errors == 1
    pair.destination.guests.DeleteGuest(guest.DeleteGuestRequest(name="g"), timeout=CALL_S)
    wait_until(lambda: not is_alive(twin_pid), 10, "the guest to be gone")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_deadline_pages_are_waited_for(pair, kind):
    migration_id = start_slow(pair, kind)
    killed_s = kill_source(pair)
    pair.wait_state(pair.destination, migration_id, types.MIGRATION_STATE_POSTCOPY_PAUSED)
    away_s = DEADLINE_S + PEER_TIMEOUT_S + LATE_S
    wait_until(lambda: time.monotonic() - killed_s > away_s, away_s + 1, "longer than any deadline of these tests")
    shown = pair.destination.migration(migration_id)
    assert (shown.state, shown.holder) == (types.MIGRATION_STATE_POSTCOPY_PAUSED, types.GUEST_HOLDER_SPLIT)
    pair.source.restart()
    assert pair.check_moved(migration_id).recoveries == 1


def test_deadline_that_is_not_reached_decides_nothing(pair):
    """The source is away twice, for half of it each time: it is the time without a page that counts."""
    migration_id = start_slow(pair, "kvm", "--deadline", f"{LONG_DEADLINE_S}s", "--on-deadline", "stop")
    for lives in (1, 2):
        killed_s = kill_source(pair)
        wait_until(
            lambda since_s=killed_s: time.monotonic() - since_s > LONG_DEADLINE_S / 2,
            LONG_DEADLINE_S,
            "half of the deadline",
        )
        before = fetched_pages(pair, migration_id)
        pair.source.restart()
        wait_until(
            lambda lives=lives: pair.destination.migration(migration_id).recoveries == lives,
            20,
            "the source to be found",
        )
        # The deadline counts from the last page.
        wait_until(lambda before=before: fetched_pages(pair, migration_id) > before, 20, "pages to flow")
    pair.check_moved(migration_id)
