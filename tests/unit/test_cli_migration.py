"""`migrate start`, `status`, `recover` and `list` against a fake daemon: JSON contract, exit codes, progress."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc
import pytest

from migrate.cli import migration as migration_commands
from migrate.cli.progress import PlainReporter
from migrate.v1 import migration_service_pb2, types_pb2
from tests.harness.cli import json_of, run
from tests.harness.fake_daemon import FakeDaemon, make_migration, serve
from tests.harness.ports import ReservedPort

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


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], (5_000_000, 0, types_pb2.DEADLINE_ACTION_STOP)),
        (["--peer-timeout", "300ms"], (300_000, 0, types_pb2.DEADLINE_ACTION_STOP)),
        (["--deadline", "120s"], (5_000_000, 120_000_000, types_pb2.DEADLINE_ACTION_STOP)),
        (["--deadline", "2s", "--on-deadline", "stop"], (5_000_000, 2_000_000, types_pb2.DEADLINE_ACTION_STOP)),
        (["--deadline", "2s", "--on-deadline", "poison"], (5_000_000, 2_000_000, types_pb2.DEADLINE_ACTION_POISON)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_start_says_how_long_a_peer_and_pages_may_stay_away(daemon, options, asked):
    assert run("start", "alpha", "--to", "192.0.2.2:7400", *options, daemon=daemon).exit_code == 0
    request = daemon.requests[0]
    assert (request.peer_timeout_us, request.deadline_us, request.on_deadline) == asked


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
        ["alpha", "--to", "192.0.2.2:7400", "--order", "no/order"],
        ["alpha", "--to", "192.0.2.2:7400", "--peer-timeout", "soon"],
        ["alpha", "--to", "192.0.2.2:7400", "--deadline", "-1s"],
        ["alpha", "--to", "192.0.2.2:7400", "--deadline", "2s", "--on-deadline", "shrug"],
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


@pytest.fixture
def _impatient(monkeypatch):
    """A daemon that goes away is waited for, but not for long."""
    monkeypatch.setattr(migration_commands, "DAEMON_AWAY_S", 0.3)


@pytest.mark.usefixtures("_impatient")
def test_start_connection_lost_says_how_to_go_on(daemon):
    daemon.watched = iter([make_migration(types_pb2.MIGRATION_STATE_POSTCOPY)])
    daemon.watch_failure = (grpc.StatusCode.UNAVAILABLE, None)

    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

    assert result.exit_code == 1
    assert "migrate status m-1" in result.stderr


@pytest.mark.usefixtures("_impatient")
def test_start_stream_without_end_says_how_to_go_on(daemon):
    daemon.watched = []

    result = run("start", "alpha", "--to", "192.0.2.2:7400", daemon=daemon)

    assert result.exit_code == 1
    assert "migrate status m-1" in result.stderr


@pytest.mark.parametrize("failure", [(grpc.StatusCode.UNAVAILABLE, None), None], ids=["killed", "shut down"])
@pytest.mark.parametrize(
    ("end", "exit_code"),
    [
        (types_pb2.MIGRATION_STATE_COMPLETED, 0),
        (types_pb2.MIGRATION_STATE_FAILED, 1),
        (types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED, 3),
    ],
)
def test_start_follows_on_after_its_daemon_was_started_again(failure, end, exit_code):
    class Restarted(FakeDaemon):
        lives = 0

        def WatchMigration(self, request, context):
            self.lives += 1
            self.watched = [make_migration(end if self.lives > 1 else types_pb2.MIGRATION_STATE_POSTCOPY)]
            self.watch_failure = None if self.lives > 1 else failure
            yield from super().WatchMigration(request, context)

    with serve(Restarted()) as daemon:
        result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

        assert result.exit_code == exit_code
        assert json_of(result)["state"] == types_pb2.MigrationState.Name(end).removeprefix("MIGRATION_STATE_").lower()
        assert daemon.lives == 2


def test_start_finds_a_daemon_that_comes_back_at_its_address():
    """The first one ends without a word; the second listens at the same port."""
    gone = threading.Event()

    def last_words():
        yield make_migration(types_pb2.MIGRATION_STATE_POSTCOPY)
        gone.set()

    with closing(ReservedPort()) as port, ThreadPoolExecutor(1) as follower:
        with serve(
            FakeDaemon(watched=last_words(), watch_failure=(grpc.StatusCode.UNAVAILABLE, None)), port.number
        ) as first:
            started = follower.submit(run, "start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=first)
            assert gone.wait(10)
        with serve(FakeDaemon(), port.number):
            result = started.result(30)

    assert (result.exit_code, json_of(result)["state"]) == (0, "completed")


def test_start_interrupt_detaches(daemon, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(PlainReporter, "show", interrupt)

    result = run("start", "alpha", "--to", "192.0.2.2:7400", "--json", daemon=daemon)

    assert result.exit_code == 130
    assert result.stdout == ""
    assert "detached; the migration goes on; look again with\n  migrate status m-1 --watch\n" in result.stderr


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
        "attempt",
        "recoveries",
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


def test_status_json_counts_attempts_and_recoveries(daemon):
    daemon.migrations = [make_migration(attempt=3, recoveries=2)]

    status = json_of(run("status", "--json", daemon=daemon))

    assert (status["attempt"], status["recoveries"]) == (3, 2)


@pytest.mark.parametrize(
    ("options", "to"), [([], ""), (["--to", "192.0.2.3:7400"], "192.0.2.3:7400")], ids=["where it was", "elsewhere"]
)
def test_recover_asks_for_the_one_named(daemon, options, to):
    result = run("recover", "m-7", *options, "--json", daemon=daemon)

    assert result.exit_code == 0
    assert [*daemon.requests] == [migration_service_pb2.RecoverMigrationRequest(migration_id="m-7", to=to)]
    assert (json_of(result)["state"], json_of(result)["recoveries"]) == ("postcopy", 1)


def test_recover_without_id_takes_the_latest(daemon):
    daemon.migrations = [make_migration(migration_id="m-1"), make_migration(migration_id="m-2")]

    result = run("recover", daemon=daemon)

    assert result.exit_code == 0
    assert daemon.requests[-1].migration_id == "m-2"
    assert "postcopy" in result.stdout


def test_recover_of_what_stays_paused_exits_with_3(daemon):
    daemon.recovered = paused_migration()

    result = run("recover", "m-1", "--json", daemon=daemon)

    assert result.exit_code == 3
    assert json_of(result)["holder"] == "split"
    assert "the source does not answer" in result.stderr


def test_recover_of_what_is_lost_exits_with_1(daemon):
    error = types_pb2.ErrorInfo(type="GuestLostError", message="its pages died", holder=types_pb2.GUEST_HOLDER_NONE)
    daemon.recovered = make_migration(types_pb2.MIGRATION_STATE_FAILED, holder=types_pb2.GUEST_HOLDER_NONE, error=error)

    result = run("recover", "m-1", daemon=daemon)

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "migrate: its pages died; the guest is lost"


def test_recover_that_is_refused_exits_with_1(daemon):
    info = types_pb2.ErrorInfo(type="GuestBusyError", message="there is nothing to recover")
    daemon.failure = (grpc.StatusCode.FAILED_PRECONDITION, info)

    result = run("recover", "m-1", daemon=daemon)

    assert (result.exit_code, result.stderr) == (1, "migrate: there is nothing to recover\n")


def test_recover_to_what_is_no_address_is_a_usage_error(daemon):
    assert run("recover", "m-1", "--to", "elsewhere", daemon=daemon).exit_code == 2
    assert not daemon.requests


def test_list(daemon):
    daemon.migrations = [make_migration(migration_id="m-1"), make_migration(migration_id="m-2")]

    result = run("list", daemon=daemon)
    ids = [migration["migration_id"] for migration in json_of(run("list", "--json", daemon=daemon))]

    assert [line.split()[0] for line in result.stdout.splitlines()] == ["MIGRATION", "m-1", "m-2"]
    assert ids == ["m-1", "m-2"]


def test_lines_of_a_pipe_are_as_long_as_their_words(daemon):
    for words in (("list",), ("status", "m-1"), ("guest", "list"), ("doctor",)):
        lines = run(*words, daemon=daemon).stdout.splitlines()
        assert len(lines) > 1
        assert lines == [line.rstrip() for line in lines]
