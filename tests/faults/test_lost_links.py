"""Links break and fall silent, peers come back elsewhere: that is noticed in time, and healed, most often by nobody."""

import time

import pytest

from migrate.barriers import Point
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.fault_proxy import Direction
from tests.harness.operator import ask, status
from tests.harness.recoverable import PEER_TIMEOUT_US
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(60)]

PEER_TIMEOUT_S = PEER_TIMEOUT_US / 1e6
NATIVE, GRPCIO = types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO
TRANSPORTS = pytest.mark.parametrize(
    "transport", [pytest.param(NATIVE, id="native"), pytest.param(GRPCIO, id="grpcio", marks=pytest.mark.thorough)]
)
POSTCOPY, PAUSED, RECOVER = (
    types.MIGRATION_STATE_POSTCOPY,
    types.MIGRATION_STATE_POSTCOPY_PAUSED,
    types.MIGRATION_STATE_POSTCOPY_RECOVER,
)
# 32 MiB of pages take more than a second, most of them in the background.
SLOWLY = {"max_bandwidth_bytes_per_s": 24 << 20}
# What is tried at once must not fail for a busy machine.
UNHURRIED = {"peer_timeout_us": 5_000_000}
GUEST = {"memory_mib": 32, "vcpus": 2, "touch_rate_per_s": 500}


def begin(pair, **terms):
    """A migration that has begun; its id."""
    pair.source.create(**GUEST)
    pair.source.wait_populated()
    return pair.start(**{**SLOWLY, **terms})


def come_to_postcopy(pair, **terms):
    """A guest that runs at the destination and lacks most of its pages; the migration's id."""
    migration_id = begin(pair, **terms)
    pair.wait_state(pair.destination, migration_id, POSTCOPY)
    pair.wait_state(pair.source, migration_id, POSTCOPY)
    return migration_id


def pages_of(pair, transport):
    """The link on which pages come."""
    return pair.source.page_link if transport == NATIVE else pair.source.control_link


def part(link):
    """Nobody comes through any more."""
    link.refuse()
    link.cut()


BREAKS = {
    "cut": lambda link: link.cut(),
    "reset": lambda link: link.reset(),
    "half-closed-to-the-source": lambda link: link.half_close(Direction.UP),
    "half-closed-to-the-destination": lambda link: link.half_close(Direction.DOWN),
    "cut-within-a-page": lambda link: link.cut_after(100_001, Direction.DOWN),
    "cut-within-a-request": lambda link: link.cut_after(7, Direction.UP),
}
GONE = {"silent": lambda link: link.blackhole(), "refused": part}


# ---- the page link ----


@pytest.mark.parametrize(
    ("transport", "how"),
    [(NATIVE, how) for how in BREAKS] + [(GRPCIO, "cut"), (GRPCIO, "reset")],
    ids=[f"native-{how}" for how in BREAKS] + ["grpcio-cut", "grpcio-reset"],
)
def test_page_link_that_breaks_is_made_again(proxied, transport, how):
    migration_id = come_to_postcopy(proxied, transport=transport)
    BREAKS[how](pages_of(proxied, transport))
    proxied.check_moved(migration_id)


def test_page_that_is_corrupted_is_fetched_again(proxied):
    migration_id = come_to_postcopy(proxied, verify=True)
    proxied.source.page_link.corrupt_after(1_000_000, Direction.DOWN)
    moved = proxied.check_moved(migration_id)
    assert proxied.source.page_link.corrupted[Direction.DOWN] == 1
    assert moved.verified_pages == moved.pages.total


