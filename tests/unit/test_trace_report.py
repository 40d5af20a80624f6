"""`migrate trace report`: its numbers are those of the trace, and whatever is in a file, it is a page."""

import html
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.telemetry.report import report_html
from migrate.telemetry.report.figures import flatten
from migrate.telemetry.report.timeline import clock_of, rates_of
from migrate.telemetry.totals import PAGE_KINDS
from migrate.telemetry.trace_file import Faults, Progress, Trace, read_trace
from tests.harness.cli import run
from tests.harness.traces import PARTS_US, STATES_MS, write_trace

MIB = 1 << 20
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


ANY_NS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def any_trace(draw):
    """Whatever the types of a trace allow."""
    count = draw(st.integers(0, 4))
    column = st.lists(ANY_NS | st.integers(-1, 9), min_size=count, max_size=count)
    names = [name for name in Faults.__dataclass_fields__ if name != "kind"]
    faults = {name: np.array(draw(column), dtype=np.int64) for name in names}
    kinds = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    numbers = st.integers(0, 2**63 - 1) | st.none()
    progress = st.builds(
        Progress,
        ANY_NS,
        st.fixed_dictionaries(dict.fromkeys(PAGE_KINDS, numbers)),
        numbers,
        numbers,
        st.binary(max_size=300),
    )
    return Trace(
        migration=draw(st.dictionaries(st.sampled_from(["guest", "state", "memory_bytes"]), st.text() | numbers)),
        downtime_us=draw(st.dictionaries(st.text(), numbers | st.floats(), max_size=3)),
        lost_faults=draw(numbers),
        is_whole=draw(st.booleans()),
        faults=Faults(kind=np.array(kinds, dtype=np.int64), **faults),
        progress=draw(st.lists(progress, max_size=3)),
        states=draw(st.lists(st.tuples(ANY_NS, st.text() | st.sampled_from(["postcopy", "completed"])), max_size=3)),
        stalls=draw(st.lists(st.tuples(st.floats(), st.integers()), max_size=3)),
        missing_at_switchover=draw(st.none() | st.builds(np.ones, st.integers(0, 90), st.just(bool))),
        zero_at_end=None,
    )


def test_a_short_trace_far_from_its_zero_has_its_rates():
    """Half a day away, a nanosecond can be told from the next, but not be divided."""
    columns = {name: np.zeros(1, dtype=np.int64) for name in Faults.__dataclass_fields__}
    pages = dict.fromkeys(PAGE_KINDS, 0)
    trace = Trace(
        migration={},
        downtime_us={},
        lost_faults=0,
        is_whole=True,
        faults=Faults(**{**columns, "placed_ns": columns["placed_ns"] + 1}),
        progress=[Progress(0, pages, 1, 0, b""), Progress(1, {**pages, "urgent": 1}, 0, 4096, b"")],
        states=[(-42_462_194_171_804, "postcopy")],
        stalls=[],
        missing_at_switchover=None,
        zero_at_end=None,
    )
    page_of(trace)
    rates = {rate.name: rate for rate in rates_of(trace, clock_of(trace))}

    assert rates["urgent pages"].per_s == pytest.approx([1e9])
    assert rates["bytes on the wire"].per_s == pytest.approx([4096e9])
    assert rates["faults"].total == 1
    assert all(np.isfinite(rate.per_s).all() and rate.peak_per_s > 0 for rate in rates.values())


@settings(max_examples=30)
@given(traces=st.lists(any_trace(), min_size=1, max_size=2))
def test_any_trace_makes_a_page(traces):
    with np.errstate(over="ignore"):
        page_of(*traces)


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


def test_other_commands_do_not_need_the_extra():
    words = "import sys, migrate.cli.main; sys.exit(len({'numpy', 'pyarrow', 'jinja2'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", words], timeout=30, check=False).returncode == 0


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
        f"migrate: traces need a Python module that is not here: {module}; pip install 'migrate[trace]'\n"
    )
