"""The policies that are shipped, over a bitmap of their own: no guest, no daemon."""

import itertools
import random
import re
from pathlib import Path

import pytest

from migrate.native.bitmap import MissingBitmap
from migrate.pager.policies import Demand, RecordedSet, Stride
from migrate.pager.policy import Fault, Policy, PolicyContext, take_runs

PAGES = 10_000
ROOM = 1024


def fault_at(page, thread_id=1, event_ns=0, *, was_requested=False):
    return Fault(page, event_ns, thread_id, was_requested)


def pages_of(runs):
    return [page for first, count in runs for page in range(first, first + count)]


class Walked:
    """vCPUs that touch pages, and a policy whose pages come before the next touch."""

    def __init__(self, policy, pages=PAGES):
        self.policy = policy
        self.missing = MissingBitmap(pages)
        self.faults = 0

    def touch(self, page, thread_id=1):
        if self.missing.is_missing(page):
            self.faults += 1
            self.policy.on_fault(fault_at(page, thread_id))
            self.missing.place(page, 1)
        for first, count in take_runs(self.policy, self.missing, ROOM):
            self.missing.place(first, count)


@pytest.mark.parametrize("stride", [1, 7, 64, -1, -13])
def test_stride_spares_a_walk_nearly_all_of_its_faults(stride):
    path = range(0, PAGES, stride) if stride > 0 else range(PAGES - 1, -1, stride)
    walked = Walked(Stride(PolicyContext(PAGES)))
    for page in path:
        walked.touch(page)
    assert walked.faults <= 3 + 7 + len(path) / 1024
    if abs(stride) > 1:
        assert walked.missing.count(0, PAGES) == PAGES - len(path), "it named no page that is not on the way"


def test_stride_tells_vcpus_apart():
    walked = Walked(Stride(PolicyContext(PAGES)))
    for step in range(300):
        walked.touch(step * 3, thread_id=1)
        walked.touch(PAGES - 1 - step * 5, thread_id=2)
    assert walked.faults <= 2 * 10


def test_stride_widens_as_it_is_right():
    policy, missing = Stride(PolicyContext(PAGES)), MissingBitmap(PAGES)
    for page in (0, 10, 20):
        assert take_runs(policy, missing, ROOM) == []
        policy.on_fault(fault_at(page))
    first = take_runs(policy, missing, ROOM)
    assert pages_of(first) == [*range(30, 101, 10)]
    policy.on_fault(fault_at(110))
    assert pages_of(take_runs(policy, missing, ROOM)) == [*range(120, 271, 10)]
    policy.on_fault(fault_at(150, was_requested=True))
    assert pages_of(take_runs(policy, missing, ROOM)) == [*range(280, 471, 10)], (
        "those that it has named, it names once"
    )


def test_stride_is_silent_about_a_guest_that_jumps():
    walked = Walked(Stride(PolicyContext(PAGES)))
    chooser = random.Random(1)  # noqa: S311
    touched = chooser.sample(range(PAGES), 500)
    for page in touched:
        walked.touch(page)
    assert walked.missing.count(0, PAGES) >= PAGES - 520


def test_stride_follows_a_vcpu_that_begins_another_walk():
    walked = Walked(Stride(PolicyContext(PAGES)))
    for page in itertools.chain(range(0, 1000, 2), range(5001, 8000, 3)):
        walked.touch(page)
    assert walked.faults <= 2 * 11


def test_recorded_set_names_its_pages_once_and_in_their_order():
    recorded = [7, 9000, 8, 7, 3, 9000]
    policy, missing = RecordedSet(PolicyContext(PAGES, recorded)), MissingBitmap(PAGES)
    assert pages_of(take_runs(policy, missing, ROOM)) == [7, 9000, 8, 3]
    assert take_runs(policy, missing, ROOM) == []


def test_recorded_set_goes_on_where_there_was_no_room():
    recorded = random.Random(1).sample(range(PAGES), 3000)  # noqa: S311
    policy, missing = RecordedSet(PolicyContext(PAGES, recorded)), MissingBitmap(PAGES)
    named = []
    for room in (1024, 0, 1, 500, 2000):
        named += pages_of(take_runs(policy, missing, room))
    assert named == recorded


def test_demand_holds_the_rest_until_no_fault_has_come_for_a_second():
    now = [5_000_000_000]
    policy, missing = Demand(PolicyContext(PAGES, now_ns=lambda: now[0])), MissingBitmap(PAGES)
    steps = [(0, False, True), (900, True, True), (1800, False, True), (1899, False, True), (1900, False, False)]
    for after_ms, has_fault, is_held in [*steps, (2500, True, True), (3499, False, True), (3500, False, False)]:
        now[0] = 5_000_000_000 + after_ms * 1_000_000
        if has_fault:
            policy.on_fault(fault_at(3, event_ns=now[0]))
        assert take_runs(policy, missing, ROOM) == []
        assert policy.holds_rest == is_held, f"after {after_ms} ms"


class Named(Policy):
    """Names what it is given."""

    def __init__(self, runs):
        super().__init__(PolicyContext(100))
        self.runs = runs

    def next_runs(self, missing):
        return self.runs


def test_what_lies_outside_the_region_is_left_out():
    runs = [(-5, 10), (95, 10), (100, 1), (-5, 3), (50, 0), (50, -3), (2**70, 2**70), (-(2**70), 2**71)]
    assert take_runs(Named(runs), MissingBitmap(100), ROOM) == [(0, 5), (95, 5), (0, 100)]


def test_no_more_is_taken_than_there_is_room_for():
    endless = ((page % 100, 1) for page in itertools.count())
    assert take_runs(Named(endless), MissingBitmap(100), 3) == [(0, 1), (1, 1), (2, 1)]
    assert next(endless) == (3, 1)


@pytest.mark.parametrize("runs", [7, [7], [(7,)], [("7", 1)], [(7.5, 1)], None])
def test_what_is_no_run_is_the_policys_error(runs):
    with pytest.raises((TypeError, ValueError)):
        take_runs(Named(runs), MissingBitmap(100), ROOM)


def test_a_policy_may_look_up_what_is_missing():
    missing = MissingBitmap(100)
    assert missing.place(10, 80) == 80
    assert [missing.is_missing(page) for page in (9, 10, 90, 100, -1)] == [True, False, True, False, False]
    assert [missing.next(page) for page in (-3, 10, 99, 100)] == [0, 90, 99, None]
    assert [missing.count(*run) for run in ((0, 100), (-10, 15), (85, 10), (95, 50), (200, 5), (5, -3))] == [
        20,
        5,
        5,
        5,
        0,
        0,
    ]
    assert missing.lose(50, 1) == 1
    assert missing.next(10) == 50


ROOT = Path(__file__).resolve().parents[2]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_what_the_document_shows_is_what_is_tested(capsys):
    written, tried = PYTHON_BLOCK.findall((ROOT / "docs" / "policies.md").read_text())
    assert written == (ROOT / "tests" / "third_party_policy" / "last_page_first.py").read_text()
    exec(tried, {})  # noqa: S102
    assert f"# {capsys.readouterr().out}" == tried.rpartition("  ")[2]
