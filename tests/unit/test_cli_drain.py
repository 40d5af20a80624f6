"""What a drain does about refusals, losses and migrations of others: a scripted source, and a held clock."""

import contextlib
from dataclasses import dataclass, field

import grpc
import pytest

from migrate.cli.draining import Drain, DrainTerms, Outcome
from migrate.cli.params import DaemonAt
from migrate.errors import ChannelError
from migrate.v1 import guest_service_pb2, migration_service_pb2, types_pb2
from tests.harness.cli import json_of, run
from tests.harness.fake_daemon import FakeDaemon, make_guest, make_migration, serve

WAIT_S = 60.0
COMPLETED = types_pb2.MIGRATION_STATE_COMPLETED
POSTCOPY = types_pb2.MIGRATION_STATE_POSTCOPY
SWITCHOVER = types_pb2.MIGRATION_STATE_SWITCHOVER
PAUSED = types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED
FAILED = types_pb2.MIGRATION_STATE_FAILED


@dataclass
class FakeHost(FakeDaemon):
    """Keeps guests and migrations as they are put; a migration that is started here stays in POSTCOPY."""

    available_bytes: int = 0
    recovered_ids: list = field(default_factory=list)

    def ListGuests(self, request, context):
        answer = guest_service_pb2.ListGuestsResponse(guests=self.guests, available_bytes=self.available_bytes)
        return self._answer(request, context, answer)

    def StartMigration(self, request, context):
        self._answer(request, context, None)
        migration_id = f"m-{len(self.migrations) + 1}"
        self.begin(migration_id, request.guest, request.to)
        return migration_service_pb2.StartMigrationResponse(migration_id=migration_id)

    def RecoverMigration(self, request, context):
        self.recovered_ids.append(request.migration_id)
        return migration_service_pb2.RecoverMigrationResponse()

    def begin(self, migration_id, name, to):
        self.migrations.append(make_migration(POSTCOPY, migration_id=migration_id, guest=name, peer=to))
        self.of_name(name).migration_id = migration_id

    def of_name(self, name):
        return next(guest for guest in self.guests if guest.spec.name == name)

    def settle(self, name, state, error="", holder=types_pb2.GUEST_HOLDER_SOURCE, words="no"):
        """The latest migration of a guest has come so far."""
        latest = next(found for found in reversed(self.migrations) if found.guest == name)
        latest.state, latest.holder = state, holder
        if error:
            latest.error.CopyFrom(types_pb2.ErrorInfo(type=error, message=words, holder=holder))
        if state == COMPLETED:
            self.guests.remove(self.of_name(name))
        elif state not in (POSTCOPY, SWITCHOVER, PAUSED):
            self.of_name(name).migration_id = ""

    def started(self):
        return [
            (request.guest, request.to)
            for request in self.requests
            if isinstance(request, migration_service_pb2.StartMigrationRequest)
        ]


class World:
    """A source with guests, two destinations, a drain, and its clock."""

    def __init__(self, stack, names, parallel=2, rooms=(20 << 30, 10 << 30)):
        self.stack = stack
        self.now_s = 1000.0
        self.source = stack.enter_context(serve(FakeHost(guests=[make_guest(name) for name in names], migrations=[])))
        self.destinations = [
            stack.enter_context(serve(FakeHost(guests=[], migrations=[], available_bytes=room))) for room in rooms
        ]
        self.said = []
        self.addresses = [daemon.address for daemon in self.destinations]
        self.drain = self.make(parallel)

    def make(self, parallel=2, addresses=None):
        terms = DrainTerms(parallel, WAIT_S, {})
        made = Drain(
            DaemonAt(self.source.address),
            [DaemonAt(address) for address in addresses or self.addresses],
            terms,
            self.said.append,
            lambda: self.now_s,
        )
        self.stack.callback(made.close)
        return made

    def step(self, later_s=0.0):
        self.now_s += later_s
        return self.drain.step()

    def outcomes(self):
        return {name: move.outcome for name, move in self.drain.moves.items()}


@pytest.fixture
def world():
    with contextlib.ExitStack() as stack:
        yield lambda *names, **options: World(stack, names, **options)


def test_guests_go_where_most_memory_is_and_no_more_than_parallel_at_a_time(world):
    made = world("a", "b", "c", parallel=2, rooms=(10 << 30, 20 << 30))

    assert not made.step()
    assert made.source.started() == [("a", made.addresses[1]), ("b", made.addresses[1])]
    assert not made.step()
    made.source.settle("a", COMPLETED)
    assert not made.step()
    assert made.source.started()[2:] == [("c", made.addresses[1])]
    made.source.settle("b", COMPLETED)
    made.source.settle("c", COMPLETED)

    assert made.step()
    assert set(made.outcomes().values()) == {Outcome.MOVED}


def test_what_was_sent_to_a_destination_counts_against_it(world):
    made = world("a", "b", "c", "d", parallel=4, rooms=(10 << 30, (10 << 30) - 1))
    made.step()

    assert [made.addresses.index(to) for _, to in made.source.started()] == [0, 1, 0, 1]


def test_refused_guest_goes_elsewhere_and_stays_if_nobody_takes_it(world):
    made = world("a")
    made.step()
    made.source.settle("a", FAILED, "NotEnoughMemoryError")
    assert not made.step()
    assert [to for _, to in made.source.started()] == made.addresses
    made.source.settle("a", FAILED, "AlreadyExistsError", words="the name is taken")

    assert made.step()
    assert made.outcomes() == {"a": Outcome.FAILED}
    assert "the name is taken" in made.drain.moves["a"].error


