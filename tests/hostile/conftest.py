"""One daemon for every hostile case: what one case leaves behind, the next ones and the end find."""

import pytest

from tests.harness.victim import Victim


@pytest.fixture(scope="session")
def victim(tmp_path_factory):
    made = Victim(tmp_path_factory.mktemp("victim"))
    try:
        made.settle()
        yield made
        made.check_as_before()
    finally:
        made.close()


@pytest.fixture(autouse=True)
def _unharmed(victim):
    yield
    victim.check_well()
