"""Runs the command line in this process, against a fake daemon."""

import json

from click.testing import CliRunner

from migrate.cli.main import main


def run(*arguments, daemon=None, env=None):
    """Run `migrate` with arguments; stdout and stderr are kept apart."""
    variables = {"MIGRATE_DAEMON": daemon.address if daemon else None, "MIGRATE_TLS_DIR": None, "NO_COLOR": "1"}
    variables |= env or {}
    return CliRunner(env=variables).invoke(main, list(arguments), prog_name="migrate")


def json_of(result):
    """The JSON object on the last line of stdout; the command must have written nothing after it."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return json.loads(result.stdout.splitlines()[-1])
