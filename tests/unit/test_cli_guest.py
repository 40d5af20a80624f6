"""`migrate guest` against a fake daemon: what is asked, what is printed."""

import pytest

from migrate.v1 import types_pb2
from tests.harness.cli import json_of, run
from tests.harness.fake_daemon import FakeDaemon, make_statistics, serve


@pytest.fixture
def daemon():
    with serve(FakeDaemon()) as running:
        yield running


def test_create_sends_every_option(daemon):
    options = ["--kind", "process", "--memory", "64MiB", "--vcpus", "3", "--workload", "sequential"]
    options += ["--write-ratio", "0.1", "--working-set", "16MiB", "--touch-rate", "500", "--seed", "9"]

    result = run("guest", "create", "gamma", *options, daemon=daemon)

    assert result.exit_code == 0, result.output
    assert "gamma" in result.stdout
    spec = daemon.requests[0].spec
    workload = types_pb2.WorkloadSpec(
        distribution=types_pb2.WORKLOAD_DISTRIBUTION_SEQUENTIAL,
        write_ratio=0.1,
        working_set_bytes=16 << 20,
        touch_rate_per_s=500,
        seed=9,
    )
    assert spec == types_pb2.GuestSpec(
        name="gamma", kind=types_pb2.GUEST_KIND_PROCESS, memory_bytes=64 << 20, vcpus=3, workload=workload
    )


def test_create_defaults(daemon):
    assert run("guest", "create", "gamma", daemon=daemon).exit_code == 0

    spec = daemon.requests[0].spec
    assert spec.kind == types_pb2.GUEST_KIND_KVM
    assert spec.memory_bytes == 1 << 30
    assert spec.vcpus == 1
    assert spec.workload.distribution == types_pb2.WORKLOAD_DISTRIBUTION_UNIFORM
    assert spec.workload.write_ratio == 0.5
    assert spec.workload.working_set_bytes == 0
    assert spec.workload.touch_rate_per_s == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "gamma", "--memory", "lots"],
        ["create", "gamma", "--memory", "1000"],
        ["create", "gamma", "--memory", "0"],
        ["create", "gamma", "--memory", "99999999TiB"],
        ["create", "gamma", "--write-ratio", "2"],
        ["create", "gamma", "--vcpus", "0"],
        ["create", "gamma", "--kind", "toaster"],
        ["create", "-gamma"],
        ["create", "a/b"],
        ["create", "x" * 65],
        ["create"],
        ["show"],
        ["show", "gamma", "--daemon", "nowhere"],
        ["show", "gamma", "--daemon", "::1:7400"],
        ["show", "gamma", "--daemon", "host:70000"],
    ],
)
def test_bad_values_are_usage_errors(daemon, arguments):
    result = run("guest", *arguments, daemon=daemon)

    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert not daemon.requests


def test_list_prints_a_row_for_each_guest(daemon):
    result = run("guest", "list", daemon=daemon)

    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "alpha", "beta"]
    assert max(map(len, lines)) <= 80


def test_list_json(daemon):
    assert [guest["name"] for guest in json_of(run("guest", "list", "--json", daemon=daemon))] == ["alpha", "beta"]


def test_show_json(daemon):
    assert json_of(run("guest", "show", "alpha", "--json", daemon=daemon)) == {
        "name": "alpha",
        "kind": "kvm",
        "state": "running",
        "memory_bytes": 1 << 30,
        "resident_bytes": 1 << 29,
        "vcpus": 2,
        "workload": {
            "distribution": "zipf",
            "write_ratio": 0.25,
            "working_set_bytes": 0,
            "touch_rate_per_s": 0,
            "seed": 7,
        },
        "pid": 4242,
        "migration_id": None,
    }


def test_show_fits_a_terminal(daemon):
    result = run("guest", "show", "alpha", daemon=daemon)

    assert "zipf, 25% writes, full speed" in result.stdout
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80


def test_stats_asks_once(daemon):
    statistics = json_of(run("guest", "stats", "alpha", "--json", daemon=daemon))

    assert statistics["touches"] == 100
    assert statistics["audits"] == 0
    assert statistics["stall_us"]["p999"] == 20
    assert daemon.requests[0].interval_us == 0


def test_stats_audit_has_the_guest_compare_its_pages(daemon):
    daemon.statistics = make_statistics(errors=2, first_error="page 7 is stale")

    statistics = json_of(run("guest", "stats", "alpha", "--audit", "--json", daemon=daemon))

    assert statistics["audits"] == 1
    assert statistics["errors"] == 2
    assert statistics["first_error"] == "page 7 is stale"


def test_stats_in_words(daemon):
    daemon.statistics = make_statistics(errors=2, first_error="page [7] is stale")

    result = run("guest", "stats", "alpha", daemon=daemon)

    assert "100, 50 of them writes" in result.stdout
    assert "page [7] is stale" in result.stdout


@pytest.mark.parametrize("command", ["pause", "resume", "delete"])
def test_commands_name_the_guest(daemon, command):
    result = run("guest", command, "alpha", daemon=daemon)

    assert result.exit_code == 0
    assert "alpha" in result.stdout
    assert daemon.requests[0].name == "alpha"
    assert type(daemon.requests[0]).__name__ == f"{command.capitalize()}GuestRequest"
