"""`migrate demo` with fake daemons: the order of things, the verdict, and that nothing stays behind."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from migrate.cli import demo as demo_command
from migrate.cli import local_daemon
from migrate.cli.local_daemon import GuestProcesses, LocalDaemon
from migrate.errors import CallFailedError
from migrate.guest.probe import Check, HostCapabilities
from migrate.v1 import types_pb2
from tests.harness.cli import json_of, run
from tests.harness.fake_daemon import FakeDaemon, make_guest, make_migration, make_statistics, serve

READY_THEN_WAIT = """
import os, signal, sys
os.write(int(sys.argv[1]), b'{"listen": "127.0.0.1:7", "page_listen": "127.0.0.1:8"}\\n')
signal.pause()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY_THEN_WAIT
BROKEN = "raise SystemExit('no room at the inn')"


class Pair:
    """Two fake daemons in the place of the real ones."""

    def __init__(self):
        self.source = FakeDaemon(guests=[])
        self.destination = FakeDaemon(guests=[make_guest("demo")])
        self.destination.guests[0].pid = 0
        self.destination.statistics = make_statistics(touches=5000)
        self.started = []
        self.stopped = []
        self.directories = []

    def local_daemon(self, name, base_dir, _options=()):
        fake = getattr(self, name)
        pair = self

        class Local:
            address = ""

            def __init__(self):
                self.name = name

            def start(self):
                pair.started.append(name)
                pair.directories.append(base_dir)
                self.address = fake.address

            def stop(self):
                pair.stopped.append(name)

            def exit_status(self):
                return None

            def log_tail(self):
                return f"last words of {name}"

        return Local()


@pytest.fixture
def pair(monkeypatch):
    pair = Pair()
    monkeypatch.setattr(demo_command, "LocalDaemon", pair.local_daemon)
    # The pids of the fakes are somebody else's.
    monkeypatch.setattr(GuestProcesses, "add", lambda _processes, _pid: None)
    monkeypatch.setattr(demo_command, "probe_host", lambda: HostCapabilities(checks=()))
    with ExitStack() as stack:
        stack.enter_context(serve(pair.source))
        stack.enter_context(serve(pair.destination))
        yield pair
    assert pair.stopped == pair.started
    assert not any(directory.exists() for directory in pair.directories)


def requests_of(fake):
    return [type(request).__name__ for request in fake.requests]


def test_demo_does_all_of_it_in_order(pair):
    result = run("demo", "--json")

    assert result.exit_code == 0, result.stderr
    assert requests_of(pair.source) == [
        "CreateGuestRequest",
        "GetGuestRequest",
        "StartMigrationRequest",
        "WatchMigrationRequest",
        "ListGuestsRequest",
    ]
    assert requests_of(pair.destination) == [
        "WatchGuestStatisticsRequest",
        "AuditGuestRequest",
        "ListGuestsRequest",
        "DeleteGuestRequest",
    ]
    assert pair.source.requests[2].to == pair.destination.address


def test_demo_defaults(pair):
    run("demo")

    spec = pair.source.requests[0].spec
    assert (spec.kind, spec.memory_bytes, spec.vcpus) == (types_pb2.GUEST_KIND_KVM, 256 << 20, 2)
    assert (spec.workload.distribution, spec.workload.write_ratio) == (types_pb2.WORKLOAD_DISTRIBUTION_UNIFORM, 0.5)


def test_demo_reports_what_the_guest_says_at_the_end(pair):
    report = json_of(run("demo", "--json"))

    assert (report["guest_touches"], report["guest_errors"]) == (5000, 0)
    assert report["guest_stall_us"]["p50"] == 20


def test_demo_table_and_headline(pair):
    result = run("demo")

    assert result.stderr.splitlines()[0].startswith("migrate demo: two daemons on this machine")
    assert "kvm, 256.0 MiB, 2 vCPUs, uniform" in result.stderr.splitlines()[0]
    assert "5,000 touches, 0 errors" in result.stdout
    assert "\x1b" not in result.stdout


def test_demo_guest_errors_exit_with_1(pair):
    pair.destination.statistics = make_statistics(touches=5000, errors=3)

    result = run("demo", "--json")

    assert result.exit_code == 1
    assert json_of(result)["guest_errors"] == 3
    assert "3 pages that are not as it left them" in result.stderr


@pytest.mark.parametrize(
    "flaw",
    [
        {"pages": types_pb2.PageCounts(total=262144, urgent=1)},
        {"memory_bytes": 1 << 31},
    ],
)
def test_demo_pages_that_do_not_add_up_exit_with_1(pair, flaw):
    pair.source.watched = [make_migration(**flaw)]

    assert run("demo").exit_code == 1


