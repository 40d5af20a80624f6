"""`migrate drain` empties a host, whatever becomes of the destinations, and of the command itself, meanwhile."""

import contextlib
import functools
import json
import signal
import subprocess
import sys

import pytest

from migrate.barriers import Point
from migrate.v1 import types_pb2 as types
from tests.harness.barriers import Barriers
from tests.harness.daemons import DaemonProcess, together
from tests.harness.tls_dirs import Certificates
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(150)]

HELD_S = 30
DRAINED_S = 100
NAMES = [f"g{number}" for number in range(6)]


class Hosts:
    """A source with guests, and destinations, that outlive their daemons."""

    def __init__(self, source, destinations, barriers):
        self.source = source
        self.destinations = destinations
        self.barriers = barriers

    def create(self, names, **spec):
        for name in names:
            self.source.create(name, **{"memory_mib": 64, "touch_rate_per_s": 5_000, **spec})
        for name in names:
            self.source.wait_populated(name)

    @contextlib.contextmanager
    def draining(self, *options):
        """The command, as a process of its own, which ends with the scope."""
        to = [word for daemon in self.destinations for word in ("--to", daemon.address)]
        command = [sys.executable, "-m", "migrate", "drain", "--from", self.source.address, *to, "--json", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def of_pid(self, pid):
        return next(daemon for daemon in self.destinations if daemon.process.pid == pid)

    def where(self):
        """Guests by the destination that has them."""
        return {daemon.address: daemon.guest_names() for daemon in self.destinations}

    def check_arrived(self, names):
        """Every guest is at one destination, runs, and has all its pages."""
        assert self.source.guest_names() == []
        assert sorted(name for found in self.where().values() for name in found) == sorted(names)
        for daemon in self.destinations:
            for name in daemon.guest_names():
                wait_until(lambda d=daemon, n=name: not d.guest(n).migration_id, 20, f"{name} to be free")
                before = daemon.statistics(name).touches
                wait_until(lambda d=daemon, n=name, b=before: d.statistics(n).touches > b, 20, f"{name} to run")
                audited = daemon.audit(name)
                assert (audited.errors, audited.first_error) == (0, "")


@contextlib.contextmanager
def hosts_under(directory, destinations=2, operator=None, **options):
    with contextlib.ExitStack() as stack:
        barriers = stack.enter_context(Barriers(directory / "barriers"))
        names = ["source", *(f"destination-{number}" for number in range(destinations))]

        def start(name):
            return DaemonProcess(state_dir=directory / name, env=barriers.env, operator=operator, **options)

        starting = together(*(functools.partial(start, name) for name in names))
        source, *others = stack.enter_context(starting)
        yield Hosts(source, others, barriers)


@pytest.fixture
def hosts(tmp_path):
    with hosts_under(tmp_path) as made:
        yield made


def result_of(process, exit_code=0):
    """What the command printed, after it has ended as it should."""
    out, err = process.communicate(timeout=DRAINED_S)
    assert process.returncode == exit_code, err
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.parametrize("point", [Point.DESTINATION_PREPARED, Point.DESTINATION_RUNNING])
def test_drain_ends_with_all_guests_running_though_a_destination_is_killed_and_started_again(hosts, point):
    hosts.create(NAMES)
    hosts.barriers.hold(point)
    with hosts.draining("--mode", "postcopy", "--peer-timeout", "1s") as process:
        held_id, pid = hosts.barriers.wait_held(point, HELD_S)
        victim = hosts.of_pid(pid)
        victim.kill()
        hosts.barriers.release(point)
        victim.restart()
        report, _ = result_of(process)

    assert (report["moved"], report["failed"], report["paused"], report["gone"]) == (6, 0, 0, 0)
    assert [guest["guest"] for guest in report["guests"]] == NAMES
    assert {guest["outcome"] for guest in report["guests"]} == {"moved"}
    assert held_id in {guest["migration_id"] for guest in report["guests"]}
    for guest in report["guests"]:
        assert guest["guest"] in hosts.where()[guest["to"]]
    hosts.check_arrived(NAMES)


def test_drain_that_is_interrupted_goes_on_where_it_was(hosts):
    names = NAMES[:4]
    hosts.create(names)
    # There its pages flow, so that this drain begins no other.
    hosts.barriers.hold(Point.SOURCE_PRECOPY)
    with hosts.draining("--parallel", "1") as process:
        held_id, _ = hosts.barriers.wait_held(Point.SOURCE_PRECOPY, HELD_S)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HELD_S)
    assert process.returncode == 130
    assert "detached" in err

    with hosts.draining("--parallel", "1") as process:
        # It has seen the one that is held once it says so.
        first = process.stderr.readline()
        hosts.barriers.release(Point.SOURCE_PRECOPY)
        report, err = result_of(process)

    assert f"by migration {held_id}" in first
    assert (report["moved"], report["failed"]) == (4, 0)
    started = [migration.guest for migration in hosts.source.migrations_now()]
    assert sorted(started) == names
    hosts.check_arrived(names)


