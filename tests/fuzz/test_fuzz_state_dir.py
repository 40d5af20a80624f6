"""Whatever lies in a state directory, a daemon starts or says which file it does not understand; it never guesses."""

import pytest

from migrate.config import Endpoint
from migrate.daemon.guests import GuestRegistry
from migrate.daemon.migrations import MigrationRegistry
from migrate.daemon.state_dir import StateDir
from migrate.errors import StateDirError
from migrate.native.exports import Exports
from migrate.telemetry.clock import Clock
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import types_pb2 as types
from tests.fuzz.fuzzing import FUZZ_S, fuzz
from tests.fuzz.messages import messages, mutated

pytestmark = pytest.mark.timeout(120 + int(FUZZ_S))

entries = messages(saved.SavedMigration)


@pytest.fixture
def state(tmp_path):
    made = StateDir(tmp_path / "state")
    yield made
    made.close()


def test_file_is_read_whole_or_refused_by_its_name(state):
    path = state.path / "migrations" / "m.pb"

    def read(data):
        path.write_bytes(data)
        refused = None
        try:
            list(state.load())
        except StateDirError as error:
            refused = error
        assert refused is None or "m.pb" in refused.message

    fuzz(read, mutated(entries))


def test_what_was_saved_is_what_is_loaded(state):
    def save(entry):
        entry.migration_id = "m"
        entry.ClearField("final")
        state.save(entry)
        (loaded,) = state.load()
        assert loaded == entry

    fuzz(save, entries)


class Stubborn:
    """Nobody answers."""

    def __getattr__(self, name):
        def call(*_):
            raise StateDirError("nobody answers")

        return (lambda: None) if name == "close" else call


def test_daemon_takes_up_an_entry_or_names_it(tmp_path, state):
    def restore(entry):
        guests = GuestRegistry(state.socket_dir)
        registry = MigrationRegistry(guests, Exports(), Clock(), state, peer_of=lambda *_: Stubborn())
        registry.page_endpoints = dict.fromkeys(
            (types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO), Endpoint("127.0.0.1", 1)
        )
        entry.migration_id = "m"
        refused = None
        try:
            registry.restore([entry])
        except StateDirError as error:
            refused = error
        registry.close()
        assert refused is None or "'m'" in refused.message
        assert len(registry.list()) <= 1

    fuzz(restore, entries)
