"""A policy in its thread, beside a real pager and a real fetch: what it may do, and what it cannot do."""

import contextlib
import threading
import time

import pytest

from migrate.native.pager import Order, Pager
from migrate.pager.fetcher import FetchTerms, make_fetcher
from migrate.pager.policies import Demand, RecordedSet, Stride
from migrate.pager.policy import Policy
from migrate.session.page_flow import PageFlow
from migrate.session.policy_thread import PolicyThread
from migrate.telemetry.clock import Clock
from migrate.v1 import types_pb2 as types
from tests.harness.memory import MIGRATION_ID, TOKEN, ServedMemory
from tests.harness.toucher import Toucher, sha256
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd

PAGES = 2048
TRANSPORTS = [types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO]
HELD_S = 1.0


@pytest.fixture(scope="module")
def served():
    made = ServedMemory(PAGES, fill=lambda page: page.to_bytes(8, "little") * 512)
    yield made
    made.close()


class Flow:
    """A small destination whose background goes by a policy."""

    def __init__(self, served, policy, *, transport=TRANSPORTS[0], cap_bytes_per_s=0, recorded_pages=()):
        self.served = served
        self.toucher = Toucher(PAGES)
        self.failures = []
        terms = FetchTerms(
            served.endpoint, MIGRATION_ID, TOKEN, verify=False, max_bandwidth_bytes_per_s=cap_bytes_per_s
        )
        self.flow = PageFlow(transport, terms, Clock(), make_fetcher, self.failures.append)
        self.flow.connect()
        order = Order.PRECOPY if policy is None else Order.SUGGESTED
        self.flow.arm(Pager(self.toucher.uffd, self.toucher.hva, PAGES, order))
        if policy is not None:
            PolicyThread(self.flow, policy, PAGES, recorded_pages, "m").start()
        self.began_s = time.monotonic()
        self.flow.fetch()

    @property
    def counters(self):
        return self.flow.counters()

    @property
    def missing(self):
        with self.flow.using() as pager:
            return pager.missing

    def touch(self, *pages):
        """One after the other, each with its answer."""
        for page in pages:
            self.toucher.touch(page)
            assert self.toucher.result() == (page, sha256(self.served.memory.page(page)))

    def wait_complete(self):
        """Every page has come, once; how long that took."""
        wait_until(lambda: not self.counters.missing_pages, 20, "all pages")
        took_s = time.monotonic() - self.began_s
        assert not self.failures
        assert self.counters.duplicate_pages == 0
        self.touch(*range(0, PAGES, 97))
        return took_s

    def close(self):
        self.flow.close()
        self.toucher.close()


@pytest.fixture
def flow_of(served):
    with contextlib.ExitStack() as stack:

        def make(*arguments, **options):
            made = Flow(served, *arguments, **options)
            stack.callback(made.close)
            return made

        yield make
        names = lambda: [thread.name for thread in threading.enumerate() if thread.name.startswith("policy-")]  # noqa: E731
        stack.close()
        wait_until(lambda: not names(), 5, "the policy's thread to end")


# ---- what it may do ----


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("policy", [Demand, RecordedSet, Stride, Policy])
def test_every_policy_ends_up_at_every_page(flow_of, policy, transport):
    flow = flow_of(policy, transport=transport, recorded_pages=range(PAGES - 1, 0, -3))
    flow.touch(*range(5, 500, 50))
    took_s = flow.wait_complete()
    assert took_s > HELD_S or policy is not Demand


@pytest.mark.alone
def test_a_policy_that_says_nothing_holds_nothing(flow_of):
    assert flow_of(Policy).wait_complete() < HELD_S / 2


