"""The daemons that a drain talks to: they may go away and come back, and each has so much room."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from migrate.cli.client import connect
from migrate.cli.params import DaemonAt
from migrate.client import Client
from migrate.client.calls import GUESTS, Call
from migrate.errors import ChannelError, MigrateError
from migrate.v1 import guest_service_pb2, types_pb2

AGAIN_S = 1.0
"""Between two tries of what has just failed."""

_LOOK_DEADLINE_S = 5.0

_Answer = TypeVar("_Answer")


class Host:
    """A daemon that may go away and come back: each connection lasts until it fails."""

    def __init__(self, at: DaemonAt) -> None:
        self.at = at
        self._client: Client | None = None

    def ask(self, question: Callable[[Client], _Answer]) -> _Answer:
        """Ask over the connection that there is, or a new one.

        Raises:
            ChannelError: it does not answer; the next call connects anew.
            MigrateError: it refuses.
        """
        if self._client is None:
            self._client = connect(self.at)
        try:
            return question(self._client)
        except ChannelError:
            self.close()
            raise

    def recover(self, migration_id: str) -> "Future[types_pb2.Migration]":
        """Have pages of a migration flow again; under way when this returns, over a connection of its own."""
        future: Future[types_pb2.Migration] = Future()

        def run() -> None:
            try:
                with connect(self.at) as client:
                    future.set_result(client.migrations.recover(migration_id))
            except MigrateError as error:
                future.set_exception(error)

        threading.Thread(target=run, name="recover", daemon=True).start()
        return future

    def close(self) -> None:
        """Close the connection, if there is one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


class Destination:
    """A host that takes guests.

    Free memory is what it says at first, less what has been sent there since: what it says later would count guests
    twice, or not yet.

    Args:
        at: Its daemon.
        now_s: When it is taken up.
    """

    def __init__(self, at: DaemonAt, now_s: float) -> None:
        self.address = at.address
        self.sent_bytes = 0
        self.is_there = False
        self.why_away: MigrateError | None = None
        self._host = Host(at)
        self._room_bytes: int | None = None
        self._there_s = now_s
        self._looked_s: float | None = None

    @property
    def room_bytes(self) -> int:
        """How much more it can take, by its own account; a rank, not a promise."""
        return (self._room_bytes or 0) - self.sent_bytes

    def away_s(self, now_s: float) -> float:
        """Since when it does not answer."""
        return 0.0 if self.is_there else now_s - self._there_s

    def look(self, now_s: float) -> None:
        """See whether it is there, now and then."""
        if self._looked_s is not None and now_s - self._looked_s < AGAIN_S:
            return
        self._looked_s = now_s
        try:
            answer = self._host.ask(list_guests)
        except MigrateError as error:
            self.is_there, self.why_away = False, error
            return
        self.is_there, self._there_s, self.why_away = True, now_s, None
        if self._room_bytes is None:
            owed_bytes = sum(guest.spec.memory_bytes - guest.resident_bytes for guest in answer.guests)
            self._room_bytes = answer.available_bytes - max(0, owed_bytes)

    def close(self) -> None:
        """Close the connection."""
        self._host.close()


def list_migrations(client: Client) -> Sequence[types_pb2.Migration]:
    """All that a daemon knows of, in order of their start."""
    return client.migrations.list()


def list_guests(client: Client) -> guest_service_pb2.ListGuestsResponse:
    """The guests of its host, and what memory that has left."""
    request = guest_service_pb2.ListGuestsRequest()
    listing: Call[guest_service_pb2.ListGuestsResponse] = Call(
        GUESTS, "ListGuests", request, lambda response: response, _LOOK_DEADLINE_S
    )
    return client.call(listing)
