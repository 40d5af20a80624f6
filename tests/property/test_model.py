"""Both sides of a migration, driven with cuts, delays, losses, refusals and reordering; see tests.harness.model."""

import faulthandler
import gc
import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from migrate.session import arrival, backoff, convergence, destination, precopy, serving, source
from migrate.session.states import State
from migrate.v1 import types_pb2 as types
from tests.harness.model import LONG_US, Model, Plan
from tests.harness.model_checks import check_end, check_step
from tests.harness.model_control import ANSWERED, RUNNING, SENT
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd

PAGES_MIN, PAGES_MAX = 48, 96
EXAMPLES = 200
STEPS = 40
VALUES = st.integers(0, 250)
# Steps of the model's that come in bursts.
TRAFFIC = (
    "ask_background",
    "ask_background",
    "ask_urgent",
    "begin_to_read",
    "read",
    "read",
    "deliver",
    "write_somewhere",
    "write_what_is_on_its_way",
    "touch_what_is_missing",
    "go_on",
    "go_on",
)
# What the sessions wait by themselves between two looks; the order of things is the model's.
FAST = {
    source: {"_POLL_S": 0.001, "_ATTEMPT_FIRST_S": 0.001, "_ATTEMPT_MAX_S": 0.001, "_ATTEMPTS_MAX": 4},
    serving: {"_POLL_S": 0.001},
    backoff: {"RETRY_FIRST_S": 0.001, "RETRY_MAX_S": 0.001},
    precopy: {"_AWAIT_US": 1_000},
    convergence: {"SETTLED_PAGES": 2},
    destination: {"_POLL_US": 1_000, "_OBSERVE_S": 0.001},
    arrival: {"_POLL_US": 1_000},
}
SOURCE_METHODS = ("pause", "save_state", "start_dirty_log", "sync_dirty_log")
TWIN_METHODS = ("arm", "load_state", "resume")
SLOW_METHODS = ("build", "arm", "pause", "save_state", "load_state", "resume", "sync_dirty_log", "stop_dirty_log")

traffic = st.lists(st.tuples(st.sampled_from(TRAFFIC), st.integers(0, 31), VALUES), min_size=1, max_size=24)
# More than a source waits for a silent destination in precopy, or a destination for a source.
LONG_TIMES_US = (6_000_000, LONG_US)
RARELY = st.sampled_from([False] * 7 + [True])

contents = st.one_of(st.integers(1, 250), st.integers(1, 250), st.none(), st.just(0))
runs_of_content = st.lists(st.tuples(contents, st.integers(1, 24)), min_size=1, max_size=8)


def filled(runs, pages):
    """What each page holds, from runs of equal content that are repeated to the end."""
    made = []
    while len(made) < pages:
        for value, count in runs:
            made += [value] * count
    return tuple(made[:pages])


def failing(methods):
    """Mostly none; else a method that fails, at its first or a later call."""
    one = st.dictionaries(st.sampled_from(methods), st.integers(0, 2), min_size=1, max_size=1)
    return st.sampled_from([False] * 9 + [True]).flatmap(lambda really: one if really else st.just({}))


plans = st.builds(
    lambda pages, runs, **rest: Plan(filled=filled(runs, pages), **rest),
    pages=st.integers(PAGES_MIN, PAGES_MAX),
    runs=runs_of_content,
    mode=st.sampled_from([types.MIGRATION_MODE_HYBRID, types.MIGRATION_MODE_PRECOPY, types.MIGRATION_MODE_POSTCOPY]),
    order=st.sampled_from(["precopy", "follow", "bubble"]),
    verify=st.booleans(),
    on_no_convergence=st.sampled_from(
        [types.NO_CONVERGENCE_POSTCOPY, types.NO_CONVERGENCE_WAIT, types.NO_CONVERGENCE_FAIL]
    ),
    # Little enough that no round is ever small enough; enough for rounds of a few pages; the default.
    downtime_limit_us=st.sampled_from([1, 6_100, 0]),
    source_failing=failing(SOURCE_METHODS),
    twin_failing=failing(TWIN_METHODS),
    slow=st.one_of(
        st.just(frozenset()), st.just(frozenset({"sync_dirty_log"})), st.frozensets(st.sampled_from(SLOW_METHODS))
    ),
    fails_to_connect=st.sampled_from([False] * 19 + [True]),
    is_traced=st.booleans(),
)


def when(condition):
    """A rule that applies only if the model is so."""
    return precondition(lambda self: self.model is not None and condition(self.model))


