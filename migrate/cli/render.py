"""How guests and migrations look: as tables for people, as JSON for scripts."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from migrate.client.words import guest_kind_word, guest_state_word, pages_present, state_word, word_of
from migrate.errors import GuestHolder
from migrate.units import format_bytes, format_duration_us
from migrate.v1 import types_pb2

# Lines that go to a file or a pipe are cut by whoever reads them, not here.
_PIPE_COLUMNS = 240


@dataclass(frozen=True, slots=True)
class End:
    """One side of a migration.

    Attributes:
        daemon: Address of the daemon that is asked for it.
        side: A MigrationSide.
        migration: As that daemon sees it; None if it was not asked, or does not know of it.
        why_unknown: Why that is None, in a word or two.
    """

    daemon: str
    side: int
    migration: types_pb2.Migration | None
    why_unknown: str = ""


def _stdout_console() -> Console:
    """A console on stdout. Colour only on a terminal, and not where NO_COLOR is set."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def print_table(table: Table) -> None:
    """Print a table on stdout, each line as long as its words: more would break lines where they are shorter."""
    console = _stdout_console()
    with console.capture() as printed:
        console.print(table)
    sys.stdout.write(re.sub(r" +$", "", printed.get(), flags=re.MULTILINE))


def print_json(value: Any) -> None:
    """Print a value as JSON on one line of stdout."""
    click.echo(json.dumps(value, ensure_ascii=not sys.stdout.encoding.lower().startswith("utf")))


def migration_json(migration: types_pb2.Migration) -> dict[str, Any]:
    """A migration with exactly the keys that docs/operations.md promises of `start --json`."""
    return {
        "migration_id": migration.migration_id,
        "guest": migration.guest,
        "guest_kind": guest_kind_word(migration.guest_kind),
        "mode": word_of(types_pb2.MigrationMode, migration.mode, "MIGRATION_MODE_"),
        "state": state_word(migration.state),
        "order": migration.order,
        "transport": word_of(types_pb2.PageTransport, migration.transport, "PAGE_TRANSPORT_").replace("_", "-"),
        "memory_bytes": migration.memory_bytes,
        "page_size_bytes": migration.page_size_bytes,
        "vcpus": migration.vcpus,
        "downtime_us": migration.downtime_us,
        "precopy_us": migration.precopy_us,
        "postcopy_us": migration.postcopy_us,
        "total_us": migration.total_us,
        "bytes_on_wire": migration.bytes_on_wire,
        "pages": _numbers(migration.pages),
        "fault_latency_us": _numbers(migration.fault_latency_us),
        "guest_stall_us": _numbers(migration.guest_stall_us),
        "guest_touches": migration.guest_touches,
        "guest_errors": migration.guest_errors,
        "verified_pages": migration.verified_pages,
    }


def migration_status_json(migration: types_pb2.Migration) -> dict[str, Any]:
    """A migration with all that its daemon knows of it."""
    return {
        **migration_json(migration),
        "side": word_of(types_pb2.MigrationSide, migration.side, "MIGRATION_SIDE_"),
        "peer": migration.peer,
        "compression": word_of(
            types_pb2.PageCompression, migration.compression or types_pb2.PAGE_COMPRESSION_NONE, "PAGE_COMPRESSION_"
        ),
        "holder": word_of(types_pb2.GuestHolder, migration.holder, "GUEST_HOLDER_"),
        "guest_touches_at_switchover": migration.guest_touches_at_switchover,
        "attempt": migration.attempt,
        "recoveries": migration.recoveries,
        "error": _error_json(migration.error) if migration.HasField("error") else None,
    }


