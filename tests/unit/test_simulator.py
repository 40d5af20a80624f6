"""The simulator: what can be worked out by hand comes out so, and nothing is asked for twice or left out."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.native.pager import Order
from migrate.pager.policies import Demand, RecordedSet, Stride
from migrate.pager.policy import Policy
from migrate.pager.replay import Overheads, Touches
from migrate.pager.simulator import Line, Memory, Oracle, Simulation
from migrate.units import PAGE_SIZE_BYTES

US = 1_000
MS = 1_000 * US
S = 1_000 * MS
PAGES = 512
BEFORE, READ, AFTER, RTT = 10 * US, 5 * US, 20 * US, 2 * MS
PAGE_BYTES = PAGE_SIZE_BYTES * 1.002 + 60
# An urgent fault on a line where nothing else is; the last is a page's own transmission.
ALONE_US = (BEFORE + READ + AFTER + RTT) / 1000


def constant(value):
    return np.array([value])


OVERHEADS = Overheads(constant(BEFORE), constant(READ), constant(0), constant(AFTER), RTT)


def line(bytes_per_s=10**12, rtt=RTT):
    return Line(rtt, bytes_per_s)


def memory(missing=PAGES, zero=()):
    flags = np.zeros(PAGES, dtype=bool)
    flags[:missing] = True
    zeros = np.zeros(PAGES, dtype=bool)
    zeros[list(zero)] = True
    return Memory(flags, zeros)


def vcpu(pages, think=100 * US, thread_id=7):
    return Touches(thread_id, list(pages), [think] * len(pages))


def simulate(*vcpus, of=None, on=None, overheads=OVERHEADS, **how):
    how = how or {"policy_of": Demand}
    return Simulation(of or memory(), vcpus, overheads, on or line(), **how).run()


def test_on_demand_every_touch_waits_for_one_round_trip():
    outcome = simulate(vcpu(range(PAGES)))
    assert (outcome.pages, outcome.waited_pages, outcome.fault_share) == (PAGES, PAGES, 1.0)
    assert len(outcome.stalls_us) == PAGES
    assert outcome.stalls_us == pytest.approx(ALONE_US, abs=0.02)
    assert outcome.stall_total_us == pytest.approx(PAGES * ALONE_US, rel=1e-4)
    assert outcome.duration_us == pytest.approx(PAGES * (ALONE_US + 100), rel=1e-4)


def test_a_page_takes_its_time_on_a_narrow_line():
    outcome = simulate(vcpu(range(PAGES)), on=line(1_000_000))
    assert outcome.stalls_us == pytest.approx(ALONE_US + PAGE_BYTES, rel=1e-3)


def test_what_is_behind_a_late_page_is_late():
    """By 30 ms, the background would have brought all; the first vCPU's page takes 50 ms more than a page does."""
    late = dataclasses.replace(OVERHEADS, jitter_ns=constant(50 * MS))
    vcpus = [vcpu([PAGES - 1], think=0), vcpu([1], think=30 * MS, thread_id=8)]
    punctual = simulate(*vcpus, order=Order.PRECOPY)
    assert punctual.stalls_us.tolist() == pytest.approx([ALONE_US], abs=1)
    outcome = simulate(*vcpus, overheads=late, order=Order.PRECOPY)
    assert outcome.stalls_us.tolist() == pytest.approx([ALONE_US + 20_000 - AFTER / 1000, ALONE_US + 50_000], abs=1)


def test_a_page_that_has_queued_is_late_all_the_same():
    late = dataclasses.replace(OVERHEADS, jitter_ns=constant(2 * MS))
    punctual_us, late_us = (
        simulate(vcpu([PAGES - 1]), on=line(4_000_000), overheads=overheads, order=Order.PRECOPY).stall_total_us
        for overheads in (OVERHEADS, late)
    )
    assert punctual_us > ALONE_US + 10_000, "it has queued"
    assert late_us == pytest.approx(punctual_us + 2_000, abs=1)


@pytest.mark.parametrize("part", ["before_ns", "read_ns"])
def test_what_has_not_been_sent_keeps_nothing_off_the_line(part):
    """The background goes on while the one request is late, at whichever end."""
    late = dataclasses.replace(OVERHEADS, **{part: constant(50 * MS)})
    punctual, outcome = (
        simulate(vcpu([PAGES - 1], think=0), on=line(10_000_000), overheads=overheads, order=Order.PRECOPY)
        for overheads in (OVERHEADS, late)
    )
    assert outcome.duration_us == pytest.approx(punctual.duration_us, rel=0.01)
    assert outcome.stall_total_us > 50_000


def test_two_vcpus_that_want_one_page_wait_for_one_request():
    outcome = simulate(vcpu([3], think=0), vcpu([3], think=1 * MS, thread_id=8), of=memory(4))
    assert (outcome.waited_pages, len(outcome.stalls_us)) == (1, 2)
    assert outcome.stalls_us.tolist() == pytest.approx([ALONE_US - 1000, ALONE_US], abs=0.1)


def test_what_is_not_missing_is_not_waited_for():
    outcome = simulate(vcpu([100, 0, 200]), of=memory(10))
    assert (outcome.pages, outcome.waited_pages) == (10, 1)


