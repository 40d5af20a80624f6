"""`migrate doctor`: what this host can and cannot do, each with its remedy."""

import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from rich.table import Table

from migrate.cli.exits import EXIT_FAILED
from migrate.cli.params import json_option
from migrate.cli.render import print_json, print_table
from migrate.errors import ConfigError
from migrate.guest.probe import ALL_KINDS, Check, HostCapabilities, probe_host

_RENEW_BEFORE = timedelta(days=30)


@click.command()
@click.option("--state-dir", type=click.Path(path_type=Path), help="Look at the state directory of a daemon, too.")
@click.option("--tls-dir", type=click.Path(path_type=Path), help="Look at a TLS directory, too.")
@json_option
def doctor(state_dir: Path | None, tls_dir: Path | None, as_json: bool) -> None:
    """Say what this host can and cannot do.

    Looks at the host it runs on, as the user who runs it: run it as the daemon's user. Exits with 1 if no kind of guest
    can move here, or if a daemon could not use a directory that was named.
    """
    host = probe_host()
    if state_dir is not None:
        host = HostCapabilities((*host.checks, _check_state_dir(state_dir)))
    if tls_dir is not None:
        host = HostCapabilities((*host.checks, *_check_tls_dir(tls_dir)))
    if as_json:
        print_json(
            {
                "ok": bool(host.guest_kinds),
                "guest_kinds": list(host.guest_kinds),
                "checks": [asdict(check) for check in host.checks],
            }
        )
    else:
        _print_report(host)
    if not host.guest_kinds:
        sys.exit(EXIT_FAILED)


def _check_state_dir(path: Path) -> Check:
    from migrate.daemon.state_dir import why_not_private  # noqa: PLC0415 - loads what a report need not

    name = "state-dir"
    try:
        reason = why_not_private(path)
    except FileNotFoundError:
        return Check(name, ok=True, detail=f"{path} is not there yet: the daemon makes it", required_for=ALL_KINDS)
    except OSError as exc:
        reason = f"{path}: {exc.strerror}"
    remedy = f"chown it to the daemon's user, chmod 700 {path}" if reason else ""
    return Check(name, not reason, reason or f"{path} is this user's alone", remedy, ALL_KINDS)


def _check_tls_dir(path: Path) -> tuple[Check, ...]:
    from migrate.tls import describe, read_tls_dir  # noqa: PLC0415 - loads what a report need not

    try:
        material = read_tls_dir(path)
    except ConfigError as error:
        remedy = error.remedy or "`migrate tls issue` makes a TLS directory"
        return (Check("tls-dir", ok=False, detail=error.message, remedy=remedy, required_for=ALL_KINDS),)
    left = material.identity.not_after - datetime.now(UTC)
    accepted = "every peer that its CA vouches for"
    if material.peer_pems is not None:
        accepted = f"{len(material.peer_pems)} peers"
    return (
        Check("tls-dir", ok=True, detail=f"{describe(material.identity)}; {accepted}", required_for=ALL_KINDS),
        Check(
            "tls-expiry",
            ok=left > _RENEW_BEFORE,
            detail=f"{left.days} days left",
            remedy="" if left > _RENEW_BEFORE else "`migrate tls issue --renew`, and copy it here: it takes no restart",
        ),
    )


def _print_report(host: HostCapabilities) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in host.checks:
        table.add_row(_verdict(check), check.name, check.detail)
        if check.remedy:
            table.add_row("", "", f"[dim]→[/dim] {check.remedy}")
    print_table(table)
    *others, last = host.guest_kinds or ("none",)
    kinds = f"{', '.join(others)} and {last}" if others else last
    verdict = f"Guests of kind {kinds} can move here." if host.guest_kinds else "No kind of guest can move here."
    click.echo(f"\n{verdict}")


def _verdict(check: Check) -> str:
    if check.ok:
        return "[green]ok[/green]"
    return "[red]missing[/red]" if check.required_for else "[yellow]note[/yellow]"
