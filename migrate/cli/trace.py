"""`migrate trace`: what can be made of a trace."""

from pathlib import Path

import click

from migrate.cli.extras import extra_is_missing
from migrate.cli.replay import replay
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
    # numpy and its kin come with the extra `trace`, and take a while to load.
    try:
        from migrate.telemetry.report import report_html  # noqa: PLC0415
        from migrate.telemetry.trace_file import read_trace  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise extra_is_missing(error) from error
    if any(path.resolve() == output.resolve() for path in files):
        raise TraceError(f"{output} is one of the traces, and would be written over", remedy="name another --output")
    page = report_html([(str(path), read_trace(path)) for path in files]).encode()
    try:
        replace_file(output, page, mode=0o644)
    except OSError as error:
        raise TraceError(f"{output} cannot be written: {error.strerror}") from error
    click.echo(f"{output}: {len(files)} trace{'s' * (len(files) > 1)}, {len(page):,} bytes")


trace.add_command(replay)
