"""What a daemon and its guests need, and what they leave behind."""

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from migrate.v1 import types_pb2 as types
from tests.harness import unprivileged
from tests.harness.daemons import DaemonProcess
from tests.harness.processes import is_alive
from tests.harness.waiting import wait_until

WITH_CORES = ("sh", "-c", 'cd "$0" && ulimit -c unlimited && exec "$@"')


def capabilities_of(pid):
    """Effective and permitted capabilities, and the user."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["CapEff"], 16), int(fields["CapPrm"], 16), int(fields["Uid"].split()[0])


@pytest.fixture
def open_dir():
    """A directory that nobody can reach, as pytest's are not."""
    path = Path(tempfile.mkdtemp(prefix="migrate-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.root
@pytest.mark.kvm
@pytest.mark.uffd
def test_unprivileged_daemons_move_a_guest(open_dir):
    if reason := unprivileged.why_not():
        pytest.skip(reason)
    daemons = []
    try:
        for name in ("source", "destination"):
            stage, state = open_dir / f"{name}-stage", open_dir / name
            stage.mkdir()
            state.mkdir(mode=0o700)
            os.chown(state, unprivileged.NOBODY, unprivileged.NOBODY)
            # It is not asked to tidy a directory that is another's.
            daemons.append(DaemonProcess(prefix=unprivileged.prefix(stage), state_dir=state))
        source, destination = daemons
        source.create("g", memory_mib=16, touch_rate_per_s=2_000)
        source.wait_populated("g")

        moved = source.migrate(destination)

        assert moved.state == types.MIGRATION_STATE_COMPLETED, moved.error
        assert destination.audit("g").errors == 0
        for pid in (source.process.pid, destination.process.pid, destination.guest("g").pid):
            assert capabilities_of(pid) == (0, 0, unprivileged.NOBODY)
    finally:
        for daemon in daemons:
            daemon.close()


@pytest.mark.uffd
def test_sockets_and_directories_are_nobody_elses(tmp_path):
    mask = os.umask(0)
    try:
        daemon = DaemonProcess(state_dir=tmp_path / "state")
    finally:
        os.umask(mask)
    try:
        daemon.create("g", kind="process", memory_mib=16, touch_rate_per_s=2_000)
        modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").rglob("*")}
        modes[tmp_path / "state"] = stat.S_IMODE((tmp_path / "state").stat().st_mode)
        sockets = [path for path in modes if path.is_socket()]
    finally:
        daemon.close()

    assert sockets
    for path, mode in modes.items():
        assert mode & 0o077 == 0, path
    assert {modes[path] for path in sockets} == {0o600}


@pytest.mark.uffd
@pytest.mark.parametrize("kind", [pytest.param("kvm", marks=pytest.mark.kvm), "process"])
def test_ram_has_no_path(tmp_path, kind):
    daemon = DaemonProcess()
    try:
        pid = daemon.create("g", kind=kind, memory_mib=16, touch_rate_per_s=2_000).pid
        with Path(f"/proc/{pid}/maps").open() as maps:
            shared = [line.split(maxsplit=5)[-1] for line in maps if line.split()[1] == "rw-s"]
    finally:
        daemon.close()

    assert any(path.startswith("/memfd:migrate-g") for path in shared)
    named = [path for path in shared if not path.startswith(("/memfd:", "/dev/zero", "anon_inode:", "/[aio]"))]
    assert named == []


def leaves_a_core(command, folder):
    """Whether a program that dies by SIGSEGV in a folder leaves something there."""
    folder.mkdir()
    process = subprocess.Popen([*WITH_CORES, folder, *command], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGSEGV)
    process.communicate(timeout=20)
    return bool(list(folder.iterdir()))


@pytest.mark.uffd
@pytest.mark.parametrize("kind", [pytest.param("kvm", marks=pytest.mark.kvm), "process"])
def test_guest_that_crashes_leaves_no_core(tmp_path, kind):
    sleeper = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    if not leaves_a_core(sleeper, tmp_path / "control"):
        pytest.skip("core dumps of this machine do not go to the working directory")
    folder = tmp_path / "cores"
    folder.mkdir()
    daemon = DaemonProcess(prefix=[*WITH_CORES, str(folder)])
    try:
        pid = daemon.create("g", kind=kind, memory_mib=16, touch_rate_per_s=2_000).pid
        assert resource.prlimit(pid, resource.RLIMIT_CORE) == (0, 0)
        os.kill(pid, signal.SIGSEGV)
        wait_until(lambda: not is_alive(pid), 20, "the guest to be gone")
    finally:
        daemon.close()

    assert list(folder.iterdir()) == []
