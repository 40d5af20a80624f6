"""The client for asyncio: the same methods as of the one that blocks, awaited, or iterated with `async for`."""

import asyncio
import builtins
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from migrate.client import calls
from migrate.client.connection import AioConnection
from migrate.client.terms import GuestTerms, MigrationTerms, guest_spec, start_request
from migrate.client.words import FINAL_STATES, SETTLED_STATES
from migrate.errors import CallFailedError, DaemonLostError
from migrate.v1 import types_pb2 as types


class AsyncGuests:
    """The guests of a daemon's host. Every method raises a MigrateError if it fails."""

    def __init__(self, connection: AioConnection) -> None:
        self._connection = connection

    async def create(self, name: str, **terms: Unpack[GuestTerms]) -> types.Guest:
        """Make a guest and let it run; it may still be populating its memory.

        Raises:
            MigrateError: why it could not be made; nothing is left of it.
        """
        return await self._connection.call(calls.create_guest(guest_spec(name, **terms)))

    async def attach(self, name: str, qmp_socket: str = "", program_socket: str = "") -> types.Guest:
        """Take over what runs on the daemon's host: a QEMU, by its monitor, or a program that opted in.

        Args:
            name: What the guest is called from now on.
            qmp_socket: Where the monitor listens, there.
            program_socket: Or where the program does.
        """
        return await self._connection.call(calls.attach_guest(name, qmp_socket, program_socket))

    async def list(self) -> builtins.list[types.Guest]:
        """All guests, by name."""
        return await self._connection.call(calls.list_guests())

    async def get(self, name: str) -> types.Guest:
        """One guest.

        Raises:
            NotFoundError: it is not here.
        """
        return await self._connection.call(calls.get_guest(name))

    async def pause(self, name: str) -> None:
        """Stop its vCPUs."""
        await self._connection.call(calls.pause_guest(name))

    async def resume(self, name: str) -> None:
        """Let its vCPUs run again."""
        await self._connection.call(calls.resume_guest(name))

    async def delete(self, name: str) -> None:
        """End it and free its memory.

        Raises:
            GuestBusyError: it is being moved.
        """
        await self._connection.call(calls.delete_guest(name))

    async def audit(self, name: str) -> types.GuestStatistics:
        """Have it compare every page of its working set, which takes a while; what it knows then."""
        return await self._connection.call(calls.audit_guest(name))

    async def statistics(self, name: str) -> types.GuestStatistics:
        """What it has counted and timed."""
        async with aclosing(self.watch_statistics(name, interval_us=0)) as answers:
            async for answer in answers:
                return answer
        raise CallFailedError(f"the daemon at {self._connection.address} ended the call without an answer")

    def watch_statistics(
        self, name: str, *, interval_us: int = 1_000_000
    ) -> AsyncGenerator[types.GuestStatistics, None]:
        """The same again and again, every so many microseconds, for as long as it is iterated."""
        return self._connection.stream(calls.watch_statistics(name, interval_us))


class AsyncMigrations:
    """The migrations of a daemon, of whichever side. Every method raises a MigrateError if it fails."""

    def __init__(self, connection: AioConnection) -> None:
        self._connection = connection

    async def start(self, guest: str, to: str, **terms: Unpack[MigrationTerms]) -> str:
        """Begin to move a guest of this daemon to the one at HOST:PORT; the migration's id, at once.

        Raises:
            MigrateError: why it cannot begin; the guest runs on.
        """
        return await self._connection.call(calls.start_migration(start_request(guest, to, **terms)))

    async def get(self, migration_id: str) -> types.Migration:
        """One migration.

        Raises:
            NotFoundError: it is not known here.
        """
        return await self._connection.call(calls.get_migration(migration_id))

    async def list(self) -> builtins.list[types.Migration]:
        """All that the daemon knows of, in order of their start."""
        return await self._connection.call(calls.list_migrations())

    def watch(self, migration_id: str, *, live: bool = False) -> AsyncGenerator[types.Migration, None]:
        """The migration whenever it changes, several times a second while pages move, until it has ended.

        The stream ends early, without an error, if the daemon shuts down. Closing the generator ends the call.

        Args:
            migration_id: Which.
            live: Whether to have the daemons gather `live` of each: where pages are missing, and the fault latencies
                of the last second. The destination spends a little on that, for as long as this lasts.
        """
        return self._connection.stream(calls.watch_migration(migration_id, live=live))

    def trace(self, migration_id: str) -> AsyncGenerator[types.TracePart, None]:
        """What is traced of a migration that was started with `trace`, part by part, at its source, as it comes.

        It ends once the trace is whole, or will come no further. Each part is given once.

        Raises:
            ConfigError: it is not traced.
        """
        return self._connection.stream(calls.watch_trace(migration_id))

    async def follow(
        self,
        migration_id: str,
        *,
        through_pauses: bool = False,
        live: bool = False,
        away_s: float = calls.AWAY_S,
    ) -> AsyncGenerator[types.Migration, None]:
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
                async with aclosing(self.watch(migration_id, live=live)) as migrations:
                    async for migration in migrations:
                        absence.is_over()
                        yield migration
                        if migration.state in settled:
                            return
            except DaemonLostError as error:
                lost = error
            absence.goes_on(lost)
            await asyncio.sleep(calls.LOOK_S)

    async def wait(
        self, migration_id: str, *, through_pauses: bool = False, away_s: float = calls.AWAY_S
    ) -> types.Migration:
        """The migration once it has settled, however it ended; as follow()."""
        followed = self.follow(migration_id, through_pauses=through_pauses, away_s=away_s)
        async with aclosing(followed) as migrations:
            async for migration in migrations:
                last = migration
        return last

    async def switchover(self, migration_id: str) -> None:
        """Have it switch over now, whatever its mode waits for: what is missing follows.

        Raises:
            GuestBusyError: it has begun to already.
        """
        await self._connection.call(calls.start_switchover(migration_id))

    async def cancel(self, migration_id: str) -> types.Migration:
        """Give it up, before the vCPUs are told to stop for the switchover: the guest runs on at the source.

        Raises:
            GuestBusyError: it has come too far.
        """
        return await self._connection.call(calls.cancel_migration(migration_id))

    async def recover(self, migration_id: str, to: str | None = None) -> types.Migration:
        """Try now to have its pages flow again; the migration after the try.

        Args:
            migration_id: Which.
            to: Control address of the other daemon, if it is another one now.

        Raises:
            GuestBusyError: nothing has been lost that this could bring back.
            GuestLostError: it is lost for good.
        """
        return await self._connection.call(calls.recover_migration(migration_id, to))


class AsyncClient:
    """A connection to one daemon, which the first call makes; made where an event loop runs. An async context manager.

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
        self._connection = AioConnection(address, None if tls_dir is None else Path(tls_dir))
        self.guests = AsyncGuests(self._connection)
        self.migrations = AsyncMigrations(self._connection)

    async def close(self) -> None:
        """End all calls, and the connection."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
