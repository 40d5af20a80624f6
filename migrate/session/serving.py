"""A source whose guest runs at the destination: it serves pages, and follows what the destination says, until END.

Whatever an answer says, and however long there is none: here are the only copies of missing pages, and somebody may
come for them.
"""

import contextlib
import threading
from collections.abc import Callable

from migrate.config import Endpoint
from migrate.errors import GuestLostError, MigrateError, PostcopyPausedError, StateDirError
from migrate.session import figures
from migrate.session.ledger import Ledger
from migrate.session.ports import PeerOf, PeerPort
from migrate.session.states import FINAL_STATES, Event
from migrate.telemetry.clock import Clock
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

_POLL_S = 0.2
LOST_WORDS = "the guest process died at the source, and with it pages that moved nowhere"


class DestinationLink:
    """Where the destination is, as far as is known, and when it was heard of. Thread-safe.

    Args:
        ledger: Of the migration; its entry is kept up to date.
        control_endpoint: Our TransferService, as the destination should see it.
        page_endpoint: Our PageService, likewise.
        peer_of: Connects to it.
        clock: Times its silence.
        must_announce: Whether the destination may believe us elsewhere.
        on_moved: Told that it is on another host now.
    """

    def __init__(
        self,
        ledger: Ledger,
        control_endpoint: Endpoint,
        page_endpoint: Endpoint,
        peer_of: PeerOf,
        clock: Clock,
        *,
        must_announce: bool,
        on_moved: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._saved = ledger.entry.source
        self.control_endpoint = control_endpoint
        self.page_endpoint = page_endpoint
        self._peer_of = peer_of
        self._clock = clock
        self._timeout_us = self._saved.request.peer_timeout_us
        self._must_announce = must_announce
        self._on_moved = on_moved
        self._heard_us = clock.now_us()
        self._offered: Endpoint | None = None
        self._turned_us: int | None = None
        self._peer = self._connect()

    @property
    def peer(self) -> PeerPort:
        """Its TransferService."""
        return self._peer

    def note_heard(self) -> None:
        """It has answered."""
        self._heard_us = self._clock.now_us()

    @property
    def is_silent(self) -> bool:
        """Whether it counts as lost, when a call to it has just broken."""
        # That call may have taken half the timeout already, and the next one may take all of it.
        return self._clock.now_us() - self._heard_us > self._timeout_us // 2

    def turn_to(self, destination: Endpoint) -> None:
        """It listens elsewhere now."""
        record = self._ledger.record
        with record.lock:
            has_moved = Endpoint.parse(self._saved.to).host != destination.host
            self._saved.to = str(destination)
            before, self._peer = self._peer, self._connect()
            self._must_announce = True
            record.update(lambda migration: figures.note_peer(migration, str(destination)))
        before.close()
        if has_moved:
            self._on_moved()
        with contextlib.suppress(StateDirError):  # found out again, if need be
            self._ledger.save()

    def offer(self, destination: Endpoint) -> None:
        """It says that it is there. An address that answers us is as good as the one by which it knows itself."""
        self._offered = destination

    def turn_to_offered(self) -> None:
        """Where we ask, nobody answers: if it said that it is elsewhere, ask there, and here again later."""
        offered, before, now_us = self._offered, self._saved.to, self._clock.now_us()
        if offered is None or str(offered) == before:
            return
        if self._turned_us is None or now_us - self._turned_us > self._timeout_us:
            self._turned_us = now_us
            self.turn_to(offered)
            self._offered = Endpoint.parse(before)

    def announce_again(self) -> None:
        """What it was told before may not be so any more."""
        self._must_announce = True

    def announce(self) -> None:
        """Tell it, once, where we are since this daemon was started, or since it moved.

        It looks for its pages then. If our guest died with our daemon, it hears so, and knows what that means: the
        guest is lost, or END is about to come, because all of them are there.

        Raises:
            MigrateError: it cannot be told now.
        """
        if not self._must_announce:
            return
        self._peer.resume_migration(
            transfer.ResumeMigrationRequest(
                migration_id=self._ledger.record.migration_id,
                token=self._saved.token,
                control_endpoint=str(self.control_endpoint),
                page_endpoint=str(self.page_endpoint),
            )
        )
        self._must_announce = False

    def close(self) -> None:
        """Close the connection."""
        self._peer.close()

    def _connect(self) -> PeerPort:
        return self._peer_of(Endpoint.parse(self._saved.to), "destination", self._timeout_us / 1_000_000)


class Serving:
    """Follows one migration from RUNNING to its end. `run` is called by the session's thread.

    Args:
        ledger: Of the migration, in POSTCOPY.
        link: To the destination.
        stopping: Ends it.
    """

    def __init__(self, ledger: Ledger, link: DestinationLink, stopping: threading.Event) -> None:
        self._ledger = ledger
        self._record = ledger.record
        self._link = link
        self._stopping = stopping

    def run(self) -> None:
        """Return at the end, or when stopping."""
        self._link.note_heard()
        while not self._stopping.is_set() and not self._record.wait_state(lambda now: now in FINAL_STATES, _POLL_S):
            try:
                self.look()
            except MigrateError as error:
                self._link.turn_to_offered()
                if self._link.is_silent:
                    self._pause(PostcopyPausedError(error.message, remedy=error.remedy))

    def look(self) -> None:
        """Hear how far the destination is.

        Raises:
            MigrateError: it does not say.
        """
        self._link.announce()
        incoming = self._link.peer.get_incoming(self._record.migration_id, live=self._record.live.is_watched)
        self._link.note_heard()
        self._follow(incoming)

    def _follow(self, incoming: types.Migration) -> None:
        with self._record.lock:
            if self._record.is_final:
                return
            self._record.live.hand_on(incoming)
            self._record.update(lambda migration: figures.merge(migration, incoming))
            if incoming.state == types.MIGRATION_STATE_FAILED:
                self._follow_failure(incoming)
            elif incoming.state == types.MIGRATION_STATE_POSTCOPY_PAUSED:
                self._pause(PostcopyPausedError(incoming.error.message, remedy=incoming.error.remedy))
            elif incoming.state == types.MIGRATION_STATE_POSTCOPY_RECOVER:
                if self._record.can(Event.RECOVERING):
                    self._record.on(Event.RECOVERING)
            elif self._record.can(Event.RUNNING):
                self._record.on(Event.RUNNING)

    def _follow_failure(self, incoming: types.Migration) -> None:
        lost = GuestLostError(incoming.error.message, remedy=incoming.error.remedy)
        if incoming.holder == types.GUEST_HOLDER_DESTINATION:
            self._pause(PostcopyPausedError(incoming.error.message))
            self._ledger.end_anyhow(Event.POISONED, lost)
        else:
            self._ledger.end_anyhow(Event.GUEST_LOST, lost)

    def _pause(self, error: PostcopyPausedError) -> None:
        with self._record.lock:
            if self._record.can(Event.LINK_LOST):
                self._record.on(Event.LINK_LOST, error)
