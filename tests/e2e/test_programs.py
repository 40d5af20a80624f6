"""Programs that opted in to being moved, in Python and in C: taken over, moved there and back, refused."""

import contextlib
import itertools
import os
import signal
from pathlib import Path

import grpc
import pytest

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.daemons import DaemonProcess
from tests.harness.operator import ask, is_free, start, start_detached
from tests.harness.processes import is_alive
from tests.harness.programs import Programs, program_of
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
NAMES = ["counter-py", "counter-c"]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    made = Programs(tmp_path_factory.mktemp("programs"))
    made.install_python()
    made.install_c()
    return made


@pytest.fixture(scope="module")
def daemons(programs, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        pair = []
        for name in ("source", "destination"):
            options = ["--programs", str(programs.path)]
            state_dir = tmp_path_factory.mktemp("state") / name
            pair.append(DaemonProcess(options=options, env=programs.env, state_dir=state_dir))
            stack.callback(pair[-1].close)
        yield pair


@pytest.fixture
def take_over(programs, source, tmp_path):
    """Starts a program as its user does, and attaches it; its guest's name and its process."""
    started = []

    def take(program):
        name = f"{program}-{next(_numbers)}"
        process = programs.start(program, tmp_path / f"{name}.sock")
        started.append(process)
        ask(source, "guest", "attach", name, "--socket", str(tmp_path / f"{name}.sock"))
        return name, process

    yield take
    for process in started:
        process.kill()
        process.wait(20)


def check_counts(programs, name, daemon, past=0, pid=0):
    """It counts on, and has compared everything at least once since; its touches."""
    pid = pid or program_of(daemon.guest(name).pid)
    wait_until(lambda: programs.status(pid)[0] > past, 20, "the program to count on")
    audits = programs.status(pid)[2]
    wait_until(lambda: programs.status(pid)[2] >= audits + 2, 20, "the program to compare all its pages")
    touches, errors, _ = programs.status(pid)
    assert errors == 0
    return touches


def check_moved(programs, here, there, name, report, past):
    assert report["state"] == "completed"
    pages = report["pages"]
    assert pages["zero"] + pages["precopy"] + pages["urgent"] + pages["background"] == pages["total"]
    wait_until(lambda: name not in here.guest_names(), 20, "the source to let the guest go")
    wait_until(lambda: is_free(there, name), 20, "the destination to let the guest be moved again")
    return check_counts(programs, name, there, past)


def delete(daemon, name):
    daemon.guests.DeleteGuest(guest.DeleteGuestRequest(name=name), timeout=30)


@pytest.mark.parametrize("program", NAMES)
def test_program_moves_there_and_back_in_every_mode(programs, source, destination, take_over, program):
    name, process = take_over(program)
    touches = check_counts(programs, name, source, pid=process.pid)
    here, there = source, destination
    for mode in ("hybrid", "precopy", "postcopy", "hybrid"):
        report = start(here, there, name, "--mode", mode, "--verify")
        assert (report["mode"], report["guest_kind"]) == (mode, "process")
        touches = check_moved(programs, here, there, name, report, touches)
        assert process.wait(20) == -signal.SIGKILL, "what was left at the source must not run on"
        here, there = there, here
    seen = here.guest(name)
    assert (seen.spec.process.program, seen.spec.process.socket) == (program, "")
    pid = program_of(here.guest(name).pid)
    delete(here, name)
    wait_until(lambda: not is_alive(pid), 20, "the program to end with its guest")


@pytest.mark.parametrize("program", NAMES)
def test_program_outlives_the_daemon_that_moves_it(programs, source, destination, take_over, program):
    name, process = take_over(program)
    touches = check_counts(programs, name, source, pid=process.pid)
    migration_id = start_detached(
        source, destination, name, "--mode", "postcopy", "--max-bandwidth", "2MB/s", "--peer-timeout", "1s"
    )
    wait_until(
        lambda: source.migration(migration_id).state == types.MIGRATION_STATE_POSTCOPY, 30, "the program to be there"
    )
    destination.kill()
    destination.restart()
    assert source.wait_completed(migration_id).recoveries >= 1
    wait_until(lambda: name not in source.guest_names(), 20, "the source to let the guest go")
    check_counts(programs, name, destination, touches)
    wait_until(lambda: is_free(destination, name), 20, "the guest to be free")
    delete(destination, name)


@pytest.mark.parametrize("program", NAMES)
def test_pause_answers_when_nothing_runs(programs, source, take_over, program):
    name, process = take_over(program)
    check_counts(programs, name, source, pid=process.pid)
    ask(source, "guest", "pause", name)
    ask(source, "guest", "pause", name)
    with open_memory(process.pid) as memfd:
        before = os.pread(memfd, 16 << 20, 0)
        ask(source, "guest", "show", name)
        assert os.pread(memfd, 16 << 20, 0) == before
    ask(source, "guest", "resume", name)
    check_counts(programs, name, source, pid=process.pid)
    delete(source, name)
    assert process.wait(20) == -signal.SIGKILL


@contextlib.contextmanager
def open_memory(pid):
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:migrate-" in str(path.readlink()):
            fd = os.open(path, os.O_RDONLY)
            try:
                yield fd
            finally:
                os.close(fd)
            return
    pytest.fail("the program has no movable memory")


# ---- what is refused ----


def test_program_that_the_destination_does_not_have_stays(programs, source, destination, take_over):
    name, process = take_over("counter-c")
    touches = check_counts(programs, name, source, pid=process.pid)
    hidden = programs.path / "hidden"
    (programs.path / "counter-c").rename(hidden)
    try:
        failed = ask(source, "start", name, "--to", destination.address, "--json", exit_code=1)
    finally:
        hidden.rename(programs.path / "counter-c")
    assert "has no program 'counter-c'" in failed.stderr
    assert "the guest is at the source" in failed.stderr
    check_counts(programs, name, source, touches, pid=process.pid)
    delete(source, name)


def test_daemon_without_programs_starts_none(programs, source, take_over):
    name, _ = take_over("counter-c")
    other = DaemonProcess()
    try:
        failed = ask(source, "start", name, "--to", other.address, "--json", exit_code=1)
    finally:
        other.close()
    assert "--programs DIR" in failed.stderr
    delete(source, name)


@pytest.mark.parametrize("name", ["../counter-c", ".hidden", "", "a/b", "x" * 65])
def test_names_that_lead_elsewhere_are_refused(source, name):
    spec = types.GuestSpec(
        name="g", kind=types.GUEST_KIND_PROCESS, memory_bytes=16 << 20, process=types.ProcessSpec(program=name)
    )
    with pytest.raises(grpc.RpcError) as refused:
        source.guests.CreateGuest(guest.CreateGuestRequest(spec=spec), timeout=30)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "no name of a program" in refused.value.details()


def test_a_program_begins_its_life_in_a_daemon(programs, source):
    process = types.ProcessSpec(program="counter-c")
    spec = types.GuestSpec(name="born", kind=types.GUEST_KIND_PROCESS, process=process, memory_bytes=16 << 20)
    source.guests.CreateGuest(guest.CreateGuestRequest(spec=spec), timeout=30)
    check_counts(programs, "born", source)
    delete(source, "born")


def test_nobody_there_is_said(source, tmp_path):
    failed = ask(source, "guest", "attach", "g", "--socket", str(tmp_path / "none.sock"), exit_code=1)
    assert "no program listens" in failed.stderr


def test_attach_wants_one_socket(source):
    assert cli.run("guest", "attach", "g", daemon=source).exit_code == 2
    assert cli.run("guest", "attach", "g", "--qmp", "a", "--socket", "b", daemon=source).exit_code == 2


def test_directory_that_others_may_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(AssertionError, match="exited"):
        DaemonProcess(options=["--programs", str(tmp_path)])
