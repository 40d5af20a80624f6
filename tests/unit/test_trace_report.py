"""`migrate trace report`: its numbers are those of the trace, and whatever is in a file, it is a page."""

import html
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from migrate.telemetry.histogram import distribution_of
from migrate.telemetry.report import report_html
from migrate.telemetry.report.drawing import linear_ticks, log_range, log_ticks
from migrate.telemetry.report.figures import bytes_words, duration_words, flatten, share_words
from migrate.telemetry.report.timeline import COLUMNS, ROWS, clock_of, fault_maps, missing_map, phases_of, rates_of
from migrate.telemetry.report.timing import (
    STAGES,
    guest_curve,
    has_stages,
    kinds_of,
    latencies_us,
    pager_curve,
    stages_of,
    vcpus_of,
)
from migrate.telemetry.trace_file import KINDS, read_trace
from tests.harness.cli import run
from tests.harness.traces import PARTS_US, STATES_MS, write_trace

MIB, GIB = 1 << 20, 1 << 30
HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>\ud800\u202e"


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes and text; all that opens must be closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in self.VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2].append(data)

    def having(self, attribute):
        return [(attributes, "".join(text)) for _, attributes, text in self.elements if attribute in attributes]

    def figures(self, place):
        return {
            attributes["data-figure"]: attributes["data-value"]
            for attributes, _ in self.having("data-figure")
            if attributes["data-trace"] == str(place)
        }

    def text(self, tag):
        return ["".join(text) for name, _, text in self.elements if name == tag]


def page_of(*traces):
    return Page(report_html([(f"trace {place}", trace) for place, trace in enumerate(traces)]))


def notes(page):
    return page.text("li")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def trace(directory):
    return write_trace(directory / "hybrid.trace")


@pytest.fixture(scope="module")
def other(directory):
    """Another one, without a precopy and with twice the faults."""
    states = (("SWITCHOVER", 12), ("POSTCOPY", 30), ("COMPLETED", 2_200))
    return write_trace(directory / "postcopy.trace", faults=40_000, seed=2, mode="postcopy", states_ms=states)


# ---- figures ----


def test_each_figure_of_the_json_is_in_the_page(trace):
    said = page_of(trace).figures(0)

    assert said == {name: str(value) for name, value in flatten(trace.migration)}
    assert said["pages.urgent"] == str(trace.migration["pages"]["urgent"])


def test_two_traces_have_all_figures_and_their_ratios(trace, other):
    page = page_of(trace, other)

    for place, each in enumerate((trace, other)):
        assert page.figures(place) == {name: str(value) for name, value in flatten(each.migration)}
    rows = {text.split()[0]: text.split() for text in page.text("tr")}
    ratio = other.migration["guest_stall_us"]["count"] / trace.migration["guest_stall_us"]["count"]
    counts = [text.split()[-1] for text in page.text("tr") if text.split()[0] == "count"]
    assert counts[1] == f"\N{MULTIPLICATION SIGN}{ratio:.2f}"
    assert rows["downtime"][-1] == "\N{MULTIPLICATION SIGN}1.00"
    assert rows["mode"] == ["mode", "hybrid", "postcopy"]


def test_percentiles_of_nothing_are_no_times(directory, trace):
    silent = write_trace(directory / "silent.trace", faults=10, stalls=False)
    page = page_of(trace, silent)

    rows = [text.split() for text in page.text("tr") if text.split()[0] == "p50"]
    assert rows[1][-1] == "none"
    assert page.figures(1)["guest_stall_us.p50"] == "0.0"


def test_a_figure_of_a_newer_version_is_shown_under_its_name(directory):
    trace = write_trace(directory / "newer.trace", faults=10, warmth={"of_cpu": 41})

    assert page_of(trace).figures(0)["warmth.of_cpu"] == "41"


