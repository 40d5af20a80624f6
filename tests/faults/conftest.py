"""Two daemons that can be killed, and whose links can be broken."""

import pytest

from tests.harness.spares import Spares


@pytest.fixture(scope="session")
def spares(tmp_path_factory):
    made = Spares(lambda: tmp_path_factory.mktemp("pair"))
    yield made
    made.close()


@pytest.fixture
def pair(spares, request):
    with spares.pair(request) as made:
        yield made


@pytest.fixture
def proxied(spares, request):
    with spares.pair(request, proxied=True) as made, made.watch() as watch:
        yield made
        assert watch.seen_twice == []
