"""The preload library: what it tells of, and that a process is none the worse for it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.errors import RemoteProtocolError
from migrate.native import preload, uffd
from migrate.native.dirty_scan import DirtyScan
from tests.harness.blocked import descriptors_of
from tests.harness.writer import PAGE, Writer

PAGES = 256
USERFAULTFD = "anon_inode:[userfaultfd]"


@pytest.fixture
def listener(tmp_path):
    with preload.listen(tmp_path / "s") as listening:
        listening.settimeout(20)
        yield listening


@pytest.fixture
def start(tmp_path):
    """Starts a writer with the library, which ends with the test."""
    started = []

    def start_one(least_bytes=PAGES * PAGE, path=tmp_path / "s", **options):
        environment = {**os.environ, **preload.environment(path, least_bytes)}
        started.append(Writer(PAGES, env=environment, **options))
        return started[-1]

    yield start_one
    for writer in started:
        writer.close()


@pytest.mark.uffd
def test_a_mapping_is_told_of_and_can_be_served_and_scanned(listener, start):
    writer = start()
    with listener.accept()[0] as connection:
        told = preload.receive(connection)

    status = os.fstat(writer.memfd)
    assert (told.pid, told.hva, told.length_bytes) == (writer.pid, writer.hva, PAGES * PAGE)
    assert (told.device, told.inode, told.file_offset_bytes) == (status.st_dev, status.st_ino, 0)
    fds = list(descriptors_of(writer.pid).values())
    assert fds.count(USERFAULTFD) == 1, "the process keeps its copy"
    assert not [fd for fd in fds if "pagemap" in fd]
    uffd.shake_hands(told.uffd, with_missing=True, with_wp=True)
    scan = DirtyScan(told.uffd, told.pagemap_fd, told.hva, told.length_bytes)
    writer.do(do="write", pages=[3], version=1)
    bitmap = bytearray(PAGES // 8)
    assert scan.sync(bitmap) == 1
    assert bitmap[0] == 1 << 3
    scan.stop()
    for fd in (told.uffd, told.pagemap_fd):
        os.close(fd)


def test_a_smaller_mapping_is_not_told_of(listener, start):
    writer = start(least_bytes=PAGES * PAGE + 1)

    assert writer.do(do="count") == 0
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_without_a_daemon_the_process_goes_on_and_says_why(start, tmp_path):
    writer = start(stderr=subprocess.PIPE)

    writer.do(do="write", pages=[1], version=7)

    assert writer.read()[PAGE] == 7
    line = writer.process.stderr.readline().decode()
    assert line == f"migrate preload: {tmp_path / 's'}: No such file or directory\n"
    assert USERFAULTFD not in descriptors_of(writer.pid).values()
    writer.process.stderr.close()


def test_a_path_that_is_too_long_is_said(start, tmp_path):
    writer = start(path=tmp_path / ("long" * 40), stderr=subprocess.PIPE)

    assert writer.process.stderr.readline().endswith(b"File name too long\n")
    writer.process.stderr.close()


def test_nothing_is_done_unless_it_is_told_where_to():
    code = "import mmap, os; fd = os.memfd_create('m'); os.ftruncate(fd, 1 << 20); mmap.mmap(fd, 1 << 20)"
    environment = {**os.environ, "LD_PRELOAD": preload.environment(".", 0)["LD_PRELOAD"]}

    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=30, check=True)

    assert result.stderr == b""


def test_a_failed_mmap_says_why():
    code = "import mmap, os; fd = os.memfd_create('m', 0); mmap.mmap(os.open('/', os.O_RDONLY), 4096)"
    environment = {**os.environ, **preload.environment("s", 0)}

    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=30, check=False)

    assert b"migrate preload" not in result.stderr
    assert b"Error" in result.stderr


@pytest.mark.parametrize("message", [b"", b"x" * 48, b"x" * 49])
def test_what_is_not_from_the_library_is_refused(message):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, Path(os.devnull).open() as null:
        socket.send_fds(theirs, [message], [null.fileno()] * 2)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(RemoteProtocolError):
            preload.receive(ours)
        assert len(os.listdir("/proc/self/fd")) == before