def test_demo_paused_migration_exits_with_3(pair):
    pair.source.watched = [make_migration(types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED)]

    result = run("demo", "--json")

    assert result.exit_code == 3
    assert json_of(result)["state"] == "postcopy_paused"


def test_demo_failure_shows_the_logs_and_cleans_up(pair):
    pair.source.watched = []

    result = run("demo")

    assert result.exit_code == 1
    assert "last words of source" in result.stderr
    assert "last words of destination" in result.stderr


def test_demo_interrupt_cleans_up(pair, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_command, "follow", interrupt)

    result = run("demo", "--json")

    assert result.exit_code == 130
    assert result.stdout == ""
    assert "DeleteGuestRequest" in requests_of(pair.destination)


def test_demo_without_kvm_takes_a_process_and_says_so(pair, monkeypatch):
    missing = Check("kvm-device", ok=False, detail="absent", remedy="load kvm", required_for=("kvm",))
    monkeypatch.setattr(demo_command, "probe_host", lambda: HostCapabilities(checks=(missing,)))

    result = run("demo", "--json")

    assert "kvm-device: absent" in result.stderr.splitlines()[0]
    assert pair.source.requests[0].spec.kind == types_pb2.GUEST_KIND_PROCESS


@pytest.fixture
def local(monkeypatch, tmp_path):
    """Makes a LocalDaemon that runs a script instead, which gets the descriptor as its argument."""
    made = []

    def make(script):
        daemon = LocalDaemon("source", tmp_path)
        monkeypatch.setattr(daemon, "_command", lambda ready_fd: [sys.executable, "-c", script, str(ready_fd)])
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.stop()


def test_local_daemon_serves_until_stopped(local):
    daemon = local(READY_THEN_WAIT)

    daemon.start()
    serving = daemon.exit_status()
    daemon.stop()

    assert daemon.address == "127.0.0.1:7"
    assert serving is None
    assert daemon.exit_status() == -15


def test_local_daemon_that_ignores_sigterm_is_killed(local, monkeypatch):
    monkeypatch.setattr(local_daemon, "STOP_DEADLINE_S", 0.1)
    daemon = local(STUBBORN)
    daemon.start()

    daemon.stop()

    assert daemon.exit_status() == -9


def test_local_daemon_that_ends_early_shows_its_log(local):
    with pytest.raises(CallFailedError, match=r"(?s)ended before it served.*no room at the inn"):
        local(BROKEN).start()


def test_local_daemon_that_never_serves(local, monkeypatch):
    monkeypatch.setattr(local_daemon, "READY_DEADLINE_S", 0.1)

    with pytest.raises(CallFailedError, match="does not serve"):
        local("import signal; signal.pause()").start()


def test_local_daemon_keeps_no_descriptor(local):
    before = sorted(os.listdir("/proc/self/fd"))
    daemon = local(READY_THEN_WAIT)

    daemon.start()

    assert sorted(os.listdir("/proc/self/fd")) == before


def test_guest_processes_end_with_us():
    guest = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    processes = GuestProcesses()
    processes.add(guest.pid)

    processes.end_all()

    assert guest.wait(10) == -9


def test_guest_processes_that_are_gone_are_left_alone():
    guest = subprocess.Popen(["/bin/true"])
    processes = GuestProcesses()
    processes.add(guest.pid)
    guest.wait(10)

    processes.end_all()
    processes.add(guest.pid)

    assert not Path(f"/proc/{guest.pid}").exists()


# ---- a guest of kind qemu ----


def test_demo_of_a_linux_guest_that_is_not_built_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("MIGRATE_LINUX_GUEST", str(tmp_path))
    monkeypatch.setattr(demo_command, "probe_host", lambda: HostCapabilities(checks=()))

    result = run("demo", "--kind", "qemu")

    assert result.exit_code == 1
    assert f"there is no Linux guest in {tmp_path}" in result.stderr
    assert "scripts/build_linux_guest" in result.stderr


def test_demo_of_a_linux_guest_without_qemu_says_so(monkeypatch):
    lacking = Check("qemu", ok=False, detail="there is no qemu", remedy="install it", required_for=("qemu",))
    monkeypatch.setattr(demo_command, "probe_host", lambda: HostCapabilities(checks=(lacking,)))

    result = run("demo", "--kind", "qemu")

    assert result.exit_code == 1
    assert "no QEMU can move here: qemu: there is no qemu" in result.stderr
