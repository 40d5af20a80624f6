"""Which figures of a migration come from where: small changes of its message, made under its record's lock."""

from migrate.native.compression import Compression
from migrate.native.pager import PagerCounters
from migrate.units import bytes_to_pages
from migrate.v1 import types_pb2 as types


def describe(migration: types.Migration, description: types.GuestDescription) -> None:
    """What the guest is."""
    migration.guest_kind = description.spec.kind
    migration.memory_bytes = description.spec.memory_bytes
    migration.vcpus = description.spec.vcpus
    migration.pages.total = bytes_to_pages(description.spec.memory_bytes)


def note_transport(
    migration: types.Migration, transport: "types.PageTransport.ValueType", compression: Compression
) -> None:
    """What was agreed on."""
    migration.transport = transport
    migration.compression = types.PageCompression.ValueType(compression)


def note_peer(migration: types.Migration, peer: str) -> None:
    """Where the other daemon is now."""
    migration.peer = peer


def note_touches(migration: types.Migration, touches: int) -> None:
    """The guest's touches when its vCPUs stopped."""
    migration.guest_touches = migration.guest_touches_at_switchover = touches


def page_counts(counters: PagerCounters) -> types.PageCounts:
    """What a pager has counted of its pages."""
    return types.PageCounts(
        total=counters.total_pages,
        zero=counters.zero_pages,
        precopy=counters.precopy_pages,
        urgent=counters.urgent_pages,
        background=counters.background_pages,
        duplicate=counters.duplicate_pages,
        stale=counters.stale_pages,
    )


def note_downtime(migration: types.Migration, downtime_us: int, parts: types.DowntimeParts) -> None:
    """How long no vCPU ran, and what is known of where that went; the rest was on the way."""
    migration.downtime_us = downtime_us
    migration.downtime.CopyFrom(parts)
    known_us = sum(getattr(parts, field.name) for field in parts.DESCRIPTOR.fields)
    migration.downtime.transfer_us = max(0, downtime_us - known_us)


def merge_pages(migration: types.Migration, destination: types.Migration, generation: int) -> None:
    """The figures of a precopy that only the destination can know."""
    migration.bytes_on_wire = destination.bytes_on_wire
    migration.pages.CopyFrom(destination.pages)
    migration.generation = generation


def merge(migration: types.Migration, destination: types.Migration) -> None:
    """The figures that only the destination can know."""
    migration.bytes_on_wire = destination.bytes_on_wire
    migration.pages.CopyFrom(destination.pages)
    migration.fault_latency_us.CopyFrom(destination.fault_latency_us)
    migration.guest_stall_us.CopyFrom(destination.guest_stall_us)
    migration.guest_touches = destination.guest_touches
    migration.guest_touches_at_switchover = destination.guest_touches_at_switchover
    migration.guest_errors = destination.guest_errors
    migration.verified_pages = destination.verified_pages
    migration.recoveries = destination.recoveries
