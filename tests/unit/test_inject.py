"""A userfaultfd made inside another process: it goes on as if nothing had been, whatever it was doing."""

import contextlib
import errno
import os
import select
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from migrate.native import inject, uffd
from tests.harness import blocked
from tests.harness.blocked import Blocked, descriptors_of, state_of
from tests.harness.waiting import wait_until
from tests.harness.writer import PAGE, Writer

pytestmark = pytest.mark.uffd
USERFAULTFD = "anon_inode:[userfaultfd]"
TIMES = 5


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


def inject_and_undo(pid, times=TIMES):
    """Open a userfaultfd there and close it again, some times over."""
    for _ in range(times):
        remote = inject.open_uffd_in(pid)
        try:
            assert descriptors_of(pid)[remote.target_fd] == USERFAULTFD
            inject.close_uffd_in(pid, remote.fd, remote.target_fd)
        finally:
            os.close(remote.fd)
    assert USERFAULTFD not in descriptors_of(pid).values()


def test_the_copy_works_from_outside():
    writer = Writer(pages=16)
    remote = inject.open_uffd_in(writer.pid)
    reader = threading.Thread(target=writer.do, kwargs={"do": "read", "pages": [3]})
    try:
        uffd.shake_hands(remote.fd, with_missing=True)
        uffd.register_missing(remote.fd, writer.hva, 16 * PAGE)
        reader.start()
        assert select.select([remote.fd], [], [], 20)[0], "its fault is reported to us"
        uffd.unregister(remote.fd, writer.hva, 16 * PAGE)
        reader.join(20)
        assert descriptors_of(writer.pid)[remote.target_fd] == USERFAULTFD, "the process keeps its copy"
    finally:
        os.close(remote.fd)
        writer.close()
    assert not reader.is_alive()


FINISHED_BY_INPUT = [
    ("read", blocked.READ),
    ("poll", blocked.POLL),
    ("ppoll", blocked.PPOLL),
    ("pselect", blocked.PSELECT),
    ("epoll", blocked.EPOLL_WAIT),
]


@pytest.mark.parametrize(("call", "number"), FINISHED_BY_INPUT, ids=[call for call, _ in FINISHED_BY_INPUT])
def test_a_call_that_waits_for_input_goes_on_waiting(start, call, number):
    process = start(call, number)

    inject_and_undo(process.pid)
    wait_until(lambda: blocked.syscall_of(process.pid) in {number, 219}, 20, "the call to be taken up again")
    process.finish()

    assert process.answer()["result"] == 1


FINISHED_BY_TIME = [
    ("poll-timeout", blocked.POLL, 0),
    ("ppoll-timeout", blocked.PPOLL, 0),
    ("nanosleep", blocked.NANOSLEEP, 0),
    ("clock-nanosleep", blocked.CLOCK_NANOSLEEP, 0),
    ("futex-timeout", blocked.FUTEX, errno.ETIMEDOUT),
]


@pytest.mark.parametrize(("call", "number", "error"), FINISHED_BY_TIME, ids=[call for call, *_ in FINISHED_BY_TIME])
def test_a_call_with_a_timeout_ends_when_it_would_have(start, call, number, error):
    process = start(call, number)

    inject_and_undo(process.pid)

    answer = process.answer()
    assert answer["errno"] == error
    assert blocked.SLEEP_S - 0.001 <= answer["took"] < blocked.SLEEP_S + 1.2


def test_a_call_that_waits_for_a_signal_gets_it(start):
    process = start("sigtimedwait", blocked.SIGTIMEDWAIT)

    inject_and_undo(process.pid)
    os.kill(process.pid, signal.SIGUSR2)

    assert process.answer()["result"] == signal.SIGUSR2


@pytest.mark.parametrize(
    ("call", "number"),
    [("pause", blocked.PAUSE), ("poll-handled", blocked.POLL), ("epoll-handled", blocked.EPOLL_WAIT)],
)
def test_a_signal_afterwards_still_interrupts(start, call, number):
    process = start(call, number)

    inject_and_undo(process.pid)
    wait_until(lambda: state_of(process.pid) == "S", 20, "the call to be taken up again")
    os.kill(process.pid, signal.SIGUSR1)

    assert process.answer()["errno"] == errno.EINTR


