"""`migrate start`, `status` and `list` against a fake daemon: JSON contract, exit codes, progress."""

import grpc
import pytest

from migrate.cli import migration as migration_commands
from migrate.v1 import types_pb2
from tests.harness.cli import json_of, run
from tests.harness.fake_daemon import FakeDaemon, make_migration, serve

CONTRACT_KEYS = [
    *("migration_id", "guest", "guest_kind", "mode", "state", "order", "transport", "memory_bytes"),
    *("page_size_bytes", "vcpus", "downtime_us", "precopy_us", "postcopy_us", "total_us", "bytes_on_wire"),
    *("pages", "fault_latency_us", "guest_stall_us", "guest_touches", "guest_errors", "verified_pages"),
]
PAGE_KEYS = ["total", "zero", "precopy", "urgent", "background", "duplicate", "stale"]
DISTRIBUTION_KEYS = ["count", "mean", "p50", "p90", "p99", "p999", "max"]


@pytest.fixture
def daemon():
    with serve(FakeDaemon()) as running:
        yield running


def paused_migration():
    error = types_pb2.ErrorInfo(
        type="PostcopyPausedError",
        message="the source does not answer",
        holder=types_pb2.GUEST_HOLDER_SPLIT,
        remedy="restart its daemon",
    )
    return make_migration(types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED, holder=types_pb2.GUEST_HOLDER_SPLIT, error=error)


def test_start_json_has_exactly_the_keys_of_the_contract(daemon):
    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

    assert result.exit_code == 0, result.output
    report = json_of(result)
    assert list(report) == CONTRACT_KEYS
    assert list(report["pages"]) == PAGE_KEYS
    assert list(report["fault_latency_us"]) == DISTRIBUTION_KEYS
    assert list(report["guest_stall_us"]) == DISTRIBUTION_KEYS


def test_start_json_values_are_plain_numbers_and_words(daemon):
    report = json_of(run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon))

    assert (report["state"], report["transport"], report["guest_kind"]) == ("completed", "grpcio", "kvm")
    assert (report["mode"], report["order"]) == ("postcopy", "precopy")
    assert report["guest_touches"] == 2**63
    assert report["pages"]["background"] == 130000
    assert report["fault_latency_us"]["max"] == 3.25


@pytest.mark.parametrize(
    ("options", "compression"),
    [
        ([], types_pb2.PAGE_COMPRESSION_NONE),
        (["--compress", "none"], types_pb2.PAGE_COMPRESSION_NONE),
        (["--compress", "zstd"], types_pb2.PAGE_COMPRESSION_ZSTD),
    ],
    ids=["default", "none", "zstd"],
)
def test_start_asks_for_the_compression_of_its_option(daemon, options, compression):
    assert run("start", "alpha", "--to", "192.0.2.2:7400", *options, daemon=daemon).exit_code == 0
    assert daemon.requests[0].compression == compression


def test_start_with_another_compression_is_a_usage_error(daemon):
    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--compress", "gzip", daemon=daemon)

    assert result.exit_code == 2
    assert daemon.requests == []


@pytest.mark.parametrize(
    ("compression", "word"),
    [
        (types_pb2.PAGE_COMPRESSION_ZSTD, "zstd"),
        (types_pb2.PAGE_COMPRESSION_NONE, "none"),
        (types_pb2.PAGE_COMPRESSION_UNSPECIFIED, "none"),
    ],
    ids=["zstd", "none", "a daemon that does not know of it"],
)
def test_status_json_says_how_pages_are_compressed(daemon, compression, word):
    daemon.migrations = [make_migration(compression=compression)]

    assert json_of(run("status", "--json", daemon=daemon))["compression"] == word


def test_start_json_is_the_only_line_of_stdout(daemon):
    daemon.watched = [make_migration(types_pb2.MIGRATION_STATE_POSTCOPY), make_migration()]

    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

    assert len(result.stdout.splitlines()) == 1
    assert "postcopy 100%" in result.stderr


def test_start_sends_every_option(daemon):
    options = ["--mode", "postcopy", "--order", "precopy", "--max-bandwidth", "1Gbit", "--transport", "grpcio"]

    assert run("start", "alpha", "--to", "[2001:db8::2]:7400", *options, "--verify", daemon=daemon).exit_code == 0

    request = daemon.requests[0]
    assert (request.guest, request.to, request.order, request.verify) == (
        "alpha",
        "[2001:db8::2]:7400",
        "precopy",
        True,
    )
    assert request.mode == types_pb2.MIGRATION_MODE_POSTCOPY
    assert request.transport == types_pb2.PAGE_TRANSPORT_GRPCIO
    assert request.max_bandwidth_bytes_per_s == 125_000_000


