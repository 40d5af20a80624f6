"""The dirty log of a guest: whatever it wrote is in the log, and what it did not write mostly is not."""

import os

import pytest

from migrate.errors import GuestBusyError, UnsupportedHostError
from migrate.guest.client import GuestClient
from migrate.guest.dirty_log import OwnScan
from migrate.guest.spawn import start_guest
from migrate.guest.workload import WorkloadGuest
from migrate.v1 import types_pb2 as types
from tests.harness.guests import KINDS, spec_of, state_of
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]
PAGE = 4096
MEMORY_BYTES = 16 << 20
PAGES = MEMORY_BYTES // PAGE


@pytest.fixture
def client_of(tmp_path):
    """Starts a guest that ends with the test; its client."""
    started = []

    def start(kind=types.GUEST_KIND_KVM, touch_rate_per_s=2_000):
        workload = types.WorkloadSpec(
            distribution=types.WORKLOAD_DISTRIBUTION_UNIFORM,
            write_ratio=0.5,
            seed=3,
            touch_rate_per_s=touch_rate_per_s,
        )
        spec = types.GuestSpec(name="g", kind=kind, memory_bytes=MEMORY_BYTES, vcpus=2, workload=workload)
        path = tmp_path / "g.sock"
        process = start_guest(spec, path)
        started.append((process, GuestClient(path)))
        client = started[-1][1]
        wait_until(lambda: state_of(client) == types.GUEST_STATE_RUNNING, 20, "population")
        return client

    yield start
    for process, client in started:
        client.close()
        process.kill()


class Watched:
    """A guest whose RAM is compared with what its log says."""

    def __init__(self, client):
        self.client = client
        *_, (self.memfd,) = client.describe()
        client.pause()
        self.before = self.read()
        self.log = client.start_dirty_log()

    def close(self):
        for fd in (self.memfd, self.log):
            os.close(fd)

    def read(self):
        return os.pread(self.memfd, MEMORY_BYTES, 0)

    def run(self, touches):
        """Let the guest work; the pages that it changed meanwhile, and those that its log has."""
        self.client.resume()
        wanted = self.client.statistics().touches + touches
        wait_until(lambda: self.client.statistics().touches >= wanted, 20, "the guest to work")
        self.client.pause()
        count = self.client.sync_dirty_log()
        bitmap = os.pread(self.log, PAGES // 8, 0)
        dirty = {page for page in range(PAGES) if bitmap[page // 8] >> page % 8 & 1}
        assert count == len(dirty)
        now = self.read()
        spans = [slice(page * PAGE, (page + 1) * PAGE) for page in range(PAGES)]
        changed = {page for page, span in enumerate(spans) if now[span] != self.before[span]}
        self.before = now
        return changed, dirty


@pytest.fixture(params=KINDS, ids=["kvm", "process"])
def watched(client_of, request):
    guest = Watched(client_of(request.param))
    assert guest.client.look().has_dirty_log
    yield guest
    guest.close()


def test_what_was_written_is_in_the_log_round_after_round(watched):
    for _ in range(4):
        changed, dirty = watched.run(400)
        assert changed
        assert changed <= dirty
        assert len(dirty) < PAGES / 2, "the log is of what was written, not of everything"


def test_a_guest_that_stands_still_writes_nothing(watched):
    watched.run(100)
    assert watched.client.sync_dirty_log() == 0


def test_a_log_that_was_ended_can_begin_anew(watched):
    watched.run(100)
    watched.client.stop_dirty_log()
    watched.client.stop_dirty_log()
    with pytest.raises(GuestBusyError):
        watched.client.sync_dirty_log()
    os.close(watched.log)
    watched.log = watched.client.start_dirty_log()
    changed, dirty = watched.run(200)
    assert changed
    assert changed <= dirty


def test_a_process_whose_kernel_cannot_says_so():
    description = types.GuestDescription(spec=spec_of(types.GUEST_KIND_PROCESS))
    guest = WorkloadGuest(description, OwnScan(-1, "no dirty scan here: told so by a test"))
    assert "told so by a test" in guest.no_dirty_log
    with pytest.raises(UnsupportedHostError, match="told so by a test"):
        guest.start_dirty_log()
    guest.pause()
