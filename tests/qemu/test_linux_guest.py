"""The Linux guest runs in a plain QEMU, and says so itself."""

import os
import signal
import time

import pytest

from tests.harness.linux_guest import GuestPort, LinuxConsole, plain_qemu
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def guest(linux_image, tmp_path_factory):
    directory = tmp_path_factory.mktemp("guest")
    with plain_qemu(linux_image, directory):
        console = LinuxConsole(directory / "console")
        console.wait_until_ready()
        yield console, directory


def test_ticks_sums_and_versions_go_on_without_a_complaint(guest):
    console, _ = guest

    console.wait_for_more(ticks=10, sums=1, versions=2)

    console.check()


def test_its_http_server_tells_what_its_console_tells(guest):
    console, directory = guest
    console.wait_for_more(versions=1, ticks=1)
    before = console.report
    port = GuestPort(directory / "port")

    status, _ = port.status()
    later, _ = port.status()
    port.close()

    assert before.ticks <= status["ticks"] <= later["ticks"]
    assert before.versions_ok <= status["versions_ok"]
    assert (status["errors"], status["sums_bad"]) == (0, 0)
    assert later["uptime_us"] > status["uptime_us"]


def test_a_request_that_was_cut_does_not_spoil_the_next_one(guest):
    _, directory = guest
    first = GuestPort(directory / "port")
    first._socket.sendall(b"\xff\x00GET /status?cut HTT")
    first.close()
    second = GuestPort(directory / "port")

    status, _ = second.status()
    second.close()

    assert status["path"].startswith("/status?")


def test_small_data_is_a_smaller_guest(linux_image, tmp_path):
    with plain_qemu(linux_image, tmp_path, memory_mib=128, vcpus=1, data_mib=8, versions_mib=1):
        console = LinuxConsole(tmp_path / "console")
        console.wait_until_ready()
        console.wait_for_more(sums=2, versions=2, ticks=5)

    assert "ready data_mib=8 versions_mib=1 " in console.text


@pytest.mark.thorough
def test_a_guest_whose_cpus_stood_still_complains(linux_image, tmp_path):
    with plain_qemu(linux_image, tmp_path, memory_mib=128, data_mib=8, versions_mib=1) as qemu:
        console = LinuxConsole(tmp_path / "console")
        console.wait_until_ready()
        os.kill(qemu.pid, signal.SIGSTOP)
        # Its watchdog bites after 10 s, and there is no event to wait for in a guest that stands.
        time.sleep(12)
        os.kill(qemu.pid, signal.SIGCONT)
        wait_until(lambda: console.report.faults, 30, "the guest's kernel to complain")

    assert any("soft lockup" in fault for fault in console.report.faults)
