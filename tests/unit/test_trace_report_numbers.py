"""The numbers of a report: out of the faults, the reports of progress and the guest's histogram, and in words."""

from dataclasses import replace

import numpy as np
import pytest

from migrate.telemetry.histogram import distribution_of
from migrate.telemetry.report.drawing import linear_ticks, log_range, log_ticks
from migrate.telemetry.report.figures import bytes_words, duration_words, share_words
from migrate.telemetry.report.timeline import COLUMNS, ROWS, clock_of, fault_maps, missing_map, phases_of, rates_of
from migrate.telemetry.report.timing import (
    STAGES,
    guest_curve,
    kinds_of,
    latencies_us,
    pager_curve,
    stages_of,
    vcpus_of,
)
from migrate.telemetry.trace_file import KINDS
from tests.harness.traces import write_trace

GIB = 1 << 30


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def trace(directory):
    return write_trace(directory / "hybrid.trace")


def test_percentiles_of_the_faults_are_those_of_the_json(trace):
    said, curve = trace.migration["fault_latency_us"], pager_curve(trace.faults)

    waited = latencies_us(trace.faults)[trace.faults.kind != KINDS.index("present")]
    exact = distribution_of(waited.tolist())
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1)):
        assert curve.quantile_us(share) == getattr(exact, name)
        assert curve.quantile_us(share) == pytest.approx(said[name], abs=0.001)
    assert curve.count == said["count"]
    assert curve.mean_us == pytest.approx(said["mean"], abs=0.001)


def test_percentiles_of_the_guest_are_those_of_the_json(trace):
    said, curve = trace.migration["guest_stall_us"], guest_curve(trace.stalls)

    assert curve.count == said["count"]
    assert [curve.quantile_us(share) for share in (0.5, 0.9, 0.99)] == pytest.approx(
        [said["p50"], said["p90"], said["p99"]], abs=0.001
    )


def test_touches_below_15_us_are_no_stalls():
    assert guest_curve([(14.9, 1000), (15.0, 3), (40.0, 1), (float("nan"), 7), (50.0, 0)]).count == 4


def test_thinned_curve_keeps_its_ends_and_stays_on_the_curve(trace):
    curve = pager_curve(trace.faults)
    thin = curve.thinned()

    assert len(thin.values_us) <= 600
    assert (thin.values_us[0], thin.values_us[-1]) == (curve.values_us[0], curve.values_us[-1])
    assert thin.count == curve.count
    assert np.array_equal(curve.values_us[thin.at_most - 1], thin.values_us)


def test_stages_add_up_to_the_latency(trace):
    faults = trace.faults
    stages = stages_of(faults)

    assert [stage.name for stage in stages] == [name for name, _ in STAGES]
    assert sum(stage.mean_us for stage in stages) == pytest.approx(latencies_us(faults)[faults.has_stages].mean())
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    read_us = faults.read_ns[faults.kind == KINDS.index("urgent")] / 1000
    assert stages[3].p99_us == distribution_of(read_us.tolist()).p99


def test_reads_that_no_source_tells_of_are_the_networks(trace):
    whole = stages_of(trace.faults)

    stages = stages_of(replace(trace.faults, read_ns=np.full(len(trace.faults), -1)))

    assert [stage.name for stage in stages] == ["queue", "request", "network", "placement"]
    assert stages[2].mean_us == pytest.approx(whole[2].mean_us + whole[3].mean_us)
    assert "less the read" not in stages[2].what


def test_kinds_and_vcpus_divide_the_faults(trace):
    kinds, vcpus = kinds_of(trace.faults), vcpus_of(trace.faults)

    assert {part.name for part in kinds} == set(KINDS)
    assert sum(part.count for part in kinds) == len(trace.faults)
    assert [part.name for part in vcpus] == ["vCPU 0", "vCPU 1"]
    assert sum(part.count for part in vcpus) == trace.migration["fault_latency_us"]["count"]
    blocked_us = latencies_us(trace.faults)[trace.faults.kind != KINDS.index("present")].sum()
    assert sum(part.blocked_us for part in vcpus) == pytest.approx(blocked_us)


