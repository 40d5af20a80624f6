"""END, said once or often, and the fence of an attempt: both outlive every daemon."""

import grpc
import pytest

from migrate.barriers import Point
from migrate.daemon.state_dir import StateDir
from migrate.daemon.status import received_error
from migrate.errors import GuestHolder
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.operator import ask, status
from tests.harness.processes import guest_pids, is_alive
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(60)]

COMPLETED = types.MIGRATION_STATE_COMPLETED
CALL_S = 20
# At full speed it would take the CPUs from the daemons, which are what is tested.
GUEST = {"memory_mib": 32, "vcpus": 2, "touch_rate_per_s": 2_000}


def move(pair):
    pair.source.create(**GUEST)
    pair.source.wait_populated()
    migration_id = pair.start()
    pair.check_moved(migration_id)
    return migration_id


def move_back(pair):
    back = pair.destination.start(pair.source.address)
    assert pair.destination.wait_final(back).state == COMPLETED
    wait_until(lambda: pair.source.migration(back).state == COMPLETED, 20, "the guest to be back")


def token_of(pair, migration_id):
    """What only the two daemons know."""
    entry = saved.SavedMigration()
    entry.ParseFromString((pair.source.state_dir / "migrations" / f"{migration_id}.pb").read_bytes())
    return entry.source.token


def write_end(daemon, migration_id):
    """What a source writes down at END, and does not live to act on."""
    state_dir = StateDir(daemon.state_dir)
    try:
        (entry,) = state_dir.load()
        assert (entry.migration_id, entry.HasField("final")) == (migration_id, False)
        entry.final.migration_id = migration_id
        entry.final.side = types.MIGRATION_SIDE_SOURCE
        entry.final.state = COMPLETED
        entry.final.holder = types.GUEST_HOLDER_DESTINATION
        state_dir.save(entry)
    finally:
        state_dir.close()


def restart(daemon):
    daemon.kill()
    daemon.restart()


def test_repeated_end_is_harmless_and_a_wrong_token_is_refused(pair):
    migration_id = move(pair)
    request = transfer.CompleteRequest(migration_id=migration_id, token=token_of(pair, migration_id))
    request.migration.pages.total = 1  # no figures are taken over any more
    wrong = transfer.CompleteRequest(migration_id=migration_id, token="wrong")  # noqa: S106
    before = pair.source.migration(migration_id)
    for _ in ("as it was", "started again"):
        for _ in range(2):
            pair.source.transfer.Complete(request, timeout=CALL_S)
        with pytest.raises(grpc.RpcError) as refused:
            pair.source.transfer.Complete(wrong, timeout=CALL_S)
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert pair.source.migration(migration_id) == before
        restart(pair.source)
    # And an END of what never left is none.
    with pytest.raises(grpc.RpcError) as refused:
        pair.destination.transfer.Complete(request, timeout=CALL_S)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    pair.check_runs(pair.destination)


def test_end_with_a_wrong_token_ends_nothing(pair):
    pair.source.create(**GUEST)
    pair.source.wait_populated()
    pair.barriers.hold(Point.DESTINATION_DISARMED)
    migration_id = pair.start()
    pair.barriers.wait_held(Point.DESTINATION_DISARMED, 20)
    for token in ("", "wrong"):
        request = transfer.CompleteRequest(migration_id=migration_id, token=token)
        with pytest.raises(grpc.RpcError) as refused:
            pair.source.transfer.Complete(request, timeout=CALL_S)
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert pair.source.migration(migration_id).state == types.MIGRATION_STATE_POSTCOPY
    assert pair.state_of(pair.source) == types.GUEST_STATE_PAUSED
    pair.barriers.release(Point.DESTINATION_DISARMED)
    pair.check_moved(migration_id)


