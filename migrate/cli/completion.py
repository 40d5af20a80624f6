"""`migrate completion`, and what a shell is offered where a guest or a migration is to be named."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from migrate.cli.client import connect
from migrate.cli.params import DEFAULT_DAEMON, DaemonAt
from migrate.client import Client, guest_state_word, state_word
from migrate.client.calls import list_guests, list_migrations
from migrate.errors import MigrateError

_VARIABLE = "_MIGRATE_COMPLETE"
# Somebody has pressed a key, and waits.
_DEADLINE_S = 1.0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete commands, options, guests and migrations.

    For bash: source <(migrate completion bash)
    """
    found = get_completion_class(shell)
    if found is None:
        raise click.UsageError(f"there is no completion for {shell}")
    root = click.get_current_context().find_root()
    click.echo(found(root.command, {}, "migrate", _VARIABLE).source())


def complete_guest(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Guests of the daemon that the command line names so far."""

    def guests(client: Client) -> Iterable[tuple[str, str]]:
        found = client.call(replace(list_guests(), deadline_s=_DEADLINE_S))
        return ((guest.spec.name, guest_state_word(guest.state)) for guest in found)

    return _offer(ctx, incomplete, guests)


def complete_migration(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Migrations of that daemon, the latest first."""

    def migrations(client: Client) -> Iterable[tuple[str, str]]:
        found = client.call(replace(list_migrations(), deadline_s=_DEADLINE_S))
        return ((each.migration_id, f"{each.guest}, {state_word(each.state)}") for each in found[::-1])

    return _offer(ctx, incomplete, migrations)


def _offer(
    ctx: click.Context, incomplete: str, ask: Callable[[Client], Iterable[tuple[str, str]]]
) -> list[CompletionItem]:
    # A daemon that cannot be asked offers nothing; the command itself will say why.
    with suppress(MigrateError), connect(_daemon_of(ctx)) as client:
        return [CompletionItem(word, help=note) for word, note in ask(client) if word.startswith(incomplete)]
    return []


def _daemon_of(ctx: click.Context) -> DaemonAt:
    # Where only a part of a command line is parsed, variables and defaults are left out.
    address = ctx.params.get("daemon") or os.environ.get("MIGRATE_DAEMON") or DEFAULT_DAEMON
    tls_dir = ctx.params.get("tls_dir") or os.environ.get("MIGRATE_TLS_DIR")
    return DaemonAt(address, Path(tls_dir) if tls_dir else None)