def test_downtime_has_its_parts_and_they_add_up(trace):
    page = page_of(trace)
    parts = {attributes["data-part"]: int(attributes["data-value"]) for attributes, _ in page.having("data-part")}

    assert parts == {name.removesuffix("_us").replace("_", " "): value for name, value in PARTS_US.items()}
    assert sum(parts.values()) == trace.migration["downtime_us"]
    assert "add up" not in " ".join(page.text("p"))


def test_parts_that_do_not_add_up_are_said_to(directory):
    trace = write_trace(directory / "sum.trace", faults=10, downtime_us=99_000)

    assert "The parts add up to 37.5 ms, while the downtime of the JSON is 99.0 ms." in page_of(trace).text("p")


# ---- numbers out of the faults ----


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
    assert sum(stage.mean_us for stage in stages) == pytest.approx(latencies_us(faults)[has_stages(faults)].mean())
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


# ---- what is not there ----

UNFINISHED = STATES_MS[:2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_last": False}, "The trace is not whole"),
        ({"lost_faults": 5_000}, "5,000 faults were not kept: curves, stages and maps are of the other 500"),
        ({"state": "cancelled", "states_ms": (*STATES_MS[:1], ("CANCELLED", 400)), "faults": 0}, "it is cancelled"),
        ({"state": "failed", "states_ms": (*STATES_MS[:3], ("FAILED", 1_200))}, "it is failed"),
        ({"faults": 0, "mode": "precopy"}, "No fault is recorded: in mode precopy, no page is missing"),
        ({"guest_kind": "qemu", "stalls": False}, "a guest of kind qemu does not time its touches"),
        ({"progress": False}, "No progress is recorded"),
        ({"mode": "postcopy", "states_ms": STATES_MS[1:]}, "There was no precopy: mode postcopy has none."),
        (
            {"fault_latency_us": {"count": 500, "p50": 1.0, "p99": 2.0}},
            "The fault latency of the JSON (500) is not quite",
        ),
        ({"states_ms": UNFINISHED, "is_last": False}, "The trace is not whole"),
    ],
)
def test_what_is_missing_is_said_in_words(directory, changes, said):
    trace = write_trace(directory / "partial.trace", **{"faults": 500, **changes})
    page = page_of(trace)

    assert any(said in note for note in notes(page)), notes(page)
    assert page.figures(0)["state"] == trace.migration["state"]
    assert page_of(trace, trace).figures(1) == page.figures(0)


def test_a_whole_trace_needs_no_words(trace):
    assert notes(page_of(trace)) == []


def test_nothing_at_all_is_still_a_page(directory):
    trace = write_trace(
        directory / "nothing.trace", faults=0, states_ms=(), stalls=False, parts=False, progress=False, is_last=False
    )
    page = page_of(trace)

    assert "The parts of the downtime (37.5 ms) are not known." in page.text("p")
    assert page.text("h1") == ["Migration of web"]


def test_lone_faults_are_drawn(directory):
    for count in (1, 2, 3):
        page = page_of(write_trace(directory / "few.trace", faults=count))

        assert page.having("data-fact")[0][0]["data-value"] == str(count)


def test_many_traces_are_compared_on_one_page(directory):
    trace = write_trace(directory / "one.trace", faults=50)

    assert set(page_of(*[trace] * 30).figures(29)) == {name for name, _ in flatten(trace.migration)}


# ---- what comes from elsewhere ----


def test_hostile_names_are_only_text(directory):
    trace = write_trace(
        directory / "hostile.trace", faults=50, guest=HOSTILE, order=HOSTILE, surprise={HOSTILE: HOSTILE}
    )
    text = report_html([(HOSTILE, trace), (HOSTILE, trace)])
    page = Page(text)

    tags = {name for name, _, _ in page.elements}
    assert not tags & {"script", "img"}
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    assert html.unescape(page.figures(0)["guest"]).startswith("</title><script>")
    text.encode()
    assert "\u202e" not in text


