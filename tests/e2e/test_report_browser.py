"""The page of `migrate trace report` in a real browser: it loads nothing, fits, and says what the JSON says."""

import json
import os

import pytest

from migrate.telemetry.report.figures import flatten
from tests.harness.browser import chromium, why_no_browser
from tests.harness.cli import run
from tests.harness.operator import ask, start

pytestmark = [pytest.mark.browser, pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(120)]
SIZE_BYTES_MAX = 3 << 20
WIDTHS = (800, 1600)

FIGURES = """
return [...document.querySelectorAll('[data-figure]')].map(
    each => [Number(each.dataset.trace), each.dataset.figure, each.dataset.value, each.innerText])
"""
CHARTS = """
return [...document.querySelectorAll('figure svg')].map(each => {
    const {width, height} = each.getBoundingClientRect();
    const drawn = [...each.querySelectorAll('rect, path, circle')].filter(part => part.getBBox().width > 0);
    return {label: each.getAttribute('aria-label'), width, height, drawn: drawn.length};
})
"""
OVERFLOWING = """
const right = document.documentElement.clientWidth;
const wide = [...document.querySelectorAll('body *')].filter(each => each.getBoundingClientRect().right > right + 1);
const scrolled = [...document.querySelectorAll('.wide')].filter(each => each.scrollWidth > each.clientWidth + 1);
const cut = [...document.querySelectorAll('figure svg')].flatMap(chart => {
    const all = chart.getBoundingClientRect();
    return [...chart.querySelectorAll('text')].filter(text => {
        const own = text.getBoundingClientRect();
        return own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1;
    });
});
return [...wide, ...scrolled, ...cut].map(each => each.outerHTML.slice(0, 160));
"""
CONTRAST = """
const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(
        value => value / 255 <= 0.03928 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = luminance(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll('h1, p, th, td, figcaption, svg .tick, svg .axis, svg .row-name')].map(each => {
    const style = getComputedStyle(each);
    const ink = luminance(each.namespaceURI.endsWith('svg') ? style.fill : style.color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}).reduce((least, each) => Math.min(least, each));
"""


@pytest.fixture(scope="module")
def moved(daemons, tmp_path_factory):
    """Two migrations between daemons, the first hybrid and of a gibibyte: for each, its trace and what it printed."""
    directory = tmp_path_factory.mktemp("traces")
    source, destination = daemons
    migrations = []
    for name, memory_mib, mode in (("large", 1024, "hybrid"), ("small", 64, "postcopy")):
        source.create(name, memory_mib=memory_mib, vcpus=2)
        source.wait_populated(name)
        file = directory / f"{name}.parquet"
        migrations.append((file, start(source, destination, name, "--mode", mode, "--trace", str(file))))
        ask(destination, "guest", "delete", name)
    return migrations


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if why_not := why_no_browser():
        required = "browser" in os.environ.get("MIGRATE_TEST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"browser: {why_not}")
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "comparison"])
def report(request, moved, tmp_path_factory):
    """A page of the first traces, and what their migrations printed."""
    page = tmp_path_factory.mktemp("page") / "report.html"
    files = [str(file) for file, _ in moved[: request.param]]
    result = run("trace", "report", *files, "-o", str(page))
    assert result.exit_code == 0, result.stderr
    return page, [printed for _, printed in moved[: request.param]]


def test_the_page_is_small(report):
    page, _ = report

    assert page.stat().st_size < SIZE_BYTES_MAX


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_the_page_loads_nothing_and_fits(browser, report, width, is_dark):
    page, migrations = report

    browser.open(page, width, is_dark=is_dark)

    assert browser.console() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.run(OVERFLOWING) == []
    charts = browser.run(CHARTS)
    assert len(charts) == (6 if len(migrations) == 1 else 10)
    for chart in charts:
        assert min(chart["width"], width - 60) > 690, chart
        assert chart["height"] > 90, chart
        assert chart["drawn"] >= 4, chart
    assert browser.run(CONTRAST) > 4.5


def test_every_figure_equals_the_json(browser, report):
    page, migrations = report

    browser.open(page, WIDTHS[0])
    said = browser.run(FIGURES)

    for place, printed in enumerate(migrations):
        shown = {name: value for at, name, value, _ in said if at == place}
        expected = dict(flatten(printed))
        assert shown.keys() == expected.keys()
        for name, value in expected.items():
            assert (shown[name] if isinstance(value, str) else json.loads(shown[name])) == value, name
    assert all(words.strip() for *_, words in said)


def test_a_request_would_be_seen(browser, report, tmp_path):
    """What the other tests trust in: a page that loads something is caught, and one that obeys its policy says so."""
    page, _ = report
    text = page.read_text()
    eager = tmp_path / "eager.html"
    image = tmp_path / "image.png"
    image.write_bytes(b"")

    eager.write_text(f"<body><img src='{image.as_uri()}'>")
    browser.open(eager, WIDTHS[0])
    assert browser.requests() == [eager.as_uri(), image.as_uri()]

    eager.write_text(
        text.replace("</body>", f"<img src='{image.as_uri()}'><script>document.title = 'run'</script></body>")
    )
    browser.open(eager, WIDTHS[0])
    assert len([words for words in browser.console() if "Content Security Policy" in words]) == 2
    assert browser.run("return document.title") != "run"
