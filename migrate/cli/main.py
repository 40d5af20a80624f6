"""The entry point: collects the commands and turns errors into words and exit codes."""

import codecs
import io
import os
import sys
from pkgutil import resolve_name
from typing import Any

import click

from migrate.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PAUSED, EXIT_TERMINATED
from migrate.errors import MigrateError, PostcopyPausedError

# What stands for the signs that our words have, where stdout or stderr cannot show them.
_PLAIN_SIGNS = {"µ": "u", "→": "->", "…": "..."}

# Where each command is: it starts without what the others import.
_COMMANDS = {
    "cancel": "migration:cancel",
    "completion": "completion:completion",
    "daemon": "daemon:daemon",
    "demo": "demo:demo",
    "doctor": "doctor:doctor",
    "drain": "drain:drain",
    "guest": "guest:guest",
    "list": "listing:list_migrations",
    "policies": "policies:policies",
    "recover": "migration:recover",
    "start": "migration:start",
    "status": "migration:status",
    "switchover": "migration:switchover",
    "tls": "tls:tls",
    "trace": "trace:trace",
}


class _MigrateGroup(click.Group):
    """A group whose commands are imported when they are asked for, and may raise any MigrateError."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = resolve_name(f"migrate.cli.{_COMMANDS[cmd_name]}")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MigrateError as error:
            click.echo(f"migrate: {error}", err=True)
            sys.exit(EXIT_PAUSED if isinstance(error, PostcopyPausedError) else EXIT_FAILED)


@click.group(cls=_MigrateGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="migrate")
def main() -> None:
    """Move running virtual machines between hosts, postcopy, over gRPC.

    Exit codes: 0 done, 1 failed, 2 usage, 3 paused and recoverable.
    """


def run() -> None:
    """Run the command as a process of its own."""
    codecs.register_error("plain", _plain_signs)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    try:
        main(prog_name="migrate")
    except SystemExit as exit_request:
        if exit_request.code not in (EXIT_INTERRUPTED, EXIT_TERMINATED):
            raise
        # A signal may have left a gRPC call half made, and the interpreter's clean-up would wait for it for ever.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_request.code)


def _plain_signs(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    escaped = (_PLAIN_SIGNS.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs)
    return "".join(escaped), error.end
