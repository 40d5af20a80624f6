"""`migrate policies`: the orders of the background that this host has."""

from dataclasses import dataclass

import click
from rich.table import Table

from migrate.cli.params import json_option
from migrate.cli.render import print_json, print_table
from migrate.errors import ConfigError
from migrate.pager.orders import OrderSource, installed_orders


@dataclass(frozen=True, slots=True)
class _Row:
    """An order, and the first line of what it says of itself, or why it cannot be loaded."""

    source: OrderSource
    description: str
    error: str


@click.command()
@json_option
def policies(as_json: bool) -> None:
    """List the orders of the background that a destination on this host has.

    Of the C core, and policies: Python classes that installed packages bring. `migrate daemon --policy` adds others.
    """
    rows = [_row(source) for source in installed_orders()]
    if as_json:
        print_json([_json(row) for row in rows])
        return
    table = Table("Order", "From", "Where", "What it does", box=None)
    for row in rows:
        source = row.source
        table.add_row(
            source.name, f"{source.package} {source.package_version}", source.where, row.error or row.description
        )
    print_table(table)


def _row(source: OrderSource) -> _Row:
    try:
        return _Row(source, source.describe(), "")
    except ConfigError as error:
        return _Row(source, "", error.message)


def _json(row: _Row) -> dict[str, object]:
    source = row.source
    return {
        "name": source.name,
        "kind": "native" if source.entry_point is None else "policy",
        "package": source.package,
        "version": source.package_version,
        "where": source.where,
        "description": row.description,
        "error": row.error,
    }
