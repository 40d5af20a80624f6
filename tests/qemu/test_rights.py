"""A QEMU without the rights that it needs, and what does without them."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import grpc
import pytest

from migrate.guest.qemu.faults import PRELOAD_VARIABLE
from migrate.v1 import types_pb2 as types
from tests.harness import unprivileged
from tests.harness.daemons import DaemonProcess
from tests.harness.linux_guest import QEMU
from tests.harness.processes import is_alive
from tests.harness.qemu_guests import answers_qmp, attach_qemu, create_qemu, qemu_of, userfaultfds
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.uffd]
# A machine whose firmware finds nothing to boot.
EMPTY = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]


@pytest.fixture(autouse=True)
def _has_qemu():
    if shutil.which(QEMU) is None:
        required = "qemu" in os.environ.get("MIGRATE_TEST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)(f"qemu: there is no {QEMU}")


@pytest.fixture
def open_dir():
    """A directory that everybody may pass."""
    with tempfile.TemporaryDirectory(prefix="migrate-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


def check_moves(source, destination, mode):
    moved = source.migrate(destination, mode=types.MigrationMode.Value(f"MIGRATION_MODE_{mode}"), verify=True)
    assert moved.state == types.MIGRATION_STATE_COMPLETED, moved.error
    wait_until(lambda: not destination.guest().migration_id, 20, "the destination to let go")
    assert destination.guest().state == types.GUEST_STATE_RUNNING


def test_qemu_with_the_preload_library_moves_without_ptrace():
    daemons = [DaemonProcess(env={PRELOAD_VARIABLE: "1"}) for _ in range(2)]
    try:
        source, destination = daemons
        create_qemu(source, "g", *EMPTY)
        # The one that it handed over is there from the start, and serves all purposes.
        assert userfaultfds(qemu_of(source.guest().pid)) == 1

        check_moves(source, destination, "POSTCOPY")
        check_moves(destination, source, "HYBRID")
    finally:
        for daemon in daemons:
            daemon.close()


@pytest.fixture
def nobodys(open_dir):
    """Daemons of a user who may use the two devices, and nothing else."""
    if reason := unprivileged.why_not():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:

        def start(name):
            stage, state = open_dir / f"{name}-stage", open_dir / name
            stage.mkdir()
            state.mkdir(mode=0o700)
            os.chown(state, unprivileged.NOBODY, unprivileged.NOBODY)
            daemon = DaemonProcess(prefix=unprivileged.prefix(stage), state_dir=state)
            stack.callback(daemon.close)
            return daemon

        yield start


def test_unprivileged_daemons_move_a_qemu_that_they_started(nobodys):
    source, destination = nobodys("source"), nobodys("destination")
    create_qemu(source, "g", *EMPTY)

    check_moves(source, destination, "POSTCOPY")
    check_moves(destination, source, "HYBRID")


def test_qemu_of_another_user_is_refused_and_runs_on(nobodys, open_dir):
    daemon = nobodys("daemon")
    shared = open_dir / "qemu"
    shared.mkdir()
    ram = ["-object", f"memory-backend-file,id=ram,size=32M,mem-path={shared}/ram,share=on"]
    command = [QEMU, *EMPTY, "-m", "32M", *ram, "-machine", "memory-backend=ram"]
    command += ["-qmp", f"unix:{shared}/qmp,server=on,wait=off"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
        try:
            wait_until(lambda: answers_qmp(shared / "qmp"), 20, "QEMU to answer")
            (shared / "qmp").chmod(0o666)
            (shared / "ram").chmod(0o666)

            with pytest.raises(grpc.RpcError) as caught:
                attach_qemu(daemon, "g", shared / "qmp")

            assert f"(process {qemu.pid})" in caught.value.details()
            assert "run the daemon as" in caught.value.details()
            assert is_alive(qemu.pid)
        finally:
            qemu.kill()
