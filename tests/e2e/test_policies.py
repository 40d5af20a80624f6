"""Policies, as an operator asks for them: of the destination's own, of somebody else's package, and refused."""

import contextlib
import json
import os
import subprocess
import sys
from contextlib import closing
from functools import partial

import pytest

from migrate.client import Client
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess
from tests.harness.operator import ask, check_moved, check_runs, is_free, start
from tests.harness.third_party import install
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]

OWN = "own_policy:Backwards"
OWN_TEXT = """
import sys

from migrate.pager.policy import Policy


class Backwards(Policy):
    def __init__(self, context):
        super().__init__(context)
        print("Backwards was made", file=sys.stderr, flush=True)
        self.runs = iter((page, 1) for page in range(context.pages - 1, -1, -1))

    def next_runs(self, missing):
        return self.runs
"""
# A vCPU walks at a pace that a look ahead can keep up with; the background as a whole is a little faster.
WALKER = {"memory_mib": 16, "workload": "sequential", "touch_rate_per_s": 3000}
SLOW = {"mode": types.MIGRATION_MODE_POSTCOPY, "max_bandwidth_bytes_per_s": 16 << 20}
EVIL = "evil_policy:Good"
EVIL_TEXT = "from pathlib import Path\n\nPath(__file__).with_suffix('.imported').touch()\n"


@pytest.fixture(scope="module")
def third_party(tmp_path_factory):
    """The variables by which Python finds the package of somebody else."""
    return install(tmp_path_factory.mktemp("third-party"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Modules of the destination's operator; one writes a file when it is imported."""
    made = tmp_path_factory.mktemp("own")
    (made / "own_policy.py").write_text(OWN_TEXT)
    (made / "evil_policy.py").write_text(EVIL_TEXT)
    return made


@pytest.fixture(scope="module")
def daemons(third_party, directory):
    """The source has nothing but what is shipped; the destination has all, and can be started again."""
    env = {"PYTHONPATH": f"{directory}{os.pathsep}{third_party['PYTHONPATH']}"}
    with contextlib.ExitStack() as stack:
        pair = []
        for options in ({}, {"options": ["--policy", OWN], "env": env, "log": directory / "log"}):
            pair.append(DaemonProcess(state_dir=directory / f"state-{len(pair)}", **options))
            stack.callback(pair[-1].close)
        yield pair


@pytest.fixture
def make_guest(make_guest):
    return partial(make_guest, memory_mib=32)


@pytest.mark.parametrize(
    ("order", "mode", "transport"),
    [("stride", "postcopy", "native"), ("stride", "hybrid", "native"), ("recorded-set", "postcopy", "grpcio")],
)
def test_policies_move_every_page(source, destination, make_guest, order, mode, transport):
    name = make_guest(vcpus=2, workload="sequential")
    options = ("--mode", mode, "--order", order, "--transport", transport, "--verify")
    report = start(source, destination, name, *options)
    check_moved(source, destination, name, report)
    assert (report["mode"], report["order"]) == (mode, order)
    assert report["verified_pages"] == report["pages"]["total"]


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["kvm", "process"])
def test_stride_spares_a_walker_faults(source, destination, make_guest, kind):
    urgent = {}
    for order in ("stride", "precopy"):
        name = make_guest(kind=kind, **WALKER)
        report = start(source, destination, name, "--mode", "postcopy", "--order", order, "--max-bandwidth", "16MiB/s")
        check_moved(source, destination, name, report)
        assert report["order"] == order
        urgent[order] = report["pages"]["urgent"]
    assert urgent["stride"] < urgent["precopy"] / 2, urgent


def test_demand_has_every_first_touch_be_a_fault(source, destination, make_guest):
    name = make_guest(working_set_mib=8, workload="uniform")
    report = start(source, destination, name, "--mode", "postcopy", "--order", "demand")
    check_moved(source, destination, name, report)
    assert report["order"] == "demand"
    pages = report["pages"]
    assert pages["urgent"] > 0.95 * (8 << 20) / 4096
    assert report["postcopy_us"] > 1_000_000


# ---- what comes first ----


def first_map(source, migration_id, cells):
    """The map of what is missing when all of some cells is there, while much else is missing."""
    with Client(source.address) as client, closing(client.migrations.watch(migration_id, live=True)) as watched:
        maps = [list(each.live.missing_map) for each in watched if each.HasField("live")]
    return next((shares for shares in maps if not any(shares[cell] for cell in cells)), None)


def check_came_first(source, destination, name, cells, last, **terms):
    """A slow migration of an idle guest in which some cells come early, and some late."""
    migration_id = source.start(destination, name, **SLOW, **terms)
    shares = first_map(source, migration_id, cells)
    assert shares is not None, "they were not there before the end"
    assert sum(shares[cell] for cell in last) > 0.9 * 255 * len(last)
    assert source.wait_completed(migration_id).order == terms["order"]
    check_runs(destination, name)


def test_recorded_pages_come_first(source, destination, make_guest):
    name = make_guest(kind="process", touch_rate_per_s=20)
    cells = range(192, 224)
    pages = range(cells[0] * 32, (cells[-1] + 1) * 32)
    check_came_first(source, destination, name, cells, range(64, 128), order="recorded-set", recorded_pages=pages[::-1])


# ---- of somebody else ----


def policies(env):
    words = [sys.executable, "-m", "migrate", "policies", "--json"]
    listed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30, env={**os.environ, **env})
    return {row["name"]: row for row in json.loads(listed.stdout)}