def test_demand_fetches_what_is_touched_and_no_more_until_it_is_quiet(flow_of):
    flow = flow_of(Demand)
    touched = range(1, PAGES // 2, 64)
    flow.touch(*touched)
    # A page is counted a moment after whoever waited for it has it.
    wait_until(lambda: flow.counters.urgent_pages + flow.counters.zero_pages >= len(touched), 5, "all to be counted")
    assert flow.counters.background_pages == 0
    flow.wait_complete()
    assert flow.counters.background_pages > 0


def test_recorded_pages_come_before_all_others(flow_of):
    """A cap shows the order: what was recorded is a quarter of a second's worth, the rest takes two."""
    recorded = [*range(1500, 1700), 3, 900, *range(400, 450)]
    flow = flow_of(RecordedSet, cap_bytes_per_s=4 << 20, recorded_pages=recorded)
    wait_until(lambda: not any(flow.missing.is_missing(page) for page in recorded), 5, "the recorded pages")
    others = PAGES - len(recorded)
    came = others - (flow.missing.count(0, PAGES))
    assert came < others / 4
    flow.touch(*recorded[::20])


@pytest.mark.alone
def test_stride_spares_faults_that_ascending_order_does_not(flow_of):
    """A vCPU walks down the second half at its pace; the cap keeps the background in the first for a while."""
    urgent = {}
    for policy in (Stride, None):
        flow = flow_of(policy, cap_bytes_per_s=8 << 20)
        flow.toucher.walk(PAGES * 7 // 8 - 2, -9, 100, pause_s=0.003)
        for _ in range(100):
            flow.toucher.result()
        urgent[policy] = flow.counters.faults
    assert urgent[Stride] < urgent[None] / 2, urgent


def test_a_policy_hears_what_it_is_told_of(flow_of):
    heard, contexts = [], []

    class Listening(Policy):
        def __init__(self, context):
            super().__init__(context)
            self.holds_rest = True
            contexts.append(context)

        def on_fault(self, fault):
            heard.append(fault)

    flow = flow_of(Listening, recorded_pages=[4, 2])
    assert flow.toucher.pages == PAGES
    before_ns = time.monotonic_ns()
    flow.touch(7, 8)
    wait_until(lambda: len(heard) == 2, 5, "the faults")
    assert [fault.page for fault in heard] == [7, 8]
    assert all(before_ns < fault.event_ns < time.monotonic_ns() and fault.thread_id for fault in heard)
    assert not any(fault.was_requested for fault in heard)
    (context,) = contexts
    assert (context.pages, context.recorded_pages, context.page_size_bytes) == (PAGES, (4, 2), 4096)


@pytest.mark.alone
def test_a_hold_lasts_as_long_as_it_is_renewed_and_no_longer(flow_of):
    released = threading.Event()

    class Holding(Policy):
        @property
        def holds_rest(self):
            return not released.is_set()

    flow = flow_of(Holding)
    assert not released.wait(1.5 * HELD_S)
    assert flow.counters.background_pages == 0
    released.set()
    at_s = time.monotonic()
    flow.wait_complete()
    assert time.monotonic() - at_s < HELD_S


# ---- what it cannot do ----


class Raising(Policy):
    """Raises where it is told to, having asked for a hold."""

    where = ""
    holds_rest = True

    def __init__(self, context):
        super().__init__(context)
        self.check("__init__")

    def check(self, where):
        if self.where == where:
            raise RuntimeError("the policy's own fault")

    def on_fault(self, fault):
        self.check("on_fault")

    def next_runs(self, missing):
        self.check("next_runs")
        yield 5, 1
        self.check("the middle of its runs")


@pytest.mark.alone
@pytest.mark.parametrize("where", ["__init__", "on_fault", "next_runs", "the middle of its runs"])
def test_a_policy_that_raises_is_dropped_with_a_word(flow_of, caplog, where):
    flow = flow_of(type("Faulty", (Raising,), {"where": where}))
    flow.touch(9)
    took_s = flow.wait_complete()
    assert took_s < HELD_S, "its hold ended with it"
    told = [record for record in caplog.records if "policy Faulty of migration m is dropped" in record.message]
    assert len(told) == 1
    assert "the policy's own fault" in told[0].exc_text


@pytest.mark.alone
def test_a_policy_that_exits_is_dropped(flow_of, caplog):
    class Exiting(Policy):
        holds_rest = True

        def on_fault(self, fault):
            raise SystemExit(3)

    flow = flow_of(Exiting)
    flow.touch(9)
    assert flow.wait_complete() < HELD_S
    assert "policy Exiting of migration m is dropped" in caplog.text


@pytest.mark.alone
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("where", ["__init__", "on_fault", "next_runs"])
def test_a_policy_that_hangs_holds_nothing_for_more_than_a_second(flow_of, where, transport):
    let_go = threading.Event()

    class Hanging(Policy):
        holds_rest = True

    def hang(*_):
        let_go.wait(30)

    setattr(Hanging, where, hang)
    flow = flow_of(Hanging, transport=transport)
    try:
        flow.touch(9, 1000)
        assert HELD_S / 2 < flow.wait_complete() < 2.5 * HELD_S
        at_s = time.monotonic()
        flow.flow.close()
        assert time.monotonic() - at_s < 1, "nobody waits for it"
    finally:
        let_go.set()


def test_a_policy_may_look_when_the_pager_is_gone(flow_of):
    """It is let go in the middle of a method; what it looks at is not there any more, and it ends without a word."""
    let_go, looked = threading.Event(), []

    class Late(Policy):
        def next_runs(self, missing):
            let_go.wait(30)
            for look in (lambda: missing.next(0), lambda: missing.count(0, 9), lambda: missing.is_missing(3)):
                try:
                    looked.append(look())
                except Exception as error:
                    looked.append(type(error).__name__)
                    raise

    flow = flow_of(Late)
    flow.flow.close()
    let_go.set()
    wait_until(lambda: looked, 5, "the policy to look")
    assert looked == ["PagerStoppedError"]


NONSENSE = [(-5, 3), (PAGES, 1), (PAGES - 2, 99), (2**70, 1), (7, 0), (7, -1), (-(2**70), 2**71), (100, 50), (120, 50)]


def test_nonsense_does_no_harm(flow_of):
    class Talking(Policy):
        def next_runs(self, missing):
            return NONSENSE * 50

    flow = flow_of(Talking)
    flow.touch(*range(0, 500, 50))
    flow.wait_complete()


def test_a_policy_that_names_what_is_there_does_not_take_a_cpu(flow_of):
    asked = []

    class Stubborn(Policy):
        holds_rest = True

        def next_runs(self, missing):
            asked.append(time.monotonic())
            return [(0, 1)] * 1000

    flow = flow_of(Stubborn)
    flow.touch(0)
    wait_until(lambda: len(asked) > 300, 20, "the policy to be asked")
    assert asked[300] - asked[0] > 0.25


@pytest.mark.parametrize("runs", [7, ["ab"], [(1, 2, 3)], [(1.5, 1)]])
def test_what_is_no_run_drops_the_policy(flow_of, caplog, runs):
    flow = flow_of(type("Odd", (Policy,), {"next_runs": lambda self, missing: runs}))
    flow.wait_complete()
    wait_until(lambda: "policy Odd of migration m is dropped" in caplog.text, 5, "a word about it")


@pytest.mark.alone
def test_faults_are_served_while_a_policy_computes(flow_of):
    """What is between a fault and its page holds no GIL: a policy that never gives it up delays none."""

    class Busy(Policy):
        holds_rest = True

        def next_runs(self, missing):
            end_s = time.monotonic() + 1.5
            while time.monotonic() < end_s:
                pass
            return ()

    flow = flow_of(Busy)
    flow.toucher.walk(1, 1, 200)
    for _ in range(200):
        flow.toucher.result()
    flow.wait_complete()
    with flow.flow.using() as pager:
        latencies_us = sorted(pager.drain_records().latencies_us())
    assert latencies_us[len(latencies_us) // 2] < 5_000
