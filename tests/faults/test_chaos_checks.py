"""The runs of chaos are what they claim to be: their plans are theirs alone, and each of their checks can fail."""

import contextlib
import dataclasses
import os
from types import SimpleNamespace

import pytest

from migrate.barriers import Point
from migrate.guest.client import GuestClient
from migrate.guest.layout import layout_of
from migrate.v1 import guest_service_pb2 as guest
from tests.harness.chaos import Outcome, run_chaos
from tests.harness.chaos_checks import check_alone, check_gone, check_log, compare_memory
from tests.harness.chaos_plan import KILLS, Event, Kind, Links, plan_of
from tests.harness.chaos_report import as_markdown, totals, unreached
from tests.harness.chaos_side import NAME, ChaosError
from tests.harness.chaos_watch import CopiesWatch
from tests.harness.daemons import DaemonProcess
from tests.harness.waiting import wait_until

RUNS = 200


@pytest.fixture(scope="module")
def plans():
    return [plan_of(7, number) for number in range(RUNS)]


@pytest.fixture
def side(tmp_path):
    """A daemon with a guest that never writes, as checks see it."""
    made = Side("source", tmp_path / "one")
    yield made
    made.daemon.close()


class Side:
    def __init__(self, name, state_dir):
        self.name = name
        self.state_dir = state_dir
        self.socket = state_dir / "guests" / f"{NAME}.sock"
        self.daemon = DaemonProcess(state_dir=state_dir)
        self.spec = self.daemon.create(NAME, kind="process", write_ratio=0.0).spec
        self.daemon.wait_populated(NAME)


@pytest.fixture
def memory_fd(side):
    with contextlib.closing(GuestClient(side.socket)) as client:
        _, _, _, (fd,) = client.describe()
    yield fd
    os.close(fd)


def test_plans_are_determined_by_seed_and_number(plans):
    assert plans == [plan_of(7, number) for number in range(RUNS)]
    assert plans != [plan_of(8, number) for number in range(RUNS)]


def test_the_same_guest_moves_when_nothing_befalls_it(plans):
    for plan in plans:
        calm = plan_of(7, plan.number, events_max=0)
        terms = {"transport": plan.transport, "compression": plan.compression, "verify": plan.verify}
        assert dataclasses.replace(plan, events=()) == dataclasses.replace(calm, **terms)


def test_plans_have_events_at_every_point_and_of_every_kind(plans):
    events = [event for plan in plans for event in plan.events]
    assert {len(plan.events) for plan in plans} == {1, 2, 3, 4, 5}
    assert {event.barrier for event in events} == {None, *Point}
    for kind in Kind:
        assert sum(event.kind is kind for event in events) >= 10, kind
    assert {plan.mode for plan in plans} == {"postcopy", "hybrid", "precopy"}
    assert {plan.vcpus for plan in plans} == {1, 2, 3, 4}
    assert (min(plan.memory_mib for plan in plans), max(plan.memory_mib for plan in plans)) == (64, 256)


def test_plans_corrupt_nothing_that_has_no_digest(plans):
    for plan in plans:
        for event in plan.events:
            assert (event.links is None) == (event.kind in KILLS)
            if event.kind is Kind.CORRUPT:
                assert (event.links, plan.transport, plan.verify) == (Links.PAGES, "native", True)


def test_points_that_are_never_reached_are_told():
    event = Event(Kind.KILL_SOURCE, barrier=Point.SOURCE_LEFT)
    plan = dataclasses.replace(plan_of(7, 0), events=(event,))
    missed = [Outcome(plan, fates=["never reached"]) for _ in range(3)]
    assert unreached(missed) == ["source.left"]
    assert unreached([*missed, Outcome(plan, fates=["done"])]) == []
    summary = totals(7, [*missed, Outcome(plan, ["lost a page"], ["done"])])
    assert (summary["runs"], summary["completed"], summary["kills"]) == (4, 3, 1)
    assert "| `source.left` | 1 | 0 | - |" in as_markdown(7, [Outcome(plan, ["lost a page"], ["done"])])


def test_two_running_copies_are_seen(side, tmp_path):
    other = Side("destination", tmp_path / "two")
    try:
        with CopiesWatch(side.socket, other.socket) as watch:
            wait_until(lambda: watch.seen_twice, 10, "two copies to be seen")
            other.daemon.guests.PauseGuest(guest.PauseGuestRequest(name=NAME), timeout=10)
            seen = len(watch.seen_twice)
            looks = watch.looks
            wait_until(lambda: watch.looks > looks + 5, 10, "more looks")
            # One may have been on its way.
            assert len(watch.seen_twice) <= seen + 1
    finally:
        other.daemon.close()


def test_one_running_copy_is_not_seen_twice(side, tmp_path):
    with CopiesWatch(side.socket, tmp_path / "nobody") as watch:
        wait_until(lambda: watch.looks > 5, 10, "some looks")
        assert watch.seen_twice == []


def test_a_byte_that_differs_is_found(side, memory_fd):
    copy_fd = os.memfd_create("copy")
    try:
        os.sendfile(copy_fd, memory_fd, 0, side.spec.memory_bytes)
        assert compare_memory(side.spec, copy_fd, side) > layout_of(side.spec).working_pages
        page = layout_of(side.spec).first_page + 300
        os.pwrite(copy_fd, b"\xaa", page * 4096 + 77)
        with pytest.raises(ChaosError, match=rf"1 pages differ from the source's: \[{page}\]"):
            compare_memory(side.spec, copy_fd, side)
    finally:
        os.close(copy_fd)


def test_a_wrong_page_is_found_by_the_audit(side, memory_fd):
    assert check_alone(side).errors == 0
    os.pwrite(memory_fd, b"\xaa" * 4096, (layout_of(side.spec).first_page + 300) * 4096)
    assert check_alone(side).errors > 0


def test_a_guest_that_stays_is_found(side, monkeypatch):
    monkeypatch.setattr("tests.harness.chaos_side.SETTLE_S", 0.1)
    with pytest.raises(ChaosError, match="the source to have no guest process"):
        check_gone(side)


@pytest.mark.kvm
@pytest.mark.uffd
def test_a_run_that_cannot_be_completed_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    event = Event(Kind.BLACKHOLE, at_s=0.1, links=Links.ALL, pause_s=4.0)
    plan = dataclasses.replace(plan_of(7, 0, quick=True), events=(event,))
    outcome = run_chaos(plan, seed=7, deadline_s=2, keep_logs=tmp_path / "logs")
    assert "not completed after 2 s" in outcome.problems[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs"]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["run-0-destination.log", "run-0-source.log"]


def test_a_traceback_in_a_log_is_found(tmp_path):
    side = SimpleNamespace(name="source", log=tmp_path / "source.log")
    side.log.write_text("INFO all is well\n")
    check_log(side)
    side.log.write_text("INFO all is well\nTraceback (most recent call last):\n  File ...\n")
    with pytest.raises(ChaosError, match="the source's log has 1 tracebacks"):
        check_log(side)
