"""`migrate start`, `status`, `switchover`, `cancel` and `recover`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Unpack

import click

from migrate.cli.client import command_for, connect
from migrate.cli.completion import complete_guest, complete_migration
from migrate.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PAUSED
from migrate.cli.params import (
    ENDPOINT,
    GUEST_NAME,
    DaemonAt,
    MigrationOptions,
    daemon_option,
    json_option,
    migration_options,
    migration_terms,
)
from migrate.cli.progress import JsonReporter, Reporter, progress_reporter
from migrate.cli.render import (
    migration_detail,
    migration_json,
    migration_status_json,
    print_json,
    print_table,
)
from migrate.cli.tracing import TraceToFile, trace_option
from migrate.client import Client
from migrate.client.calls import AWAY_S
from migrate.client.connection import error_from_info
from migrate.errors import CallFailedError
from migrate.v1 import types_pb2

DAEMON_AWAY_S = AWAY_S
_HINT = "Ctrl-C detaches; the migration goes on"

_migration_argument = click.argument("migration", required=False, shell_complete=complete_migration)


@click.command()
@click.argument("name", type=GUEST_NAME, shell_complete=complete_guest)
@click.option("--to", type=ENDPOINT, required=True, help="Control address of the destination daemon.")
@migration_options()
@trace_option
@click.option("--detach", is_flag=True, help="Print the migration's id and return at once.")
@daemon_option
@json_option
def start(
    name: str,
    to: str,
    trace: Path | None,
    detach: bool,
    daemon: DaemonAt,
    as_json: bool,
    **options: Unpack[MigrationOptions],
) -> None:
    """Move guest NAME to another daemon's host, and follow it until it is there.

    Interrupting this command does not interrupt the migration.
    """
    if trace is not None and detach:
        raise click.UsageError("a trace is written by who follows the migration: --trace goes without --detach")
    with connect(daemon) as client, TraceToFile(trace) as traced:
        terms = migration_terms(options)
        terms["trace"] = traced.is_wanted
        migration_id = client.migrations.start(name, to, **terms)
        if detach:
            if as_json:
                print_json({"migration_id": migration_id})
            else:
                click.echo(migration_id)
            return
        traced.begin(client, migration_id)
        with _detaching(daemon, migration_id), progress_reporter(daemon.address, _HINT) as reporter:
            final = follow(client, migration_id, reporter, away_s=DAEMON_AWAY_S, note=traced.note)
    if as_json:
        print_json(migration_json(final))
    else:
        print_table(migration_detail(final))
    finish(final)


@click.command()
@_migration_argument
@click.option("--watch", is_flag=True, help="Follow it to its end, through pauses, too.")
@daemon_option
@json_option
def status(migration: str | None, watch: bool, daemon: DaemonAt, as_json: bool) -> None:
    """Show MIGRATION, or the daemon's latest one.

    Exits with 0 if the migration could be read, whatever became of it. Interrupting --watch does not interrupt the
    migration; with --json, it prints a line at each change of state, and once a second.
    """
    with connect(daemon) as client:
        found = _latest(client) if migration is None else client.migrations.get(migration)
        if watch:
            watching = nullcontext(JsonReporter()) if as_json else progress_reporter(daemon.address, _HINT)
            with _detaching(daemon, found.migration_id), watching as reporter:
                found = follow(client, found.migration_id, reporter, away_s=DAEMON_AWAY_S, through_pauses=True)
    if as_json:
        print_json(migration_status_json(found))
    else:
        print_table(migration_detail(found))


@click.command()
@_migration_argument
@daemon_option
def switchover(migration: str | None, daemon: DaemonAt) -> None:
    """Have MIGRATION, or the daemon's latest one, switch over now: what is missing follows by postcopy."""
    with connect(daemon) as client:
        client.migrations.switchover(migration or _latest(client).migration_id)


@click.command()
@_migration_argument
@daemon_option
@json_option
def cancel(migration: str | None, daemon: DaemonAt, as_json: bool) -> None:
    """Give up MIGRATION, or the daemon's latest one: the guest runs on at the source, the destination keeps nothing.

    Possible until the vCPUs are told to stop for the switchover.
    """
    with connect(daemon) as client:
        cancelled = client.migrations.cancel(migration or _latest(client).migration_id)
    if as_json:
        print_json(migration_status_json(cancelled))
    else:
        print_table(migration_detail(cancelled))


@click.command()
@_migration_argument
@click.option("--to", type=ENDPOINT, help="Control address of the other daemon, if it is another one now.")
@daemon_option
@json_option
def recover(migration: str | None, to: str | None, daemon: DaemonAt, as_json: bool) -> None:
    """Have the pages of MIGRATION, or of the daemon's latest one, flow again now.

    Both daemons try by themselves all the time, with pauses; this is for impatience, and for a peer that has come back
    at another address. Exits with 3 if pages do not flow yet.
    """
    with connect(daemon) as client:
        found = client.migrations.recover(migration or _latest(client).migration_id, to)
    if as_json:
        print_json(migration_status_json(found))
    else:
        print_table(migration_detail(found))
    if found.state in (types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED, types_pb2.MIGRATION_STATE_FAILED):
        finish(found)


def follow(
    client: Client,
    migration_id: str,
    reporter: Reporter,
    *,
    away_s: float,
    through_pauses: bool = False,
    note: Callable[[types_pb2.Migration], None] = lambda _migration: None,
) -> types_pb2.Migration:
    """Watch a migration until it has ended or stands still; a daemon that goes away may be back within some seconds.

    Args:
        client: Of a daemon that knows it.
        migration_id: Which.
        reporter: Shows it.
        away_s: How long that daemon may not answer.
        through_pauses: Whether it is followed on when it stands still.
        note: Told everything that is shown.

    Raises:
        MigrateError: the daemon cannot be asked any more; the migration may go on.
    """
    followed = client.migrations.follow(
        migration_id, through_pauses=through_pauses, live=reporter.wants_live, away_s=away_s
    )
    with closing(followed) as migrations:
        for migration in migrations:
            note(migration)
            reporter.show(migration)
    return migration


@contextmanager
def _detaching(daemon: DaemonAt, migration_id: str) -> Iterator[None]:
    """A scope that Ctrl-C ends, and with it the command, but not the migration."""
    try:
        yield
    except KeyboardInterrupt:
        again = command_for(daemon, "status", migration_id, "--watch")
        click.echo(f"migrate: detached; the migration goes on; look again with\n  {again}", err=True)
        sys.exit(EXIT_INTERRUPTED)


def finish(migration: types_pb2.Migration) -> None:
    """Say why a migration is not complete, and exit accordingly; return if it is."""
    if migration.state == types_pb2.MIGRATION_STATE_COMPLETED:
        return
    if migration.HasField("error"):
        click.echo(f"migrate: {error_from_info(migration.error)}", err=True)
    paused = migration.state == types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED
    sys.exit(EXIT_PAUSED if paused else EXIT_FAILED)


def _latest(client: Client) -> types_pb2.Migration:
    migrations = client.migrations.list()
    if not migrations:
        raise CallFailedError(f"the daemon at {client.address} knows of no migration")
    return migrations[-1]