def test_map_has_every_fault_once_and_where_it_was(trace):
    clock = clock_of(trace)
    maps = fault_maps(trace, clock, (clock.begin_s, clock.end_s), trace.migration["memory_bytes"])

    assert {kind: cells.sum() for kind, cells in maps.items()} == {
        part.name: part.count for part in kinds_of(trace.faults)
    }
    urgent = trace.faults.page[trace.faults.kind == KINDS.index("urgent")]
    low = (urgent < trace.migration["pages"]["total"] // ROWS).sum()
    assert maps["urgent"][0].sum() == low


def test_of_many_vcpus_the_longest_waiting_are_named(trace):
    waited = trace.faults.kind != KINDS.index("present")
    vcpu = np.where(np.arange(len(trace.faults)) < 1_000, np.arange(len(trace.faults)) % 100, 7)
    parts = vcpus_of(replace(trace.faults, vcpu=vcpu))

    assert len(parts) == 17
    assert parts[-1].name == "84 more"
    assert max(parts, key=lambda part: part.blocked_us).name == "vCPU 7"
    assert sum(part.count for part in parts) == waited.sum()


def test_missing_pages_are_known_from_the_switchover_on(directory):
    """The first report of progress comes some time after it."""
    trace = write_trace(directory / "late.trace", faults=10, progress=False)
    clock = clock_of(trace)

    missing = missing_map(trace, clock, (-1, 1), GIB)

    assert not missing[:, : COLUMNS // 2].any()
    assert missing[:, COLUMNS // 2 :] == pytest.approx(0.25 + 0.75 / 4, abs=0.01)
    assert missing_map(replace(trace, missing_at_switchover=None), clock, (-1, 1), GIB) is None


def test_missing_pages_are_those_last_reported(trace):
    clock = clock_of(trace)
    range_s = (clock.begin_s, clock.end_s)

    missing = missing_map(trace, clock, range_s, GIB)

    last = clock.begin_s + (COLUMNS // 2 + 0.5) * (clock.end_s - clock.begin_s) / COLUMNS
    sample = [each for each in trace.progress if clock.seconds(each.at_ns) <= last][-1]
    for row in (0, ROWS // 2, ROWS - 1):
        share = sample.missing_map[int((row + 0.5) / ROWS * 256)] / 255
        assert missing[row, COLUMNS // 2] == pytest.approx(0.25 + 0.75 * share if share else 0)


def test_missing_pages_of_a_small_guest_stay_in_its_ram(trace):
    clock = clock_of(trace)
    range_s = (clock.begin_s, clock.end_s)

    own, wider = (missing_map(trace, clock, range_s, size) for size in (GIB, 4 * GIB))

    assert not wider[ROWS // 4 :].any()
    assert wider[: ROWS // 4, 10].mean() == pytest.approx(own[:, 10].mean(), abs=0.02)


def test_rates_add_up_to_what_was_reported(trace):
    rates = {rate.name: rate for rate in rates_of(trace, clock_of(trace))}

    first, last = trace.progress[0], trace.progress[-1]
    for name in ("precopy", "urgent", "background"):
        moved = (rates[f"{name} pages"].per_s * np.diff(rates[f"{name} pages"].edges_s)).sum()
        assert moved == pytest.approx(last.pages[name] - first.pages[name])
    faults = rates["faults"]
    assert (faults.per_s * np.diff(faults.edges_s)).sum() == pytest.approx(len(trace.faults))


def test_phases_are_counted_from_the_switchover(trace):
    phases = phases_of(trace, clock_of(trace))

    assert [phase.state for phase in phases] == ["setup", "precopy", "switchover", "postcopy"]
    assert [phase.begin_s for phase in phases] == pytest.approx([-0.94, -0.935, -0.04, 0])
    assert phases[-1].end_s == pytest.approx(2.06)


def test_words_of_durations_sizes_and_shares():
    assert [duration_words(us) for us in (0, 0.123, 9.996, 85, 999.6, 4_200, 1_310_000, -40_000)] == [
        "0", "0.12 µs", "10.0 µs", "85.0 µs", "1.00 ms", "4.20 ms", "1.31 s", "\N{MINUS SIGN}40.0 ms",
    ]  # fmt: skip
    assert [bytes_words(size) for size in (0, 4_096, 1_143_225_344, 1 << 40)] == ["0 B", "4 KiB", "1.06 GiB", "1 TiB"]
    assert [share_words(share) for share in (0, 0.0001, 0.5, 0.9999, 1)] == [
        "0 %",
        "<0.1 %",
        "50.0 %",
        ">99.9 %",
        "100 %",
    ]


def test_ticks_are_round_and_within():
    assert linear_ticks(0, 37.5, 6) == [0, 10, 20, 30]
    assert linear_ticks(-0.5, 2.06, 8) == [-0.5, 0, 0.5, 1, 1.5, 2]
    assert linear_ticks(0, 3 << 30, 4, base=2) == [0, 1 << 30, 2 << 30, 3 << 30]
    assert log_range(3.2, 454) == (2, 500)
    assert [value for value, named in log_ticks(10, 500) if named] == pytest.approx([10, 20, 50, 100, 200, 500])