def test_start_table_fits_a_terminal(daemon):
    result = run("start", "alpha", "--to", "192.0.2.2:7400", daemon=daemon)

    assert "alpha (kvm, 2 vCPUs, 1.0 GiB)" in result.stdout
    assert "4.2 ms" in result.stdout
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["alpha"],
        ["--to", "192.0.2.2:7400"],
        ["alpha", "--to", "192.0.2.2"],
        ["alpha", "--to", "192.0.2.2:7400", "--mode", "telepathy"],
        ["alpha", "--to", "192.0.2.2:7400", "--max-bandwidth", "fast"],
        ["alpha", "--to", "192.0.2.2:7400", "--order", "random"],
    ],
)
def test_start_bad_values_are_usage_errors(daemon, arguments):
    assert run("start", *arguments, daemon=daemon).exit_code == 2
    assert not daemon.requests


def test_start_detach_prints_the_id(daemon):
    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--detach", daemon=daemon)

    assert (result.exit_code, result.stdout) == (0, "m-1\n")
    assert len(daemon.requests) == 1


def test_start_detach_json(daemon):
    arguments = ["start", "alpha", "--to", "192.0.2.2:7400", "--detach", "--json"]

    assert json_of(run(*arguments, daemon=daemon)) == {"migration_id": "m-1"}


def test_start_paused_exits_with_3(daemon):
    daemon.watched = [paused_migration()]

    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

    assert result.exit_code == 3
    assert json_of(result)["state"] == "postcopy_paused"
    assert result.stderr.splitlines()[-1] == (
        "migrate: the source does not answer; the guest is split: vCPUs at the destination, pages on both hosts; "
        "restart its daemon"
    )


@pytest.mark.parametrize("state", [types_pb2.MIGRATION_STATE_FAILED, types_pb2.MIGRATION_STATE_CANCELLED])
def test_start_failed_exits_with_1(daemon, state):
    error = types_pb2.ErrorInfo(
        type="MigrationAbortedError", message="no room there", holder=types_pb2.GUEST_HOLDER_SOURCE
    )
    daemon.watched = [make_migration(state, error=error)]

    result = run("start", "alpha", "--to", "192.0.2.2:7400", daemon=daemon)

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "migrate: no room there; the guest is at the source"
    assert "no room there" in result.stdout


def test_start_connection_lost_says_how_to_go_on(daemon):
    daemon.watched = [make_migration(types_pb2.MIGRATION_STATE_POSTCOPY)]
    daemon.watch_failure = (grpc.StatusCode.UNAVAILABLE, None)

    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

    assert result.exit_code == 1
    assert "migrate status m-1" in result.stderr


def test_start_stream_without_end_says_how_to_go_on(daemon):
    daemon.watched = []

    result = run("start", "alpha", "--to", "192.0.2.2:7400", daemon=daemon)

    assert result.exit_code == 1
    assert "migrate status m-1" in result.stderr


def test_start_interrupt_detaches(daemon, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(migration_commands, "report_migration", interrupt)

    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

    assert result.exit_code == 130
    assert result.stdout == ""
    assert "detached; migration m-1 goes on" in result.stderr


def test_status_shows_the_one_asked_for(daemon):
    status = json_of(run("status", "m-9", "--json", daemon=daemon))

    assert status["migration_id"] == "m-9"
    assert set(status) == {
        *CONTRACT_KEYS,
        "side",
        "peer",
        "compression",
        "holder",
        "guest_touches_at_switchover",
        "error",
    }
    assert (status["side"], status["holder"], status["error"]) == ("source", "destination", None)


def test_status_without_id_shows_the_latest(daemon):
    daemon.migrations = [make_migration(migration_id="m-1"), paused_migration()]

    result = run("status", daemon=daemon)

    assert result.exit_code == 0
    assert "postcopy_paused" in result.stdout
    assert "restart its daemon" in result.stdout


def test_status_json_carries_the_error(daemon):
    daemon.migrations = [paused_migration()]

    assert json_of(run("status", "--json", daemon=daemon))["error"] == {
        "type": "PostcopyPausedError",
        "message": "the source does not answer",
        "holder": "split",
        "remedy": "restart its daemon",
    }


def test_status_of_nothing_fails(daemon):
    daemon.migrations = []

    result = run("status", daemon=daemon)

    assert result.exit_code == 1
    assert "knows of no migration" in result.stderr


def test_list(daemon):
    daemon.migrations = [make_migration(migration_id="m-1"), make_migration(migration_id="m-2")]

    result = run("list", daemon=daemon)
    ids = [migration["migration_id"] for migration in json_of(run("list", "--json", daemon=daemon))]

    assert [line.split()[0] for line in result.stdout.splitlines()] == ["MIGRATION", "m-1", "m-2"]
    assert ids == ["m-1", "m-2"]
