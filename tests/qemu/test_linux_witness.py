"""The Linux guest finds memory that is not what it wrote: whoever moves it wrongly will hear of it."""

import itertools
import struct

import pytest

from tests.harness.linux_guest import LinuxConsole, plain_qemu
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.qemu

MEMORY_MIB = 128
PAGE = 4096
# How the words of a block go on (word_of in guest_workload.c), which no other page has.
STEP = 0x9E3779B97F4A7C15


def is_block(page):
    first, second, third = struct.unpack_from("<3Q", page)
    return (second - first) % (1 << 64) == (third - second) % (1 << 64) == STEP


def is_data(page, after):
    """Whether a page is of the file of random data: one xorshift goes on from its end to the next one's begin."""
    (state,) = struct.unpack_from("<Q", page, PAGE - 8)
    for shift in (13, -7, 17):
        state ^= (state << shift) % (1 << 64) if shift > 0 else state >> -shift
    return state != 0 and struct.pack("<Q", state) == after[:8]


def pages_of(ram):
    ram.seek(0)
    return [ram.read(PAGE) for _ in range(MEMORY_MIB * 256)]


@pytest.fixture
def guest(linux_image, tmp_path):
    ram = tmp_path / "ram"
    backend = f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={ram},share=on"
    options = ["-object", backend, "-machine", "memory-backend=ram"]
    with plain_qemu(linux_image, tmp_path, *options, memory_mib=MEMORY_MIB, data_mib=8, versions_mib=1):
        console = LinuxConsole(tmp_path / "console")
        console.wait_until_ready()
        console.wait_for_more(versions=1, sums=1)
        with ram.open("r+b", buffering=0) as file:
            yield console, file


def wait_for_fault(console, beginning):
    wait_until(lambda: console.report.faults, 30, "the guest to find a fault")
    assert all(fault.startswith(beginning) for fault in console.report.faults)


def test_a_stale_block_is_found(guest):
    console, ram = guest
    before = {number: page for number, page in enumerate(pages_of(ram)) if is_block(page)}
    console.wait_for_more(versions=2)
    # A block that was rewritten meanwhile gets the contents that were right a moment ago.
    number, old = next((number, old) for number, old in before.items() if old != pages_of(ram)[number])
    ram.seek(number * PAGE)
    ram.write(old)

    wait_for_fault(console, "versions BAD")


def test_a_bit_of_the_data_that_changed_is_found(guest):
    console, ram = guest
    number = next(number for number, pair in enumerate(itertools.pairwise(pages_of(ram))) if is_data(*pair))
    ram.seek(number * PAGE + 100)
    (byte,) = ram.read(1)
    ram.seek(number * PAGE + 100)
    ram.write(bytes([byte ^ 1]))

    wait_for_fault(console, "sum BAD")
