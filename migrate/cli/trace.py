"""`migrate trace`: what can be made of a trace."""

from pathlib import Path

import click

from migrate.cli.extras import imports_extra
from migrate.cli.params import DURATION, ORDER, RATE, complete_order, json_option, recorded_option
from migrate.errors import TraceError
from migrate.files import replace_file

_FILE = click.Path(path_type=Path)


@click.group()
def trace() -> None:
    """Look at traces, which `migrate start --trace` writes."""


@trace.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=_FILE)
@click.option("-o", "--output", required=True, metavar="FILE", type=_FILE, help="The page.")
def report(files: tuple[Path, ...], output: Path) -> None:
    """Make one HTML page of traces, which loads nothing and can be passed on as it is.

    The first trace is what the others are compared with.
    """
    with imports_extra():
        from migrate.telemetry.report import report_html  # noqa: PLC0415
        from migrate.telemetry.trace_file import read_trace  # noqa: PLC0415
    if any(path.resolve() == output.resolve() for path in files):
        raise TraceError(f"{output} is one of the traces, and would be written over", remedy="name another --output")
    page = report_html([(str(path), read_trace(path)) for path in files]).encode()
    try:
        replace_file(output, page, mode=0o644)
    except OSError as error:
        raise TraceError(f"{output} cannot be written: {error.strerror}") from error
    click.echo(f"{output}: {len(files)} trace{'s' * (len(files) > 1)}, {len(page):,} bytes")


@trace.command()
@click.argument("file", type=_FILE)
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
    with imports_extra():
        from migrate.cli.replay import replay_by  # noqa: PLC0415
    replay_by(orders, file, like, rtt_us=rtt_us, bandwidth=bandwidth, recorded_pages=recorded, as_json=as_json)
