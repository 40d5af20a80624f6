"""What keeps us from a userfaultfd inside another process: said clearly, in bounded time, and the process runs on."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from migrate.errors import (
    GuestBusyError,
    GuestGoneError,
    MissingFeatureError,
    TraceUnavailableError,
    UffdUnavailableError,
)
from migrate.native import inject
from tests.harness import blocked, unprivileged
from tests.harness.blocked import Blocked, descriptors_of, state_of, tracer_of
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
NOBODY = unprivileged.NOBODY
SHORT_US = 300_000
# A process that does nothing but pause(2), over and over, in 32-bit code.
CODE_32 = bytes.fromhex("b81d000000cd80ebf7")


@pytest.fixture
def start():
    """Starts processes that end with the test."""
    started = []

    def start_one(*arguments, **options):
        started.append(Blocked(*arguments, **options))
        return started[-1]

    yield start_one
    for process in started:
        process.close()


def assert_untouched(process):
    """It has no userfaultfd, nobody traces it, and it takes the input that it waits for."""
    wait_until(lambda: tracer_of(process.pid) == 0, 20, "the process to be let go of")
    assert "anon_inode:[userfaultfd]" not in descriptors_of(process.pid).values()
    process.finish()
    assert process.answer()["result"] == 1


def test_no_such_process(start):
    process = subprocess.Popen(["true"])
    process.wait()

    for pid in (process.pid, 0, -1):
        with pytest.raises(GuestGoneError):
            inject.open_uffd_in(pid)


def test_a_zombie_is_no_process():
    process = subprocess.Popen(["true"])
    wait_until(lambda: state_of(process.pid) == "Z", 20, "the process to end")

    with pytest.raises(GuestGoneError):
        inject.open_uffd_in(process.pid)

    assert process.wait() == 0


def test_one_that_another_traces(start):
    process = start("read", blocked.READ)
    tracer = start("trace", blocked.READ, extra=[str(process.pid)])

    with pytest.raises(GuestBusyError, match=f"traced by process {tracer.pid}"):
        inject.open_uffd_in(process.pid)

    tracer.close()
    assert_untouched(process)


def test_one_of_32_bits(tmp_path):
    program = tmp_path / "pause"
    program.write_bytes(_elf_32(CODE_32))
    program.chmod(0o755)
    try:
        process = subprocess.Popen([program])
    except OSError as error:
        pytest.skip(f"no programs of 32 bits here: {error}")
    try:
        wait_until(lambda: state_of(process.pid) == "S", 20, "the process to pause")
        with pytest.raises(MissingFeatureError, match="64 bits"):
            inject.open_uffd_in(process.pid)
        assert state_of(process.pid) == "S"
    finally:
        process.kill()
        process.wait()


def _elf_32(code):
    base, header_bytes = 0x08048000, 52 + 32
    header = b"\x7fELF\x01\x01\x01" + bytes(9)
    header += b"".join(n.to_bytes(2, "little") for n in (2, 3)) + (1).to_bytes(4, "little")
    header += b"".join(n.to_bytes(4, "little") for n in (base + header_bytes, 52, 0, 0))
    header += b"".join(n.to_bytes(2, "little") for n in (52, 32, 1, 0, 0, 0))
    total = header_bytes + len(code)
    segment = (1, 0, base, base, total, total, 5, 0x1000)
    return header + b"".join(n.to_bytes(4, "little") for n in segment) + code


def test_one_that_ends_in_the_middle():
    """Killed at any moment of it; the one who waits for it learns of its true end."""
    outcomes = set()
    for delay_us in range(0, 1500, 50):
        process = subprocess.Popen(["sleep", "60"])
        killer = threading.Thread(target=_kill_after, args=(process.pid, delay_us))
        killer.start()
        try:
            for _ in range(20):
                os.close(inject.open_uffd_in(process.pid).fd)
        except GuestGoneError:
            outcomes.add("gone")
        killer.join()
        assert process.wait(20) == -signal.SIGKILL
    assert outcomes == {"gone"}


def _kill_after(pid, delay_us):
    until = time.monotonic() + delay_us / 1e6
    while time.monotonic() < until:
        pass
    os.kill(pid, signal.SIGKILL)


def test_one_in_uninterruptible_sleep(start, tmp_path):
    process = start("spawn", extra=[str(tmp_path)])
    wait_until(lambda: state_of(process.pid) == "D", 20, "it to wait uninterruptibly")
    began = time.monotonic()

    with pytest.raises(GuestBusyError, match="stopped in time"):
        inject.open_uffd_in(process.pid, timeout_us=SHORT_US)

    assert time.monotonic() - began < 10 * SHORT_US / 1e6
    wait_until(lambda: tracer_of(process.pid) == 0, 20, "it to be let go of")
    with contextlib.suppress(BrokenPipeError), (tmp_path / "fifo").open("w"):
        pass
    assert process.answer() == {"status": 0}


@pytest.mark.root
def test_a_filter_that_kills_is_suspended(start):
    process = start("killed-for-it", blocked.READ)

    remote = inject.open_uffd_in(process.pid)
    inject.close_uffd_in(process.pid, remote.fd, remote.target_fd)

    os.close(remote.fd)
    assert_untouched(process)


# ---- with fewer rights: in a process that gives them up after its imports ----

WITHOUT_ADMIN = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
ATTEMPT = """
import json, os, sys
from migrate.errors import MigrateError
from migrate.native import inject
pid, uid, despite = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "despite"
if uid:
    os.setgroups([]), os.setresgid(uid, uid, uid), os.setresuid(uid, uid, uid)
