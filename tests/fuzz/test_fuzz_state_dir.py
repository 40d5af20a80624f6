"""Whatever lies in a state directory, a daemon starts or says which file it does not understand; it never guesses."""

import pytest
from hypothesis import strategies as st

from migrate.config import Endpoint
from migrate.daemon.guests import GuestRegistry
from migrate.daemon.migrations import MigrationRegistry
from migrate.daemon.state_dir import StateDir
from migrate.errors import StateDirError
from migrate.native.exports import Exports
from migrate.telemetry.clock import Clock
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import types_pb2 as types
from tests.fuzz.fuzzing import LIMIT_S, fuzz
from tests.fuzz.messages import messages, mutated

pytestmark = pytest.mark.timeout(LIMIT_S)

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


def restored(state, entries):
    """The ids of the migrations that a daemon takes up, and why it does not start. Nobody listens where it calls."""
    guests = GuestRegistry(state.socket_dir)
    registry = MigrationRegistry(guests, Exports(), Clock(), state, peer_of=lambda *_: Stubborn())
    registry.page_endpoints = dict.fromkeys(
        (types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO), Endpoint("127.0.0.1", 1)
    )
    try:
        guests.adopt()
        registry.restore(entries)
        return [migration.migration_id for migration in registry.list()], ""
    except StateDirError as error:
        return [], error.message
    finally:
        registry.close()


def test_daemon_takes_up_an_entry_or_names_it(state):
    def restore(entry):
        entry.migration_id = "m"
        taken, refused = restored(state, [entry])
        assert "'m'" in refused if refused else taken in ([], ["m"])

    end_of_another = saved.SavedMigration(final=types.Migration(side=types.MIGRATION_SIDE_SOURCE))
    fuzz(restore, entries, found=[end_of_another])


def saved_as(name):
    """What may lie under that name: mostly what belongs there."""

    def own(entry):
        entry.migration_id = name.removesuffix(".pb")
        entry.version = 1
        return entry

    return st.tuples(st.just(name), entries.map(own).map(lambda entry: entry.SerializeToString()) | mutated(entries))


NAMES = ["m.pb", "n.pb", "m.n.pb", ".pb", ".m.pb", "m", "m.pb.new"]
SOCKETS = ["g.sock", ".sock", "g", "g.sock.sock"]


def test_daemon_starts_with_any_files_or_names_one(state):
    migrations = state.path / "migrations"

    def start(files, sockets):
        for name, data in files:
            (migrations / name).write_bytes(data)
        for name, data in sockets:
            (state.socket_dir / name).write_bytes(data)
        taken, refused = restored(state, state.load())
        assert {f"{migration_id}.pb" for migration_id in taken} <= {path.name for path in migrations.iterdir()}
        assert not refused or any(name in refused or repr(name[:-3]) in refused for name, _ in files)
        outside = {path.name for path in state.path.parent.iterdir()} | {path.name for path in state.path.iterdir()}
        assert outside == {"state", "migrations", "guests", "lock"}

    def start_and_clear(found):
        try:
            start(*found)
        finally:
            for path in [*migrations.iterdir(), *state.socket_dir.iterdir()]:
                path.unlink()

    files = st.lists(st.sampled_from(NAMES).flatmap(saved_as), min_size=1, max_size=3)
    sockets = st.lists(st.tuples(st.sampled_from(SOCKETS), st.binary(max_size=4)), max_size=2)
    other = saved.SavedMigration(version=1, migration_id="../x")
    fuzz(start_and_clear, st.tuples(files, sockets), found=[([("m.pb", other.SerializeToString())], [])])