@pytest.mark.alone
@TRANSPORTS
@pytest.mark.parametrize("how", GONE)
def test_page_link_that_is_gone_pauses_in_time_and_heals_by_itself(proxied, transport, how):
    migration_id = come_to_postcopy(proxied, transport=transport)
    GONE[how](pages_of(proxied, transport))
    began_s = time.monotonic()
    paused = proxied.wait_state(proxied.destination, migration_id, PAUSED, RECOVER)
    destination_s = time.monotonic() - began_s
    proxied.wait_state(proxied.source, migration_id, PAUSED, RECOVER)
    source_s = time.monotonic() - began_s
    # grpcio sends one PING a second at most.
    assert destination_s < PEER_TIMEOUT_S * 1.5 + (0.5 if transport == GRPCIO else 0)
    # The source hears of it when it asks, as it does several times a second.
    assert source_s < destination_s + 1
    assert (paused.holder, paused.recoveries) == (types.GUEST_HOLDER_SPLIT, 0)
    assert proxied.runners() == "destination"
    pages_of(proxied, transport).heal()
    assert proxied.check_moved(migration_id).recoveries == 1
    assert proxied.source.migration(migration_id).recoveries == 1


def test_page_link_that_is_gone_twice_is_recovered_twice(proxied):
    migration_id = come_to_postcopy(proxied)
    for recoveries in (1, 2):
        part(proxied.source.page_link)
        proxied.wait_state(proxied.destination, migration_id, PAUSED)
        proxied.source.page_link.heal()
        recovered = proxied.wait_state(proxied.destination, migration_id, POSTCOPY)
        assert recovered.recoveries == recoveries
    assert proxied.check_moved(migration_id).recoveries == 2


@pytest.mark.alone
def test_page_link_that_falls_silent_in_precopy_costs_an_attempt(proxied):
    migration_id = begin(proxied, mode=types.MIGRATION_MODE_PRECOPY)
    proxied.wait_state(proxied.destination, migration_id, types.MIGRATION_STATE_PRECOPY)
    proxied.source.page_link.blackhole()
    lost = wait_until(lambda: _attempt_lost(proxied, migration_id), PEER_TIMEOUT_S * 2.5, "the attempt to be lost")
    assert (lost.holder, proxied.runners()) == (types.GUEST_HOLDER_SOURCE, "source")
    proxied.source.page_link.heal()
    assert proxied.check_moved(migration_id).attempt > 1


def _attempt_lost(pair, migration_id):
    found = pair.source.migration(migration_id)
    return found if found.error.type == "AttemptLostError" else None


# ---- the control links ----


@pytest.mark.alone
def test_destination_that_falls_silent_in_precopy_costs_an_attempt(proxied):
    migration_id = begin(proxied, mode=types.MIGRATION_MODE_PRECOPY)
    proxied.wait_state(proxied.source, migration_id, types.MIGRATION_STATE_PRECOPY)
    proxied.destination.control_link.blackhole()
    lost = wait_until(lambda: _attempt_lost(proxied, migration_id), PEER_TIMEOUT_S * 2, "the attempt to be lost")
    assert (lost.holder, proxied.runners()) == (types.GUEST_HOLDER_SOURCE, "source")
    proxied.destination.control_link.reset()
    proxied.destination.control_link.heal()
    assert proxied.check_moved(migration_id).attempt > 1


@pytest.mark.alone
@pytest.mark.parametrize("point", [Point.DESTINATION_BUILT, Point.DESTINATION_SWITCHING], ids=["prepare", "switchover"])
def test_destination_that_falls_silent_in_a_long_call_is_noticed_in_time(proxied, point):
    proxied.barriers.hold(point)
    migration_id = begin(proxied)
    proxied.barriers.wait_held(point, 20)
    proxied.destination.control_link.blackhole()

    def is_noticed():
        return proxied.source.migration(migration_id).HasField("error")

    wait_until(is_noticed, PEER_TIMEOUT_S * 1.5 + 0.5, "the source to notice")
    proxied.destination.control_link.heal()
    proxied.barriers.release(point)
    proxied.check_moved(migration_id)


