"""Twenty runs of chaos, each perfect. `scripts/bench/chaos` makes two hundred, with larger guests."""

import pytest

from tests.harness.chaos import run_chaos
from tests.harness.chaos_plan import plan_of

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(150)]

SEED = 20
RUNS_OF_TEST = 5
DEADLINE_S = 25


@pytest.mark.parametrize("first", range(0, 20, RUNS_OF_TEST))
def test_guest_survives_whatever_befalls_its_migration(first):
    for number in range(first, first + RUNS_OF_TEST):
        plan = plan_of(SEED, number, quick=True)
        outcome = run_chaos(plan, seed=SEED, deadline_s=DEADLINE_S, with_way_back=False)
        assert outcome.problems == [], str(outcome)
