"""The Linux guest of scripts/linux_guest in a QEMU: its command line, what its console tells, its HTTP server."""

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.harness.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
# Pinned: both sides must have the same one, whatever their versions of QEMU.
MACHINE = "pc-i440fx-7.2"
CPU_MODEL = "qemu64"
MEMORY_MIB, VCPUS = 512, 2
BOOT_DEADLINE_S = 50
REPLY_DEADLINE_S = 10

_IMPOSSIBLE = 77  # scripts/build_linux_guest
_BUILD_DEADLINE_S = 300
# Faster under TCG, and every complaint of the kernel with its level: <4>[   12.345678] clocksource: ...
_KERNEL_PARAMETERS = "console=ttyS0 console_msg_format=syslog loglevel=5 nokaslr mitigations=off init_on_alloc=0"

# What a kernel says of a CPU, a clock or a page that is not what it was. At any time, and whatever its level.
COMPLAINTS = [
    r"\bBUG\b",
    r"\bWARNING: ",
    r"\bOops\b",
    r"\bKernel panic\b",
    r"\bCall Trace\b",
    r"\b(?:soft|hard) lockup\b",
    r"\bblocked for more than\b",
    r"\brcu.*(?:stall|starved|self-detected)",
    r"\bclocksource.*(?:unstable|skew|watchdog)",
    r"\bclock.*(?:backward|jump)",
    r"\b(?:segfault|trap|general protection|invalid opcode)\b",
    r"\bBad (?:page|rss-counter)\b",
    r"\bcorrupt(?:ed|ion)\b",
    r"\b(?:Out of memory|oom-kill|page allocation failure)\b",
    r"\bspurious\b",
    r"\bnobody cared\b",
    r"\bmessages? dropped\b",
]
_COMPLAINT = re.compile("|".join(COMPLAINTS), re.IGNORECASE)
# Any warning of a kernel that has long booted is one too, but for this: an overloaded host causes it by itself.
_KERNEL_LINE = re.compile(r"<([0-7])>\[ *\d+\.\d+\] (.*)")
_HARMLESS = re.compile(r"hrtimer: interrupt took|perf: interrupt took")
# Nor of a clock, if both agree: a watchdog that came late and compares none (kernel/time/clocksource.c).
_LATE_WATCHDOG = re.compile(r"clocksource: Long readout interval, skipping .*: cs_nsec: (\d+) wd_nsec: (\d+)$")
_CLOCKS_AGREE_NS = 10_000_000
_WARNING_LEVEL = 4
_COUNTED = re.compile(r"(tick|sum ok|versions ok) (\d+)\b")


@dataclass
class ConsoleReport:
    """What a console tells: the last number of each counter, and what is wrong, in its order."""

    ready: bool = False
    ticks: int = 0
    sums_ok: int = 0
    versions_ok: int = 0
    faults: list[str] = field(default_factory=list)


def judge(text):
    """Read what a guest wrote since its boot, wherever it ran; a line that has no end yet does not count."""
    report = ConsoleReport()
    attributes = {"tick": "ticks", "sum ok": "sums_ok", "versions ok": "versions_ok"}
    for raw in text.split("\n")[:-1]:
        line = raw.strip("\r")
        kernel = _KERNEL_LINE.search(line)
        if counted := _COUNTED.match(line):
            attribute, number = attributes[counted[1]], int(counted[2])
            if number != getattr(report, attribute) + 1:
                report.faults.append(f"{counted[1]} {number} came after {getattr(report, attribute)}")
            setattr(report, attribute, number)
        elif line.startswith("ready "):
            report.ready = True
        elif kernel and _is_late_watchdog(kernel[2]):
            continue
        elif " BAD" in line or _COMPLAINT.search(line):
            report.faults.append(line)
        elif report.ready and not (kernel and (int(kernel[1]) > _WARNING_LEVEL or _HARMLESS.search(kernel[2]))):
            report.faults.append(f"not expected: {line}")
    return report


def _is_late_watchdog(said):
    late = _LATE_WATCHDOG.match(said)
    return late is not None and abs(int(late[1]) - int(late[2])) <= _CLOCKS_AGREE_NS