@pytest.mark.alone
def test_destination_that_falls_silent_in_postcopy_pauses_the_source_until_it_is_heard_again(proxied):
    proxied.barriers.hold(Point.DESTINATION_COMPLETE)
    migration_id = come_to_postcopy(proxied)
    proxied.destination.control_link.blackhole()
    began_s = time.monotonic()
    paused = proxied.wait_state(proxied.source, migration_id, PAUSED)
    assert time.monotonic() - began_s < PEER_TIMEOUT_S * 1.5 + 0.3
    assert (paused.holder, paused.error.type) == (types.GUEST_HOLDER_SPLIT, "PostcopyPausedError")
    # Pages have a link of their own.
    proxied.barriers.wait_held(Point.DESTINATION_COMPLETE, 20)
    assert proxied.destination.migration(migration_id).state == POSTCOPY
    proxied.destination.control_link.heal()
    proxied.wait_state(proxied.source, migration_id, POSTCOPY)
    proxied.barriers.release(Point.DESTINATION_COMPLETE)
    assert proxied.check_moved(migration_id).recoveries == 0


def test_source_that_falls_silent_in_postcopy_hears_of_the_end_once_it_can(proxied):
    migration_id = come_to_postcopy(proxied)
    proxied.source.control_link.blackhole()

    def is_noticed():
        return proxied.destination.migration(migration_id).HasField("error")

    wait_until(is_noticed, 10, "the destination to find that END is not heard")
    kept = proxied.source.migration(migration_id)
    assert (kept.state, proxied.state_of(proxied.source)) == (POSTCOPY, types.GUEST_STATE_PAUSED)
    proxied.source.control_link.heal()
    assert proxied.check_moved(migration_id).recoveries == 0


@TRANSPORTS
def test_hosts_that_are_parted_find_each_other_again(proxied, transport):
    migration_id = come_to_postcopy(proxied, transport=transport)
    links = (proxied.source.page_link, proxied.source.control_link, proxied.destination.control_link)
    for link in links:
        link.blackhole()
    proxied.wait_state(proxied.destination, migration_id, PAUSED)
    proxied.wait_state(proxied.source, migration_id, PAUSED)
    assert proxied.runners() == "destination"
    for link in links:
        link.heal()
    assert proxied.check_moved(migration_id).recoveries >= 1


# ---- migrate recover ----


def recover(daemon, *words, exit_code=0):
    """`migrate recover`; how the migration is after it."""
    return cli.json_of(ask(daemon, "recover", *words, "--json", exit_code=exit_code))


@pytest.mark.alone
@pytest.mark.parametrize("side", ["source", "destination"])
def test_recover_ends_a_pause_at_once(proxied, side):
    migration_id = come_to_postcopy(proxied)
    part(proxied.source.page_link)
    paused_s = [0.0]

    def is_long_pause():
        if proxied.destination.migration(migration_id).state != PAUSED:
            paused_s[0] = 0.0
            return False
        paused_s[0] = paused_s[0] or time.monotonic()
        return time.monotonic() - paused_s[0] > 0.4

    # Pauses become longer with every try that fails.
    wait_until(is_long_pause, 20, "a pause that is not one of the first")
    proxied.source.page_link.heal()
    began_s = time.monotonic()
    recover(getattr(proxied, side), migration_id)
    proxied.wait_state(proxied.destination, migration_id, POSTCOPY)
    assert time.monotonic() - began_s < 0.5
    assert proxied.check_moved(migration_id).recoveries == 1


def test_recover_says_so_if_pages_still_do_not_flow(proxied):
    migration_id = come_to_postcopy(proxied)
    links = (proxied.source.page_link, proxied.source.control_link)
    for link in links:
        part(link)
    proxied.wait_state(proxied.destination, migration_id, PAUSED)
    assert recover(proxied.destination, migration_id, exit_code=3)["state"] == "postcopy_paused"
    for link in links:
        link.heal()
    proxied.check_moved(migration_id)


def test_source_at_another_page_port_is_found_by_itself(pair):
    migration_id = come_to_postcopy(pair)
    before = pair.source.page_address
    pair.source.kill()
    pair.source.restart(page_listen="127.0.0.1:0")
    assert pair.source.page_address != before
    assert pair.check_moved(migration_id).recoveries >= 1


