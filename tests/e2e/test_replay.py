"""`migrate trace replay`: a guest's first touches, recorded once, go through other orders and over other lines."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from migrate.pager.replay import outcome_of, overheads_of
from migrate.telemetry.trace_file import read_trace
from tests.harness import cli
from tests.harness.operator import ask, start
from tests.harness.third_party import install
from tests.harness.traces import write_trace

# What a recording cost a busy machine, the simulator takes for the line's.
pytestmark = [pytest.mark.alone, pytest.mark.kvm, pytest.mark.uffd]

LINE = ("--rtt", "2ms", "--bandwidth", "50MB")
OWN_TEXT = """
from migrate.pager.policy import Policy


class Raises(Policy):
    def on_fault(self, fault):
        raise RuntimeError("no idea")


class Backwards(Policy):
    def next_runs(self, missing):
        return ((page, 1) for page in range(self.context.pages - 1, -1, -1) if missing.is_missing(page))
"""
_names = (f"replayed-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    made = tmp_path_factory.mktemp("own")
    (made / "own_replayed.py").write_text(OWN_TEXT)
    return made


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """The trace of faults that took what faults take, whatever this machine does meanwhile."""
    path = tmp_path_factory.mktemp("even") / "even.parquet"
    write_trace(path, faults=500)
    return path


@pytest.fixture(scope="module")
def recorded(daemons, directory):
    """The trace of a guest that had all of its memory on demand, and what its migration printed."""
    source, destination = daemons
    name = next(_names)
    source.create(name, memory_mib=16, vcpus=2)
    source.wait_populated(name)
    path = directory / "demand.parquet"
    report = start(source, destination, name, "--mode", "postcopy", "--order", "demand", "--trace", str(path))
    ask(destination, "guest", "delete", name)
    return path, report


def replay(path, *words, env=None, exit_code=0):
    """The command, as a process of its own if it has variables of its own; what it said."""
    command = ["trace", "replay", str(path), *words]
    if env is None:
        result = cli.run(*command)
        assert result.exit_code == exit_code, (result.stdout, result.stderr)
        return result
    done = subprocess.run(
        [sys.executable, "-m", "migrate", *command],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == exit_code, (done.stdout, done.stderr)
    return done


def outcomes(path, *words, env=None):
    answer = json.loads(replay(path, *words, "--json", env=env).stdout)
    return answer, {outcome["order"]: outcome for outcome in answer["replayed"]}


def test_a_demand_trace_has_every_first_touch(recorded):
    path, report = recorded
    answer, replayed = outcomes(path, "--order", "demand", "--bandwidth", "10GB")
    live, again = answer["recorded"], replayed["demand"]
    touched = report["pages"]["urgent"] + report["pages"]["background"]
    assert live["network_fault_share"] > 0.95
    assert live["network_fault_pages"] == pytest.approx(touched, rel=0.05)
    assert live["stalls"] == report["fault_latency_us"]["count"] - zero_faults(path)
    # Its own order on its own line: the simulator has nothing to guess, but what it draws has the recording's spread.
    assert again["network_fault_pages"] == live["network_fault_pages"]
    assert again["stall_p50_us"] == pytest.approx(live["stall_p50_us"], rel=0.25)
    stalls_us = outcome_of(read_trace(path)).stalls_us
    drawn_us = 5 * stalls_us.std() * len(stalls_us) ** 0.5
    assert again["stall_total_us"] == pytest.approx(live["stall_total_us"], abs=drawn_us + 0.1 * live["stall_total_us"])


def zero_faults(path):
    faults = read_trace(path).faults
    return int((faults.kind == 0).sum())


def test_orders_are_compared_with_each_other_and_with_an_oracle(recorded, even):
    path, _ = recorded
    words = [word for order in ("precopy", "follow", "bubble", "stride", "recorded-set") for word in ("--order", order)]
    answer, replayed = outcomes(path, *words, *LINE, "--like", str(even), "--recorded", str(path))
    assert (answer["rtt_us"], answer["bandwidth_bytes_per_s"]) == (2000, 50_000_000)
    assert list(replayed) == ["precopy", "follow", "bubble", "stride", "recorded-set", "oracle"]
    for order, outcome in replayed.items():
        assert outcome["pages"] == answer["recorded"]["pages"], order
        assert 0 < outcome["network_fault_share"] < 1, order
        # None is faster than 16 MiB over 50 MB/s, nor much slower: the window has to open, and leaves room for faults.
        assert 0.99 < outcome["duration_us"] / (16 * 1.048576 / 50 * 1e6) < 2, order
        assert replayed["oracle"]["stall_total_us"] <= outcome["stall_total_us"], order
    assert replayed["recorded-set"] == {**replayed["oracle"], "order": "recorded-set"}


def test_what_faults_take_may_come_from_another_trace(recorded, even):
    path, _ = recorded
    words = ("--order", "demand", "--bandwidth", "1GB")
    here, there = (outcomes(path, *words, *more) for more in ((), ("--like", str(even))))
    assert there[0]["rtt_us"] == pytest.approx(overheads_of(read_trace(even)).rtt_ns / 1000, abs=0.01)
    assert there[0]["rtt_us"] != here[0]["rtt_us"]
    assert there[1]["demand"]["network_fault_pages"] == here[1]["demand"]["network_fault_pages"]


def test_a_policy_of_somebody_else_is_replayed(recorded, tmp_path):
    path, _ = recorded
    _, replayed = outcomes(path, "--order", "descending", "--order", "precopy", *LINE, env=install(tmp_path))
    assert 0 < replayed["descending"]["network_fault_share"] < 1
    assert replayed["descending"] != {**replayed["precopy"], "order": "descending"}
    assert "descending" in replay(path, "--order", "descending", *LINE, exit_code=1).stderr


def test_a_class_is_replayed_from_where_python_finds_it(recorded, directory):
    path, _ = recorded
    env = {"PYTHONPATH": str(directory)}
    _, replayed = outcomes(path, "--order", "own_replayed:Backwards", *LINE, env=env)
    assert replayed["own_replayed:Backwards"]["pages"] > 0
    broken = replay(path, "--order", "own_replayed:Raises", *LINE, env=env, exit_code=1)
    assert broken.stderr == "migrate: policy own_replayed:Raises raised RuntimeError: no idea\n"


def test_people_get_a_table(recorded):
    path, _ = recorded
    lines = replay(path, "--order", "precopy", *LINE).stdout.splitlines()
    assert "pages over a line of round trip 2.0 ms, 47.7 MiB/s" in lines[0]
    assert [line.split("  ")[0].strip() for line in lines[1:]] == ["ORDER", "demand, as recorded", "precopy", "oracle"]


def test_what_a_trace_does_not_show_must_be_said(recorded, even):
    path, _ = recorded
    assert "give --bandwidth" in replay(path, "--order", "precopy", exit_code=2).stderr
    said = replay(even, "--order", "precopy", "--json")
    assert "record with --order demand" in said.stderr
    assert json.loads(said.stdout)["recorded"]["order"] != "demand"


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (("--order", "tides"), 1, "this host has no order 'tides'"),
        (("--order", "no_such_module:Class"), 1, "cannot be loaded"),
        ((), 2, "--order"),
        (("--order", "precopy", "--rtt", "soon"), 2, "--rtt"),
    ],
)
def test_what_makes_no_sense_is_refused(recorded, words, exit_code, said):
    path, _ = recorded
    assert said in replay(path, *words, "--bandwidth", "1MB", exit_code=exit_code).stderr


def test_what_is_no_trace_is_refused(tmp_path):
    (tmp_path / "t").write_text("no")
    assert "cannot be read as a trace" in replay(tmp_path / "t", "--order", "precopy", exit_code=1).stderr
    empty = tmp_path / "empty.parquet"
    write_trace(empty, faults=0)
    assert "no urgent fault" in replay(empty, "--order", "precopy", exit_code=1).stderr


def test_a_guest_gets_first_what_was_recorded_of_an_earlier_one(source, destination, recorded):
    path, _ = recorded
    name = next(_names)
    source.create(name, memory_mib=16, vcpus=1)
    source.wait_populated(name)
    terms = ("--mode", "postcopy", "--order", "recorded-set", "--recorded", str(path))
    report = start(source, destination, name, *terms)
    assert (report["state"], report["order"], report["guest_errors"]) == ("completed", "recorded-set", 0)
    ask(destination, "guest", "delete", name)
    assert cli.run("start", "none", "--to", "127.0.0.1:1", "--recorded", "missing").exit_code == 1
