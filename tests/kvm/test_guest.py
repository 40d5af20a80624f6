"""A guest process by itself: its state goes from one process to another, and its own check sees what was lost."""

import pytest

from migrate.errors import GuestBusyError, GuestGoneError, RemoteProtocolError
from migrate.guest.layout import layout_of
from migrate.native.pager import PageKind, Pager
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types
from tests.harness.guests import (
    KINDS,
    MEMORY_BYTES,
    PAGE,
    populated,
    read_ram,
    spec_of,
    state_of,
    twin_of,
    write_ram,
)
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]


def move(start, client, ram, state):
    """A twin with that RAM and state, running."""
    twin = twin_of(start, client)
    assert state_of(twin) == types.GUEST_STATE_INCOMING
    write_ram(twin, ram)
    twin.load_state(state)
    twin.resume()
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vcpus", [1, 8])
def test_state_and_ram_make_the_same_guest_elsewhere(start, kind, vcpus):
    client = populated(start, spec_of(kind, vcpus))
    client.pause()
    state, touches = client.save_state()
    assert client.statistics().touches == touches
    twin = move(start, client, read_ram(client), state)
    wait_until(lambda: twin.statistics().touches > touches, 10, "the twin to run")
    audited = twin.audit(10_000_000)
    assert (audited.errors, audited.first_error) == (0, "")
    assert client.statistics().touches == touches
    client.resume()
    assert client.audit(10_000_000).errors == 0


def first_offset(page):
    return (layout_of(spec_of()).first_page + page) * PAGE


def zero_page(ram, _):
    ram[first_offset(5) : first_offset(6)] = bytes(PAGE)


def swap_pages(ram, _):
    ram[first_offset(5) : first_offset(7)] = (
        ram[first_offset(6) : first_offset(7)] + ram[first_offset(5) : first_offset(6)]
    )


def tear_page(ram, _):
    ram[first_offset(5) + PAGE // 2 : first_offset(6)] = bytes(PAGE // 2)


def stale_pages(ram, old):
    ram[first_offset(0) :] = old[first_offset(0) :]


def stale_pages_and_versions(ram, old):
    table = layout_of(spec_of()).table_gpa
    ram[table:] = old[table:]


@pytest.mark.parametrize("damage", [zero_page, swap_pages, tear_page, stale_pages, stale_pages_and_versions])
def test_damaged_memory_is_counted(start, damage):
    client = populated(start, spec_of())
    client.pause()
    old = read_ram(client)
    client.resume()
    touches = client.statistics().touches
    wait_until(lambda: client.statistics().touches > touches + 50_000, 20, "pages to change")
    client.pause()
    state, _ = client.save_state()
    ram = read_ram(client)
    damage(ram, old)
    audited = move(start, client, ram, state).audit(10_000_000)
    assert audited.errors > 0
    assert audited.first_error.startswith("page ")


def test_lost_vector_register_is_counted(start):
    client = populated(start, spec_of())
    client.pause()
    state = pb.MachineState.FromString(client.save_state()[0])
    (xsave,) = [item for item in state.vcpus[0].items if item.name == "xsave"]
    # XMM15 in the legacy area of XSAVE (Intel SDM volume 1, 13.4.1).
    xmm15 = slice(160 + 15 * 16, 160 + 15 * 16 + 8)
    assert any(xsave.data[xmm15])
    xsave.data = xsave.data[: xmm15.start] + bytes(8) + xsave.data[xmm15.stop :]
    twin = move(start, client, read_ram(client), state.SerializeToString())
    wait_until(lambda: twin.statistics().errors > 0, 10, "the guest to miss its register")


def drop_vcpu(state):
    del state.vcpus[1]


def drop_item(state):
    del state.vcpus[0].items[0]


def cut_item(state):
    state.vcpus[0].items[0].data = state.vcpus[0].items[0].data[:-1]


def cut_mailbox(state):
    state.mailbox = state.mailbox[:-1]


def change_version(state):
    state.version = 2


def change_kind(state):
    state.kind = types.GUEST_KIND_PROCESS


@pytest.mark.parametrize("change", [drop_vcpu, drop_item, cut_item, cut_mailbox, change_version, change_kind])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(start, change):
    client = populated(start, spec_of())
    client.pause()
    good, _ = client.save_state()
    bad = pb.MachineState.FromString(good)
    change(bad)
    twin = twin_of(start, client)
    with pytest.raises(RemoteProtocolError):
        twin.load_state(bad.SerializeToString())
    with pytest.raises(GuestBusyError):
        twin.resume()
    write_ram(twin, read_ram(client))
    twin.load_state(good)
    twin.resume()
    assert twin.audit(10_000_000).errors == 0


def test_vcpu_that_waits_for_a_page_is_paused_or_said_to_run_on(start):
    """Some kernels let a signal end KVM_RUN's wait for a page, some do not; neither harms the guest."""
    client = populated(start, spec_of())
    client.pause()
    state, touches = client.save_state()
    twin = twin_of(start, client)
    fd, (hva,) = twin.arm()
    pager = Pager(fd, hva, MEMORY_BYTES // PAGE)
    pager.start_fault_thread()
    try:
        twin.load_state(state)
        twin.resume()
        wait_until(lambda: pager.counters().faults > 0, 10, "a vCPU to wait for a page")
        try:
            twin.pause()
            assert state_of(twin) == types.GUEST_STATE_PAUSED
            assert twin.statistics().touches == touches
            twin.resume()
        except GuestBusyError:
            assert state_of(twin) == types.GUEST_STATE_RUNNING
        ram = read_ram(client)
        for page in range(MEMORY_BYTES // PAGE):
            pager.place_data(page, 1, bytes(ram[page * PAGE : (page + 1) * PAGE]), PageKind.BACKGROUND, None)
        twin.disarm()
        assert twin.audit(10_000_000).errors == 0
    finally:
        pager.close()


def test_dead_guest_is_reported_as_gone(start):
    process, client = start(spec_of(), "source")
    process.kill()
    with pytest.raises(GuestGoneError):
        client.statistics()


def test_shutdown_ends_the_process_and_its_socket(start, tmp_path):
    process, client = start(spec_of(), "source")
    client.shutdown()
    wait_until(lambda: not (tmp_path / "source.sock").exists(), 10, "the socket to go")
    process.kill()