def test_signals_in_between_all_arrive(start):
    process = start("count-signals", blocked.POLL)
    sent, stop = [0], threading.Event()

    def send():
        while not stop.is_set():
            os.kill(process.pid, signal.SIGRTMIN + 1)
            sent[0] += 1
            stop.wait(0.0003)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        inject_and_undo(process.pid, 100)
    finally:
        stop.set()
        sender.join()
    process.finish()

    answer = process.answer()
    assert answer["strange"] == [], "no errno but EINTR comes up"
    assert answer["received"] == sent[0] > 0


def test_a_process_that_computes_goes_on(start):
    process = start("compute")

    inject_and_undo(process.pid, 100)
    process.finish()

    answer = process.answer()
    assert answer["rounds"] > 0
    assert answer["same"]


def test_a_stopped_process_stays_stopped(start):
    process = start("read", blocked.READ)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: state_of(process.pid) == "T", 20, "the process to stop")

    inject_and_undo(process.pid)

    wait_until(lambda: state_of(process.pid) == "T", 20, "the process to be stopped again")
    os.kill(process.pid, signal.SIGCONT)
    wait_until(lambda: state_of(process.pid) == "S", 20, "the process to go on")
    process.finish()
    assert process.answer()["result"] == 1


def test_stops_and_continues_in_between_take_their_course(start):
    process = start("read", blocked.READ)
    stop = threading.Event()

    def send():
        while not stop.is_set():
            os.kill(process.pid, signal.SIGSTOP)
            stop.wait(0.0005)
            os.kill(process.pid, signal.SIGCONT)
            stop.wait(0.0005)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        inject_and_undo(process.pid, 50)
    finally:
        stop.set()
        sender.join()
    os.kill(process.pid, signal.SIGCONT)
    wait_until(lambda: state_of(process.pid) == "S", 20, "the process to go on")
    process.finish()
    assert process.answer()["result"] == 1


def test_closing_what_is_closed_already_is_nothing(start):
    process = start("read", blocked.READ)
    remote = inject.open_uffd_in(process.pid)
    inject.close_uffd_in(process.pid, remote.fd, remote.target_fd)

    assert inject.close_uffd_in(process.pid, remote.fd, remote.target_fd) == 0
    os.close(remote.fd)


def test_another_file_at_that_number_is_not_closed(start):
    process = start("read", blocked.READ)
    first, second = inject.open_uffd_in(process.pid), inject.open_uffd_in(process.pid)

    assert inject.close_uffd_in(process.pid, first.fd, second.target_fd) == 0

    assert second.target_fd in descriptors_of(process.pid)
    for remote in (first, second):
        os.close(remote.fd)


def test_a_main_thread_that_cannot_stop_is_passed_over(start, tmp_path):
    process = _spawning(start, tmp_path, "-threaded")

    inject_and_undo(process.pid, 1)

    _let_spawn(process, tmp_path)


def _spawning(start, tmp_path, suffix=""):
    process = start(f"spawn{suffix}", extra=[str(tmp_path)])
    wait_until(lambda: state_of(process.pid) == "D", 20, "its main thread to wait uninterruptibly")
    return process


def _let_spawn(process, tmp_path):
    with contextlib.suppress(BrokenPipeError), (tmp_path / "fifo").open("w"):
        pass
    assert process.answer() == {"status": 0}


def inject_blindly(pid):
    """Others do the same meanwhile."""
    remote = inject.open_uffd_in(pid)
    inject.close_uffd_in(pid, remote.fd, remote.target_fd)
    os.close(remote.fd)


def test_injections_from_many_threads_take_turns(start):
    process = start("poll", blocked.POLL)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(inject_blindly, process.pid) for _ in range(20)]:
            done.result(20)

    assert USERFAULTFD not in descriptors_of(process.pid).values()
    process.finish()
    assert process.answer()["result"] == 1
