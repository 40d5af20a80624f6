"""Modes and orders, as an operator asks for them: real daemons, guests under load, the command line."""

import pytest

from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.operator import ask, check_moved, check_runs, start, start_detached, status
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]

# Two thousand pages a second: any link here moves more.
SLOW_WRITER = {"vcpus": 2, "workload": "uniform", "write_ratio": 1.0, "touch_rate_per_s": 1000}
FULL_SPEED_WRITER = {"memory_mib": 32, "vcpus": 2, "workload": "uniform", "write_ratio": 1.0}
HOT_ZIPF = {"vcpus": 2, "workload": "zipf", "write_ratio": 0.5}
# No round is ever small enough for a downtime below that of a switchover by itself.
HOPELESS = ("--mode", "precopy", "--max-bandwidth", "100MB/s", "--downtime-limit", "1ms")


def wait_for_rounds(source, migration_id, rounds=2):
    """Until so many rounds of the dirty log are over: the precopy waits by now."""
    wait_until(lambda: source.migration(migration_id).generation > rounds, 30, f"{rounds} rounds of precopy")
    assert source.migration(migration_id).state == types.MIGRATION_STATE_PRECOPY


# ---- modes ----


@pytest.mark.parametrize("transport", ["native", "grpcio"])
@pytest.mark.parametrize("spec", [SLOW_WRITER, {"workload": "idle"}], ids=["slow-writer", "idle"])
def test_precopy_moves_all_before_the_switchover(source, destination, make_guest, spec, transport):
    name = make_guest(**spec)
    report = start(source, destination, name, "--mode", "precopy", "--transport", transport)
    check_moved(source, destination, name, report)
    assert report["mode"] == "precopy"
    pages = report["pages"]
    assert (pages["urgent"], pages["background"]) == (0, 0)
    assert pages["precopy"] + pages["zero"] == pages["total"]
    assert report["fault_latency_us"]["count"] == 0
    assert report["precopy_us"] > 0


@pytest.mark.alone
def test_precopy_keeps_the_downtime_limit(source, destination, make_guest):
    name = make_guest(memory_mib=128, **SLOW_WRITER)
    report = start(source, destination, name, "--mode", "precopy", "--downtime-limit", "300ms")
    check_moved(source, destination, name, report)
    assert report["pages"]["urgent"] == 0
    assert report["downtime_us"] <= 300_000


def test_verified_precopy_verifies_every_page(source, destination, make_guest):
    name = make_guest(**SLOW_WRITER)
    report = start(source, destination, name, "--mode", "precopy", "--verify")
    check_moved(source, destination, name, report)
    assert report["pages"]["urgent"] == 0
    assert report["verified_pages"] == report["pages"]["total"]


@pytest.mark.parametrize("options", [(), ("--verify",), ("--transport", "grpcio")], ids=["plain", "verify", "grpcio"])
def test_hybrid_moves_a_hot_writer(source, destination, make_guest, options):
    name = make_guest(**HOT_ZIPF)
    report = start(source, destination, name, "--mode", "hybrid", *options)
    check_moved(source, destination, name, report)
    assert report["mode"] == "hybrid"
    pages = report["pages"]
    # Most came before; what it wrote meanwhile came again, after.
    assert pages["precopy"] > 0
    assert pages["urgent"] + pages["background"] > 0
    assert report["verified_pages"] == (pages["total"] if "--verify" in options else 0)


def test_hybrid_moves_a_guest_that_writes_everything(source, destination, make_guest):
    name = make_guest(**FULL_SPEED_WRITER)
    report = start(source, destination, name, "--mode", "hybrid", "--verify")
    check_moved(source, destination, name, report)
    assert report["verified_pages"] == report["pages"]["total"]


def test_hybrid_guest_moves_there_and_back(source, destination, make_guest):
    name = make_guest(**HOT_ZIPF)
    for here, there in [(source, destination), (destination, source), (source, destination)]:
        check_moved(here, there, name, start(here, there, name, "--mode", "hybrid"))