@pytest.mark.parametrize("value", [None, True, -1, 10**30, float("nan"), float("inf"), "12", [], {"deep": {"er": 1}}])
def test_figures_that_are_none_are_shown_as_they_are(directory, value):
    changes = dict.fromkeys(
        ("downtime_us", "memory_bytes", "vcpus", "state", "mode", "guest", "fault_latency_us"), value
    )
    trace = write_trace(directory / "odd.trace", faults=50, **changes)

    for page in (page_of(trace), page_of(trace, trace)):
        assert page.text("h2")[0] == "Figures"


def test_the_page_forbids_itself_to_load_anything(trace):
    page = page_of(trace)

    (policy,) = [each["content"] for each, _ in page.having("http-equiv")]
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    links = [each.get("href", each.get("src", "")) for _, each, _ in page.elements]
    assert {link.partition(":")[0] for link in links if link} == {"data"}
    assert not re.search(r"url\((?!#)", report_html([("x", trace)]))


def test_every_chart_has_a_label_and_ids_are_unique(trace, other):
    page = page_of(trace, other)

    charts = [each for name, each, _ in page.elements if name == "svg" and "aria-hidden" not in each]
    assert len(charts) == 10
    assert all(each["aria-label"] and each["role"] == "img" for each in charts)
    ids = [each["id"] for each, _ in page.having("id")]
    assert len(ids) == len(set(ids))


def test_300_000_faults_stay_small(directory):
    trace = write_trace(directory / "many.trace", faults=300_000)

    assert len(report_html([("many", trace)])) < MIB
    assert len(report_html([("many", trace), ("again", trace)])) < 2 * MIB


# ---- how it is written ----


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


# ---- the command ----


def test_report_is_written_and_said(directory, tmp_path, trace):
    page = tmp_path / "report.html"

    result = run("trace", "report", str(directory / "hybrid.trace"), str(directory / "hybrid.trace"), "-o", str(page))

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{page}: 2 traces, {page.stat().st_size:,} bytes\n"
    assert Page(page.read_text()).figures(1)["migration_id"] == trace.migration["migration_id"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("content", [None, b"", b"PAR1 but not really", b"<html>"])
def test_what_is_no_trace_fails_and_writes_nothing(tmp_path, content):
    file, page = tmp_path / "file", tmp_path / "report.html"
    if content is not None:
        file.write_bytes(content)

    result = run("trace", "report", str(file), "-o", str(page))

    assert result.exit_code == 1
    assert result.stderr.startswith(f"migrate: {file} cannot be read as a trace: ")
    assert not page.exists()


def test_another_table_is_no_trace(tmp_path):
    pq.write_table(pa.table({"event": ["fault"]}), tmp_path / "file")

    result = run("trace", "report", str(tmp_path / "file"), "-o", str(tmp_path / "page"))

    assert result.exit_code == 1
    assert "is no trace of ours" in result.stderr


@pytest.mark.usefixtures("trace")
def test_page_that_cannot_be_written_fails(directory, tmp_path):
    file = directory / "hybrid.trace"

    for page, why in ((tmp_path / "no" / "such.html", "No such file"), (tmp_path, "Is a directory")):
        result = run("trace", "report", str(file), "-o", str(page))
        assert result.exit_code == 1
        assert result.stderr.startswith(f"migrate: {page} cannot be written: {why}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("trace")
def test_a_trace_is_not_written_over(directory):
    file = directory / "hybrid.trace"
    before = file.read_bytes()

    result = run("trace", "report", str(file), "-o", str(file))

    assert result.exit_code == 1
    assert "would be written over" in result.stderr
    assert file.read_bytes() == before
    assert read_trace(file).is_whole


@pytest.mark.parametrize("module", ["numpy", "pyarrow", "jinja2"])
def test_without_the_extra_the_remedy_is_said(monkeypatch, tmp_path, module):
    for name in [
        name for name in sys.modules if name.startswith(("migrate.telemetry.report", "migrate.telemetry.trace_"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)

    result = run("trace", "report", str(tmp_path / "file"), "-o", str(tmp_path / "page"))

    assert result.exit_code == 1
    assert result.stderr == (
        f"migrate: traces cannot be read: there is no Python module {module}; pip install 'migrate[trace]'\n"
    )
