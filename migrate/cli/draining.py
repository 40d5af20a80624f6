"""Empties a host: which guest goes where, what is done about refusals and pauses, and when it is over.

All that counts is at the daemons: each look asks the source for its guests and migrations, and goes on from there. So a
drain that was interrupted, or that runs beside somebody else's migrations, begins nothing twice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from migrate.cli.drain_hosts import AGAIN_S, Destination, Host, list_guests, list_migrations
from migrate.cli.params import DaemonAt
from migrate.client.connection import error_from_info
from migrate.client.terms import MigrationTerms
from migrate.errors import (
    AttemptLostError,
    ChannelError,
    LimitError,
    MigrateError,
    MigrationAbortedError,
    PeerNotTrustedError,
    error_class,
)
from migrate.v1 import types_pb2

LOOK_S = 0.2
# After this, a switchover no longer passes by: its answer was lost, or a daemon was.
_SWITCHOVER_S = 2.0

_FAILED_STATES = (types_pb2.MIGRATION_STATE_FAILED, types_pb2.MIGRATION_STATE_CANCELLED)
# Where a migration waits for its destination, however long that takes. A switchover only passes by if nothing is lost.
_STILL_STATES = (types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED, types_pb2.MIGRATION_STATE_SWITCHOVER)


class Outcome(Enum):
    """What has become of a guest."""

    WAITING = "waiting"
    MOVING = "moving"
    MOVED = "moved"
    PAUSED = "paused"
    FAILED = "failed"
    GONE = "gone"

    @property
    def is_final(self) -> bool:
        """Whether this drain does nothing more about it."""
        return self not in (Outcome.WAITING, Outcome.MOVING)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a guest did not go to a destination.

    Attributes:
        words: The error.
        may_pass: Whether it may be another time, and not only elsewhere.
        at_s: When that was.
        since_s: When that was for the first time.
    """

    words: str
    may_pass: bool
    at_s: float
    since_s: float


@dataclass(slots=True)
class Move:
    """One guest on its way.

    Attributes:
        guest: Its name.
        memory_bytes: Its RAM.
        outcome: How far it is.
        to: Destination of its last migration.
        migration_id: Which; empty while there is none.
        seen: That migration, as the source showed it last.
        error: Why it failed, or stands still.
        start_error: Why it could not even be started, unless somebody else has, or it is gone.
        refusals: By destination.
        still_since_s: Since when its pages stand still.
        recovering: A try to have them flow again, and when it was made.
    """

    guest: str
    memory_bytes: int
    outcome: Outcome = Outcome.WAITING
    to: str = ""
    migration_id: str = ""
    seen: types_pb2.Migration | None = None
    error: str = ""
    start_error: str = ""
    refusals: dict[str, Refusal] = field(default_factory=dict)
    still_since_s: float | None = None
    recovering: Any = None
    recovered_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DrainTerms:
    """How a host is emptied.

    Attributes:
        parallel: Migrations whose pages flow at one time.
        wait_s: How long a daemon may be away, and a migration stand still.
        migration: How guests are moved.
    """

    parallel: int
    wait_s: float
    migration: MigrationTerms