def guest_json(guest: types_pb2.Guest) -> dict[str, Any]:
    """A guest with all that its daemon knows of it."""
    workload = guest.spec.workload
    return {
        "name": guest.spec.name,
        "kind": guest_kind_word(guest.spec.kind),
        "state": guest_state_word(guest.state),
        "memory_bytes": guest.spec.memory_bytes,
        "resident_bytes": guest.resident_bytes,
        "vcpus": guest.spec.vcpus,
        "workload": {
            "distribution": _workload_word(workload.distribution),
            "write_ratio": workload.write_ratio,
            "working_set_bytes": workload.working_set_bytes,
            "touch_rate_per_s": workload.touch_rate_per_s,
            "seed": workload.seed,
        },
        "pid": guest.pid,
        "migration_id": guest.migration_id or None,
    }


def statistics_json(statistics: types_pb2.GuestStatistics) -> dict[str, Any]:
    """What a guest says about itself."""
    return {
        "touches": statistics.touches,
        "writes": statistics.writes,
        "errors": statistics.errors,
        "stall_us": _numbers(statistics.stall_us),
        "audits": statistics.audits,
        "first_error": statistics.first_error or None,
    }


def guest_table(guests: Iterable[types_pb2.Guest]) -> Table:
    """A row for each guest."""
    table = _list_table("NAME", "KIND", "STATE", "MEMORY", "RESIDENT", "VCPUS", "MIGRATION")
    for guest in guests:
        table.add_row(
            guest.spec.name,
            guest_kind_word(guest.spec.kind),
            guest_state_word(guest.state),
            format_bytes(guest.spec.memory_bytes),
            format_bytes(guest.resident_bytes),
            str(guest.spec.vcpus),
            guest.migration_id or "-",
        )
    return table


def guest_detail(guest: types_pb2.Guest) -> Table:
    """One guest, a line for each fact."""
    workload = guest.spec.workload
    working_set = format_bytes(workload.working_set_bytes) if workload.working_set_bytes else "nearly all of RAM"
    rate = f"{workload.touch_rate_per_s} touches/s for each vCPU" if workload.touch_rate_per_s else "full speed"
    return _fact_table(
        ("guest", f"{guest.spec.name} ({guest_kind_word(guest.spec.kind)}, {_plural(guest.spec.vcpus, 'vCPU')})"),
        ("state", guest_state_word(guest.state)),
        ("memory", f"{format_bytes(guest.spec.memory_bytes)}, {format_bytes(guest.resident_bytes)} of it populated"),
        ("workload", f"{_workload_word(workload.distribution)}, {workload.write_ratio:.0%} writes, {rate}"),
        ("working set", working_set),
        ("pid", str(guest.pid)),
        ("migration", guest.migration_id or "-"),
    )


def statistics_detail(statistics: types_pb2.GuestStatistics) -> Table:
    """What a guest says about itself, a line for each fact."""
    rows = [
        ("touches", f"{statistics.touches:,}, {statistics.writes:,} of them writes"),
        ("errors", f"{statistics.errors:,}"),
        ("stalls", distribution_words(statistics.stall_us)),
        ("audits", f"{statistics.audits:,}"),
    ]
    if statistics.first_error:
        rows.append(("first error", statistics.first_error))
    return _fact_table(*rows)


def migration_table(migrations: Iterable[types_pb2.Migration]) -> Table:
    """A row for each migration."""
    table = _list_table("MIGRATION", "GUEST", "SIDE", "PEER", "STATE", "PRESENT", "TOTAL")
    for migration in migrations:
        table.add_row(
            migration.migration_id,
            migration.guest,
            word_of(types_pb2.MigrationSide, migration.side, "MIGRATION_SIDE_"),
            migration.peer,
            state_word(migration.state),
            f"{present_share(migration.pages):.0%}",
            format_duration_us(migration.total_us),
        )
    return table


