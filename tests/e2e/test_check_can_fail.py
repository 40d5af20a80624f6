"""The guest's own check can fail: pages that are zeroed, swapped or stale on their way make it count errors."""

import os

import pytest

from migrate.guest.client import GuestClient
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess
from tests.harness.tampering import TamperingPeer
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]
PAGE = 4096
MEMORY_BYTES = 32 << 20


@pytest.fixture
def pair(tmp_path):
    source = DaemonProcess(state_dir=tmp_path / "source")
    destination = DaemonProcess()
    yield source, destination
    source.close()
    destination.close()


def snapshot(tmp_path):
    """The guest's RAM as it is now, read beside the running guest."""
    client = GuestClient(tmp_path / "source" / "guests" / "g.sock")
    try:
        _, _, _, (memfd,) = client.describe()
        try:
            return os.pread(memfd, MEMORY_BYTES, 0)
        finally:
            os.close(memfd)
    finally:
        client.close()


def is_workload(content, page):
    """Whether a page is surely one of the workload's: it lies in the upper half of RAM and has been stamped."""
    return page >= MEMORY_BYTES // PAGE // 2 and any(content)


def zero(response, _):
    response.data = bytes(PAGE) + response.data[PAGE:]


def swap(response, _):
    response.data = response.data[PAGE : 2 * PAGE] + response.data[:PAGE] + response.data[2 * PAGE :]


def make_stale(response, old):
    first = response.first_page * PAGE
    response.data = old[first : first + len(response.data)]


@pytest.mark.parametrize("tamper", [zero, swap, make_stale])
def test_tampered_page_is_counted(pair, tmp_path, tamper):
    source, destination = pair
    source.create(memory_mib=32, vcpus=2)
    source.wait_populated()
    old = snapshot(tmp_path)
    touches = source.statistics().touches
    wait_until(lambda: source.statistics().touches > touches + 50_000, 20, "pages to be written again")
    tampered = []

    def change(response):
        if response.WhichOneof("content") != "data" or response.page_count < 2:
            return
        if not is_workload(response.data[:PAGE], response.first_page):
            return
        before = response.data
        tamper(response, old)
        if response.data != before:
            tampered.append(response.first_page)

    with TamperingPeer(destination.address, change) as peer:
        moved = source.migrate(peer.address)
        assert moved.state == types.MIGRATION_STATE_COMPLETED
        assert tampered
        audited = destination.audit()
        assert audited.errors > 0
        assert audited.first_error
    destination.guests.DeleteGuest(guest.DeleteGuestRequest(name="g"), timeout=30)


def test_verify_refuses_a_tampered_page(pair):
    source, destination = pair
    source.create(memory_mib=32)
    source.wait_populated()

    def change(response):
        if response.WhichOneof("content") == "data" and is_workload(response.data[:PAGE], response.first_page):
            zero(response, b"")

    with TamperingPeer(destination.address, change) as peer:
        moved = source.wait_completed(source.start(peer.address, verify=True))
        arrived = next(one for one in destination.list() if one.migration_id == moved.migration_id)
    # It was not taken; whoever tampered stood between the first connections only, and the next ones brought it whole.
    assert "digest" in arrived.error.message
    assert arrived.recoveries >= 1
    assert arrived.verified_pages == arrived.pages.total
    assert destination.audit().errors == 0
    destination.guests.DeleteGuest(guest.DeleteGuestRequest(name="g"), timeout=30)


def test_verify_refuses_a_page_told_to_be_zero(pair):
    source, destination = pair
    source.create(memory_mib=32)
    source.wait_populated()

    def change(response):
        if response.WhichOneof("content") == "data" and is_workload(response.data[:PAGE], response.first_page):
            response.zero.SetInParent()

    with TamperingPeer(destination.address, change) as peer:
        moved = source.migrate(peer.address, verify=True)
    assert moved.state == types.MIGRATION_STATE_POSTCOPY_PAUSED
    assert "digest" in moved.error.message