class MigrationMachine(RuleBasedStateMachine):
    """Steps in any order; each leaves all threads at rest."""

    def __init__(self):
        super().__init__()
        self.model = None
        self.fds_before = len(os.listdir("/proc/self/fd"))
        self.threads_before = len(os.listdir("/proc/self/task"))

    @initialize(plan=plans, calls=st.integers(0, 4))
    def start(self, plan, calls):
        self.model = Model(plan)
        for _ in range(calls):
            self.pass_calls(0, 1)

    # ---- the guest ----

    @when(lambda model: model.source.is_running)
    @rule(writes=st.lists(st.tuples(st.integers(0, PAGES_MAX - 1), VALUES), min_size=1, max_size=6))
    def write_at_source(self, writes):
        for page, value in writes:
            self.model.write(page % self.model.pages, value)

    @when(lambda model: model.twin_runs)
    @rule(page=st.integers(0, PAGES_MAX - 1), value=st.none() | st.integers(1, 250))
    def touch_at_destination(self, page, value):
        self.model.touch(page % self.model.pages, value)

    @when(lambda model: model.world.gates)
    @rule(index=st.integers(0, 3))
    def let_guest_go_on(self, index):
        self.model.world.open_gate(index % len(self.model.world.gates))
        self.model.settle()

    # ---- the page call, and the guest that it must keep up with ----

    @when(lambda model: model.link is not None and model.link.is_active)
    @rule(steps=traffic)
    def have_traffic(self, steps):
        for name, index, value in steps:
            if self.model.link.is_active:
                getattr(self.model, name)(index, value)
                self.model.settle()

    @when(lambda model: model.source_state is State.PRECOPY and model.link.is_active)
    @rule(before=traffic, after=traffic)
    def force_amid_traffic(self, before, after):
        self.have_traffic(before)
        self.model.force()
        self.have_traffic(after)

    @when(lambda model: model.link is not None and model.link.is_active)
    @rule(really=st.booleans())
    def move_all_pages(self, really):
        if really:
            self.model.flow()

    @when(lambda model: model.link is not None and model.link.in_flight)
    @rule(really=st.booleans())
    def cut(self, really):
        if really:
            self.model.link.cut()
            self.model.settle()

    @when(lambda model: model.link is not None and model.link.is_active)
    @rule(really=RARELY)
    def lose_page_call_for_good(self, really):
        if really:
            self.model.link.fail()
            self.model.settle()

    # ---- the control calls ----

    @when(lambda model: model.calls(SENT, ANSWERED))
    @rule(index=st.integers(0, 3), times=st.integers(1, 4))
    def pass_calls(self, index, times):
        for _ in range(times):
            if calls := self.model.calls(SENT, ANSWERED):
                self.model.pass_call(calls[index % len(calls)])

    @when(lambda model: model.calls(SENT))
    @rule(index=st.integers(0, 3))
    def deliver_call(self, index):
        calls = self.model.calls(SENT)
        self.model.control.deliver(calls[index % len(calls)])
        self.model.settle()

    @when(lambda model: any(call.caller for call in model.control.calls))
    @rule(index=st.integers(0, 3), will_arrive=st.booleans(), really=RARELY)
    def lose_call(self, index, will_arrive, really):
        if not really:
            return
        calls = [call for call in self.model.calls(SENT, RUNNING, ANSWERED) if call.caller is not None]
        self.model.control.give_up(calls[index % len(calls)], will_arrive=will_arrive)
        self.model.settle()

    # ---- the operator, and time ----

    @when(lambda model: len(model.cancels) < 2)
    @rule(order=st.sampled_from([None] * 6 + ["force", "force", "cancel"]))
    def operate(self, order):
        if order == "force":
            self.model.force()
        elif order == "cancel":
            self.model.cancel()

    @when(lambda model: model.source_state is State.POSTCOPY_PAUSED)
    @rule()
    def have_destination_recover(self):
        self.model.destination_session._arrival.recover_now()
        self.model.settle()

    @when(lambda model: True)
    @rule(duration_us=st.sampled_from([1_000, 10_000, 100_000]), is_long=RARELY, long_us=st.sampled_from(LONG_TIMES_US))
    def let_time_pass(self, duration_us, is_long, long_us):
        self.model.world.now_us += long_us if is_long else duration_us
        self.model.settle()

    @invariant()
    def holds(self):
        if self.model is not None:
            check_step(self.model)

    def teardown(self):
        if self.model is None:
            return
        model, self.model = self.model, None
        try:
            model.drive()
            check_end(model)
        finally:
            model.close()
        assert not model.world.violations, model.world.violations
        del model
        if len(os.listdir("/proc/self/fd")) > self.fds_before:
            gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= self.fds_before, "a descriptor was left open"
        # The kernel's thread ends a little after Python has said so.
        wait_until(lambda: len(os.listdir("/proc/self/task")) <= self.threads_before, 5, "all threads to end")


IS_THOROUGH = settings.default.max_examples > EXAMPLES


@pytest.mark.timeout(3600 if IS_THOROUGH else 180)
def test_whole_guest_is_somewhere_once_whatever_happens(monkeypatch):
    if IS_THOROUGH:
        faulthandler.cancel_dump_traceback_later()  # it may take longer than a test should
    for module, values in FAST.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    run_state_machine_as_test(
        MigrationMachine,
        settings=settings(
            max_examples=max(EXAMPLES, settings.default.max_examples),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
