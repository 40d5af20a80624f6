"""What `migrate trace replay` does. Needs the extra `trace`, and the C core."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from migrate.cli.render import print_json, print_table
from migrate.errors import ConfigError, TraceError
from migrate.native.pager import Order
from migrate.pager.orders import Orders
from migrate.pager.policy import Policy
from migrate.pager.replay import Outcome, bandwidth_bytes_per_s, outcome_of, overheads_of
from migrate.pager.simulator import Line, Oracle, replay
from migrate.telemetry.trace_file import Trace, read_trace
from migrate.units import format_bytes, format_duration_us

_DEMAND, _ORACLE = "demand", "oracle"


def replay_by(
    orders: Sequence[str],
    file: Path,
    like: Path | None,
    *,
    rtt_us: int | None,
    bandwidth: int | None,
    recorded_pages: Sequence[int],
    as_json: bool,
) -> None:
    """Replay a trace by each of the orders, and print what came of it; the arguments are the command's."""
    here = Orders([order for order in orders if ":" in order])
    policies = {**{order: here.find(order) for order in orders}, _ORACLE: Oracle}
    trace = read_trace(file)
    overheads = overheads_of(trace if like is None else read_trace(like))
    line = _line_of(trace, overheads.rtt_ns if rtt_us is None else rtt_us * 1000, bandwidth)
    outcomes = {
        order: _outcome_of(order, policy, trace, line, overheads=overheads, recorded_pages=recorded_pages)
        for order, policy in policies.items()
    }
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


def _line_of(trace: Trace, rtt_ns: float, bandwidth: int | None) -> Line:
    if not bandwidth and trace.migration["order"] == _DEMAND:
        raise click.UsageError(f"a trace of order {_DEMAND} does not show what its line carries: give --bandwidth")
    line = Line(rtt_ns, bandwidth or bandwidth_bytes_per_s(trace))
    if not line.bytes_per_s:
        raise click.UsageError("the trace does not show what its line carries: give --bandwidth")
    return line


def _outcome_of(order: str, policy: type[Policy] | None, trace: Trace, line: Line, **more: Any) -> Outcome:
    native = Order[order.upper()] if policy is None else None
    try:
        return replay(trace, line, order=native, policy=policy, **more)
    except TraceError:
        raise
    except Exception as error:
        raise ConfigError(f"policy {order} raised {type(error).__name__}: {error}") from error


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
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


def _outcome_words(outcome: Outcome) -> list[str]:
    durations_us = (outcome.stall_total_us, outcome.stall_us(0.5), outcome.stall_us(0.99), outcome.duration_us)
    return [f"{outcome.waited_pages:,}", f"{outcome.fault_share:.2%}", *map(format_duration_us, durations_us)]
