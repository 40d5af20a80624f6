"""One migration between two QEMUs: postcopy with a preempting channel, of the guest of qemu_guest/."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_common import BenchError, Host, Link, process, run, tool, wait_until, warm_memory
from qemu_guest_build import BareGuest, Mailbox, stalls_between

from migrate.native.machine import MAILBOX_BYTES

# Before the switchover nearly nothing shall move, as in our postcopy mode.
PRECOPY_BYTES_PER_S = 1 << 16
# The guest is well under way when it has touched this many pages (our guest waits for as many).
TOUCHES_BEFORE = 1_000_000

_CAPABILITIES = ("events", "postcopy-ram", "postcopy-preempt")
_PORT = 4444  # in a namespace of our own
_START_S, _POPULATE_S, _MIGRATE_S, _REPLY_S = 20, 120, 120, 20
_RECEIVE_BYTES = 1 << 16
# From linux/kvm.h.
_KVM_CREATE_VM, _KVM_CREATE_VCPU, _KVM_GET_TSC_KHZ = 0xAE01, 0xAE41, 0xAEA3

Message = dict[str, Any]


class Monitor:
    """A QMP connection. Events are kept in the order of their arrival; their timestamps are QEMU's own."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._received = b""
        self.events: list[Message] = []
        self._receive(lambda message: "QMP" in message, _REPLY_S, "greeting")
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> Any:
        """Run a command and return what it returned.

        Raises:
            BenchError: QEMU refused, is silent, or is gone.
        """
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        reply = self._receive(lambda message: "return" in message or "error" in message, _REPLY_S, name)
        if "error" in reply:
            raise BenchError(f"QEMU refuses {name}: {reply['error']['desc']}")
        return reply["return"]

    def wait_event(self, wanted: Callable[[Message], bool], deadline_s: float, what: str) -> float:
        """The time of the first event that is wanted, in seconds of the wall clock, perhaps one that is here already.

        Raises:
            BenchError: it does not come, or the migration failed.
        """
        for event in self.events:
            if wanted(event):
                return _event_s(event)
        return _event_s(self._receive(wanted, deadline_s, what))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _receive(self, wanted: Callable[[Message], bool], deadline_s: float, what: str) -> Message:
        deadline = time.monotonic() + deadline_s
        while True:
            line = self._read_line(deadline, what)
            message: Message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            if wanted(message):
                return message
            if _status(message) in ("failed", "postcopy-paused"):
                raise BenchError(f"QEMU's migration is {_status(message)}")

    def _read_line(self, deadline: float, what: str) -> bytes:
        while b"\n" not in self._received:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise BenchError(f"QEMU does not tell its {what}")
            self._socket.settimeout(remaining_s)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except TimeoutError:
                continue
            except OSError as error:
                raise BenchError(f"QEMU's monitor: {error}") from error
            if not data:
                raise BenchError("QEMU closed its monitor")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line


class Qemu:
    """A running QEMU and its monitor."""

    def __init__(self, monitor: Monitor, guest: BareGuest, directory: Path) -> None:
        self.monitor = monitor
        self._guest = guest
        self._file = directory / "mailbox"

    def mailbox(self) -> Mailbox:
        """The guest's mailbox as it is now, read from its memory."""
        where = {"val": self._guest.mailbox_gpa, "size": MAILBOX_BYTES, "filename": str(self._file)}
        self.monitor.command("pmemsave", **where)
        return Mailbox.parse(self._file.read_bytes())

    def set_up_migration(self) -> None:
        """Give both sides what they must agree on."""
        wanted = [{"capability": name, "state": True} for name in _CAPABILITIES]
        self.monitor.command("migrate-set-capabilities", capabilities=wanted)
        limits = {"max-bandwidth": PRECOPY_BYTES_PER_S, "max-postcopy-bandwidth": 0}
        self.monitor.command("migrate-set-parameters", **limits)


def qemu_version(binary: str) -> str:
    """The first line of `--version`."""
    return run([tool(binary), "--version"]).splitlines()[0]


def tsc_khz() -> int:
    """The TSC rate that KVM gives a vCPU here, which is the rate of QEMU's guests too.

    Raises:
        BenchError: KVM is not to be had.
    """
    opened: list[int] = []
    try:
        opened.append(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        opened.append(fcntl.ioctl(opened[-1], _KVM_CREATE_VM, 0))
        opened.append(fcntl.ioctl(opened[-1], _KVM_CREATE_VCPU, 0))
        rate = fcntl.ioctl(opened[-1], _KVM_GET_TSC_KHZ, 0)
    except OSError as error:
        raise BenchError(f"/dev/kvm: {error}") from error
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)
    if rate <= 0:
        raise BenchError("KVM does not know its TSC rate")
    return int(rate)


