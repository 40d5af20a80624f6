"""A guest under load moves from one daemon to another."""

import itertools

import pytest

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness.operator import is_free
from tests.harness.waiting import wait_until

_names = (f"guest-{number}" for number in itertools.count())


def delete(daemon, name):
    daemon.guests.DeleteGuest(guest.DeleteGuestRequest(name=name), timeout=30)


def check_moved(source, destination, name, moved):
    assert moved.error.message == ""
    assert moved.state == types.MIGRATION_STATE_COMPLETED
    assert moved.holder == types.GUEST_HOLDER_DESTINATION
    pages = moved.pages
    assert pages.total == moved.memory_bytes // 4096
    assert pages.zero + pages.precopy + pages.urgent + pages.background == pages.total
    assert moved.guest_errors == 0
    assert 0 < moved.downtime_us < moved.total_us
    # END is acknowledged first; then the source ends the process and frees its RAM.
    wait_until(lambda: name not in source.guest_names(), 10, "the source to let the guest go")
    wait_until(lambda: is_free(destination, name), 10, "the destination to let the guest be moved again")
    wait_until(
        lambda: destination.statistics(name).touches > moved.guest_touches_at_switchover, 20, "touches after the move"
    )
    audited = destination.audit(name)
    assert (audited.errors, audited.first_error) == (0, "")
    assert audited.audits >= 1


@pytest.mark.kvm
@pytest.mark.uffd
@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("workload", ["uniform", "zipf", "sequential", "idle"])
def test_kvm_guest_moves_while_it_runs(source, destination, workload, vcpus):
    name = next(_names)
    source.create(name, memory_mib=32, vcpus=vcpus, workload=workload)
    source.wait_populated(name)
    # Slow enough that the vCPUs run long before the background is through.
    moved = source.migrate(destination, name, max_bandwidth_bytes_per_s=100_000_000)
    check_moved(source, destination, name, moved)
    if workload in ("uniform", "zipf"):
        assert moved.pages.urgent > 0
        assert moved.guest_stall_us.count > 0
    # A sequential guest may run right behind the background, and wait for nothing but runs in flight.
    assert moved.fault_latency_us.count >= moved.pages.urgent
    delete(destination, name)


def test_process_guest_moves_while_it_runs(source, destination):
    name = next(_names)
    source.create(name, kind="process", memory_mib=32, vcpus=2)
    source.wait_populated(name)
    moved = source.migrate(destination, name, max_bandwidth_bytes_per_s=100_000_000)
    check_moved(source, destination, name, moved)
    assert moved.pages.urgent > 0
    delete(destination, name)


@pytest.mark.kvm
@pytest.mark.uffd
def test_guest_that_still_populates_moves(source, destination):
    name = next(_names)
    source.create(name, memory_mib=256, vcpus=2)
    moved = source.migrate(destination, name)
    assert moved.state == types.MIGRATION_STATE_COMPLETED, moved.error
    destination.wait_populated(name)
    assert destination.audit(name).errors == 0
    delete(destination, name)


@pytest.mark.kvm
@pytest.mark.uffd
def test_guest_moves_there_and_back_and_there(source, destination):
    name = next(_names)
    source.create(name, memory_mib=32, vcpus=2)
    source.wait_populated(name)
    for here, there in [(source, destination), (destination, source), (source, destination)]:
        check_moved(here, there, name, here.migrate(there, name))
    delete(destination, name)


@pytest.mark.kvm
@pytest.mark.uffd
def test_verified_migration_verifies_every_page(source, destination):
    name = next(_names)
    source.create(name, memory_mib=32, working_set_mib=16)
    source.wait_populated(name)
    moved = source.migrate(destination, name, verify=True)
    check_moved(source, destination, name, moved)
    assert moved.verified_pages == moved.pages.total
    delete(destination, name)


@pytest.mark.kvm
@pytest.mark.uffd
def test_sparse_guest_stays_sparse(source, destination):
    name = next(_names)
    source.create(name, memory_mib=1024, working_set_mib=16)
    source.wait_populated(name)
    before_bytes = source.guest(name).resident_bytes
    moved = source.migrate(destination, name)
    check_moved(source, destination, name, moved)
    after_bytes = destination.guest(name).resident_bytes
    assert after_bytes <= before_bytes + (1 << 20)
    assert moved.bytes_on_wire < before_bytes * 1.05 + (1 << 20)
    delete(destination, name)


@pytest.mark.kvm
@pytest.mark.uffd
def test_bandwidth_cap_holds_the_background(source, destination):
    name = next(_names)
    source.create(name, memory_mib=32, workload="idle")
    source.wait_populated(name)
    moved = source.migrate(destination, name, max_bandwidth_bytes_per_s=16 << 20)
    check_moved(source, destination, name, moved)
    assert moved.postcopy_us >= 1_500_000
    delete(destination, name)
