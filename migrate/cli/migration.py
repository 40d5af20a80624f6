"""`migrate start`, `status`, `list`, `switchover`, `cancel` and `recover`."""

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Unpack

import click

from migrate.cli.client import CallFailedError, Daemon, connect, error_from_info
from migrate.cli.params import (
    ENDPOINT,
    GUEST_NAME,
    DaemonAt,
    MigrationOptions,
    daemon_option,
    json_option,
    migration_options,
    start_request,
)
from migrate.cli.progress import Reporter, progress_reporter, report_migration
from migrate.cli.render import (
    EXIT_FAILED,
    EXIT_PAUSED,
    migration_detail,
    migration_json,
    migration_status_json,
    migration_table,
    print_json,
    stdout_console,
)
from migrate.errors import ChannelError
from migrate.v1 import migration_service_pb2, types_pb2

# What a shell reports of a command that an interrupt ended.
EXIT_INTERRUPTED = 130
_CANCEL_DEADLINE_S = 90.0
_RECOVER_DEADLINE_S = 120.0
# A daemon that is started again takes up its migrations; whoever follows one waits for that.
DAEMON_AWAY_S = 30.0
_LOOK_S = 0.2

_SETTLED = {
    types_pb2.MIGRATION_STATE_COMPLETED,
    types_pb2.MIGRATION_STATE_CANCELLED,
    types_pb2.MIGRATION_STATE_FAILED,
    types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED,
}


@click.command()
@click.argument("name", type=GUEST_NAME)
@click.option("--to", type=ENDPOINT, required=True, help="Control address of the destination daemon.")
@migration_options()
@click.option("--detach", is_flag=True, help="Print the migration's id and return at once.")
@daemon_option
@json_option
def start(
    name: str, to: str, detach: bool, daemon: DaemonAt, as_json: bool, **options: Unpack[MigrationOptions]
) -> None:
    """Move guest NAME to another daemon's host, and follow it until it is there.

    Interrupting this command does not interrupt the migration.
    """
    with connect(daemon) as remote:
        request = start_request(name, to, options)
        migration_id = remote.call(remote.migrations.StartMigration, request).migration_id
        if detach:
            if as_json:
                print_json({"migration_id": migration_id})
            else:
                click.echo(migration_id)
            return
        try:
            with progress_reporter() as reporter:
                final = follow(remote, migration_id, reporter, away_s=DAEMON_AWAY_S)
        except KeyboardInterrupt:
            click.echo(
                f"migrate: detached; migration {migration_id} goes on: `migrate status {migration_id}`", err=True
            )
            sys.exit(EXIT_INTERRUPTED)
    if as_json:
        print_json(migration_json(final))
    else:
        stdout_console().print(migration_detail(final))
    finish(final)


@click.command()
@click.argument("migration", required=False)
@daemon_option
@json_option
def status(migration: str | None, daemon: DaemonAt, as_json: bool) -> None:
    """Show MIGRATION, or the daemon's latest one.

    Exits with 0 if the migration could be read, whatever became of it.
    """
    with connect(daemon) as remote:
        if migration is None:
            found = _latest(remote)
        else:
            request = migration_service_pb2.GetMigrationRequest(migration_id=migration)
            found = remote.call(remote.migrations.GetMigration, request).migration
    if as_json:
        print_json(migration_status_json(found))
    else:
        stdout_console().print(migration_detail(found))


@click.command()
@click.argument("migration", required=False)
@daemon_option
def switchover(migration: str | None, daemon: DaemonAt) -> None:
    """Have MIGRATION, or the daemon's latest one, switch over now: what is missing follows by postcopy."""
    with connect(daemon) as remote:
        migration_id = migration or _latest(remote).migration_id
        request = migration_service_pb2.StartSwitchoverRequest(migration_id=migration_id)
        remote.call(remote.migrations.StartSwitchover, request)


