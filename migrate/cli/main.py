"""The entry point: collects the commands and turns errors into words and exit codes."""

import codecs
import io
import os
import sys
from typing import Any

import click

from migrate.cli.completion import completion
from migrate.cli.daemon import daemon
from migrate.cli.demo import EXIT_TERMINATED, demo
from migrate.cli.doctor import doctor
from migrate.cli.drain import drain
from migrate.cli.guest import guest
from migrate.cli.listing import list_migrations
from migrate.cli.migration import EXIT_INTERRUPTED, cancel, recover, start, status, switchover
from migrate.cli.policies import policies
from migrate.cli.render import EXIT_FAILED, EXIT_PAUSED
from migrate.cli.tls import tls
from migrate.cli.trace import trace
from migrate.errors import MigrateError, PostcopyPausedError

# What stands for the signs that our words have, where stdout or stderr cannot show them.
_PLAIN_SIGNS = {"µ": "u", "→": "->", "…": "..."}


class _MigrateGroup(click.Group):
    """A group whose commands may raise any MigrateError."""

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


main.add_command(cancel)
main.add_command(completion)
main.add_command(daemon)
main.add_command(demo)
main.add_command(doctor)
main.add_command(drain)
main.add_command(guest)
main.add_command(list_migrations)
main.add_command(policies)
main.add_command(start)
main.add_command(status)
main.add_command(recover)
main.add_command(switchover)
main.add_command(tls)
main.add_command(trace)


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