def test_zero_pages_cost_no_bytes_and_no_stall_that_counts():
    zero = range(0, PAGES, 2)
    with_zeros = simulate(order=Order.PRECOPY, of=memory(zero=zero), on=line(1_000_000))
    without = simulate(order=Order.PRECOPY, on=line(1_000_000))
    assert with_zeros.pages == PAGES // 2
    assert with_zeros.duration_us == pytest.approx(without.duration_us / 2, rel=0.1)
    touched = simulate(vcpu(range(PAGES)), of=memory(zero=zero))
    assert touched.waited_pages == len(touched.stalls_us) == PAGES // 2


@pytest.mark.parametrize("order", Order.__members__.values())
def test_the_background_fills_the_line(order):
    outcome = simulate(order=order, on=line(10_000_000))
    assert (outcome.waited_pages, outcome.stall_total_us, outcome.stall_us(0.99)) == (0, 0, 0)
    assert outcome.duration_us == pytest.approx(PAGES * PAGE_BYTES / 10, rel=0.25)


def test_nobody_waits_for_what_the_background_has_brought():
    outcome = simulate(vcpu(range(PAGES), think=10 * MS), order=Order.PRECOPY)
    assert outcome.waited_pages <= 2
    assert simulate(vcpu(range(PAGES), think=10 * MS)).waited_pages == PAGES


def test_stride_sees_a_walk_that_ascending_order_meets_last():
    walk = range(PAGES - 1, -1, -4)
    slow = line(4_000_000)
    plain = simulate(vcpu(walk, think=2 * MS), on=slow, order=Order.PRECOPY)
    strided = simulate(vcpu(walk, think=2 * MS), on=slow, policy_of=Stride)
    assert strided.waited_pages < plain.waited_pages / 2
    assert strided.stall_total_us < plain.stall_total_us


def test_a_recorded_set_comes_first():
    walk = list(np.random.default_rng(3).permutation(PAGES))
    slow = line(8_000_000)
    plain = simulate(vcpu(walk, think=2 * MS), on=slow, order=Order.PRECOPY)
    recorded = simulate(vcpu(walk, think=2 * MS), on=slow, policy_of=RecordedSet, recorded_pages=walk)
    assert recorded.waited_pages < plain.waited_pages / 4


def test_one_seed_is_one_outcome():
    overheads = Overheads(*(np.arange(1, 100) * US for _ in range(4)), rtt_ns=RTT)

    def one(seed):
        return Simulation(memory(), [vcpu(range(PAGES))], overheads, line(), policy_of=Demand, seed=seed).run()

    assert one(1).stalls_us.tolist() == one(1).stalls_us.tolist()
    assert one(1).stalls_us.tolist() != one(2).stalls_us.tolist()


class Wild(Policy):
    """Names what makes no sense, and holds everything else back for ever."""

    holds_rest = True

    def next_runs(self, missing):
        assert missing.pages == PAGES
        yield from ((-5, 3), (0, 10**9), (PAGES, 1), (7, 0), (3, 2))


def test_a_wild_policy_ends_all_the_same():
    assert simulate(vcpu(range(PAGES)), policy_of=Wild).waited_pages <= PAGES


class Broken(Policy):
    """Raises."""

    def on_fault(self, fault):
        raise RuntimeError(f"page {fault.page}")


def test_what_a_policy_raises_is_seen():
    with pytest.raises(RuntimeError, match="page 5"):
        simulate(vcpu([5]), policy_of=Broken)


walks = st.lists(st.integers(0, PAGES - 1), max_size=60)


@settings(max_examples=60)
@given(
    walks=st.lists(walks, min_size=1, max_size=3),
    think=st.sampled_from([0, 10 * US, 1 * MS, 50 * MS]),
    missing=st.integers(1, PAGES),
    zero=st.sets(st.integers(0, PAGES - 1), max_size=20),
    how=st.sampled_from(
        [*({"order": order} for order in Order), {"policy_of": Stride}, {"policy_of": Demand}, {"policy_of": Oracle}]
    ),
    bytes_per_s=st.sampled_from([10**6, 10**8, 10**10]),
)
def test_every_page_comes_once_and_every_wait_ends(walks, think, missing, zero, how, bytes_per_s):
    vcpus = [vcpu(walk, think, thread_id) for thread_id, walk in enumerate(walks)]
    more = {"recorded_pages": [page for walk in walks for page in walk]} if how.get("policy_of") is Oracle else {}
    simulation = Simulation(memory(missing, zero), vcpus, OVERHEADS, line(bytes_per_s), **how, **more)
    outcome = simulation.run()
    wanted = {page for walk in walks for page in walk if page < missing and page not in zero}
    assert outcome.pages == missing - len({page for page in zero if page < missing})
    assert outcome.waited_pages <= len(wanted)
    assert outcome.waited_pages <= len(outcome.stalls_us) <= sum(map(len, walks))
    assert (outcome.stalls_us >= 0).all()
    assert simulation._left == 0
    assert outcome.duration_us * bytes_per_s / 1e6 >= outcome.pages * PAGE_SIZE_BYTES
