"""A guest some of whose pages will never come: its vCPUs meet a memory error, its process lives and says so."""

import os
import re
import signal

import pytest

from migrate.errors import GuestGoneError
from migrate.guest.layout import layout_of
from migrate.native.pager import PageKind, Pager
from migrate.v1 import types_pb2 as types
from tests.harness.guests import KINDS, MEMORY_BYTES, PAGE, populated, read_ram, spec_of, state_of, twin_of
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]
PAGES = MEMORY_BYTES // PAGE
LOST = re.compile(r"vCPU (\d): memory error at guest address (0x[0-9a-f]+): the page was lost in a migration.*")


@pytest.fixture
def arrive(start):
    """Makes a running twin of a guest, some of whose pages have not come; the twin and its pager."""
    pagers = []

    def make(spec, is_lost):
        client = populated(start, spec)
        client.pause()
        state, _ = client.save_state()
        ram = read_ram(client)
        twin = twin_of(start, client)
        fd, (hva,) = twin.arm()
        pager = Pager(fd, hva, PAGES)
        pagers.append(pager)
        pager.start_fault_thread()
        for page in range(PAGES):
            if not is_lost(page):
                pager.place_data(page, 1, bytes(ram[page * PAGE : (page + 1) * PAGE]), PageKind.BACKGROUND, None)
        twin.load_state(state)
        twin.resume()
        return twin, pager

    yield make
    for pager in pagers:
        pager.close()


def lost_by(statistics):
    """vCPU and guest address of the first error."""
    found = LOST.fullmatch(statistics.first_error)
    assert found, statistics.first_error
    return found.groups()


def wait_failed(twin):
    wait_until(lambda: twin.statistics().errors, 10, "a memory error to be counted")
    return twin.statistics()


@pytest.mark.parametrize("kind", KINDS)
def test_vcpu_that_waits_for_a_lost_page_stops_and_the_other_runs_on(arrive, kind):
    """Every page of vCPU 1's own working set is lost, none of vCPU 0's."""
    spec = spec_of(kind)
    first_page = layout_of(spec).first_page
    twin, pager = arrive(spec, lambda page: page >= first_page and (page - first_page) % 2)
    wait_until(lambda: pager.counters().faults, 10, "a vCPU to wait for a page")
    assert twin.statistics().errors == 0
    missing = pager.counters().missing_pages
    assert pager.poison_missing() == missing > 0
    pager.stop()

    statistics = wait_failed(twin)
    assert statistics.errors == 1
    vcpu, address = lost_by(statistics)
    assert vcpu == "1"
    page = int(address, 16) // PAGE
    assert page >= first_page
    assert (page - first_page) % 2
    wait_until(lambda: twin.statistics().touches > statistics.touches + 10_000, 10, "the other vCPU to run on")
    twin.pause()
    assert state_of(twin) == types.GUEST_STATE_PAUSED
    twin.resume()
    assert twin.statistics().errors == 1


@pytest.mark.parametrize("kind", KINDS)
def test_lost_page_that_is_touched_later_is_a_memory_error(arrive, kind):
    """The last page is the only one; all vCPUs but one never touch it."""
    spec = spec_of(kind, vcpus=4)
    twin, pager = arrive(spec, lambda page: page == PAGES - 1)
    assert pager.poison_missing() == 1
    pager.stop()
    statistics = wait_failed(twin)
    assert statistics.errors == 1
    vcpu, address = lost_by(statistics)
    assert int(address, 16) // PAGE == PAGES - 1
    assert int(vcpu) == (PAGES - 1 - layout_of(spec).first_page) % 4


@pytest.mark.parametrize("kind", KINDS)
def test_guest_of_which_nothing_came_lives_as_a_process(arrive, kind):
    """Not even its page tables and its code."""
    twin, pager = arrive(spec_of(kind, vcpus=8), lambda _: True)
    wait_until(lambda: pager.counters().faults, 10, "a vCPU to wait for a page")
    assert pager.poison_missing() == PAGES
    statistics = wait_failed(twin)
    assert statistics.errors == 1
    # What KVM cannot read for the vCPU, it cannot tell the address of.
    assert "lost in a migration" in statistics.first_error
    twin.pause()

    assert state_of(twin) == types.GUEST_STATE_PAUSED


@pytest.mark.parametrize("kind", KINDS)
def test_bus_error_that_is_not_the_guests_ends_the_process(start, kind):
    process, client = start(spec_of(kind), "source")
    wait_until(lambda: state_of(client) == types.GUEST_STATE_RUNNING, 20, "population")
    os.kill(process.pid, signal.SIGBUS)
    with pytest.raises(GuestGoneError):
        wait_until(lambda: client.statistics() and False, 10, "the process to end")
