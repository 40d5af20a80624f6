"""Two daemons for the tests of a file."""

import pytest

from tests.harness.daemons import two_daemons


@pytest.fixture(scope="module")
def daemons():
    with two_daemons() as pair:
        yield pair


@pytest.fixture
def source(daemons):
    return daemons[0]


@pytest.fixture
def destination(daemons):
    return daemons[1]
