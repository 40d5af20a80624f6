"""What a companion and a program say to each other, and what either refuses; no daemon, no migration."""

import fcntl
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from enum import IntEnum
from pathlib import Path

import pytest

from migrate.daemon.guests import GuestRegistry
from migrate.daemon.programs import Programs
from migrate.errors import ConfigError, GuestGoneError, ProgramError, RemoteProtocolError, UnsupportedHostError
from migrate.guest.dirty_log import OwnScan
from migrate.guest.program import wire
from migrate.guest.program.control import Control
from migrate.guest.program.guest import ProgramGuest
from migrate.guest.program.wire import Ask, Flag, Message
from migrate.v1 import types_pb2 as types
from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 16 << 20
NO_SCAN = OwnScan(-1, "not in this test")
PROGRAM = """
import sys, threading
from migrate.guest.embed import Program
loaded = []
def refuse():
    raise ValueError("not now")
program = Program("p", 1, pause=refuse if "refuse" in sys.argv else lambda: None, resume=lambda: None,
                  save=lambda: b"s" * int(sys.argv[2]), load=loaded.append)
if "touch" in sys.argv:
    program.memory[0] = 1
program.serve(sys.argv[1])
threading.Event().wait()
"""


@pytest.fixture
def run_program(tmp_path):
    """Starts a program of our own; its control, and its process."""
    started = []

    def run(*words, state_bytes=5, incoming=False):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {**os.environ, "PYTHONPATH": str(ROOT), wire.FD_VARIABLE: str(theirs.fileno())}
        env |= {wire.INCOMING_VARIABLE: "1"} if incoming else {}
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), "-", str(state_bytes), *words]
        with theirs:
            process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])
        control = Control(ours)
        started.append((control, process))
        return control, process

    yield run
    for control, process in started:
        control.close()
        process.kill()
        process.wait(20)


def test_program_says_who_it_is(run_program):
    control, _ = run_program()
    hello, fds = control.call(Ask.HELLO)
    assert (hello.text, hello.memory_bytes, Flag(hello.flags)) == ("p", MEMORY_BYTES, Flag.HAS_RUN | Flag.RUNNING)
    assert os.fstat(fds[0]).st_size == MEMORY_BYTES
    with pytest.raises(PermissionError):
        os.ftruncate(fds[0], 4096)
    for fd in fds:
        os.close(fd)


def test_state_is_saved_while_paused_only(run_program):
    control, _ = run_program()
    with pytest.raises(ProgramError, match="while paused only"):
        control.call_for_fd(Ask.SAVE)
    control.call_plain(Ask.PAUSE)
    fd = control.call_for_fd(Ask.SAVE)
    assert wire.read_state(fd) == b"sssss"
    os.close(fd)
    control.call_plain(Ask.RESUME)


def test_one_that_runs_takes_no_state(run_program):
    control, _ = run_program()
    fd = wire.state_file(b"x")
    with pytest.raises(ProgramError, match="has a state already"):
        control.call_plain(Ask.LOAD, (fd,))
    os.close(fd)


def test_one_that_arrives_does_nothing_before_its_state(run_program):
    control, _ = run_program(incoming=True)
    for ask in (Ask.PAUSE, Ask.RESUME, Ask.SAVE):
        with pytest.raises(ProgramError):
            control.call_plain(ask)
    fd = wire.state_file(b"x")
    control.call_plain(Ask.LOAD, (fd,))
    with pytest.raises(ProgramError, match="has a state already"):
        control.call_plain(Ask.LOAD, (fd,))
    os.close(fd)
    control.call_plain(Ask.RESUME)


def test_one_that_arrives_and_touches_its_memory_dies_at_once(run_program):
    control, process = run_program("touch", incoming=True)
    with pytest.raises(GuestGoneError):
        control.call_plain(Ask.HELLO)
    assert process.wait(20) == -11


def test_words_of_a_callback_reach_the_operator(run_program):
    control, _ = run_program("refuse")
    with pytest.raises(ProgramError, match="refused PAUSE: not now"):
        control.call_plain(Ask.PAUSE)
    # It is as it was.
    hello, fds = control.call(Ask.HELLO)
    assert Flag.RUNNING in Flag(hello.flags)
    for fd in fds:
        os.close(fd)


def test_state_that_is_too_large_is_refused(run_program):
    control, _ = run_program(state_bytes=wire.STATE_BYTES_MAX + 1)
    control.call_plain(Ask.PAUSE)
    with pytest.raises(ProgramError, match="more than"):
        control.call_for_fd(Ask.SAVE)