def migrate_with_qemu(binary: str, guest: BareGuest, link: Link, directory: Path) -> dict[str, float]:
    """Move the guest once; downtime, total time and the guest's stalls.

    Raises:
        BenchError: it failed, or the guest's memory was wrong afterwards.
    """
    with contextlib.ExitStack() as stack:
        directories = [directory / side for side in ("source", "destination")]
        for side in directories:
            side.mkdir(exist_ok=True)
        source = stack.enter_context(_qemu(binary, guest, link.source, directories[0], ()))
        wait_until(lambda: source.mailbox().touches >= TOUCHES_BEFORE, _POPULATE_S, "QEMU's guest to populate its RAM")
        destination = stack.enter_context(
            _qemu(binary, guest, link.destination, directories[1], ("-incoming", "defer"))
        )
        warm_memory(guest.memory_bytes)
        return _migrate(source, destination, f"tcp:{link.destination.address}:{_PORT}")


def _migrate(source: Qemu, destination: Qemu, uri: str) -> dict[str, float]:
    for qemu in (source, destination):
        qemu.set_up_migration()
    destination.monitor.command("migrate-incoming", uri=uri)
    source.monitor.command("migrate", uri=uri)
    source.monitor.command("migrate-start-postcopy")
    completed_s = source.monitor.wait_event(_is_completed, _MIGRATE_S, "end of the migration")
    stop_s = source.monitor.wait_event(lambda event: event.get("event") == "STOP", _REPLY_S, "stop")
    resume_s = destination.monitor.wait_event(lambda event: event.get("event") == "RESUME", _REPLY_S, "start")
    destination.monitor.wait_event(_is_completed, _REPLY_S, "end of the migration at the destination")
    after = destination.mailbox()
    # The source is stopped since its STOP: its memory is that of the switchover.
    before = source.mailbox()
    check_guest(before, after)
    stalls = stalls_between(before, after, tsc_khz())
    ram = source.monitor.command("query-migrate")["ram"]
    figures = {f"stall_{name}_us": getattr(stalls, name) for name in ("mean", "p50", "p90", "p99", "p999", "max")}
    figures["stalled_us"] = stalls.mean * stalls.count
    # QEMU tells of its stop once the vCPUs stand, and of its start just before they run.
    figures["downtime_us"] = (resume_s - stop_s) * 1e6
    # The source is done when the destination has acknowledged that all is there.
    figures["total_us"] = (completed_s - stop_s) * 1e6
    return {
        **{name: round(value, 1) for name, value in figures.items()},
        "stalls": stalls.count,
        "bytes_on_wire": ram["transferred"],
        "precopy_bytes": ram.get("precopy-bytes", 0),
        "touches_after": after.touches - before.touches,
    }


def check_guest(before: Mailbox, after: Mailbox) -> None:
    """Whether a guest runs on, and all that it touched was right.

    Raises:
        BenchError: it does not, or was not.
    """
    if after.errors or not after.populated:
        raise BenchError(f"QEMU's guest found {after.errors} errors, the first: {after.first_error}")
    if after.touches <= before.touches:
        raise BenchError("QEMU's guest does not run at the destination")


def machine_options(guest: BareGuest) -> list[str]:
    """The machine that the guest runs on, but for RAM and vCPUs."""
    options = ["-nodefaults", "-no-user-config", "-display", "none", "-kernel", str(guest.path)]
    # IA32_ARCH_CAPABILITIES: some KVMs announce it and then refuse to set it, and QEMU gives up.
    return [*options, "-machine", "pc,accel=kvm", "-cpu", "host,-arch-capabilities"]


@contextlib.contextmanager
def _qemu(binary: str, guest: BareGuest, host: Host, directory: Path, options: tuple[str, ...]) -> Iterator[Qemu]:
    path, log = directory / "qmp", directory / "log"
    path.unlink(missing_ok=True)
    command = [*host.inside, tool(binary), *machine_options(guest)]
    command += ["-smp", "1", "-m", f"{guest.memory_bytes >> 20}M"]
    command += ["-qmp", f"unix:{path},server=on,wait=off", *options]
    with process(command, log=log) as started:

        def connect() -> Monitor | None:
            if started.poll() is not None:
                raise BenchError(f"QEMU ended at once: {log.read_text(errors='replace').strip()[-500:]}")
            try:
                return Monitor(path)
            except OSError:
                return None

        monitor = wait_until(connect, _START_S, "QEMU's monitor")
        try:
            yield Qemu(monitor, guest, directory)
        except BenchError as error:
            said = log.read_text(errors="replace").strip()[-500:]
            raise BenchError(f"{error}; {said}" if said else str(error)) from error
        finally:
            monitor.close()


def _status(message: Message) -> str:
    if message.get("event") != "MIGRATION":
        return ""
    return str(message["data"]["status"])


def _is_completed(message: Message) -> bool:
    return _status(message) == "completed"


def _event_s(event: Message) -> float:
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
