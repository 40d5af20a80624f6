"""What a daemon remembers of migrations that never ran, and what it makes of a peer's errors."""

import grpc
import pytest

from migrate.config import Endpoint
from migrate.daemon import migrations as module
from migrate.daemon.guests import GuestRegistry
from migrate.daemon.migrations import MigrationRegistry
from migrate.daemon.state_dir import StateDir
from migrate.daemon.status import METADATA_ERROR, received_error
from migrate.errors import ChannelError, ConfigError, GuestHolder, LimitError, MigrateError
from migrate.native.exports import Exports
from migrate.telemetry.clock import Clock
from migrate.v1 import types_pb2 as types

FENCES = 8


@pytest.fixture
def state(tmp_path):
    made = StateDir(tmp_path)
    yield made
    made.close()


@pytest.fixture
def registry(state, monkeypatch):
    monkeypatch.setattr(module, "ENDED_MAX", FENCES)
    return MigrationRegistry(GuestRegistry(state.socket_dir), Exports(), Clock(), state)


def kept(state):
    return {entry.migration_id for entry in state.load()}


def test_fence_beyond_the_limit_is_refused_while_the_oldest_is_young(registry, state):
    for number in range(FENCES):
        registry.abort(f"m{number}", "because", 0)
    with pytest.raises(LimitError, match="never ran here"):
        registry.abort("one-more", "because", 0)
    assert kept(state) == {f"m{number}" for number in range(FENCES)}


def test_fence_that_is_known_can_be_repeated_at_the_limit(registry, state):
    for number in range(FENCES):
        registry.abort(f"m{number}", "because", 1)
    registry.abort("m3", "because", 7)
    assert len(kept(state)) == FENCES


def test_oldest_fence_makes_room_once_it_is_old(registry, state, monkeypatch):
    monkeypatch.setattr(module, "FENCE_KEPT_S", 0.0)
    for number in range(FENCES + 2):
        registry.abort(f"m{number}", "because", 0)
    assert kept(state) == {f"m{number}" for number in range(2, FENCES + 2)}


def test_fences_count_after_a_restart(registry, state):
    for number in range(FENCES):
        registry.abort(f"m{number}", "because", 0)
    again = MigrationRegistry(GuestRegistry(state.socket_dir), Exports(), Clock(), state)
    again.restore(state.load())
    with pytest.raises(LimitError):
        again.abort("one-more", "because", 0)


@pytest.mark.parametrize("migration_id", ["", ".", "..", "../x", "a/b", "a\nb", "a\0b", "x" * 65, "ü"])
def test_id_that_no_file_should_have_is_refused(registry, state, migration_id):
    with pytest.raises(ConfigError, match="no id of a migration"):
        registry.abort(migration_id, "because", 0)
    assert kept(state) == set()


class Failed(grpc.RpcError):
    def __init__(self, details):
        self._details = details

    def trailing_metadata(self):
        return ((METADATA_ERROR, self._details),)

    def code(self):
        return grpc.StatusCode.INTERNAL

    def details(self):
        return "no"


@pytest.mark.parametrize("name", ["StoppedError", "CancelledError", "PagerStoppedError", "", "object"])
def test_peer_cannot_raise_what_steers_our_own_threads(name):
    error = received_error(Failed(types.ErrorInfo(type=name, message="m").SerializeToString()), "the peer")
    assert type(error) is MigrateError


def test_holder_that_does_not_exist_tells_nothing():
    error = received_error(Failed(types.ErrorInfo(type="ConfigError", holder=99).SerializeToString()), "the peer")
    assert error.holder is GuestHolder.UNSPECIFIED


def test_details_that_are_no_protobuf_are_a_broken_call():
    assert type(received_error(Failed(b"\xff" * 9), "the peer")) is ChannelError


@pytest.mark.parametrize("text", ["h" * 256 + ":1", "h:" + "1" * 6, "h:" + "9" * 5000])
def test_address_without_end_is_none(text):
    with pytest.raises(ConfigError) as caught:
        Endpoint.parse(text)
    assert len(caught.value.message) < 400
