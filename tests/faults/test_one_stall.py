"""What a guest feels of a daemon that is away: one stall as long as that, and nothing else."""

import time

import pytest

from migrate.v1 import types_pb2 as types
from tests.harness.mailboxes import stalls_us
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(90)]

AWAY_S = 3.0
VCPUS = 4
LONG_US = 1_000_000
P99_MAX_US = 100_000
# Slow enough to be in the middle of it when something dies.
BANDWIDTH_BYTES_PER_S = 16 << 20
HALVES_RUN = (types.MIGRATION_STATE_POSTCOPY,)


def start_slow(pair, **spec):
    """A guest of 4 vCPUs in the middle of postcopy, with its faults flowing; the migration."""
    pair.source.create(memory_mib=80, vcpus=VCPUS, touch_rate_per_s=1000, **spec)
    pair.source.wait_populated()
    migration_id = pair.start(max_bandwidth_bytes_per_s=BANDWIDTH_BYTES_PER_S)
    pair.wait_state(pair.destination, migration_id, *HALVES_RUN)
    before = pair.destination.statistics().stall_us.count
    wait_until(lambda: pair.destination.statistics().stall_us.count > before + 100, 20, "faults to flow")
    return migration_id


def wait_still(client):
    """Wait until no vCPU touches pages any more."""

    def stands():
        before = client.statistics().touches
        time.sleep(0.2)
        return client.statistics().touches == before

    wait_until(stands, 20, "every vCPU to wait for a page")


def wait_away(since_s, away_s=AWAY_S):
    wait_until(lambda: time.monotonic() - since_s >= away_s, away_s + 1, "the daemon to have been away for so long")


@pytest.mark.alone
def test_killed_destination_daemon_is_one_stall_as_long_as_it_was_away(pair):
    migration_id = start_slow(pair)
    killed_s = time.monotonic()
    pair.destination.kill()
    client = pair.look_into(pair.destination)
    # Four faults stand in the kernel, for nobody reads them.
    wait_still(client)
    assert client.statistics().errors == 0
    wait_away(killed_s)
    pair.destination.restart()
    back_s = time.monotonic()
    waiting_us = client.statistics().touches
    wait_until(lambda: client.statistics().touches > waiting_us, 20, "the vCPUs to run on")
    ran_us = (time.monotonic() - killed_s) * 1_000_000
    client.close()

    arrived = pair.check_moved(migration_id)
    assert (arrived.recoveries, arrived.attempt) == (1, 1)
    stalls = pair.destination.statistics().stall_us
    # A vCPU may have begun to wait a moment after the kill; the last one went on a moment after the first.
    assert (AWAY_S - 0.5) * 1_000_000 <= stalls.max <= ran_us + LONG_US
    assert back_s - killed_s < AWAY_S + 2
    histograms = stalls_us(pair.destination.guest().pid, VCPUS, stalls.max)
    long_of = [sum(count for us, count in histogram.items() if us > LONG_US) for histogram in histograms]
    assert 1 <= sum(long_of) <= VCPUS
    assert max(long_of) == 1
    assert stalls.count > 100
    assert stalls.p99 < P99_MAX_US


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("kind", ["kvm", pytest.param("process", marks=pytest.mark.thorough)])
def test_guest_whose_daemon_is_gone_for_long_only_waits(pair, side, kind):
    """Several times as long as the peer's timeout; no vCPU that waits for a page takes anything else for it."""
    migration_id = start_slow(pair, kind=kind)
    client = pair.look_into(pair.destination)
    victim = getattr(pair, side)
    killed_s = time.monotonic()
    victim.kill()
    wait_still(client)
    wait_away(killed_s)
    stood = client.statistics()
    assert (stood.errors, stood.first_error) == (0, "")
    wait_still(client)
    assert client.statistics().touches == stood.touches
    client.close()
    if side == "source":
        (shown,) = [pair.destination.migration(migration_id)]
        assert (shown.state, shown.holder) == (types.MIGRATION_STATE_POSTCOPY_PAUSED, types.GUEST_HOLDER_SPLIT)
    else:
        shown = pair.wait_state(pair.source, migration_id, types.MIGRATION_STATE_POSTCOPY_PAUSED)
        assert shown.holder == types.GUEST_HOLDER_SPLIT
    victim.restart()
    pair.check_moved(migration_id)


def test_running_guest_does_not_notice_that_its_daemon_is_gone(pair):
    """No migration: its vCPUs touch pages all the time, and another daemon finds them as they were."""
    pair.source.create(vcpus=2, touch_rate_per_s=1000)
    pair.source.wait_populated()
    pair.source.kill()
    client = pair.look_into(pair.source)
    before = client.statistics().touches
    wait_until(lambda: client.statistics().touches > before + 1000, 20, "the guest to run on")
    client.close()
    pair.source.restart()
    assert pair.source.statistics().stall_us.max < LONG_US
    pair.check_runs(pair.source)
