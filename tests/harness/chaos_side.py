"""One daemon of a run of chaos, behind its proxies, and how it is asked while it may be dead."""

import contextlib
import threading
import time

import grpc

from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import types_pb2 as types
from tests.harness.proxied import ProxiedDaemon

NAME = "g"
ASK_S = 2
POLL_S = 0.02
SETTLE_S = 15
# What a call to a daemon that is being killed raises: the last one, if its channel was closed under it.
NO_ANSWER = (grpc.RpcError, ValueError)


class ChaosError(Exception):
    """Something is not as it must be; the message says what."""


class Side:
    """One daemon, its proxies, and the lock that whoever kills it holds until it is there again."""

    def __init__(self, name, directory, env, chooser):
        self.name = name
        self.state_dir, self.log = directory / name, directory / f"{name}.log"
        self.socket = self.state_dir / "guests" / f"{NAME}.sock"
        self.lock = threading.Lock()
        self.daemon = ProxiedDaemon(chooser=chooser, env=env, state_dir=self.state_dir, log=self.log, forked=True)
        self.control, self.pages = self.daemon.control_link, self.daemon.page_link

    def record(self, migration_id):
        """What the daemon says of a migration; None while it says nothing."""
        try:
            request = migration.GetMigrationRequest(migration_id=migration_id)
            return self.daemon.migrations.GetMigration(request, timeout=ASK_S).migration
        except NO_ANSWER:
            return None

    def check_lives(self):
        """Unless it is being killed, it must not end."""
        if not self.lock.locked() and (code := self.daemon.process.poll()) is not None and not self.lock.locked():
            raise ChaosError(f"the {self.name} daemon ended by itself, with {code}")

    def heal(self):
        """Links are whole, and stay so."""
        self.daemon.calm()

    def close(self):
        self.daemon.close()


def wait_for(predicate, what):
    """Wait until something is true; a daemon that does not answer is asked again."""
    ends_s = time.monotonic() + SETTLE_S
    while True:
        with contextlib.suppress(*NO_ANSWER):
            if predicate():
                return
        if time.monotonic() > ends_s:
            raise ChaosError(f"waited {SETTLE_S} s in vain for {what}")
        time.sleep(POLL_S)


def describe(record):
    """A record in words."""
    if record is None:
        return "does not answer"
    words = types.MigrationState.Name(record.state).removeprefix("MIGRATION_STATE_").lower()
    words += f", attempt {record.attempt}, recoveries {record.recoveries}"
    return f"{words}, {record.error.message}" if record.error.message else words
