"""What happens in a run of chaos: a guest, a migration and what befalls it, all of it chosen by a seed and a number."""

import random
from dataclasses import dataclass
from enum import Enum

from migrate.barriers import Point
from tests.harness.fault_proxy import Direction

EVENTS_MAX = 5
# Barriers are taken by turns, so that all are; each so many-th run has none but by chance.
_RUNS_WITHOUT = 4
_BY_PRECOPY = {Point.SOURCE_PRECOPY, Point.DESTINATION_INVALIDATED}
_MODES = ("postcopy", "hybrid", "precopy")
_WORKLOADS = ("uniform", "zipf", "sequential", "idle")


class Kind(Enum):
    """What befalls a migration."""

    KILL_SOURCE = "kill source"
    KILL_DESTINATION = "kill destination"
    KILL_BOTH = "kill both"
    CUT = "cut"
    RESET = "reset"
    HALF_CLOSE = "half-close"
    BLACKHOLE = "blackhole"
    REFUSE = "refuse"
    CORRUPT = "corrupt"


KILLS = (Kind.KILL_SOURCE, Kind.KILL_DESTINATION, Kind.KILL_BOTH)
# A link heals after a while: both less and more than a peer waits.
_LASTING = (Kind.BLACKHOLE, Kind.REFUSE)


class Links(Enum):
    """Which links something happens to. Control calls carry no digests, so only the pages' link corrupts."""

    CONTROL = "control"
    PAGES = "pages"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that befalls a migration.

    Attributes:
        kind: What.
        at_s: When, after the start; None if at a barrier.
        barrier: The point at which a daemon is held for it; None if at a time.
        links: For all kinds but kills.
        direction: For kinds that have one.
        after_bytes: Of CUT and CORRUPT: how many bytes later, in `direction`; -1 is at once.
        pause_s: Until a killed daemon is started again, or a link heals.
    """

    kind: Kind
    at_s: float | None = None
    barrier: Point | None = None
    links: Links | None = None
    direction: Direction = Direction.DOWN
    after_bytes: int = -1
    pause_s: float = 0.0

    def __str__(self):
        words = [self.kind.value]
        words += [] if self.links is None else [self.links.value]
        if self.kind in (Kind.HALF_CLOSE, Kind.CORRUPT) or self.after_bytes >= 0:
            words.append(self.direction.name.lower())
        words += [f"{self.after_bytes} bytes on"] if self.after_bytes >= 0 else []
        words.append(f"at {self.at_s:.2f} s" if self.barrier is None else f"at {self.barrier.value}")
        words += [f"for {self.pause_s:.2f} s"] if self.pause_s else []
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        number: Of the run.
        kind: Of the guest.
        mode, transport, compression, verify: Of the migration.
        bandwidth_bytes_per_s: Cap of its background.
        peer_timeout_us: When it takes its peer for lost.
        memory_mib, vcpus, workload, write_ratio, touch_rate_per_s: Of the guest.
        events: What befalls it.
    """

    number: int
    kind: str
    mode: str
    transport: str
    compression: str
    verify: bool
    bandwidth_bytes_per_s: int
    peer_timeout_us: int
    memory_mib: int
    vcpus: int
    workload: str
    write_ratio: float
    touch_rate_per_s: int
    events: tuple[Event, ...]

    def __str__(self):
        extras = [self.transport] + [self.compression] * (self.compression != "none") + ["verify"] * self.verify
        rate = f" {self.touch_rate_per_s}/s" if self.touch_rate_per_s else ""
        return (
            f"{self.mode} {self.kind} {self.memory_mib} MiB, {self.vcpus} vCPUs, {self.workload}{rate},"
            f" {self.write_ratio:g} writes, {' '.join(extras)}, {self.bandwidth_bytes_per_s / 1e6:.0f} MB/s"
        )