def test_a_package_of_somebody_else_is_listed_where_it_is_installed(third_party):
    row = policies(third_party)["descending"]
    assert (row["package"], row["version"]) == ("last-page-first", "2.5")
    assert (row["where"], row["error"]) == ("last_page_first:Descending", "")
    assert row["description"] == "The last pages first, down to the first."
    assert "descending" not in policies({})


@pytest.mark.parametrize("order", ["descending", OWN])
def test_a_policy_of_the_destination_is_used(source, destination, make_guest, order):
    """The source has never heard of it."""
    name = make_guest(kind="process", touch_rate_per_s=20)
    check_came_first(source, destination, name, range(192, 256), range(64), order=order)


def test_demo_hands_a_policy_to_its_daemons(directory):
    words = ["demo", "--kind", "process", "--memory", "16MiB", "--order", OWN, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "migrate", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": str(directory)},
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["order"], report["guest_errors"]) == (OWN, 0)


# ---- refused ----


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("tides", "it has precopy, follow, bubble"),
        (EVIL, f"--policy {EVIL}"),
        ("own_policy:Forwards", "--policy own_policy:Forwards"),
    ],
)
def test_an_order_that_the_destination_does_not_have_changes_nothing(
    source, destination, make_guest, directory, order, words
):
    name = make_guest()
    failed = ask(source, "start", name, "--to", destination.address, "--order", order, exit_code=1)
    assert f"the destination has no order '{order}'" in failed.stderr
    assert words in failed.stderr
    assert "the guest is at the source" in failed.stderr
    assert name not in destination.guest_names()
    wait_until(lambda: is_free(source, name), 10, "the source to let the guest go on")
    check_runs(source, name)
    assert not (directory / "evil_policy.imported").exists(), "a peer had the destination import something"


def test_recorded_pages_of_another_guest_are_refused(source, destination, make_guest):
    name = make_guest(memory_mib=16)
    failed = source.migrate(destination, name, order="recorded-set", recorded_pages=[4095, 4096])
    assert (failed.state, failed.error.type) == (types.MIGRATION_STATE_FAILED, "ConfigError")
    assert "page 4096 was recorded of another one" in failed.error.message
    check_runs(source, name)


# ---- a daemon that is started again ----


def count(log, words):
    return log.read_text().count(words)


@pytest.mark.parametrize("has_policy", [True, False])
def test_a_daemon_that_is_started_again_makes_the_policy_anew_or_does_without(
    source, destination, make_guest, has_policy
):
    name = make_guest(kind="process", touch_rate_per_s=200)
    made = count(destination.log, "Backwards was made")
    migration_id = source.start(destination, name, order=OWN, peer_timeout_us=1_000_000, **SLOW)
    wait_until(lambda: source.migration(migration_id).pages.background > 200, 20, "pages to come")
    destination.kill()
    words = destination.words
    if not has_policy:
        destination.words = [word for word in words if word not in ("--policy", OWN)]
    destination.restart()
    source.wait_completed(migration_id)
    check_runs(destination, name)
    assert count(destination.log, "Backwards was made") == made + 1 + has_policy
    said = f"this host has no order '{OWN}'; pages of migration {migration_id} come in ascending order"
    assert count(destination.log, said) == (not has_policy)
    if not has_policy:
        destination.kill()
        destination.words = words
        destination.restart()
