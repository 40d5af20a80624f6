"""`migrate doctor`: what this host can and cannot do, each with its remedy."""

import sys
from dataclasses import asdict

import click
from rich.table import Table

from migrate.cli.params import json_option
from migrate.cli.render import EXIT_FAILED, print_json, stdout_console
from migrate.guest.probe import Check, HostCapabilities, probe_host


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this host can and cannot do.

    Looks at the host it runs on, as the user who runs it. Exits with 1 if no kind of guest can move here.
    """
    host = probe_host()
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


def _print_report(host: HostCapabilities) -> None:
    console = stdout_console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in host.checks:
        table.add_row(_verdict(check), check.name, check.detail)
        if check.remedy:
            table.add_row("", "", f"[dim]→[/dim] {check.remedy}")
    console.print(table)
    kinds = " and ".join(host.guest_kinds)
    console.print(f"\nGuests of kind {kinds} can move here." if kinds else "\nNo kind of guest can move here.")


def _verdict(check: Check) -> str:
    if check.ok:
        return "[green]ok[/green]"
    return "[red]missing[/red]" if check.required_for else "[yellow]note[/yellow]"