@pytest.mark.parametrize("kind", ["kvm", "process"])
def test_default_mode_is_hybrid(source, destination, make_guest, kind):
    name = make_guest(kind=kind, **SLOW_WRITER)
    report = start(source, destination, name)
    check_moved(source, destination, name, report)
    assert (report["mode"], report["guest_kind"]) == ("hybrid", kind)


def test_process_moves_there_and_back_in_every_mode(source, destination, make_guest):
    name = make_guest(kind="process", **SLOW_WRITER)
    here, there = source, destination
    for mode in ("hybrid", "precopy", "postcopy", "precopy"):
        report = start(here, there, name, "--mode", mode, "--verify")
        check_moved(here, there, name, report)
        assert report["mode"] == mode
        pages = report["pages"]
        assert report["verified_pages"] == pages["total"]
        assert (pages["precopy"] > 0) == (mode != "postcopy")
        assert mode != "precopy" or (pages["urgent"], pages["background"]) == (0, 0)
        here, there = there, here


def test_hybrid_moves_a_process_that_writes_everything(source, destination, make_guest):
    name = make_guest(kind="process", **FULL_SPEED_WRITER)
    report = start(source, destination, name, "--mode", "hybrid", "--verify")
    check_moved(source, destination, name, report)


@pytest.mark.parametrize("workload", ["uniform", "zipf", "sequential"])
@pytest.mark.parametrize("order", ["precopy", "follow", "bubble"])
@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
def test_orders_move_every_page(source, destination, make_guest, mode, order, workload):
    name = make_guest(vcpus=2, workload=workload)
    report = start(source, destination, name, "--mode", mode, "--order", order, "--verify")
    check_moved(source, destination, name, report)
    assert (report["mode"], report["order"]) == (mode, order)
    assert report["verified_pages"] == report["pages"]["total"]


# ---- a precopy that does not converge ----


def test_no_convergence_switches_to_postcopy(source, destination, make_guest):
    name = make_guest(**FULL_SPEED_WRITER)
    report = start(source, destination, name, *HOPELESS, "--on-no-convergence", "postcopy")
    check_moved(source, destination, name, report)
    assert report["mode"] == "precopy"
    assert report["pages"]["urgent"] + report["pages"]["background"] > 0


def test_switchover_ends_a_precopy_that_waits(source, destination, make_guest):
    name = make_guest(**FULL_SPEED_WRITER)
    migration_id = start_detached(source, destination, name, *HOPELESS, "--on-no-convergence", "wait")
    wait_for_rounds(source, migration_id, rounds=4)
    ask(source, "switchover", migration_id)
    moved = source.wait_final(migration_id)
    assert moved.state == types.MIGRATION_STATE_COMPLETED, moved.error
    report = status(source, migration_id)
    check_moved(source, destination, name, report)
    assert report["holder"] == "destination"
    assert report["pages"]["urgent"] + report["pages"]["background"] > 0
    # It is past that point now, and says who holds the guest.
    refused = ask(source, "switchover", migration_id, exit_code=1)
    assert "the guest is at the destination" in refused.stderr


def test_no_convergence_fails_where_that_is_asked_for(source, destination, make_guest):
    name = make_guest(**FULL_SPEED_WRITER)
    words = ("start", name, "--to", destination.address, *HOPELESS, "--on-no-convergence", "fail", "--json")
    failed = ask(source, *words, exit_code=1)
    assert "do not shrink" in failed.stderr
    assert "the guest is at the source" in failed.stderr
    report = status(source, cli.json_of(failed)["migration_id"])
    assert (report["state"], report["holder"]) == ("failed", "source")
    assert report["error"]["type"] == "MigrationAbortedError"
    wait_until(lambda: name not in destination.guest_names(), 10, "the destination to let go of the twin")
    assert source.guest(name).migration_id == ""
    check_runs(source, name)
    # Nothing of it stands in the way of the next one.
    check_moved(source, destination, name, start(source, destination, name, "--mode", "hybrid"))
