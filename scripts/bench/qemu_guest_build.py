"""Builds the bare guest of qemu_guest/ and reads what it says of itself."""

import struct
from dataclasses import dataclass
from pathlib import Path

from bench_common import BenchError, run, tool

import migrate
from migrate.guest.layout import layout_of
from migrate.native.machine import MAILBOX_BYTES, PARAMS_GPA, STALL_BUCKETS
from migrate.telemetry.histogram import bucket_midpoint_ticks, distribution_of_ticks
from migrate.units import PAGE_SIZE_BYTES
from migrate.v1 import types_pb2 as types

MEMORY_MAX_BYTES = 3 << 30  # above it, a PC has a hole for devices
STALL_MIN_US = 15.0
AUDIT_REQUESTED_OFFSET = 64  # in a mailbox

# The workload's RAM begins above the firmware's holes and the guest's own code, on a 2 MiB boundary.
_RAM_GPA = 4 << 20
_SEED = 1
_SOURCES = Path(__file__).with_name("qemu_guest")
_COMPILE = [
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-D_GNU_SOURCE",
    "-ffreestanding",
    "-fno-pic",
    "-fno-pie",
]
_COMPILE += ["-fcf-protection=none", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"]


@dataclass(frozen=True, slots=True)
class BareGuest:
    """A multiboot file, where its mailbox lies, and how much it touches."""

    path: Path
    memory_bytes: int
    mailbox_gpa: int
    working_set_bytes: int


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What a guest has counted (native/mailbox.h)."""

    touches: int
    errors: int
    first_error: tuple[int, int, int]
    stall_max_ticks: int
    populated: bool
    audits: int
    histogram: tuple[int, ...]

    @staticmethod
    def parse(data: bytes) -> "Mailbox":
        """Read the two pages of a mailbox.

        Raises:
            BenchError: not that many bytes.
        """
        if len(data) != MAILBOX_BYTES:
            raise BenchError(f"a mailbox has {MAILBOX_BYTES} bytes, not {len(data)}")
        touches, _, errors, *first_error, stall_max_ticks, populated, _, audits = struct.unpack_from("<10Q", data)
        page, expected, found = first_error
        histogram = struct.unpack_from(f"<{STALL_BUCKETS}I", data, MAILBOX_BYTES - 4 * STALL_BUCKETS)
        return Mailbox(touches, errors, (page, expected, found), stall_max_ticks, bool(populated), audits, histogram)


def stalls_between(before: Mailbox, after: Mailbox, tsc_khz: int) -> types.Distribution:
    """The stalls that a guest counted since an earlier mailbox, of STALL_MIN_US and more.

    The longest is exact if it is the longest ever, else the middle of its bucket, off by 1/64 at most.
    """
    buckets = [late - early for early, late in zip(before.histogram, after.histogram, strict=True)]
    if min(buckets) < 0:
        raise BenchError("the guest's histogram went backwards")
    max_ticks = after.stall_max_ticks
    if max_ticks <= before.stall_max_ticks:
        last = max((bucket for bucket, count in enumerate(buckets) if count), default=0)
        max_ticks = round(bucket_midpoint_ticks(last))
    return distribution_of_ticks(buckets, tsc_khz, max_ticks, STALL_MIN_US)


def build_guest(memory_bytes: int, directory: Path) -> BareGuest:
    """Compile and link the guest, with the layout of our own guest in the RAM above _RAM_GPA.

    Raises:
        BenchError: too much memory for it, or the compiler failed.
    """
    if memory_bytes > MEMORY_MAX_BYTES:
        raise BenchError("the bare guest has at most 3 GiB: its memory must lie in one piece")
    spec = types.GuestSpec(kind=types.GUEST_KIND_KVM, memory_bytes=memory_bytes - _RAM_GPA, vcpus=1)
    layout = layout_of(spec)
    values = {
        "RAM_GPA": _RAM_GPA,
        "WRITE_THRESHOLD": 1 << 31,
        "WORKING_PAGES": layout.working_pages,
        "FIRST_PAGE": layout.first_page,
        "TABLE_OFFSET": layout.table_gpa,
        "STATE_OFFSET": layout.state_gpa,
        "SEED": _SEED,
    }
    if layout.state_gpa <= PARAMS_GPA:
        raise BenchError("the layout of our guest is not what this benchmark knows")
    native = Path(migrate.__file__).parent / "native"
    defines = [f"-DGUEST_{name}={value:#x}" for name, value in values.items()]
    objects = []
    for source in (_SOURCES / "start.S", _SOURCES / "main.c", native / "payload.c"):
        objects.append(str(directory / f"{source.name}.o"))
        run([tool("gcc"), *_COMPILE, f"-I{native}", *defines, "-c", str(source), "-o", objects[-1]])
    linked, guest = directory / "guest64.elf", directory / "guest.elf"
    link = [tool("ld"), "-m", "elf_x86_64", "-nostdlib", "-static", "-z", "max-page-size=4096"]
    link += ["-T", str(_SOURCES / "guest.ld"), f"--defsym=GUEST_RAM_GPA={_RAM_GPA:#x}"]
    run([*link, *objects, "-o", str(linked)])
    # QEMU's multiboot loader takes no 64-bit file, whatever its code does later.
    run([tool("objcopy"), "-O", "elf32-i386", str(linked), str(guest)])
    symbols = [line.split() for line in run([tool("nm"), str(linked)]).splitlines()]
    mailbox_gpa = next(int(words[0], 16) for words in symbols if words[-1] == "mailbox")
    return BareGuest(guest, memory_bytes, mailbox_gpa, layout.working_pages * PAGE_SIZE_BYTES)
