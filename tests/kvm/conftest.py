"""Guest processes that end with the test."""

import pytest

from migrate.guest.client import GuestClient
from migrate.guest.spawn import start_guest


@pytest.fixture
def start(tmp_path):
    """Starts guests that end with the test."""
    started = []

    def start_one(start_from, name):
        path = tmp_path / f"{name}.sock"
        process = start_guest(start_from, path)
        client = GuestClient(path)
        started.append((process, client))
        return process, client

    yield start_one
    for process, client in started:
        client.close()
        process.kill()
    assert list(tmp_path.glob("*.sock")) == []
