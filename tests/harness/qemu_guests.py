"""Guests of kind qemu in daemons of ours, and QEMUs that are started without us."""

import contextlib
import socket
from pathlib import Path

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import types_pb2 as types
from tests.harness.linux_guest import MEMORY_MIB, VCPUS, LinuxConsole, linux_guest_options
from tests.harness.processes import is_alive
from tests.harness.waiting import wait_until

CREATE_S = 60
NAME = "linux"
MODES = {
    "postcopy": types.MIGRATION_MODE_POSTCOPY,
    "hybrid": types.MIGRATION_MODE_HYBRID,
    "precopy": types.MIGRATION_MODE_PRECOPY,
}


def allowing(*directories):
    """Options of a daemon that lets arriving guests use files there."""
    return [word for directory in directories for word in ("--qemu-dir", str(directory))]


def create_qemu(daemon, name, *options, memory_mib=32, vcpus=1):
    """`migrate guest create --kind qemu`."""
    spec = types.GuestSpec(
        name=name,
        kind=types.GUEST_KIND_QEMU,
        memory_bytes=memory_mib << 20,
        vcpus=vcpus,
        qemu=types.QemuSpec(options=options),
    )
    return daemon.guests.CreateGuest(guest.CreateGuestRequest(spec=spec), timeout=CREATE_S).guest


def attach_qemu(daemon, name, qmp_socket):
    """`migrate guest attach`."""
    spec = types.GuestSpec(name=name, kind=types.GUEST_KIND_QEMU, qemu=types.QemuSpec(qmp_socket=str(qmp_socket)))
    return daemon.guests.CreateGuest(guest.CreateGuestRequest(spec=spec), timeout=CREATE_S).guest


def linux_options(image, console, port="{dir}/port"):
    """The Linux guest, whose console is one file on whichever host of this machine it is."""
    return [
        *linux_guest_options(image),
        *("-chardev", f"file,id=console,path={console},append=on", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=port,path={port},server=on,wait=off", "-serial", "chardev:port"),
    ]


class MovingLinux:
    """The Linux guest, created at one of two daemons, and where it is now."""

    def __init__(self, image, source, destination, directory):
        self.source, self.destination = source, destination
        path = directory / "console"
        create_qemu(source, NAME, *linux_options(image, path), memory_mib=MEMORY_MIB, vcpus=VCPUS)
        self.console = LinuxConsole(path)
        self.console.wait_until_ready()

    def move(self, mode="postcopy", **terms):
        """Have it cross, and wait until its new host has let go of the migration."""
        moved = self.source.migrate(self.destination, NAME, mode=MODES[mode], **terms)
        assert moved.state == types.MIGRATION_STATE_COMPLETED, moved.error
        self.crossed()
        return moved

    def wait_placed(self, migration_id, pages):
        """Until so many pages of the background are at the destination, which may not know of the migration yet."""

        def is_placed():
            here = (each for each in self.destination.list() if each.migration_id == migration_id)
            return any(each.pages.background > pages for each in here)

        wait_until(is_placed, 30, f"{pages} pages to be placed")

    def crossed(self):
        """It is at the other one now."""
        self.source, self.destination = self.destination, self.source
        wait_until(lambda: not self.source.guest(NAME).migration_id, 20, "the new host to let go")

    def qemu_pid(self, daemon=None):
        """Of the QEMU that runs it."""
        shepherd = (daemon or self.source).guest(NAME).pid
        return qemu_of(shepherd)


def qemu_of(shepherd):
    """The QEMU that a guest process started."""
    for path in Path(f"/proc/{shepherd}/task").glob("*/children"):
        for child in path.read_text().split():
            if "qemu-system" in Path(f"/proc/{child}/comm").read_text():
                return int(child)
    raise AssertionError(f"guest process {shepherd} has no QEMU")


def userfaultfds(pid):
    """How many a process has open."""
    links = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(link.readlink()))
    return sum("userfaultfd" in link for link in links)


def wait_gone(pid):
    wait_until(lambda: not is_alive(pid), 20, f"process {pid} to be gone")


def answers_qmp(path):
    """Whether a QEMU says hello there; it has room for the next one afterwards."""
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(ConnectionError, FileNotFoundError):
        connection.settimeout(10)
        connection.connect(str(path))
        return b"QMP" in connection.recv(4096)
    return False