class Drain:
    """Follows, and starts, migrations until every guest of a host has an outcome.

    Args:
        source: The daemon whose host is emptied.
        destinations: Where its guests go.
        terms: How.
        tell: Told each thing that happens, in words.
        now_s: The clock.
    """

    def __init__(
        self,
        source: DaemonAt,
        destinations: Sequence[DaemonAt],
        terms: DrainTerms,
        tell: Callable[[str], None],
        now_s: Callable[[], float],
    ) -> None:
        self._source = Host(source)
        self._terms = terms
        self._tell = tell
        self._now_s = now_s
        self._destinations = {at.address: Destination(at, now_s()) for at in destinations}
        self._heard_s: float | None = None
        self.moves: dict[str, Move] = {}

    def step(self) -> bool:
        """Look at the source, and do what follows from it. True: there is nothing more to do.

        Raises:
            MigrateError: the source cannot be asked.
        """
        now_s = self._now_s()
        try:
            migrations = {found.migration_id: found for found in self._source.ask(list_migrations)}
            guests = {guest.spec.name: guest for guest in self._source.ask(list_guests).guests}
        except ChannelError:
            # One that was never there is perhaps misspelt.
            if self._heard_s is None or now_s - self._heard_s > self._terms.wait_s:
                raise
            return False
        self._heard_s = now_s
        for guest in guests.values():
            self._note_guest(guest, migrations)
        for move in self.moves.values():
            if not move.outcome.is_final:
                self._follow(move, guests, migrations, now_s)
        self._start_some(now_s)
        # One that is complete is listed until its memory has been freed.
        return all(
            move.outcome.is_final and not (move.outcome is Outcome.MOVED and move.guest in guests)
            for move in self.moves.values()
        )

    def close(self) -> None:
        """Close all connections."""
        self._source.close()
        for destination in self._destinations.values():
            destination.close()

    # ---- what is ----

    def _note_guest(self, guest: types_pb2.Guest, migrations: Mapping[str, types_pb2.Migration]) -> None:
        name = guest.spec.name
        move = self.moves.get(name)
        if move is None:
            move = self.moves[name] = Move(name, guest.spec.memory_bytes)
        elif move.outcome in (Outcome.MOVED, Outcome.GONE) and guest.migration_id != move.migration_id:
            # It has come back, or there is another one of that name.
            move = self.moves[name] = Move(name, guest.spec.memory_bytes)
        found = migrations.get(guest.migration_id)
        if found is not None and not move.outcome.is_final and move.migration_id != guest.migration_id:
            move.migration_id, move.outcome, move.to = guest.migration_id, Outcome.MOVING, found.peer
            self._tell(f"{name}: is on its way {_direction(found)} by migration {guest.migration_id}")
            if found.side == types_pb2.MIGRATION_SIDE_SOURCE and found.peer in self._destinations:
                self._destinations[found.peer].sent_bytes += move.memory_bytes

    def _follow(
        self,
        move: Move,
        guests: Mapping[str, types_pb2.Guest],
        migrations: Mapping[str, types_pb2.Migration],
        now_s: float,
    ) -> None:
        found = migrations.get(move.migration_id)
        if found is None or found.side == types_pb2.MIGRATION_SIDE_DESTINATION:
            self._follow_without(move, guests, migrations, found, now_s)
            return
        move.seen = found
        if found.state == types_pb2.MIGRATION_STATE_COMPLETED:
            move.outcome, move.error = Outcome.MOVED, ""
            self._tell(f"{move.guest}: moved to {found.peer}")
        elif found.state in _FAILED_STATES:
            self._note_failure(move, found, now_s)
        elif found.state in _STILL_STATES:
            self._wait_for_pages(move, found, now_s)
        else:
            self._note_flowing(move)

    def _follow_without(
        self,
        move: Move,
        guests: Mapping[str, types_pb2.Guest],
        migrations: Mapping[str, types_pb2.Migration],
        arriving: types_pb2.Migration | None,
        now_s: float,
    ) -> None:
        """No migration takes it away from here, as far as the source knows."""
        guest = guests.get(move.guest)
        if guest is None:
            moved = _last_completed(move.guest, migrations.values())
            if moved is None:
                move.outcome = Outcome.GONE
                self._tell(f"{move.guest}: is gone")
            else:
                # Somebody else began that, and we did not look in time.
                move.migration_id, move.to, move.seen, move.outcome = (
                    moved.migration_id,
                    moved.peer,
                    moved,
                    Outcome.MOVED,
                )
                self._tell(f"{move.guest}: moved to {moved.peer}")
        elif guest.migration_id:
            move.start_error = ""
            if arriving is not None and arriving.state in _STILL_STATES:
                self._wait_for_pages(move, arriving, now_s)
            elif arriving is not None:
                self._note_flowing(move)
        elif move.start_error:
            self._fail(move, move.start_error)
        else:
            move.migration_id, move.outcome = "", Outcome.WAITING

    def _note_failure(self, move: Move, found: types_pb2.Migration, now_s: float) -> None:
        words = str(error_from_info(found.error)) if found.HasField("error") else "it was cancelled"
        if found.state == types_pb2.MIGRATION_STATE_CANCELLED or found.holder != types_pb2.GUEST_HOLDER_SOURCE:
            # Whoever cancelled it wanted it to stay.
            self._fail(move, words)
            return
        destination = self._destinations.get(move.to)
        if destination is not None:
            destination.sent_bytes -= move.memory_bytes
        before = move.refusals.pop(move.to, None)  # the last one is to be the last
        since_s = now_s if before is None else before.since_s
        move.refusals[move.to] = Refusal(words, _may_pass(found), now_s, since_s)
        move.migration_id, move.outcome, move.still_since_s = "", Outcome.WAITING, None
        self._tell(f"{move.guest}: not moved to {move.to}: {words}")

    def _note_flowing(self, move: Move) -> None:
        if move.still_since_s is not None and move.error:
            self._tell(f"{move.guest}: goes on")
        move.still_since_s, move.error = None, ""

    def _wait_for_pages(self, move: Move, found: types_pb2.Migration, now_s: float) -> None:
        if move.still_since_s is None:
            move.still_since_s = now_s
        is_paused = found.state == types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED
        if is_paused and not move.error:
            move.error = found.error.message
            self._tell(f"{move.guest}: stands still: {move.error}")
        if now_s - move.still_since_s > self._terms.wait_s:
            move.outcome = Outcome.PAUSED
            move.error = move.error or "nobody knows whether it runs at the destination"
            self._tell(f"{move.guest}: still stands still, and is left so: {move.error}")
        elif is_paused:
            self._recover(move, now_s)

    def _recover(self, move: Move, now_s: float) -> None:
        """Both daemons try by themselves, with pauses; no need to wait once the destination is there again."""
        destination = self._destinations.get(move.to)
        if destination is not None:
            destination.look(now_s)
        is_trying = move.recovering is not None and not move.recovering.done()
        if destination is None or not destination.is_there or is_trying or now_s - move.recovered_s < AGAIN_S:
            return
        move.recovered_s = now_s
        move.recovering = self._source.recover(move.migration_id)

    # ---- what to do ----

    def _start_some(self, now_s: float) -> None:
        waiting = [move for move in self.moves.values() if move.outcome is Outcome.WAITING]
        if not waiting:
            return
        for destination in self._destinations.values():
            destination.look(now_s)
        flowing = sum(_is_flowing(move, now_s) for move in self.moves.values())
        for move in waiting:
            if flowing >= self._terms.parallel:
                return
            chosen = self._choose(move, now_s)
            if chosen is not None:
                flowing += self._start(move, chosen)

    def _choose(self, move: Move, now_s: float) -> Destination | None:
        """The one with most room, of those that have not refused it; fails the move if there is no hope of any."""
        hopeful = [found for found in self._destinations.values() if self._is_hopeful(move, found, now_s)]
        if not hopeful:
            away = [found.why_away for found in self._destinations.values() if found.why_away is not None]
            refused = [refusal.words for refusal in move.refusals.values()]
            self._fail(move, [*map(str, away), *refused][-1])
            return None
        ready = [
            found
            for found in hopeful
            if found.is_there
            and (found.address not in move.refusals or now_s - move.refusals[found.address].at_s >= AGAIN_S)
        ]
        # Where it was not refused yet comes first.
        return min(ready, key=lambda found: (found.address in move.refusals, -found.room_bytes), default=None)

    def _is_hopeful(self, move: Move, destination: Destination, now_s: float) -> bool:
        refusal = move.refusals.get(destination.address)
        if refusal is not None and not refusal.may_pass:
            return False
        tried_s = now_s - refusal.since_s if refusal is not None else 0.0
        return max(tried_s, destination.away_s(now_s)) <= self._terms.wait_s

    def _start(self, move: Move, destination: Destination) -> bool:
        terms = self._terms.migration
        try:
            migration_id = self._source.ask(
                lambda client: client.migrations.start(move.guest, destination.address, **terms)
            )
        except ChannelError:
            return False  # the next look tells whether it has begun
        except MigrateError as error:
            move.start_error = str(error)  # likewise: the guest may be gone, or somebody else be moving it
            return False
        move.migration_id, move.to, move.outcome = migration_id, destination.address, Outcome.MOVING
        destination.sent_bytes += move.memory_bytes
        self._tell(f"{move.guest}: moving to {move.to} by migration {move.migration_id}")
        return True

    def _fail(self, move: Move, words: str) -> None:
        move.outcome, move.error = Outcome.FAILED, words
        self._tell(f"{move.guest}: failed: {words}")


