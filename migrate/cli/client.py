"""The daemon that a command talks to."""

import os

from migrate.cli.params import DEFAULT_DAEMON, DaemonAt
from migrate.client import Client


def connect(at: DaemonAt) -> Client:
    """A client of a daemon; the first call connects, or fails if nobody answers there.

    Raises:
        ConfigError: the TLS directory cannot be used.
    """
    return Client(at.address, at.tls_dir)


def command_for(at: DaemonAt, *words: str) -> str:
    """A command that asks the same daemon, to be typed where this one was."""
    is_default = at.address == (os.environ.get("MIGRATE_DAEMON") or DEFAULT_DAEMON)
    return " ".join(("migrate", *words) if is_default else ("migrate", *words, "--daemon", at.address))