def ends_table(ends: Iterable[Sequence[End]]) -> Table:
    """A row for each end of each migration."""
    table = _list_table("MIGRATION", "GUEST", "SIDE", "DAEMON", "STATE", "HOLDER", "PAGES")
    # Where a line is too short, the address is what is broken.
    table.columns[3].no_wrap, table.columns[3].overflow = False, "fold"
    for pair in ends:
        known = next(end.migration for end in pair if end.migration is not None)
        for number, end in enumerate(pair):
            row = [
                "" if number else known.migration_id,
                "" if number else known.guest,
                word_of(types_pb2.MigrationSide, end.side, "MIGRATION_SIDE_"),
                end.daemon,
            ]
            if end.migration is None:
                row += [f"({end.why_unknown})", "", ""]
            else:
                holder = word_of(types_pb2.GuestHolder, end.migration.holder, "GUEST_HOLDER_")
                row += [state_word(end.migration.state), holder, f"{present_share(end.migration.pages):.0%}"]
            table.add_row(*row)
    return table


def migration_detail(migration: types_pb2.Migration) -> Table:
    """One migration, a line for each fact."""
    pages = migration.pages
    kind = guest_kind_word(migration.guest_kind)
    machine = f"{kind}, {_plural(migration.vcpus, 'vCPU')}, {format_bytes(migration.memory_bytes)}"
    parts = (
        ("zero", pages.zero),
        ("precopy", pages.precopy),
        ("urgent", pages.urgent),
        ("background", pages.background),
    )
    page_sum = " + ".join(f"{count:,} {name}" for name, count in parts if count)
    rows = [
        ("guest", f"{migration.guest} ({machine})"),
        ("migration", migration.migration_id),
        ("state", state_word(migration.state)),
        ("downtime", format_duration_us(migration.downtime_us)),
        ("total", f"{format_duration_us(migration.total_us)}, postcopy {format_duration_us(migration.postcopy_us)}"),
        ("on the wire", format_bytes(migration.bytes_on_wire)),
        ("pages", f"{pages.total:,} = {page_sum or '0'}"),
        ("fault latency", distribution_words(migration.fault_latency_us)),
        ("guest stall", distribution_words(migration.guest_stall_us)),
        ("guest", f"{migration.guest_touches:,} touches, {migration.guest_errors:,} errors"),
    ]
    if migration.verified_pages:
        rows.append(("verified", f"{migration.verified_pages:,} pages"))
    if migration.HasField("error"):
        rows.append(("error", migration.error.message))
        rows.append(("holder", GuestHolder(migration.holder).describe()))
        if migration.error.remedy:
            rows.append(("remedy", migration.error.remedy))
    return _fact_table(*rows)


def distribution_words(distribution: types_pb2.Distribution) -> str:
    """`p50 85 µs  p99 1.2 ms  max 4.0 ms  (1,234)`."""
    if not distribution.count:
        return "none"
    parts = (("p50", distribution.p50), ("p99", distribution.p99), ("max", distribution.max))
    words = "  ".join(f"{name} {format_duration_us(value)}" for name, value in parts)
    return f"{words}  ({distribution.count:,})"


def present_share(pages: types_pb2.PageCounts) -> float:
    """pages_present() as a share of all pages, 0 to 1."""
    return pages_present(pages) / pages.total if pages.total else 0.0


def _workload_word(distribution: int) -> str:
    return word_of(types_pb2.WorkloadDistribution, distribution, "WORKLOAD_DISTRIBUTION_")


def _numbers(message: types_pb2.PageCounts | types_pb2.Distribution) -> dict[str, int | float]:
    """Each field as a JSON number; MessageToDict would write 64-bit integers as text."""
    names = [field.name for field in message.DESCRIPTOR.fields]
    values = {name: getattr(message, name) for name in names}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


def _error_json(error: types_pb2.ErrorInfo) -> dict[str, Any]:
    return {
        "type": error.type,
        "message": error.message,
        "holder": word_of(types_pb2.GuestHolder, error.holder, "GUEST_HOLDER_"),
        "remedy": error.remedy,
    }


def _list_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _fact_table(*rows: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        # Text keeps brackets in names from being read as markup.
        table.add_row(name, Text(value))
    return table


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
