"""Calls without end that each would leave something. Last of all, for the daemon is full of it then, for a minute."""

import pytest

from migrate.v1 import transfer_service_pb2 as transfer
from tests.harness.hostile_source import HostileSource
from tests.harness.victim import refusal_of

# Longer than every run of the tests can wait for.
pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.thorough]


@pytest.mark.timeout(150)
def test_ten_thousand_aborts_of_unknown_migrations_leave_a_bounded_number_of_files(victim):
    asked = [transfer.AbortRequest(migration_id=f"unknown-{number}") for number in range(10_000)]
    refused = 0
    for first in range(0, len(asked), 16):
        calls = [victim.daemon.transfer.Abort.future(each, timeout=30) for each in asked[first : first + 16]]
        refused += sum(call.exception() is not None for call in calls)
    status, error = refusal_of(victim.daemon.transfer.Abort, transfer.AbortRequest(migration_id="one-more"))
    assert (status, error.type_name) == ("RESOURCE_EXHAUSTED", "LimitError")
    assert "4096 migrations that never ran here" in error.message
    assert refused >= 10_000 - 4096
    assert victim.fence_files() <= 4096 + 8
    with HostileSource(victim) as source:  # an honest one is still taken
        source.prepare()
    assert victim.fence_files() <= 4096 + 8
