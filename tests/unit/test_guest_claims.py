"""Which migration has a guest, and who has to wait for it."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from migrate.daemon import guests
from migrate.daemon.guests import GuestRegistry, HostedGuest
from migrate.errors import GuestBusyError
from migrate.v1 import types_pb2 as types
from tests.harness.waiting import wait_until


@pytest.fixture
def registry(tmp_path):
    """One whose guest is being moved."""
    made = GuestRegistry(tmp_path)
    made._guests["g"] = HostedGuest(types.GuestSpec(name="g"), None, None, "first")
    return made


@pytest.mark.parametrize(
    ("wants", "holder"),
    [(lambda registry: registry.claim("g", "next"), "next"), (lambda registry: registry.operate("g"), "")],
    ids=["claim", "operate"],
)
def test_whoever_wants_a_guest_that_has_arrived_waits_for_its_end(registry, wants, holder):
    guest = registry.find("g")
    registry.note_ending(guest)
    with ThreadPoolExecutor(1) as pool:
        wanted = pool.submit(wants, registry)
        wait_until(lambda: registry._changed._waiters, 10, "the guest to be waited for")
        registry.release(guest)
        assert wanted.result(10) is guest
    assert guest.migration_id == holder


def test_an_end_that_does_not_come_is_not_waited_for_for_ever(registry, monkeypatch):
    monkeypatch.setattr(guests, "_END_S", 0.01)
    registry.note_ending(registry.find("g"))
    with pytest.raises(GuestBusyError, match="first"):
        registry.claim("g", "next")


def test_a_guest_is_claimed_anew_after_an_end(registry):
    guest = registry.find("g")
    registry.note_ending(guest)
    registry.release(guest)
    assert registry.claim("g", "next").migration_id == "next"
    with pytest.raises(GuestBusyError, match="next"):
        registry.operate("g")