@pytest.mark.parametrize("recovers", [False, True], ids=["by-itself", "recover"])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_one_that_came_back_elsewhere_is_found(pair, side, recovers):
    pair.barriers.hold(Point.DESTINATION_COMPLETE)
    migration_id = come_to_postcopy(pair, **UNHURRIED)
    moved, other = (pair.source, pair.destination) if side == "source" else (pair.destination, pair.source)
    moved.kill()
    restart_elsewhere(moved)
    if recovers:
        recover(other, migration_id, "--to", moved.address)
    # Both know, before END tells.
    wait_until(lambda: other.migration(migration_id).peer == moved.address, 20, "it to be found")
    pair.wait_state(pair.source, migration_id, POSTCOPY)
    pair.barriers.release(Point.DESTINATION_COMPLETE)
    pair.check_moved(migration_id)


@pytest.mark.parametrize("side", ["source", "destination"])
def test_both_that_came_back_elsewhere_find_each_other_once_one_is_told(pair, side):
    pair.barriers.hold(Point.DESTINATION_COMPLETE)
    migration_id = come_to_postcopy(pair, **UNHURRIED)
    pair.source.kill()
    pair.destination.kill()
    restart_elsewhere(pair.source)
    restart_elsewhere(pair.destination)
    lost = pair.wait_state(pair.destination, migration_id, PAUSED)
    assert (lost.holder, pair.runners()) == (types.GUEST_HOLDER_SPLIT, "destination")
    told, other = (pair.source, pair.destination) if side == "source" else (pair.destination, pair.source)
    recover(told, migration_id, "--to", other.address)
    pair.wait_state(pair.source, migration_id, POSTCOPY)
    pair.wait_state(pair.destination, migration_id, POSTCOPY)
    for daemon, peer in ((pair.source, pair.destination), (pair.destination, pair.source)):
        wait_until(
            lambda daemon=daemon, peer=peer: daemon.migration(migration_id).peer == peer.address, 10, "them to know"
        )
    pair.barriers.release(Point.DESTINATION_COMPLETE)
    pair.check_moved(migration_id)


def restart_elsewhere(daemon):
    before = daemon.address
    daemon.restart("127.0.0.1:0", "127.0.0.1:0")
    assert daemon.address != before


def test_recover_of_what_is_not_lost_says_so_and_changes_nothing(pair):
    pair.barriers.hold(Point.SOURCE_PRECOPY)
    migration_id = begin(pair, mode=types.MIGRATION_MODE_PRECOPY, max_bandwidth_bytes_per_s=0)
    pair.barriers.wait_held(Point.SOURCE_PRECOPY, 20)
    for daemon in (pair.source, pair.destination):
        refuse_to_recover(daemon, migration_id, "in state PRECOPY")
    pair.barriers.release(Point.SOURCE_PRECOPY)
    pair.check_moved(migration_id)
    for daemon in (pair.source, pair.destination):
        refuse_to_recover(daemon, migration_id, "in state COMPLETED")
        daemon.kill()
        daemon.restart()
        refuse_to_recover(daemon, migration_id, "in state COMPLETED")
    refused = ask(pair.source, "recover", "nobody", exit_code=1)
    assert "no migration 'nobody' is known here" in refused.stderr
    ask(pair.source, "recover", migration_id, "--to", "nowhere", exit_code=2)


def refuse_to_recover(daemon, migration_id, words):
    before = status(daemon, migration_id)
    for to in ([], ["--to", "127.0.0.1:1"]):
        refused = ask(daemon, "recover", migration_id, *to, exit_code=1)
        assert "there is nothing to recover" in refused.stderr
        assert words in refused.stderr
    after = status(daemon, migration_id)
    for word in ("state", "peer", "attempt", "holder", "error"):
        assert after.get(word) == before.get(word)
