"""The harness's daemons: killed and started again at the same addresses, and no guest outlives them."""

import pytest

from migrate.v1 import migration_service_pb2 as migration
from tests.harness.daemons import DaemonProcess
from tests.harness.processes import end_guests, guest_pids, is_alive
from tests.harness.waiting import wait_until


@pytest.fixture
def daemon(tmp_path):
    made = DaemonProcess(state_dir=tmp_path / "state")
    yield made
    made.close()


def test_restarted_daemon_answers_at_the_same_addresses(daemon):
    before = (daemon.address, daemon.page_address, daemon.process.pid)
    daemon.kill()
    daemon.restart()
    assert (daemon.address, daemon.page_address) == before[:2]
    assert daemon.process.pid != before[2]
    assert daemon.guest_names() == []


def test_restarted_daemon_may_have_other_addresses(daemon):
    before = (daemon.address, daemon.page_address)
    daemon.kill()
    daemon.restart("127.0.0.1:0", "127.0.0.1:0")
    assert not {daemon.address, daemon.page_address} & set(before)
    assert list(daemon.migrations.ListMigrations(migration.ListMigrationsRequest(), timeout=10).migrations) == []


@pytest.mark.parametrize("end", ["close", "kill and close"])
def test_no_guest_outlives_close(tmp_path, end):
    state_dir = tmp_path / "state"
    daemon = DaemonProcess(state_dir=state_dir)
    try:
        pid = daemon.create(kind="process").pid
        assert guest_pids(state_dir) == [pid]
        if end != "close":
            daemon.kill()
            assert is_alive(pid)
    finally:
        daemon.close()
    wait_until(lambda: not is_alive(pid), 10, "the guest to be gone")
    assert end_guests(state_dir) == []


def test_only_guests_of_the_state_directory_are_found(daemon, tmp_path):
    daemon.create(kind="process")
    assert guest_pids(tmp_path / "stat") == []
    assert len(guest_pids(tmp_path / "state")) == 1
    assert guest_pids(tmp_path) == []
