"""What must be true after a run of chaos: one guest, whole, at one place, and nothing else left anywhere."""

import contextlib
import os

from migrate.guest.client import GuestClient
from migrate.guest.layout import layout_of
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness.chaos_side import NAME, SETTLE_S, ChaosError, wait_for
from tests.harness.processes import guest_pids, memory_fds

_PIECE_BYTES = 1 << 20
_VERSION_BYTES = 8
_BUGS = ("Traceback (most recent call last)", "Fatal Python error")


def check_gone(side):
    """A daemon has no guest, and no process of one."""
    wait_for(lambda: guest_pids(side.state_dir) == [], f"the {side.name} to have no guest process")
    wait_for(lambda: side.daemon.guest_names() == [], f"the {side.name} to have no guest")


def check_alone(side):
    """A daemon has the guest, free, running, in one process; what it says after it has compared all its pages."""
    daemon = side.daemon
    wait_for(lambda: daemon.guest(NAME).migration_id == "", f"the {side.name} to let the guest be moved")
    found = daemon.guest(NAME)
    pids = guest_pids(side.state_dir)
    if found.state != types.GUEST_STATE_RUNNING or pids != [found.pid]:
        raise ChaosError(f"guest {found.pid} is {types.GuestState.Name(found.state)}, processes are {pids}")
    touches = daemon.statistics(NAME).touches
    wait_for(lambda: daemon.statistics(NAME).touches > touches, f"the guest to touch pages at the {side.name}")
    return daemon.audit(NAME)


def compare_memory(spec, source_fd, destination):
    """Byte for byte, of a guest that never writes: its working set and the versions of its pages; how many pages."""
    layout = layout_of(spec)
    table_pages = -(-layout.working_pages * _VERSION_BYTES // PAGE_SIZE_BYTES)
    parts = ((layout.first_page, layout.working_pages), (layout.table_gpa // PAGE_SIZE_BYTES, table_pages))
    with contextlib.closing(GuestClient(destination.socket)) as client:
        _, _, _, (destination_fd,) = client.describe()
    try:
        wrong = [page for part in parts for page in _differing_pages(source_fd, destination_fd, *part)]
    finally:
        os.close(destination_fd)
    if wrong:
        raise ChaosError(f"{len(wrong)} pages differ from the source's: {wrong[:8]}")
    return sum(count for _, count in parts)


def check_lets_go(side):
    """A daemon has no memory of a guest open when nothing is moving."""
    pid = side.daemon.process.pid
    wait_for(lambda: memory_fds(pid) == [], f"the {side.name} to close the guest's memory")


def check_leaves_nothing(side):
    """Once its guests are deleted and it has ended, no process and no socket of a daemon is left."""
    for name in side.daemon.guest_names():
        side.daemon.guests.DeleteGuest(guest.DeleteGuestRequest(name=name), timeout=SETTLE_S)
    wait_for(lambda: guest_pids(side.state_dir) == [], f"no guest to be left at the {side.name}")
    side.daemon.close()
    left = [str(path.relative_to(side.state_dir)) for path in side.state_dir.rglob("*") if path.is_socket()]
    if left:
        raise ChaosError(f"sockets are left at the {side.name}: {left}")


def check_log(side):
    """No daemon and no guest has met an exception that nobody expected: it healed, but it is a bug."""
    bugs = [line for line in side.log.read_text(errors="replace").splitlines() if line.startswith(_BUGS)]
    if bugs:
        raise ChaosError(f"the {side.name}'s log has {len(bugs)} tracebacks")


def _differing_pages(one_fd, other_fd, first_page, count):
    wrong = []
    for offset in range(first_page * PAGE_SIZE_BYTES, (first_page + count) * PAGE_SIZE_BYTES, _PIECE_BYTES):
        size = min(_PIECE_BYTES, (first_page + count) * PAGE_SIZE_BYTES - offset)
        one, other = os.pread(one_fd, size, offset), os.pread(other_fd, size, offset)
        if one != other:
            wrong += [
                (offset + at) // PAGE_SIZE_BYTES
                for at in range(0, size, PAGE_SIZE_BYTES)
                if one[at : at + PAGE_SIZE_BYTES] != other[at : at + PAGE_SIZE_BYTES]
            ]
    return wrong