def _is_flowing(move: Move, now_s: float) -> bool:
    """Whether it counts against what goes on at one time; a pause, and a switchover that stands, leave room."""
    if move.outcome is not Outcome.MOVING:
        return False
    # A pause has its error.
    return move.still_since_s is None or (not move.error and now_s - move.still_since_s < _SWITCHOVER_S)


def _may_pass(found: types_pb2.Migration) -> bool:
    """Whether what a migration failed of was a loss, or a crowd, rather than something about guest and host."""
    cls = error_class(found.error.type)
    if issubclass(cls, MigrationAbortedError):
        return issubclass(cls, AttemptLostError) or found.attempt > 1
    return issubclass(cls, (ChannelError, LimitError)) and not issubclass(cls, PeerNotTrustedError)


def _direction(found: types_pb2.Migration) -> str:
    return f"{'from' if found.side == types_pb2.MIGRATION_SIDE_DESTINATION else 'to'} {found.peer}"


def _last_completed(guest: str, migrations: Iterable[types_pb2.Migration]) -> types_pb2.Migration | None:
    found = None
    for migration in migrations:
        if migration.guest == guest and migration.side == types_pb2.MIGRATION_SIDE_SOURCE:
            found = migration if migration.state == types_pb2.MIGRATION_STATE_COMPLETED else None
    return found