class LinuxConsole:
    """The first serial port of a guest: one file for each QEMU process that it ran in, in their order."""

    def __init__(self, *paths):
        self._paths = [Path(path) for path in paths]
        self._sizes = None
        self._report = ConsoleReport()

    def add(self, path):
        """The guest goes on in another QEMU process, which writes to this file."""
        self._paths.append(Path(path))

    @property
    def text(self):
        """All that was written; a line that was cut by the move is whole again."""
        return b"".join(path.read_bytes() for path in self._paths if path.exists()).decode(errors="replace")

    @property
    def report(self):
        """The verdict on what was written until now."""
        sizes = [path.stat().st_size if path.exists() else 0 for path in self._paths]
        if sizes != self._sizes:
            self._report, self._sizes = judge(self.text), sizes
        return self._report

    def check(self):
        """Fail if anything was ever wrong."""
        assert self.report.faults == [], self.text[-4000:]

    def wait_until_ready(self, deadline_s=BOOT_DEADLINE_S):
        """Wait until the guest has its data, and has begun to work."""
        self._wait(lambda report: report.ready and report.ticks, deadline_s, "the guest to have its data")

    def wait_for_more(self, *, ticks=0, sums=0, versions=0, deadline_s=30):
        """Wait for more of each; the second sum (or versions) from now is the first that began after now."""
        now = self.report
        wanted = (now.ticks + ticks, now.sums_ok + sums, now.versions_ok + versions)

        def reached(report):
            return all(
                have >= want
                for have, want in zip((report.ticks, report.sums_ok, report.versions_ok), wanted, strict=True)
            )

        self._wait(reached, deadline_s, f"the guest's ticks, sums and versions to reach {wanted}")

    def _wait(self, reached, deadline_s, what):
        def look():
            report = self.report
            return report.faults or reached(report)

        wait_until(look, deadline_s, what)
        self.check()


class GuestPort:
    """The HTTP server on the guest's second serial port, at the socket of whichever QEMU has the guest."""

    _numbers = itertools.count(1)

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._received = b""

    def status(self, deadline_s=REPLY_DEADLINE_S):
        """The guest's own account of itself, and how long it took to ask: (dict, seconds)."""
        path = f"/status?{os.getpid()}.{next(self._numbers)}"
        begun = time.monotonic()
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: guest\r\n\r\n".encode())
        while True:
            body = json.loads(self._read_reply(begun + deadline_s))
            # What an earlier request left behind, even one of another client, is not an answer to this one.
            if body["path"] == path:
                return body, time.monotonic() - begun

    def close(self):
        self._socket.close()

    def _read_reply(self, deadline):
        head = self._read_until(lambda data: data.find(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0, deadline)
        begin = head.rfind(b"HTTP/1.1 200 OK\r\n")
        length = re.search(rb"Content-Length: (\d+)", head[begin:])
        if begin < 0 or not length:
            return self._read_reply(deadline)
        length = int(length[1])
        return self._read_until(lambda data: length if len(data) >= length else 0, deadline)

    def _read_until(self, end_of, deadline):
        while not (end := end_of(self._received)):
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("QEMU closed the guest's port")
            self._received += data
        taken, self._received = self._received[:end], self._received[end:]
        return taken


@dataclass(frozen=True)
class LinuxImage:
    """What scripts/build_linux_guest made."""

    kernel: Path
    initramfs: Path


def build_linux_image():
    """Build the guest if that was not done yet: (image, None), or (None, why that is not possible here)."""
    if shutil.which(QEMU) is None:
        return None, f"there is no {QEMU}"
    directory = Path(os.environ.get("MIGRATE_LINUX_GUEST", ROOT / "build" / "linux-guest"))
    environment = os.environ | {"MIGRATE_LINUX_GUEST": str(directory), "LD_PRELOAD": ""}
    built = subprocess.run(
        [ROOT / "scripts" / "build_linux_guest"],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=_BUILD_DEADLINE_S,
    )
    if built.returncode == _IMPOSSIBLE:
        return None, built.stderr.strip().rpartition("\n")[2]
    assert built.returncode == 0, built.stderr
    return LinuxImage(directory / "vmlinuz", directory / "initramfs.cpio.gz"), None


def linux_guest_options(image, *, data_mib=256, versions_mib=16, writes_per_s=4000):
    """QEMU's options for the guest itself: no RAM, no vCPUs and no ports."""
    parameters = f"migrate.data_mib={data_mib} migrate.versions_mib={versions_mib} migrate.writes_per_s={writes_per_s}"
    options = ["-nodefaults", "-no-user-config", "-display", "none", "-machine", MACHINE]
    options += ["-accel", "tcg,thread=multi", "-cpu", CPU_MODEL]
    options += ["-kernel", str(image.kernel), "-initrd", str(image.initramfs)]
    return [*options, "-append", f"{_KERNEL_PARAMETERS} {parameters}"]


def port_options(directory):
    """QEMU's options for the two serial ports, as files of a directory: `console` and the socket `port`."""
    options = ["-chardev", f"file,id=console,path={directory}/console,append=on", "-serial", "chardev:console"]
    options += ["-chardev", f"socket,id=port,path={directory}/port,server=on,wait=off"]
    return [*options, "-serial", "chardev:port"]


@contextlib.contextmanager
def plain_qemu(image, directory, *options, memory_mib=MEMORY_MIB, vcpus=VCPUS, **guest):
    """A QEMU that runs the guest, with no migration in mind; a process that is ended whatever happens."""
    command = [QEMU, *linux_guest_options(image, **guest), *port_options(directory)]
    command += ["-m", f"{memory_mib}M", "-smp", str(vcpus), *options]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with (Path(directory) / "qemu.log").open("wb") as log:
        qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    try:
        yield qemu
    finally:
        qemu.kill()
        qemu.wait(20)