def test_loss_is_tried_again_until_the_wait_is_over(world):
    made = world("a", rooms=(10 << 30,))
    made.step()
    made.source.settle("a", FAILED, "PeerUnreachableError")
    assert not made.step()
    assert len(made.source.started()) == 1
    assert not made.step(2)
    assert len(made.source.started()) == 2
    made.source.settle("a", FAILED, "PeerUnreachableError")
    made.step(1)

    assert made.step(WAIT_S)
    assert made.outcomes() == {"a": Outcome.FAILED}


def test_migration_of_somebody_else_is_followed_and_nothing_is_started_twice(world):
    made = world("a")
    made.source.begin("m-theirs", "a", "192.0.2.9:7400")

    assert not made.step()
    made.source.settle("a", COMPLETED)

    assert made.step()
    assert made.source.started() == []
    assert (made.drain.moves["a"].to, made.outcomes()) == ("192.0.2.9:7400", {"a": Outcome.MOVED})


def test_second_drain_goes_on_where_the_first_was(world):
    made = world("a", "b", parallel=1)
    made.step()
    made.drain = made.make(parallel=1)
    made.step()
    made.source.settle("a", COMPLETED)
    made.step()
    made.source.settle("b", COMPLETED)

    assert made.step()
    assert [name for name, _ in made.source.started()] == ["a", "b"]


def test_cancelled_guest_stays(world):
    made = world("a")
    made.step()
    made.source.settle("a", types_pb2.MIGRATION_STATE_CANCELLED)

    assert made.step()
    assert made.outcomes() == {"a": Outcome.FAILED}
    assert len(made.source.started()) == 1


def test_lost_guest_is_not_tried_again(world):
    made = world("a")
    made.step()
    made.source.settle("a", FAILED, "GuestLostError", types_pb2.GUEST_HOLDER_NONE)

    assert made.step()
    assert made.outcomes() == {"a": Outcome.FAILED}


def test_paused_guest_makes_room_is_recovered_and_goes_on(world):
    made = world("a", "b", parallel=1)
    made.step()
    made.source.settle("a", PAUSED, "PostcopyPausedError", types_pb2.GUEST_HOLDER_SPLIT)

    assert not made.step()
    assert [name for name, _ in made.source.started()] == ["a", "b"]
    made.drain.moves["a"].recovering.result(10)
    assert made.source.recovered_ids == ["m-1"]
    made.source.settle("a", POSTCOPY)
    made.step(WAIT_S - 1)
    made.step(WAIT_S)
    for name in ("a", "b"):
        made.source.settle(name, COMPLETED)
    assert made.step()
    assert set(made.outcomes().values()) == {Outcome.MOVED}


def test_switchover_makes_no_room_unless_it_stands_still(world):
    made = world("a", "b", parallel=1)
    made.step()
    made.source.settle("a", SWITCHOVER)

    made.step()
    made.step(1)
    assert [name for name, _ in made.source.started()] == ["a"]
    made.step(2)
    assert [name for name, _ in made.source.started()] == ["a", "b"]


@pytest.mark.parametrize("state", [PAUSED, SWITCHOVER])
def test_guest_that_stands_still_for_too_long_is_left(world, state):
    made = world("a")
    made.step()
    made.source.settle("a", state, "PostcopyPausedError", types_pb2.GUEST_HOLDER_SPLIT)

    assert not made.step()
    assert made.step(WAIT_S + 1)
    assert made.outcomes() == {"a": Outcome.PAUSED}


def test_deleted_guest_is_gone(world):
    made = world("a", "b", parallel=1)
    made.step()
    made.source.guests.remove(made.source.of_name("b"))
    made.source.settle("a", COMPLETED)

    assert made.step()
    assert made.outcomes() == {"a": Outcome.MOVED, "b": Outcome.GONE}


def test_guest_that_cannot_even_be_started_is_failed_with_its_reason(world):
    made = world()
    with serve(_Refusing(guests=[make_guest("a")], migrations=[])) as made.source:
        made.drain = made.make()
        assert not made.step()
        assert made.step()
        made.drain.close()

    assert made.outcomes() == {"a": Outcome.FAILED}
    assert "not whole" in made.drain.moves["a"].error


class _Refusing(FakeHost):
    def StartMigration(self, request, context):
        error = types_pb2.ErrorInfo(type="GuestLostError", message="what is here is not whole")
        context.set_trailing_metadata((("migrate-error-bin", error.SerializeToString()),))
        context.abort(grpc.StatusCode.DATA_LOSS, "")


def test_destinations_that_do_not_answer_are_waited_for(world):
    made = world("a")
    made.drain = made.make(addresses=["127.0.0.1:1"])

    assert not made.step()
    assert not made.step(WAIT_S - 1)
    assert made.step(2)
    assert made.outcomes() == {"a": Outcome.FAILED}
    assert "no daemon answers" in made.drain.moves["a"].error
    assert made.source.started() == []


def test_source_that_was_never_there_is_an_error_at_once(world):
    made = world()
    made.source.address = "127.0.0.1:1"
    made.drain = made.make()

    with pytest.raises(ChannelError, match="no daemon answers"):
        made.step()


def test_command_prints_one_object(world):
    made = world()
    to = [word for address in made.addresses for word in ("--to", address)]

    result = run("drain", "--from", made.source.address, *to, "--json")

    assert result.exit_code == 0
    assert json_of(result) == {
        "from": made.source.address,
        "to": made.addresses,
        "moved": 0,
        "paused": 0,
        "failed": 0,
        "gone": 0,
        "guests": [],
    }


def test_command_needs_another_host():
    assert run("drain", "--from", "127.0.0.1:1", "--to", "127.0.0.1:1").exit_code == 2
    assert run("drain", "--from", "127.0.0.1:1").exit_code == 2
