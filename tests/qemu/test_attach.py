"""A QEMU that was started without us is taken over as it runs, or told what it lacks, and runs on."""

import contextlib
import os
import socket
import subprocess
import threading
from pathlib import Path

import grpc
import pytest

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess
from tests.harness.linux_guest import MEMORY_MIB, QEMU, VCPUS, LinuxConsole, plain_qemu
from tests.harness.processes import is_alive
from tests.harness.qemu_guests import (
    allowing,
    answers_qmp,
    attach_qemu,
    linux_options,
    userfaultfds,
    wait_gone,
)
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.uffd, pytest.mark.timeout(150)]
SMALL_MIB = 32


@pytest.fixture(scope="module")
def daemons(linux_image, tmp_path_factory):
    directory = tmp_path_factory.mktemp("daemons")
    options = allowing(linux_image.kernel.parent, tmp_path_factory.getbasetemp())
    made = [DaemonProcess(options=options, state_dir=directory / name, log=directory / f"{name}.log") for name in "ab"]
    yield made
    for daemon in made:
        daemon.close()


@pytest.fixture
def ram_file(tmp_path):
    """A path on tmpfs, free afterwards."""
    path = Path(f"/dev/shm/migrate-test-{os.getpid()}-{tmp_path.name}")
    yield path
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def empty_qemu(directory, *options):
    """A QEMU without anything in it, whose vCPU runs; its monitor is `qmp` in the directory."""
    command = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-smp", "1"]
    command += ["-qmp", f"unix:{directory}/qmp,server=on,wait=off", *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
        try:
            wait_until(lambda: answers_qmp(directory / "qmp"), 20, "QEMU to answer")
            yield qemu
        finally:
            qemu.kill()


def shared_ram(path, memory_mib=SMALL_MIB, kind="file", share="on"):
    file = f",mem-path={path}" if kind == "file" else ""
    share = f",share={share}" if kind != "ram" else ""
    return [
        *("-m", f"{memory_mib}M"),
        *("-object", f"memory-backend-{kind},id=ram,size={memory_mib}M{file}{share}", "-machine", "memory-backend=ram"),
    ]


def refusal(daemon, directory, name="foreign"):
    with pytest.raises(grpc.RpcError) as caught:
        attach_qemu(daemon, name, directory / "qmp")
    assert name not in daemon.guest_names()
    return caught.value.details()


# ---- what can be moved ----


def test_linux_that_runs_already_is_taken_over_and_crosses(daemons, linux_image, tmp_path, ram_file):
    source, destination = daemons
    options = [*linux_options(linux_image, tmp_path / "console", tmp_path / "port"), *shared_ram(ram_file, MEMORY_MIB)]
    command = [QEMU, *options, "-smp", str(VCPUS), "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as qemu:
        try:
            console = LinuxConsole(tmp_path / "console")
            console.wait_until_ready()

            taken = attach_qemu(source, "linux", tmp_path / "qmp")

            assert (taken.spec.memory_bytes, taken.spec.vcpus) == (MEMORY_MIB << 20, VCPUS)
            assert taken.state == types.GUEST_STATE_RUNNING
            assert userfaultfds(qemu.pid) == 0
            console.wait_for_more(ticks=5)
            moved = source.migrate(destination, "linux", mode=types.MIGRATION_MODE_HYBRID, verify=True)
            assert moved.state == types.MIGRATION_STATE_COMPLETED, moved.error
            assert moved.verified_pages == moved.pages.total
            # It is a copy that must never run again.
            assert qemu.wait(20) is not None
        finally:
            qemu.kill()
    wait_until(lambda: not destination.guest("linux").migration_id, 20, "the destination to let go")
    console.wait_for_more(ticks=10, sums=2, versions=2, deadline_s=60)
    # At the destination it is one of ours, and goes back as one.
    back = destination.migrate(source, "linux")
    assert back.state == types.MIGRATION_STATE_COMPLETED, back.error
    console.wait_for_more(ticks=10, sums=2, versions=2, deadline_s=60)
    source.guests.DeleteGuest(guest.DeleteGuestRequest(name="linux"), timeout=30)


def test_one_that_is_paused_stays_paused(daemons, tmp_path, ram_file):
    with empty_qemu(tmp_path, *shared_ram(ram_file), "-S") as qemu:
        # With -S it has not begun: that is no pause, and it is said.
        assert "in state prelaunch" in refusal(daemons[0], tmp_path)
        assert is_alive(qemu.pid)


def test_file_whose_name_is_gone_is_found(daemons, tmp_path, ram_file):
    with empty_qemu(tmp_path, *shared_ram(ram_file)) as qemu:
        ram_file.unlink()

        attach_qemu(daemons[0], "nameless", tmp_path / "qmp")

        daemons[0].guests.DeleteGuest(guest.DeleteGuestRequest(name="nameless"), timeout=30)
        assert qemu.wait(20) is not None


def test_daemon_without_state_leaves_what_it_took_over(tmp_path, ram_file):
    with empty_qemu(tmp_path, *shared_ram(ram_file)) as qemu:
        daemon = DaemonProcess()
        shepherd = attach_qemu(daemon, "guest", tmp_path / "qmp").pid

        daemon.close()

        wait_gone(shepherd)
        assert is_alive(qemu.pid)
        assert answers_qmp(tmp_path / "qmp")


# ---- what cannot ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", f"{SMALL_MIB}M"], "is memory-backend-ram, not memory-backend-file"),
        (shared_ram("", kind="ram"), "is memory-backend-ram, not memory-backend-file"),
        (shared_ram("", kind="memfd"), "is memory-backend-memfd, not memory-backend-file"),
        (shared_ram("{ram_file}", share="off"), "a private one (share=off)"),
    ],
    ids=["nothing said", "private", "memfd", "private file"],
)
def test_private_ram_is_refused_and_the_machine_runs_on(daemons, tmp_path, ram_file, options, words):
    options = [word.replace("{ram_file}", str(ram_file)) for word in options]
    with empty_qemu(tmp_path, *options) as qemu:
        said = refusal(daemons[0], tmp_path)

        assert words in said
        assert "start QEMU with -object memory-backend-file" in said
        assert is_alive(qemu.pid)
        assert answers_qmp(tmp_path / "qmp")
        assert userfaultfds(qemu.pid) == 0


def test_private_linux_runs_on_after_the_refusal(daemons, linux_image, tmp_path):
    qmp = ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    with plain_qemu(linux_image, tmp_path, *qmp, memory_mib=128, data_mib=8, versions_mib=1):
        console = LinuxConsole(tmp_path / "console")
        console.wait_until_ready()

        assert "not memory-backend-file" in refusal(daemons[0], tmp_path)

        console.wait_for_more(ticks=10, sums=1, versions=1)
        console.check()


def test_nobody_at_the_socket_is_named(daemons, tmp_path):
    said = refusal(daemons[0], tmp_path)
    assert f"no QEMU listens at {tmp_path}/qmp: No such file or directory" in said


def test_somebody_else_at_the_socket_is_named(daemons, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen()

        def hang_up():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                connection.sendall(b"hello\r\n")
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        said = refusal(daemons[0], tmp_path)
        thread.join()
    assert "no QEMU answers" in said


def test_monitor_that_is_taken_is_named(daemons, tmp_path, ram_file):
    with empty_qemu(tmp_path, *shared_ram(ram_file)), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(tmp_path / "qmp"))
        assert first.recv(100)

        said = refusal(daemons[0], tmp_path)

    assert "a monitor has room for one client at a time" in said
