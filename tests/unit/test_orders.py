"""Which orders a host has, and whose word is enough to import one."""

import subprocess
import sys

import pytest

from migrate.config import ORDERS, check_order_word
from migrate.errors import ConfigError, GuestHolder, UnsupportedHostError
from migrate.native.pager import Order
from migrate.pager.orders import Orders, installed_orders
from migrate.pager.policies import Demand, RecordedSet, Stride
from migrate.session.rules import check_order, check_recorded_pages
from tests.harness.cli import json_of, run

SHIPPED = {"demand": Demand, "recorded-set": RecordedSet, "stride": Stride}
GOOD = "from migrate.pager.policy import Policy\n\n\nclass Good(Policy):\n    '''Says so.\n\n    At length.'''\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs packages of one module with entry points, by writing what pip would write."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name, text, **points):
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-3.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.0\n")
        lines = "".join(f"{point} = {name}:{target}\n" for point, target in points.items())
        (info / "entry_points.txt").write_text(f"[migrate.policies]\n{lines}")

    yield make
    for module in [name for name, found in sys.modules.items() if str(tmp_path) in str(getattr(found, "__file__", ""))]:
        del sys.modules[module]


def test_the_orders_of_the_c_core_are_those_that_python_knows():
    assert [order.name.lower() for order in Order if order is not Order.SUGGESTED] == [*ORDERS]


def test_what_is_shipped_is_found_by_its_entry_points():
    offered = Orders()
    assert [*offered][: len(ORDERS)] == [*ORDERS]
    assert {name: offered.find(name) for name in SHIPPED} == SHIPPED
    assert [offered.find(name) for name in ORDERS] == [None] * len(ORDERS)


def test_a_package_of_somebody_else_is_found(package):
    package("strangers", GOOD, polite="Good")
    (found,) = [source for source in installed_orders() if source.name == "polite"]
    assert (found.package, found.package_version, found.where) == ("strangers", "3.0", "strangers:Good")
    assert "strangers" not in sys.modules, "what is only listed is not imported"
    assert found.describe() == "Says so."
    assert Orders().find("polite").__name__ == "Good"


def test_a_name_that_is_taken_stays_what_it_was(package, caplog):
    package("squatter", GOOD, precopy="Good", stride="Good")
    offered = Orders()
    assert (offered.find("precopy"), offered.find("stride")) == (None, Stride)
    assert [*offered].count("stride") == 1
    assert "squatter has an order 'stride', too" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(7)", "SystemExit: 7"),
        ("import no_such_module_at_all", "no_such_module_at_all"),
        ("", "AttributeError"),
        ("Good = 7", "is no policy"),
        ("class Good: pass", "is no policy"),
    ],
)
def test_a_broken_package_is_listed_with_what_is_wrong_and_refused(package, text, words):
    package("broken", text, odd="Good")
    with pytest.raises(UnsupportedHostError, match=words) as caught:
        Orders().find("odd")
    assert caught.value.remedy
    (row,) = [row for row in json_of_list(run("policies", "--json")) if row["name"] == "odd"]
    assert words in row["error"]
    assert row["description"] == ""


def json_of_list(result):
    assert result.exit_code == 0
    return json_of(result)


def test_policies_lists_what_is_here():
    rows = {row["name"]: row for row in json_of_list(run("policies", "--json"))}
    assert rows.keys() >= {*ORDERS, *SHIPPED}
    assert {rows[name]["kind"] for name in ORDERS} == {"native"}
    assert rows["stride"]["where"] == "migrate.pager.policies:Stride"
    assert rows["stride"]["package"] == "migrate"
    assert all(row["description"] and not row["error"] for row in rows.values())
    table = run("policies").stdout
    assert all(name in table for name in rows)


def test_a_policy_that_the_operator_names_is_imported_and_offered(package):
    package("own", GOOD)
    offered = Orders(["own:Good"])
    assert offered.find("own:Good").__name__ == "Good"
    assert "own:Good" in offered


@pytest.mark.parametrize(
    "reference", ["own:Bad", "own", "no_such_module:Class", "own:Good()", "os:getcwd", "../own:Good"]
)
def test_a_wrong_word_of_the_operator_is_an_error_at_once(package, reference):
    package("own", GOOD)
    with pytest.raises(ConfigError):
        Orders([reference])


def test_a_daemon_does_not_start_with_a_wrong_policy():
    words = [sys.executable, "-m", "migrate", "daemon", "--listen", "127.0.0.1:0", "--policy", "no_such_module:Class"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "no_such_module:Class cannot be loaded" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_peers_word_imports_nothing(package):
    package("evil", "raise SystemExit")
    with pytest.raises(UnsupportedHostError):
        Orders().find("evil:Good")
    assert "evil" not in sys.modules


def test_an_unknown_order_is_refused_with_what_there_is():
    check_order("stride", ["precopy", "stride"])
    with pytest.raises(UnsupportedHostError, match="'tides'; it has precopy, stride") as caught:
        check_order("tides", ["precopy", "stride"])
    assert caught.value.holder is GuestHolder.SOURCE
    with pytest.raises(UnsupportedHostError) as caught:
        check_order("own:Good", ["precopy"])
    assert "--policy own:Good" in caught.value.remedy


@pytest.mark.parametrize("word", ["precopy", "recorded-set", "a.b:C", "package.module:Class", "x" * 200, "é:É"])
def test_a_word_that_may_be_an_order(word):
    check_order_word(word)


@pytest.mark.parametrize(
    "word", ["", "-x", "a b", "a/b", "a:", ":C", "a:b:c", "a.:C", "1a:C", "a\n", "a:C\n", "x" * 201, "é"]
)
def test_a_word_that_is_no_order(word):
    with pytest.raises(ConfigError):
        check_order_word(word)


def test_recorded_pages_are_the_guests_and_not_too_many():
    check_recorded_pages([], 1)
    check_recorded_pages([3, 0, 3], 4)
    with pytest.raises(ConfigError, match="page 4"):
        check_recorded_pages([3, 4], 4)
    check_recorded_pages(range(262_144), 1 << 20)
    with pytest.raises(ConfigError, match="262145"):
        check_recorded_pages(range(262_145), 1 << 20)
