"""Two daemons that can be killed, and whose links can be broken."""

import pytest

from tests.harness.recoverable import recoverable_pair


@pytest.fixture
def pair(tmp_path):
    with recoverable_pair(tmp_path) as made:
        yield made


@pytest.fixture
def proxied(tmp_path):
    with recoverable_pair(tmp_path, proxied=True) as made, made.watch() as watch:
        yield made
        assert watch.seen_twice == []
