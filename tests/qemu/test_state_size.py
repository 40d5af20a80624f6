"""The state of a QEMU: as often as it stops, and more than a daemon takes."""

import contextlib
import os
import shutil

import pytest

from migrate.errors import QemuError
from migrate.guest.client import GuestClient
from migrate.guest.spawn import start_guest
from migrate.v1 import types_pb2 as types

pytestmark = pytest.mark.qemu

# A machine without an operating system.
OPTIONS = ["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]


@pytest.fixture
def start_qemu(tmp_path):
    if shutil.which("qemu-system-x86_64") is None:
        required = "qemu" in os.environ.get("MIGRATE_TEST_REQUIRE", "").split(",")
        (pytest.fail if required else pytest.skip)("qemu: there is no qemu-system-x86_64")
    with contextlib.ExitStack() as stack:

        def start(*options):
            spec = types.GuestSpec(name="g", kind=types.GUEST_KIND_QEMU, memory_bytes=64 << 20, vcpus=1)
            spec.qemu.options.extend([*OPTIONS, *options])
            process = start_guest(spec, tmp_path / "g.sock")
            stack.callback(process.kill)
            client = GuestClient(tmp_path / "g.sock", attach=True)
            stack.callback(client.close)
            return client

        yield start


@pytest.mark.parametrize("rom_bytes", [1 << 20, 4 << 20], ids=["one packet", "no packet"])
def test_a_state_that_is_too_large_is_said_so_each_time_and_the_guest_can_run_on(start_qemu, tmp_path, rom_bytes):
    # No boot ROM, by its first bytes, but a block of memory that is not RAM and not zero.
    rom = tmp_path / "rom"
    rom.write_bytes(os.urandom(rom_bytes))
    guest = start_qemu("-device", f"virtio-net-pci,romfile={rom}")
    guest.pause()

    for _ in range(2):
        with pytest.raises(QemuError, match=r"the state of its devices is .* more than 1020\.0 KiB"):
            guest.save_state()
    guest.resume()

    assert guest.look().state == types.GUEST_STATE_RUNNING


def test_a_guest_gives_its_state_each_time_that_it_stops(start_qemu):
    guest = start_qemu()
    for _ in range(3):
        guest.pause()
        state, _ = guest.save_state()
        again, _ = guest.save_state()
        guest.resume()

        assert state == again
        assert len(state) > 64 << 10