def test_drain_goes_elsewhere_where_a_guest_is_refused(hosts):
    """A guest of that name is at the roomier destination already."""
    hosts.create(["g0", "g1"])
    taken = hosts.destinations[0]
    taken.create("g0", kind="process", memory_mib=16, workload="idle")

    with hosts.draining("--parallel", "1") as process:
        report, _ = result_of(process)

    assert (report["moved"], report["failed"]) == (2, 0)
    moved = {guest["guest"]: guest for guest in report["guests"]}
    assert moved["g0"]["to"] == hosts.destinations[1].address
    for refusal in moved["g0"]["refusals"]:
        assert refusal["to"] == taken.address
        assert "already" in refusal["error"]
    assert hosts.source.guest_names() == []


def test_drain_says_which_guests_could_go_nowhere(tmp_path):
    with hosts_under(tmp_path, destinations=1) as hosts:
        hosts.create(["g0", "g1"], kind="process", memory_mib=16)
        hosts.destinations[0].create("g0", kind="process", memory_mib=16, workload="idle")

        with hosts.draining() as process:
            report, _ = result_of(process, exit_code=1)

        outcomes = {guest["guest"]: guest["outcome"] for guest in report["guests"]}
        assert outcomes == {"g0": "failed", "g1": "moved"}
        assert hosts.source.guest_names() == ["g0"]
        assert hosts.source.guest("g0").state == types.GUEST_STATE_RUNNING


def test_drain_leaves_what_stands_still_and_says_so(tmp_path):
    with hosts_under(tmp_path, destinations=1) as hosts:
        hosts.create(["g0"])
        hosts.barriers.hold(Point.DESTINATION_RUNNING)
        with hosts.draining("--mode", "postcopy", "--peer-timeout", "1s", "--wait", "2s") as process:
            migration_id, _ = hosts.barriers.wait_held(Point.DESTINATION_RUNNING, HELD_S)
            hosts.destinations[0].kill()
            hosts.barriers.release(Point.DESTINATION_RUNNING)
            report, _ = result_of(process, exit_code=3)
        assert (report["paused"], report["guests"][0]["migration_id"]) == (1, migration_id)

        with hosts.draining() as process:
            assert migration_id in process.stderr.readline()
            hosts.destinations[0].restart()
            report, _ = result_of(process)
        assert report["moved"] == 1
        hosts.check_arrived(["g0"])


def test_drain_over_tls(tmp_path):
    certificates = Certificates(tmp_path / "ca")
    operator = certificates.operator()
    with hosts_under(tmp_path, operator=operator, tls_dir=certificates.host()) as hosts:
        hosts.create(["g0", "g1", "g2"], kind="process", memory_mib=16)

        with hosts.draining("--tls-dir", str(operator)) as process:
            report, _ = result_of(process)

        assert (report["moved"], report["failed"]) == (3, 0)
        hosts.check_arrived(["g0", "g1", "g2"])
