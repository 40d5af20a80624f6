"""`migrate trace replay`: what a recorded guest would go through with another order, or on another line."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from migrate.cli.extras import extra_is_missing
from migrate.cli.params import DURATION, ORDER, RATE, complete_order, json_option, recorded_option
from migrate.cli.render import print_json, print_table
from migrate.errors import ConfigError, TraceError
from migrate.native.pager import Order
from migrate.pager.orders import Orders
from migrate.units import format_bytes, format_duration_us

if TYPE_CHECKING:
    from migrate.pager.policy import Policy
    from migrate.pager.replay import Outcome, Overheads
    from migrate.pager.simulator import Line
    from migrate.telemetry.trace_file import Trace

_DEMAND, _ORACLE = "demand", "oracle"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--order",
    "orders",
    type=ORDER,
    required=True,
    multiple=True,
    shell_complete=complete_order,
    help="Of the background; may be given several times. MODULE:CLASS is imported.",
)
@click.option("--rtt", "rtt_us", type=DURATION, help="Round trip of the line.  [default: that of the trace]")
@click.option(
    "--like",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A trace over the line in question: its round trip, and what its faults took, instead of FILE's.",
)
@click.option("--bandwidth", type=RATE, help="What the line carries.  [default: the most that the trace shows]")
@recorded_option
@json_option
def replay(
    file: Path,
    orders: tuple[str, ...],
    rtt_us: int | None,
    like: Path | None,
    bandwidth: int | None,
    recorded: list[int],
    as_json: bool,
) -> None:
    """Replay the touches of a trace in a simulator, by another order or on another line.

    For each order, beside what was recorded and an oracle that knows what will be touched: the share of pages that a
    vCPU waited for, how long all waited, and percentiles of a wait. A trace of --order demand has every first touch;
    any other lacks those of pages that had come before.
    """
    try:
        from migrate.pager.replay import outcome_of, overheads_of  # noqa: PLC0415 - numpy takes a while to load
        from migrate.telemetry.trace_file import read_trace  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise extra_is_missing(error) from error
    here = Orders([order for order in orders if ":" in order])
    policies = {order: here.find(order) for order in orders}
    trace = read_trace(file)
    overheads = overheads_of(trace if like is None else read_trace(like))
    line = _line_of(trace, overheads.rtt_ns if rtt_us is None else rtt_us * 1000, bandwidth)
    outcomes = {
        order: _outcome_of(order, policies[order], trace, line, overheads=overheads, recorded_pages=recorded)
        for order in orders
    }
    outcomes[_ORACLE] = _oracle_of(trace, line, overheads)
    recorded_order = trace.migration["order"]
    if recorded_order != _DEMAND:
        click.echo(
            f"migrate: recorded with order {recorded_order}: touches of pages that had come before them are not in it,"
            f" so an order that brings those late looks better than it is; record with --order {_DEMAND}",
            err=True,
        )
    before = outcome_of(trace)
    if as_json:
        print_json(
            {
                "trace": str(file),
                "rtt_us": round(line.rtt_ns / 1000, 3),
                "bandwidth_bytes_per_s": round(line.bytes_per_s),
                "recorded": {"order": recorded_order, **_outcome_json(before)},
                "replayed": [{"order": order, **_outcome_json(outcome)} for order, outcome in outcomes.items()],
            }
        )
        return
    words = f"round trip {format_duration_us(line.rtt_ns / 1000)}, {format_bytes(line.bytes_per_s)}/s"
    click.echo(f"{before.pages:,} pages over a line of {words}")
    table = Table("ORDER", "WAITED FOR", "SHARE", "STALLED IN ALL", "P50", "P99", "TOOK", box=None, pad_edge=False)
    for name, outcome in ((f"{recorded_order}, as recorded", before), *outcomes.items()):
        table.add_row(name, *_outcome_words(outcome))
    print_table(table)


def _line_of(trace: "Trace", rtt_ns: float, bandwidth_bytes_per_s: int | None) -> "Line":
    from migrate.pager.replay import bandwidth_bytes_per_s as shown_by  # noqa: PLC0415
    from migrate.pager.simulator import Line  # noqa: PLC0415

    if not bandwidth_bytes_per_s and trace.migration["order"] == _DEMAND:
        raise click.UsageError(f"a trace of order {_DEMAND} does not show what its line carries: give --bandwidth")
    line = Line(rtt_ns, bandwidth_bytes_per_s or shown_by(trace))
    if not line.bytes_per_s:
        raise click.UsageError("the trace does not show what its line carries: give --bandwidth")
    return line


def _outcome_of(order: str, policy: "type[Policy] | None", trace: "Trace", line: "Line", **more: Any) -> "Outcome":
    from migrate.pager.simulator import replay as replayed  # noqa: PLC0415

    native = Order[order.upper()] if policy is None else None
    try:
        return replayed(trace, line, order=native, policy=policy, **more)
    except TraceError:
        raise
    except Exception as error:
        raise ConfigError(f"policy {order} raised {type(error).__name__}: {error}") from error


def _oracle_of(trace: "Trace", line: "Line", overheads: "Overheads") -> "Outcome":
    from migrate.pager.simulator import Oracle  # noqa: PLC0415
    from migrate.pager.simulator import replay as replayed  # noqa: PLC0415

    return replayed(trace, line, policy=Oracle, overheads=overheads)


def _outcome_json(outcome: "Outcome") -> dict[str, Any]:
    return {
        "pages": outcome.pages,
        "network_fault_pages": outcome.waited_pages,
        "network_fault_share": round(outcome.fault_share, 6),
        "stalls": len(outcome.stalls_us),
        "stall_total_us": round(outcome.stall_total_us, 3),
        "stall_p50_us": round(outcome.stall_us(0.5), 3),
        "stall_p99_us": round(outcome.stall_us(0.99), 3),
        "duration_us": round(outcome.duration_us, 3),
    }


def _outcome_words(outcome: "Outcome") -> list[str]:
    durations_us = (outcome.stall_total_us, outcome.stall_us(0.5), outcome.stall_us(0.99), outcome.duration_us)
    return [f"{outcome.waited_pages:,}", f"{outcome.fault_share:.2%}", *map(format_duration_us, durations_us)]