def test_unknown_request_is_refused(run_program):
    control, _ = run_program()
    with pytest.raises(ProgramError, match="does not know"):
        control.call_plain(IntEnum("Other", {"LATER": 99}).LATER)


def test_program_ends_with_its_companion(run_program):
    control, process = run_program()
    control.call_plain(Ask.PAUSE)
    control.close()
    assert process.wait(20) == 0


# ---- programs that lie ----


def answering(tmp_path, *answers):
    """Listens as a program does, and answers so; its path."""
    path = tmp_path / "liar.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(1)

    def serve():
        connection, _ = listener.accept()
        with connection, listener:
            for packet, fds in answers:
                connection.recv(4096)
                socket.send_fds(connection, [packet], fds)
            connection.recv(4096)

    threading.Thread(target=serve, daemon=True).start()
    return path


def hello_packet(sequence=1, memory_bytes=MEMORY_BYTES, magic=0x3147494D, hva=1 << 30, name=b"liar"):
    return struct.pack("=IIIiIIQQ88s", magic, sequence, Ask.HELLO, 0, 3, 0, memory_bytes, hva, name)


def take_over(path):
    spec = types.GuestSpec(name="g", kind=types.GUEST_KIND_PROCESS, process=types.ProcessSpec(socket=str(path)))
    return ProgramGuest(types.GuestDescription(spec=spec), None, NO_SCAN, lambda: None)


def test_memory_that_could_shrink_is_refused(tmp_path):
    memfd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, MEMORY_BYTES)
    with pytest.raises(ConfigError, match="sealed size"):
        take_over(answering(tmp_path, (hello_packet(), [memfd])))
    os.close(memfd)


def test_file_that_is_no_memory_is_refused(tmp_path):
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(MEMORY_BYTES)
        with pytest.raises(ConfigError, match="sealed size"):
            take_over(answering(tmp_path, (hello_packet(), [file.fileno()])))


def test_name_that_no_destination_would_take_is_refused(tmp_path):
    memfd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, MEMORY_BYTES)
    fcntl.fcntl(memfd, 1033, 0x2 | 0x4)
    with pytest.raises(ConfigError, match="no name of a program"):
        take_over(answering(tmp_path, (hello_packet(name=b"../../bin/sh"), [memfd])))
    os.close(memfd)


def test_no_memory_at_all_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="sealed size"):
        take_over(answering(tmp_path, (hello_packet(), [])))


@pytest.mark.parametrize("packet", [b"x", b"x" * 4096, hello_packet(magic=1)])
def test_packet_of_something_else_is_refused(tmp_path, packet):
    with pytest.raises(RemoteProtocolError, match="no program of this version"):
        take_over(answering(tmp_path, (packet, [])))


def test_answer_that_comes_too_late_is_told_from_the_next():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire.send(theirs, Message(Ask.PAUSE, 0, error=5))
    wire.send(theirs, Message(Ask.PAUSE, 1))
    control = Control(ours)
    assert control.call_plain(Ask.PAUSE).error == 0
    theirs.close()
    control.close()


# ---- which programs are started ----


def test_peer_cannot_have_a_socket_of_this_host_called(tmp_path):
    registry = GuestRegistry(tmp_path)
    for spec in (
        types.GuestSpec(name="g", kind=types.GUEST_KIND_PROCESS, process=types.ProcessSpec(socket="/run/x.sock")),
        types.GuestSpec(name="g", kind=types.GUEST_KIND_QEMU, qemu=types.QemuSpec(qmp_socket="/run/x.sock")),
    ):
        with pytest.raises(RemoteProtocolError, match="cannot run here already"):
            registry.create_incoming(types.GuestDescription(spec=spec, regions=[types.RamRegion()]), "m")


def test_only_executable_files_of_the_directory_are_programs(tmp_path):
    tmp_path.chmod(0o755)
    programs = Programs(tmp_path)
    (tmp_path / "text").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("text", "folder", "none"):
        with pytest.raises(UnsupportedHostError, match="has no program"):
            programs.path_of(name)
    (tmp_path / "text").chmod(0o755)
    assert programs.path_of("text") == tmp_path / "text"
    with pytest.raises(UnsupportedHostError, match="starts no programs"):
        Programs(None).path_of("text")


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_directory_that_others_write_to_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(ConfigError, match="others may write"):
        Programs(tmp_path)


def test_directory_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be used"):
        Programs(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="no directory"):
        Programs(tmp_path / "file")


def test_socket_of_a_program_is_nobody_elses(tmp_path):
    path = tmp_path / "p.sock"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), str(path), "5"], env=env)
    try:
        wait_until(path.exists, 20, "the program to listen")
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        process.kill()
        process.wait(20)