def test_completed_survives_restarts_of_both(pair):
    migration_id = move(pair)
    shown = [status(daemon, migration_id) for daemon in (pair.source, pair.destination)]
    listed = [cli.json_of(ask(daemon, "list", "--json")) for daemon in (pair.source, pair.destination)]
    for _ in range(2):
        pair.source.kill()
        pair.destination.kill()
        pair.restart(pair.source, pair.destination)
        for daemon, before, all_before in zip((pair.source, pair.destination), shown, listed, strict=True):
            assert status(daemon, migration_id) == before
            assert cli.json_of(ask(daemon, "list", "--json")) == all_before
    assert {each["state"] for each in shown} == {"completed"}
    pair.check_runs(pair.destination)
    # It can be moved on, and back.
    move_back(pair)
    pair.check_runs(pair.source)


def test_guest_that_a_killed_source_did_not_free_is_freed_and_one_that_came_back_is_not(pair):
    pair.source.create(**GUEST)
    pair.source.wait_populated()
    pair.barriers.hold(Point.SOURCE_ENDING)
    migration_id = pair.start()
    pair.barriers.wait_held(Point.SOURCE_ENDING, 20)
    pair.source.kill()
    write_end(pair.source, migration_id)
    (pid,) = guest_pids(pair.source.state_dir)
    pair.source.restart()
    assert not is_alive(pid)
    assert pair.source.guest_names() == []
    pair.check_moved(migration_id)
    move_back(pair)
    (new_pid,) = guest_pids(pair.source.state_dir)
    restart(pair.source)
    assert [pair.source.guest().pid] == guest_pids(pair.source.state_dir) == [new_pid]
    assert pair.source.migration(migration_id).state == COMPLETED
    pair.check_runs(pair.source)


# ---- the fence ----


def test_fence_outlives_the_daemon_and_lets_later_attempts_pass(pair):
    destination = pair.destination
    pair.source.create(**GUEST)
    pair.source.wait_populated()
    description, _ = pair.describe(pair.source)

    def prepare(attempt):
        request = transfer.PrepareRequest(
            migration_id="of-ours",
            protocol_version=3,
            guest=description,
            page_endpoint=pair.source.page_address,
            control_endpoint=pair.source.address,
            token="t",  # noqa: S106
            mode=types.MIGRATION_MODE_POSTCOPY,
            order="precopy",
            transport=types.PAGE_TRANSPORT_NATIVE_GRPC,
            attempt=attempt,
        )
        return destination.transfer.Prepare(request, timeout=CALL_S)

    def refusal(call, *arguments):
        with pytest.raises(grpc.RpcError) as refused:
            call(*arguments)
        return received_error(refused.value, "the destination")

    def switch_over(attempt):
        request = transfer.SwitchoverRequest(migration_id="of-ours", attempt=attempt)
        return destination.transfer.Switchover(request, timeout=CALL_S)

    def abort(attempt):
        request = transfer.AbortRequest(migration_id="of-ours", reason="a test", attempt=attempt)
        destination.transfer.Abort(request, timeout=CALL_S)

    abort(1)
    restart(destination)
    assert "has been here before" in refusal(prepare, 1).message
    assert refusal(switch_over, 1).holder is GuestHolder.SOURCE
    assert pair.state_of(destination) is None

    prepare(2)
    assert pair.state_of(destination) == types.GUEST_STATE_INCOMING
    assert refusal(switch_over, 1).holder is GuestHolder.SOURCE
    assert "has been here before" in refusal(prepare, 1).message
    # An abort of what is past anyway does no harm to what is there.
    abort(1)
    assert pair.state_of(destination) == types.GUEST_STATE_INCOMING

    abort(2)
    assert pair.state_of(destination) is None
    for _ in ("as it was", "started again"):
        assert "has been here before" in refusal(prepare, 2).message
        for attempt in (1, 2, 3):
            assert refusal(switch_over, attempt).holder is GuestHolder.SOURCE
        restart(destination)
    abort(0)
    restart(destination)
    assert "has been here before" in refusal(prepare, 7).message
    assert pair.runners() == "source"
