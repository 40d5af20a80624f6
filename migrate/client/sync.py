"""The client that blocks."""

import builtins
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

from migrate.client import calls
from migrate.client.connection import Connection
from migrate.client.terms import GuestTerms, MigrationTerms, guest_spec, start_request
from migrate.client.words import FINAL_STATES, SETTLED_STATES
from migrate.errors import CallFailedError, DaemonLostError
from migrate.v1 import types_pb2 as types

_Result = TypeVar("_Result")


class Guests:
    """The guests of a daemon's host. Every method raises a MigrateError if it fails."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, name: str, **terms: Unpack[GuestTerms]) -> types.Guest:
        """Make a guest and let it run; it may still be populating its memory.

        Raises:
            MigrateError: why it could not be made; nothing is left of it.
        """
        return self._connection.call(calls.create_guest(guest_spec(name, **terms)))

    def attach(self, name: str, qmp_socket: str = "", program_socket: str = "") -> types.Guest:
        """Take over what runs on the daemon's host: a QEMU, by its monitor, or a program that opted in.

        Args:
            name: What the guest is called from now on.
            qmp_socket: Where the monitor listens, there.
            program_socket: Or where the program does.
        """
        return self._connection.call(calls.attach_guest(name, qmp_socket, program_socket))

    def list(self) -> builtins.list[types.Guest]:
        """All guests, by name."""
        return self._connection.call(calls.list_guests())

    def get(self, name: str) -> types.Guest:
        """One guest.

        Raises:
            NotFoundError: it is not here.
        """
        return self._connection.call(calls.get_guest(name))

    def pause(self, name: str) -> None:
        """Stop its vCPUs."""
        self._connection.call(calls.pause_guest(name))

    def resume(self, name: str) -> None:
        """Let its vCPUs run again."""
        self._connection.call(calls.resume_guest(name))

    def delete(self, name: str) -> None:
        """End it and free its memory.

        Raises:
            GuestBusyError: it is being moved.
        """
        self._connection.call(calls.delete_guest(name))

    def audit(self, name: str) -> types.GuestStatistics:
        """Have it compare every page of its working set, which takes a while; what it knows then."""
        return self._connection.call(calls.audit_guest(name))

    def statistics(self, name: str) -> types.GuestStatistics:
        """What it has counted and timed."""
        with closing(self.watch_statistics(name, interval_us=0)) as answers:
            for answer in answers:
                return answer
        raise CallFailedError(f"the daemon at {self._connection.address} ended the call without an answer")

    def watch_statistics(
        self, name: str, *, interval_us: int = 1_000_000
    ) -> Generator[types.GuestStatistics, None, None]:
        """The same again and again, every so many microseconds, for as long as it is iterated."""
        return self._connection.stream(calls.watch_statistics(name, interval_us))


class Migrations:
    """The migrations of a daemon, of whichever side. Every method raises a MigrateError if it fails."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def start(self, guest: str, to: str, **terms: Unpack[MigrationTerms]) -> str:
        """Begin to move a guest of this daemon to the one at HOST:PORT; the migration's id, at once.

        Raises:
            MigrateError: why it cannot begin; the guest runs on.
        """
        return self._connection.call(calls.start_migration(start_request(guest, to, **terms)))

    def get(self, migration_id: str) -> types.Migration:
        """One migration.

        Raises:
            NotFoundError: it is not known here.
        """
        return self._connection.call(calls.get_migration(migration_id))

    def list(self) -> builtins.list[types.Migration]:
        """All that the daemon knows of, in order of their start."""
        return self._connection.call(calls.list_migrations())

    def watch(self, migration_id: str, *, live: bool = False) -> Generator[types.Migration, None, None]:
        """The migration whenever it changes, several times a second while pages move, until it has ended.

        The stream ends early, without an error, if the daemon shuts down. Closing the generator ends the call.

        Args:
            migration_id: Which.
            live: Whether to have the daemons gather `live` of each: where pages are missing, and the fault latencies
                of the last second. The destination spends a little on that, for as long as this lasts.
        """
        return self._connection.stream(calls.watch_migration(migration_id, live=live))

    def trace(self, migration_id: str) -> Generator[types.TracePart, None, None]:
        """What is traced of a migration that was started with `trace`, part by part, at its source, as it comes.

        It ends once the trace is whole, or will come no further. Each part is given once.

        Raises:
            ConfigError: it is not traced.
        """
        return self._connection.stream(calls.watch_trace(migration_id))

    def follow(
        self,
        migration_id: str,
        *,
        through_pauses: bool = False,
        live: bool = False,
        away_s: float = calls.AWAY_S,
    ) -> Generator[types.Migration, None, None]:
        """As watch(), to the end, though the daemon be started again meanwhile; the last one is in a settled state.

        Args:
            migration_id: Which.
            through_pauses: Whether a migration that stands still (POSTCOPY_PAUSED) is followed on; else it counts as
                settled.
            live: As for watch().
            away_s: How long the daemon may not answer.

        Raises:
            DaemonLostError: it does not for longer; the migration may go on.
            MigrateError: the daemon refuses, or knows of no such migration.
        """
        settled = FINAL_STATES if through_pauses else SETTLED_STATES
        absence = calls.Absence(migration_id, away_s)
        while True:
            lost = DaemonLostError(f"the daemon at {self._connection.address} is shutting down")
            try:
                with closing(self.watch(migration_id, live=live)) as migrations:
                    for migration in migrations:
                        absence.is_over()
                        yield migration
                        if migration.state in settled:
                            return
            except DaemonLostError as error:
                lost = error
            absence.goes_on(lost)
            time.sleep(calls.LOOK_S)

    def wait(self, migration_id: str, *, through_pauses: bool = False, away_s: float = calls.AWAY_S) -> types.Migration:
        """The migration once it has settled, however it ended; as follow()."""
        followed = self.follow(migration_id, through_pauses=through_pauses, away_s=away_s)
        with closing(followed) as migrations:
            for migration in migrations:
                last = migration
        return last

    def switchover(self, migration_id: str) -> None:
        """Have it switch over now, whatever its mode waits for: what is missing follows.

        Raises:
            GuestBusyError: it has begun to already.
        """
        self._connection.call(calls.start_switchover(migration_id))

    def cancel(self, migration_id: str) -> types.Migration:
        """Give it up, before the vCPUs are told to stop for the switchover: the guest runs on at the source.

        Raises:
            GuestBusyError: it has come too far.
        """
        return self._connection.call(calls.cancel_migration(migration_id))

    def recover(self, migration_id: str, to: str | None = None) -> types.Migration:
        """Try now to have its pages flow again; the migration after the try.

        Args:
            migration_id: Which.
            to: Control address of the other daemon, if it is another one now.

        Raises:
            GuestBusyError: nothing has been lost that this could bring back.
            GuestLostError: it is lost for good.
        """
        return self._connection.call(calls.recover_migration(migration_id, to))


class Client:
    """A connection to one daemon, which the first call makes. Thread-safe; a context manager.

    Args:
        address: HOST:PORT, as in `--daemon`.
        tls_dir: Certificate, key, and whom to trust (docs/operations.md); None talks in plaintext.

    Attributes:
        address: HOST:PORT.
        guests: What lives on its host.
        migrations: What comes and goes.

    Raises:
        ConfigError: the TLS directory cannot be used.
    """

    def __init__(self, address: str, tls_dir: Path | str | None = None) -> None:
        self.address = address
        self._connection = Connection(address, None if tls_dir is None else Path(tls_dir))
        self.guests = Guests(self._connection)
        self.migrations = Migrations(self._connection)

    def call(self, call: calls.Call[_Result]) -> _Result:
        """Make a call of migrate.client.calls as it is.

        Raises:
            MigrateError: as the daemon refuses it.
        """
        return self._connection.call(call)

    def close(self) -> None:
        """End all calls, and the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A signal may have left a call half made, and close() would wait for it for ever: the process ends without.
        if exc_type is None or not issubclass(exc_type, (KeyboardInterrupt, SystemExit)):
            self.close()