try:
    print(json.dumps({"fd": inject.open_uffd_in(pid, despite_seccomp=despite, timeout_us=500_000).target_fd}))
except MigrateError as error:
    print(json.dumps({"error": type(error).__name__, "remedy": error.remedy, "text": error.message}), flush=True)
sys.stdin.read()
"""


def attempt(pid, uid=0, before=(), despite=False):
    """What becomes of an injection by another process of ours."""
    command = [*before, sys.executable, "-c", ATTEMPT, str(pid), str(uid), "despite" if despite else "-"]
    result = subprocess.run(command, input="", capture_output=True, text=True, timeout=30, check=True)
    return json.loads(result.stdout)


needs_setpriv = pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv(1)")


@pytest.mark.root
def test_one_of_another_user(start):
    process = start("read", blocked.READ)

    answer = attempt(process.pid, uid=NOBODY)

    assert answer["error"] == TraceUnavailableError.__name__
    assert "CAP_SYS_PTRACE" in answer["remedy"]
    assert_untouched(process)


@pytest.mark.root
def test_one_that_hides_from_its_own_user(start):
    process = start("as-nobody", blocked.READ)

    assert attempt(process.pid, uid=NOBODY)["error"] == TraceUnavailableError.__name__
    assert_untouched(process)


@pytest.mark.root
def test_one_that_may_not_have_a_userfaultfd(start):
    process = start("as-nobody", blocked.READ)
    device = Path("/dev/userfaultfd")
    is_open = device.exists() and device.stat().st_mode & 0o002
    if is_open or Path("/proc/sys/vm/unprivileged_userfaultfd").read_text() == "1\n":
        pytest.skip("anybody may have a userfaultfd here")

    with pytest.raises(UffdUnavailableError, match="may not call") as raised:
        inject.open_uffd_in(process.pid)

    assert "/dev/userfaultfd" in raised.value.remedy
    assert_untouched(process)


@pytest.mark.root
@pytest.mark.skipif(bool(unprivileged.why_not()), reason=unprivileged.why_not() or "-")
def test_one_without_privilege_opens_the_device(start, tmp_path):
    process = start("read", None, before=unprivileged.prefix(tmp_path))
    wait_until(lambda: blocked.syscall_of(process.pid) == blocked.READ, 20, "it to read")

    remote = inject.open_uffd_in(process.pid)
    assert list(descriptors_of(process.pid).values()).count("anon_inode:[userfaultfd]") == 1
    assert "/dev/userfaultfd" not in descriptors_of(process.pid).values()
    inject.close_uffd_in(process.pid, remote.fd, remote.target_fd)

    os.close(remote.fd)
    assert_untouched(process)


@pytest.mark.root
@needs_setpriv
def test_a_filter_that_may_kill_is_an_obstacle(start):
    process = start("killed-for-it", blocked.READ)

    answer = attempt(process.pid, before=WITHOUT_ADMIN)

    assert answer["error"] == TraceUnavailableError.__name__
    assert "preload" in answer["remedy"]
    assert_untouched(process)


@pytest.mark.root
@needs_setpriv
def test_a_filter_that_refuses_is_asked_if_told_so(start):
    process = start("refused-it", blocked.READ)

    assert attempt(process.pid, before=WITHOUT_ADMIN)["error"] == TraceUnavailableError.__name__
    answer = attempt(process.pid, before=WITHOUT_ADMIN, despite=True)

    assert answer["error"] == UffdUnavailableError.__name__
    assert_untouched(process)


@pytest.mark.root
@needs_setpriv
def test_a_filter_that_kills_ends_the_one_who_insists(start):
    process = start("killed-for-it", blocked.READ)

    answer = attempt(process.pid, before=WITHOUT_ADMIN, despite=True)

    assert answer["error"] == GuestGoneError.__name__
    assert process.process.wait(20) == -signal.SIGSYS


@pytest.mark.root
@needs_setpriv
def test_a_call_that_does_not_return_is_given_up_and_undone_when_it_does(start, tmp_path):
    fifo = tmp_path / "fifo"
    process = start("held-up", blocked.READ, extra=[str(fifo)])
    command = [*WITHOUT_ADMIN, sys.executable, "-c", ATTEMPT, str(process.pid), "0", "despite"]

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as attempting:
        answer = json.loads(attempting.stdout.readline())
        assert tracer_of(process.pid) != 0, "it is held until its call returns"
        fifo.write_text("")
        wait_until(lambda: tracer_of(process.pid) == 0, 20, "it to be let go of")

    assert answer["error"] == GuestBusyError.__name__
    assert "has not ended" in answer["text"]
    assert_untouched(process)
