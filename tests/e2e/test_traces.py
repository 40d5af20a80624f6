"""`--trace FILE`: every fault of a migration between two daemons, as the migration's own figures have it."""

import itertools
from functools import partial
from math import ceil

import numpy as np
import pytest

from migrate.client import Client
from migrate.errors import ConfigError
from migrate.telemetry.trace_file import KINDS, read_trace
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.operator import ask, check_moved, following, start
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]

URGENT, PRESENT = KINDS.index("urgent"), KINDS.index("present")


@pytest.fixture
def make_guest(make_guest):
    return partial(make_guest, vcpus=2)


def check_figures(trace, report):
    """The trace and the report tell the same story."""
    faults, pages = trace.faults, report["pages"]
    assert trace.migration == report
    assert trace.lost_faults == 0
    waited = np.sort((faults.placed_ns - faults.at_ns)[faults.kind != PRESENT]) / 1000
    latency = report["fault_latency_us"]
    assert len(waited) == latency["count"] > 0
    for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        assert waited[ceil(share * len(waited)) - 1] == pytest.approx(latency[name], abs=0.05)
    # A page counts as urgent once, however many waited for it.
    assert len(np.unique(faults.page[faults.kind == URGENT])) <= pages["urgent"]
    assert sum(count for _, count in trace.stalls) == report["guest_stall_us"]["count"]
    assert sum(trace.downtime_us.values()) == report["downtime_us"]
    last = trace.progress[-1]
    assert last.missing_pages == 0
    assert {**last.pages, "total": pages["total"]} == pages
    assert last.bytes_on_wire <= report["bytes_on_wire"]
    assert trace.missing_at_switchover.sum() == pages["total"] - pages["precopy"] - zeros_before(trace)
    assert trace.zero_at_end.sum() == pages["zero"]


def zeros_before(trace):
    """Pages known to be zero that were not missing when the vCPUs came."""
    return int((trace.zero_at_end & ~trace.missing_at_switchover).sum())


def check_stages(faults, *, is_native):
    """Every stage comes after the one before it."""
    urgent = faults.kind == URGENT
    stages = [faults.at_ns, faults.taken_ns, faults.sent_ns, faults.replied_ns, faults.placed_ns]
    for before, after in itertools.pairwise(stage[urgent & (faults.sent_ns >= 0)] for stage in stages):
        assert (before <= after).all()
    assert (faults.sent_ns[urgent] >= 0).mean() > 0.9
    assert (faults.read_ns[urgent] > 0).mean() > 0.9
    if is_native:
        assert (faults.read_ns[urgent] < faults.placed_ns[urgent] - faults.at_ns[urgent]).all()
    assert (faults.placed_ns >= faults.at_ns).all()


@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
@pytest.mark.parametrize(("kind", "transport"), [("kvm", "native"), ("process", "native"), ("kvm", "grpcio")])
def test_a_trace_says_what_the_report_says(source, destination, make_guest, tmp_path, kind, transport, mode):
    name = make_guest(kind=kind)
    path = tmp_path / "trace.parquet"
    words = ("--mode", mode, "--transport", transport, "--max-bandwidth", "100MB", "--trace", str(path))
    report = start(source, destination, name, *words)
    check_moved(source, destination, name, report)
    trace = read_trace(path)
    check_figures(trace, report)
    check_stages(trace.faults, is_native=transport == "native")
    assert set(np.unique(trace.faults.vcpu).tolist()) == {0, 1}
    states = [state for _, state in trace.states]
    assert states == [*(["precopy"] if mode == "hybrid" else []), "switchover", "postcopy"]
    assert [at_ns for at_ns, _ in trace.states] == sorted(at_ns for at_ns, _ in trace.states)
    running_ns = trace.states[-1][0]
    # The state may touch memory while it is loaded.
    assert (trace.faults.at_ns > running_ns - report["downtime_us"] * 1000).all()


def test_a_trace_in_mode_precopy_has_no_fault_but_all_the_rest(source, destination, make_guest, tmp_path):
    name = make_guest(workload="idle")
    path = tmp_path / "trace.parquet"
    report = start(source, destination, name, "--mode", "precopy", "--trace", str(path))
    check_moved(source, destination, name, report)
    trace = read_trace(path)
    assert len(trace.faults) == report["pages"]["urgent"] == 0
    assert trace.missing_at_switchover.sum() == 0
    assert trace.progress[-1].pages["precopy"] == report["pages"]["precopy"]
    assert sum(trace.downtime_us.values()) == report["downtime_us"]


def test_what_cannot_be_written_is_known_before_anything_begins(source, destination, make_guest, tmp_path):
    name = make_guest()
    words = ("start", name, "--to", destination.address, "--trace")
    refused = ask(source, *words, str(tmp_path / "missing" / "t.parquet"), exit_code=1)
    assert "the trace cannot be written" in refused.stderr
    assert "without --detach" in ask(source, *words, str(tmp_path / "t"), "--detach", exit_code=2).stderr
    assert source.guest(name).migration_id == ""
    assert list(tmp_path.iterdir()) == []


def test_a_migration_that_is_not_traced_has_no_trace(source, destination, make_guest):
    name = make_guest(workload="idle")
    report = start(source, destination, name)
    check_moved(source, destination, name, report)
    with Client(source.address) as client, pytest.raises(ConfigError, match="is not traced here"):
        next(client.migrations.trace(report["migration_id"]))


def test_a_cancelled_migration_leaves_the_trace_of_what_there_was(source, destination, make_guest, tmp_path):
    name = make_guest(memory_mib=128)
    path = tmp_path / "trace.parquet"
    with following(source, destination, name, "--max-bandwidth", "10MB", "--trace", str(path)) as followed:
        # A guest is claimed a moment before its migration is known.
        moving = wait_until(
            lambda: next((each for each in source.list() if each.guest == name and each.pages.precopy), None),
            20,
            "pages to move",
        )
        ask(source, "cancel", moving.migration_id)
        result = followed.result(60)
    assert result.exit_code == 1
    assert "has what was traced until now" in result.stderr
    trace = read_trace(path)
    assert (trace.migration["state"], len(trace.faults)) == ("cancelled", 0)
    assert source.guest(name).state == types.GUEST_STATE_RUNNING


def test_a_demo_is_traced_too(tmp_path):
    path = tmp_path / "trace.parquet"
    report = cli.json_of(cli.run("demo", "--memory", "32MiB", "--trace", str(path), "--json"))
    trace = read_trace(path)
    assert (report["state"], report["guest_errors"]) == ("completed", 0)
    assert trace.migration["migration_id"] == report["migration_id"]
    assert trace.migration["fault_latency_us"] == report["fault_latency_us"]
