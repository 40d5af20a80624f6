"""`migrate drain`: every guest of a host goes to other hosts."""

import sys
import time
from pathlib import Path
from typing import Any, Unpack

import click
from rich.table import Table
from rich.text import Text

from migrate.cli.draining import LOOK_S, Drain, DrainTerms, Move, Outcome
from migrate.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PAUSED
from migrate.cli.params import (
    DURATION,
    ENDPOINT,
    DaemonAt,
    MigrationOptions,
    json_option,
    migration_options,
    migration_terms,
    tls_dir_option,
)
from migrate.cli.render import print_json, print_table
from migrate.units import format_duration_us


@click.command()
@click.option("--from", "source", type=ENDPOINT, required=True, help="The daemon whose host is emptied.")
@click.option(
    "--to", "destinations", type=ENDPOINT, required=True, multiple=True, help="Where guests may go; may be repeated."
)
@click.option(
    "--parallel", type=click.IntRange(1), default=2, show_default=True, metavar="N", help="Migrations at one time."
)
@click.option(
    "--wait",
    type=DURATION,
    default="60s",
    show_default=True,
    help="How long a daemon may be away, and a migration stand still.",
)
@migration_options()
@tls_dir_option
@json_option
def drain(
    source: str,
    destinations: tuple[str, ...],
    parallel: int,
    wait: int,
    tls_dir: Path | None,
    as_json: bool,
    **options: Unpack[MigrationOptions],
) -> None:
    """Move all guests of a host to others, each to the one with most free memory.

    Guests that are being moved already are followed. Interrupting this command interrupts no migration; calling it
    again goes on.
    """
    if source in destinations:
        raise click.UsageError("--to is where --from is")
    terms = DrainTerms(parallel, wait / 1_000_000, migration_terms(options))
    draining = Drain(
        DaemonAt(source, tls_dir),
        [DaemonAt(address, tls_dir) for address in dict.fromkeys(destinations)],
        terms,
        lambda words: click.echo(words, err=True),
        time.monotonic,
    )
    try:
        while not draining.step():
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        under_way = [move.guest for move in draining.moves.values() if move.outcome is Outcome.MOVING]
        click.echo(
            f"migrate: detached; {', '.join(under_way) or 'nothing'} moves on; the same command goes on with the rest",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    draining.close()
    moves = sorted(draining.moves.values(), key=lambda move: move.guest)
    if as_json:
        print_json(_json(source, destinations, moves))
    else:
        print_table(_table(moves))
    outcomes = {move.outcome for move in moves}
    if Outcome.FAILED in outcomes:
        sys.exit(EXIT_FAILED)
    if Outcome.PAUSED in outcomes:
        sys.exit(EXIT_PAUSED)


def _json(source: str, destinations: tuple[str, ...], moves: list[Move]) -> dict[str, Any]:
    counted = (Outcome.MOVED, Outcome.PAUSED, Outcome.FAILED, Outcome.GONE)
    return {
        "from": source,
        "to": [*destinations],
        **{outcome.value: sum(move.outcome is outcome for move in moves) for outcome in counted},
        "guests": [
            {
                "guest": move.guest,
                "outcome": move.outcome.value,
                "to": move.to or None,
                "migration_id": move.migration_id or None,
                "downtime_us": move.seen.downtime_us if move.seen is not None else 0,
                "total_us": move.seen.total_us if move.seen is not None else 0,
                "refusals": [{"to": to, "error": refusal.words} for to, refusal in move.refusals.items()],
                "error": move.error or None,
            }
            for move in moves
        ],
    }


def _table(moves: list[Move]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("GUEST", "OUTCOME", "TO", "DOWNTIME", "TOTAL", "ERROR"):
        table.add_column(column, no_wrap=True)
    for move in moves:
        times = ("-", "-") if move.seen is None else (move.seen.downtime_us, move.seen.total_us)
        words = [each if isinstance(each, str) else format_duration_us(each) for each in times]
        table.add_row(move.guest, move.outcome.value, move.to or "-", *words, Text(move.error or "-"))
    return table
