"""The state directory: whole or not at all, one daemon at a time, and nothing is believed that no daemon wrote."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrate.daemon import state_dir as module
from migrate.daemon.state_dir import StateDir
from migrate.errors import ConfigError, StateDirError
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import types_pb2 as types
from tests.harness.waiting import wait_until

# Says that it is ready, then writes attempt 1, 2, 3 … of one migration for ever. Each entry tells by its other fields
# which attempt it is of, and is larger than a page, so that a torn one could not be whole by accident.
WRITER = """
import sys
from pathlib import Path
from migrate.daemon.state_dir import StateDir
from migrate.v1 import daemon_state_pb2 as saved

state = StateDir(Path(sys.argv[1]))
attempt = int(sys.argv[2])
while True:
    attempt += 1
    source = saved.SavedSource(attempt=attempt, token=str(attempt) * 2000, instance=str(attempt))
    state.save(saved.SavedMigration(migration_id="m", source=source))
    print(attempt, flush=True)
"""


@pytest.fixture
def state(tmp_path):
    made = StateDir(tmp_path / "state")
    yield made
    made.close()


def typical():
    """A migration under way as a daemon writes it down at the source."""
    request = operator.StartMigrationRequest(
        guest="database-17",
        to="[2001:db8:1234:5678::42]:7400",
        mode=types.MIGRATION_MODE_HYBRID,
        order="precopy",
        transport=types.PAGE_TRANSPORT_NATIVE_GRPC,
        max_bandwidth_bytes_per_s=1_250_000_000,
        verify=True,
        peer_timeout_us=5_000_000,
        deadline_us=3_600_000_000,
        on_deadline=types.DEADLINE_ACTION_POISON,
    )
    source = saved.SavedSource(
        request=request,
        token="t" * 43,
        attempt=3,
        instance="0123456789abcdef",
        to=request.to,
        transport=types.PAGE_TRANSPORT_NATIVE_GRPC,
        kind=types.GUEST_KIND_KVM,
    )
    return saved.SavedMigration(version=1, migration_id="0123456789ab", source=source)


def ended(migration_id="m"):
    final = types.Migration(migration_id=migration_id, state=types.MIGRATION_STATE_COMPLETED)
    return saved.SavedMigration(migration_id=migration_id, source=saved.SavedSource(), final=final)


def file_of(state, migration_id="m"):
    return state.path / "migrations" / f"{migration_id}.pb"


def test_what_was_saved_is_loaded(state):
    first, second = typical(), ended()
    state.save(first)
    state.save(second)
    assert [*state.load()] == [first, second]


def test_load_follows_the_order_of_the_last_changes(state):
    for name in ("b", "c", "a"):
        state.save(saved.SavedMigration(migration_id=name, source=saved.SavedSource()))
    for age, name in enumerate(("a", "b", "c")):
        os.utime(file_of(state, name), ns=(age, age))
    assert [entry.migration_id for entry in state.load()] == ["a", "b", "c"]


def test_typical_entry_is_small(state):
    entry = typical()
    state.save(entry)
    assert file_of(state, entry.migration_id).stat().st_size < 1024


@pytest.mark.timeout(60)
def test_writer_that_is_killed_leaves_the_old_entry_or_the_new_one(tmp_path):
    """Killed 20 times, at whatever it is doing. What it had said to be written is there, and nothing is torn."""
    path = tmp_path / "state"
    said = 0
    for life in range(20):
        command = [sys.executable, "-c", WRITER, str(path), str(said)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            said = int(writer.stdout.readline())
            time.sleep(life * 0.0007)  # where in a write it dies is to differ
            writer.send_signal(signal.SIGKILL)
            said = max([said, *map(int, writer.stdout.read().split("\n")[:-1])])
        state = StateDir(path)
        (entry,) = state.load()
        state.close()
        assert entry.source.attempt in (said, said + 1)
        assert entry.source.token == str(entry.source.attempt) * 2000
        assert entry.source.instance == str(entry.source.attempt)
        said = entry.source.attempt
        assert [found.name for found in (path / "migrations").iterdir()] == ["m.pb"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_save_that_fails_leaves_the_old_entry_and_no_litter(state, monkeypatch, call):
    state.save(typical())

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os if call == "fsync" else module.Path, call, fail)
    changed = typical()
    changed.source.attempt = 99
    with pytest.raises(StateDirError, match=r"cannot be written: No space left on device") as caught:
        state.save(changed)
    monkeypatch.undo()

    assert str(state.path) in caught.value.message
    assert "free space" in caught.value.remedy
    assert [*state.load()] == [typical()]
    assert len([*(state.path / "migrations").iterdir()]) == 1


def test_entry_is_on_the_disk_before_it_has_its_name_and_its_name_before_save_returns(state, monkeypatch):
    steps = []
    fsync, replace = os.fsync, module.Path.replace

    def note_fsync(fd):
        steps.append("directory" if Path(f"/proc/self/fd/{fd}").is_dir() else "file")
        fsync(fd)

    def note_replace(path, target):
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(module.os, "fsync", note_fsync)
    monkeypatch.setattr(module.Path, "replace", note_replace)
    state.save(typical())
    assert steps == ["file", "rename", "directory"]


def test_second_daemon_is_refused_until_the_first_has_gone(state):
    with pytest.raises(ConfigError, match="another daemon uses the state directory") as caught:
        StateDir(state.path)
    assert "--state-dir of its own" in caught.value.remedy
    state.close()
    state._lock_fd = StateDir(state.path)._lock_fd


def test_lock_goes_with_a_daemon_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), "0"], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(ConfigError, match="another daemon"):
            StateDir(tmp_path)
        writer.kill()
    StateDir(tmp_path).close()


def test_lock_does_not_go_on_to_processes_that_a_daemon_starts(state):
    with subprocess.Popen(["sleep", "30"], close_fds=False) as child:
        try:
            wait_until(lambda: Path(f"/proc/{child.pid}/exe").readlink().name in ("sleep", "coreutils"), 10, "exec")
            state.close()
            state._lock_fd = StateDir(state.path)._lock_fd
        finally:
            child.kill()


@pytest.mark.parametrize("version", [0, 2, 99])
def test_entry_of_another_version_is_refused_by_name(state, version):
    entry = typical()
    entry.version = version
    file_of(state, "m").write_bytes(entry.SerializeToString())
    with pytest.raises(
        StateDirError, match=rf"m\.pb was written by another version of migrate \({version}, "
    ) as caught:
        list(state.load())
    assert str(file_of(state, "m")) in caught.value.message


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"not a message at all", typical().SerializeToString()[:-7]])
def test_garbage_is_refused_by_name(state, garbage):
    file_of(state, "m").write_bytes(garbage)
    with pytest.raises(StateDirError) as caught:
        list(state.load())
    assert str(file_of(state, "m")) in caught.value.message


def test_litter_of_a_daemon_that_died_while_it_wrote_is_swept(state):
    litter = state.path / "migrations" / ".half.new"
    litter.write_bytes(b"\xff")
    state.save(typical())
    assert [*state.load()] == [typical()]
    assert not litter.exists()


def test_old_ends_are_removed_and_what_has_not_ended_never_is(state):
    state.save(ended("old"))
    state.save(ended("new"))
    running = typical()
    state.save(running)
    long_ago = time.time() - 8 * 86_400
    for name in ("old", running.migration_id):
        os.utime(file_of(state, name), (long_ago, long_ago))
    assert {entry.migration_id for entry in state.load()} == {"new", running.migration_id}
    assert not file_of(state, "old").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../m", "a/b", ".hidden", "a\0b", "ä", "x" * 65, "m\n"])
def test_id_that_is_no_file_name_is_refused(state, name):
    with pytest.raises(StateDirError, match="no id of a migration"):
        state.save(saved.SavedMigration(migration_id=name))
    assert [*(state.path / "migrations").iterdir()] == []


def test_directory_is_for_its_owner_alone(state):
    for directory in (state.path, state.socket_dir, state.path / "migrations"):
        assert directory.stat().st_mode & 0o777 == 0o700
    state.save(typical())
    assert file_of(state, typical().migration_id).stat().st_mode & 0o077 == 0


def test_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used: Not a directory"):
        StateDir(tmp_path / "file" / "state")


def test_many_saves_leave_one_file_and_no_descriptor(state):
    before = len(os.listdir("/proc/self/fd"))
    entry = typical()
    for attempt in range(50):
        entry.source.attempt = attempt
        state.save(entry)
    assert len(os.listdir("/proc/self/fd")) == before
    assert [found.source.attempt for found in state.load()] == [49]


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o770, 0o755])
def test_directory_that_others_can_enter_is_refused(tmp_path, mode):
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(mode)

    with pytest.raises(ConfigError, match="is open to others") as caught:
        StateDir(path)

    assert f"{mode:04o}" in caught.value.message
    assert "chmod 700" in caught.value.remedy


@pytest.mark.root
def test_directory_of_another_user_is_refused(tmp_path):
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    os.chown(path, 65534, 65534)

    with pytest.raises(ConfigError, match="belongs to another user"):
        StateDir(path)
