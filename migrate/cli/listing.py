"""`migrate list`: the migrations of one daemon, or of several, with both ends of each side by side."""

import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click

from migrate.cli.client import connect
from migrate.cli.exits import EXIT_FAILED
from migrate.cli.params import DaemonAt, daemons_option, json_option
from migrate.cli.render import (
    End,
    ends_table,
    migration_status_json,
    migration_table,
    print_json,
    print_table,
)
from migrate.errors import MigrateError
from migrate.v1 import types_pb2 as types

_OTHER: dict[int, int] = {
    types.MIGRATION_SIDE_SOURCE: types.MIGRATION_SIDE_DESTINATION,
    types.MIGRATION_SIDE_DESTINATION: types.MIGRATION_SIDE_SOURCE,
}
# So many daemons are asked at one time.
_ASKED_MAX = 16


@dataclass(slots=True)
class _Asked:
    """What some daemons said."""

    migrations: dict[str, list[types.Migration]] = field(default_factory=dict)  # by address, in the order asked
    errors: dict[str, MigrateError] = field(default_factory=dict)


@click.command("list")
@click.option("--peers", is_flag=True, help="Ask the other daemon of each migration, too.")
@daemons_option
@json_option
def list_migrations(daemons: tuple[str, ...], tls_dir: Path | None, peers: bool, as_json: bool) -> None:
    """List the migrations that a daemon knows of, in order of their start.

    With --peers, or --daemon more than once, both ends of a migration stand together. Exits with 1 if one of the
    daemons named does not answer; a peer that does not is only said so.
    """
    if len(daemons) == 1 and not peers:
        with connect(DaemonAt(daemons[0], tls_dir)) as client:
            migrations = client.migrations.list()
        if as_json:
            print_json([migration_status_json(item) for item in migrations])
        else:
            print_table(migration_table(migrations))
        return
    asked = _ask(dict.fromkeys(daemons), tls_dir)
    if peers:
        more = _ask(_peers(asked), tls_dir)
        known = {migration.migration_id for found in asked.migrations.values() for migration in found}
        for address, found in more.migrations.items():
            # Of a peer, only what it has in common with those who were named.
            asked.migrations[address] = [migration for migration in found if migration.migration_id in known]
        asked.errors |= more.errors
    ends = align(asked.migrations, asked.errors)
    if as_json:
        found_ends = (end for pair in ends for end in pair)
        print_json(
            [
                {**migration_status_json(end.migration), "daemon": end.daemon}
                for end in found_ends
                if end.migration is not None
            ]
        )
    else:
        print_table(ends_table(ends))
    for error in asked.errors.values():
        click.echo(f"migrate: {error}", err=True)
    if asked.errors.keys() & set(daemons):
        sys.exit(EXIT_FAILED)


def _ask(addresses: Iterable[str], tls_dir: Path | None) -> _Asked:
    """All of them at once, for one that is down takes its time."""

    def ask(address: str) -> list[types.Migration] | MigrateError:
        try:
            with connect(DaemonAt(address, tls_dir)) as client:
                return client.migrations.list()
        except MigrateError as error:
            return error

    asked, unique = _Asked(), list(addresses)
    with ThreadPoolExecutor(_ASKED_MAX) as pool:
        for address, found in zip(unique, pool.map(ask, unique), strict=True):
            if isinstance(found, MigrateError):
                asked.errors[address] = found
            else:
                asked.migrations[address] = found
    return asked


def _peers(asked: _Asked) -> list[str]:
    """Those that are named as the other daemon of a migration whose other side nobody has told yet."""
    told = {(migration.migration_id, migration.side) for found in asked.migrations.values() for migration in found}
    peers = dict.fromkeys(
        migration.peer
        for found in asked.migrations.values()
        for migration in found
        if migration.peer and (migration.migration_id, _OTHER.get(migration.side)) not in told
    )
    return [peer for peer in peers if peer not in asked.migrations and peer not in asked.errors]


def align(migrations: dict[str, list[types.Migration]], errors: dict[str, MigrateError]) -> list[Sequence[End]]:
    """The ends of each migration, source first; in order of the start, as far as daemons agree on it.

    Args:
        migrations: What each daemon said, by address. One that was asked under two addresses counts once.
        errors: Why others said nothing.
    """
    ends: dict[str, dict[int, End]] = {}
    for address, found in migrations.items():
        for migration in found:
            ends.setdefault(migration.migration_id, {}).setdefault(
                migration.side, End(address, migration.side, migration)
            )
    for pair in ends.values():
        for end in list(pair.values()):
            other = _OTHER.get(end.side)
            if other is not None and other not in pair and end.migration is not None:
                pair[other] = End(end.migration.peer, other, None, _why_unknown(end.migration.peer, migrations, errors))
    return [[pair[side] for side in sorted(pair)] for pair in ends.values()]


def _why_unknown(peer: str, migrations: dict[str, list[types.Migration]], errors: dict[str, MigrateError]) -> str:
    if peer in errors:
        return "no answer"
    return "not known there" if peer in migrations else "not asked"