@click.command()
@click.argument("migration", required=False)
@daemon_option
@json_option
def cancel(migration: str | None, daemon: DaemonAt, as_json: bool) -> None:
    """Give up MIGRATION, or the daemon's latest one: the guest runs on at the source, the destination keeps nothing.

    Possible until the vCPUs are told to stop for the switchover.
    """
    with connect(daemon) as remote:
        migration_id = migration or _latest(remote).migration_id
        request = migration_service_pb2.CancelMigrationRequest(migration_id=migration_id)
        cancelled = remote.call(remote.migrations.CancelMigration, request, deadline_s=_CANCEL_DEADLINE_S).migration
    if as_json:
        print_json(migration_status_json(cancelled))
    else:
        stdout_console().print(migration_detail(cancelled))


@click.command()
@click.argument("migration", required=False)
@click.option("--to", type=ENDPOINT, help="Control address of the other daemon, if it is another one now.")
@daemon_option
@json_option
def recover(migration: str | None, to: str | None, daemon: DaemonAt, as_json: bool) -> None:
    """Have the pages of MIGRATION, or of the daemon's latest one, flow again now.

    Both daemons try by themselves all the time, with pauses; this is for impatience, and for a peer that has come back
    at another address. Exits with 3 if pages do not flow yet.
    """
    with connect(daemon) as remote:
        migration_id = migration or _latest(remote).migration_id
        request = migration_service_pb2.RecoverMigrationRequest(migration_id=migration_id, to=to or "")
        found = remote.call(remote.migrations.RecoverMigration, request, deadline_s=_RECOVER_DEADLINE_S).migration
    if as_json:
        print_json(migration_status_json(found))
    else:
        stdout_console().print(migration_detail(found))
    if found.state in (types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED, types_pb2.MIGRATION_STATE_FAILED):
        finish(found)


@click.command("list")
@daemon_option
@json_option
def list_migrations(daemon: DaemonAt, as_json: bool) -> None:
    """List the migrations that a daemon knows of, in order of their start."""
    with connect(daemon) as remote:
        migrations = _list(remote)
    if as_json:
        print_json([migration_status_json(item) for item in migrations])
    else:
        stdout_console().print(migration_table(migrations))


def follow(remote: Daemon, migration_id: str, reporter: Reporter, *, away_s: float) -> types_pb2.Migration:
    """Watch a migration until it has ended or stands still; a daemon that goes away may be back within some seconds.

    Raises:
        MigrateError: the daemon cannot be asked any more; the migration may go on.
    """
    away_since_s: float | None = None
    while True:
        try:
            for migration in _watch(remote, migration_id):
                away_since_s = None
                report_migration(reporter, migration)
                if migration.state in _SETTLED:
                    return migration
            lost = ChannelError(f"the daemon at {remote.address} is shutting down")
        except ChannelError as exc:
            lost = exc
        now_s = time.monotonic()
        away_since_s = now_s if away_since_s is None else away_since_s
        if now_s - away_since_s > away_s:
            raise ChannelError(
                f"{lost.message}; what became of migration {migration_id} is not known here",
                remedy=f"once the daemon answers again, ask with `migrate status {migration_id}`",
            ) from lost
        time.sleep(_LOOK_S)


def _watch(remote: Daemon, migration_id: str) -> Iterator[types_pb2.Migration]:
    request = migration_service_pb2.WatchMigrationRequest(migration_id=migration_id)
    with closing(remote.stream(remote.migrations.WatchMigration, request)) as responses:
        for response in responses:
            yield response.migration


def finish(migration: types_pb2.Migration) -> None:
    """Say why a migration is not complete, and exit accordingly; return if it is."""
    if migration.state == types_pb2.MIGRATION_STATE_COMPLETED:
        return
    if migration.HasField("error"):
        click.echo(f"migrate: {error_from_info(migration.error)}", err=True)
    paused = migration.state == types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED
    sys.exit(EXIT_PAUSED if paused else EXIT_FAILED)


def _latest(remote: Daemon) -> types_pb2.Migration:
    migrations = _list(remote)
    if not migrations:
        raise CallFailedError(f"the daemon at {remote.address} knows of no migration")
    return migrations[-1]


def _list(remote: Daemon) -> list[types_pb2.Migration]:
    return [*remote.call(remote.migrations.ListMigrations, migration_service_pb2.ListMigrationsRequest()).migrations]