def plan_of(seed, number, *, quick=False, kinds=("kvm", "process"), events_max=EVENTS_MAX):
    """The plan of a run.

    Args:
        seed: Of all runs.
        number: Of this one.
        quick: Small guests and short pauses, for tests.
        kinds: Of guests, the usual one first.
        events_max: 0 is a run to which nothing happens.
    """
    chooser = random.Random(f"{seed}/{number}")  # noqa: S311 - the same run each time
    turn = _barrier_of_turn(number)
    kind = chooser.choice([kinds[0]] * 9 + [kinds[-1]])
    if turn in _BY_PRECOPY:
        kind = kinds[0]
    # Only a vCPU's writes are logged, so a process knows postcopy alone.
    mode = chooser.choice(_MODES) if kind == "kvm" else "postcopy"
    if turn in _BY_PRECOPY and mode == "postcopy" and kind == "kvm":
        mode = "hybrid"
    memory_mib = 64 if quick else chooser.choice((64, 96, 128, 192, 256))
    planned_s = chooser.uniform(0.4, 0.8) if quick else chooser.uniform(0.8, 2.0)
    # Of its own, so that the same guest moves in the same way when less befalls it.
    fate = random.Random(f"{seed}/{number}/events")  # noqa: S311 - the same events each time
    events = _events(fate, fate.randint(1, events_max) if events_max else 0, turn, mode, planned_s, quick)
    corrupts = any(event.kind is Kind.CORRUPT for event in events)
    # Pages of grpcio share a link with control calls, which nothing but TCP's checksum protects.
    transport = chooser.choice(("native",) * 4 + ("grpcio",))
    if corrupts:
        transport = "native"
    compression = chooser.choice(("none", "none", "none", "zstd"))
    is_verified = chooser.random() < 0.25
    is_writer = chooser.random() < 0.75
    return Plan(
        number=number,
        kind=kind,
        mode=mode,
        transport=transport,
        compression=compression if transport == "native" else "none",
        verify=corrupts or is_verified,
        bandwidth_bytes_per_s=int((memory_mib << 20) / planned_s),
        peer_timeout_us=1_000_000 if quick else chooser.choice((1_000_000, 1_500_000, 2_000_000)),
        memory_mib=memory_mib,
        vcpus=chooser.randint(1, 4),
        workload=chooser.choice(_WORKLOADS),
        write_ratio=chooser.choice((0.1, 0.5, 1.0)) if is_writer else 0.0,
        touch_rate_per_s=chooser.choice((0, 0, 1000)),
        events=events,
    )


def _barrier_of_turn(number):
    points = list(Point)
    turn, position = divmod(number, _RUNS_WITHOUT)
    if position == _RUNS_WITHOUT - 1:
        return None
    return points[(turn * (_RUNS_WITHOUT - 1) + position) % len(points)]


def _events(chooser, count, turn, mode, planned_s, quick):
    """The barrier whose turn it is, and so many others, half of them or more at a time."""
    points = [point for point in Point if mode != "postcopy" or point not in _BY_PRECOPY]
    barriers = [turn] if turn is not None and count else []
    while len(barriers) < count:
        free = [point for point in points if point not in barriers]
        barriers.append(chooser.choice(free) if chooser.random() < 0.3 else None)
    return tuple(_event(chooser, barrier, planned_s, quick) for barrier in barriers)


def _event(chooser, barrier, planned_s, quick):
    pause_max_s = 1.0 if quick else 3.0
    at_s = None if barrier is not None else round(chooser.uniform(0, planned_s * 1.2), 3)
    kind = _kind(chooser, barrier)
    if kind in KILLS:
        return Event(kind, at_s, barrier, pause_s=round(chooser.uniform(0.02, pause_max_s / 2), 3))
    links = Links.PAGES if kind is Kind.CORRUPT else chooser.choice([*Links])
    direction = chooser.choice((Direction.DOWN, Direction.DOWN, Direction.DOWN, Direction.UP))
    later = kind in (Kind.CUT, Kind.CORRUPT) and links is Links.PAGES
    # Requests are some thousand times smaller than what they ask for.
    reach_bytes = 1 << 20 if direction is Direction.DOWN else 1 << 10
    return Event(
        kind,
        at_s,
        barrier,
        links,
        direction,
        chooser.randrange(reach_bytes) if later else -1,
        round(chooser.uniform(0.1, pause_max_s), 3) if kind in _LASTING else 0.0,
    )


def _kind(chooser, barrier):
    """At a barrier, mostly the death of the daemon that is held there; else anything."""
    if barrier is None or chooser.random() < 0.2:
        return chooser.choice([kind for kind in Kind if kind is not Kind.KILL_BOTH])
    held = Kind.KILL_SOURCE if barrier.value.startswith("source.") else Kind.KILL_DESTINATION
    other = Kind.KILL_DESTINATION if held is Kind.KILL_SOURCE else Kind.KILL_SOURCE
    return chooser.choice((held, held, held, held, held, other, Kind.KILL_BOTH))
