"""One try of a source to bring its guest to the destination: prepare, precopy, pause, hand over.

Once Switchover was sent, the vCPUs stay paused here until the destination either runs the guest, or says that it never
did and never will (migrate.session.two_generals).
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from migrate.barriers import Point, reach
from migrate.config import PROTOCOL_VERSION, Endpoint
from migrate.errors import (
    AttemptLostError,
    ChannelError,
    GuestBusyError,
    GuestGoneError,
    GuestHolder,
    LocalProtocolError,
    MigrateError,
    MigrationAbortedError,
    NotFoundError,
)
from migrate.native.compression import Compression
from migrate.native.exports import Exports
from migrate.native.page_source import PageSource
from migrate.session import figures
from migrate.session.convergence import Next, Terms
from migrate.session.ledger import Ledger
from migrate.session.ports import GuestPort
from migrate.session.precopy import Precopy, gave_up
from migrate.session.rules import choose_compression, choose_transport
from migrate.session.serving import DestinationLink
from migrate.session.states import Event, State
from migrate.session.two_generals import learn_whether_it_runs
from migrate.telemetry.clock import Clock
from migrate.units import bytes_to_pages
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

# Pages of the last round that do not come in the time that was reckoned get this much more.
_COMPLETE_GRACE_US = 1_000_000
# The vCPUs stand still: whatever is read now is later than every round of the dirty log.
_LAST_GENERATION = (1 << 63) - 1


class CancelledError(MigrationAbortedError):
    """The operator gave up; the session's thread undoes what there is."""


class StoppedError(Exception):
    """The session was told to stop; who holds the guest does not change."""


@dataclass(slots=True)
class Outgoing:
    """What the parts of a source's session share.

    Attributes:
        ledger: Of the migration.
        terms: What the operator asked for, as far as the precopy goes.
        guest: The guest process.
        link: To the destination daemon.
        exports: Where the guest's pages are published.
        clock: Times it all.
        pause: Waits some seconds; raises what ends the session meanwhile.
    """

    ledger: Ledger
    terms: Terms
    guest: GuestPort
    link: DestinationLink
    exports: Exports
    clock: Clock
    pause: Callable[[float], None]


class Attempt:
    """One try. Its methods are called by the session's thread, in their order.

    Args:
        out: What is shared.
        number: From 1 on; the destination refuses all that belongs to an earlier one than it knows.
    """

    def __init__(self, out: Outgoing, number: int) -> None:
        self._out = out
        self._saved = out.ledger.entry.source
        self._record = out.ledger.record
        self._id = self._record.migration_id
        self.number = number
        self._memfds: list[int] = []
        self._source: PageSource | None = None
        self._precopy: Precopy | None = None
        self._is_published = False
        self.paused_us: int | None = None
        self.downtime = types.DowntimeParts()

    @property
    def precopy(self) -> Precopy | None:
        """The rounds, once they have begun."""
        return self._precopy

    def open(self) -> types.GuestDescription:
        """Take the guest's memory."""
        description, _, _, self._memfds = self._out.guest.describe()
        self._record.update(lambda migration: figures.describe(migration, description))
        self._source = PageSource(self._memfds[0], bytes_to_pages(description.regions[0].size_bytes))
        return description

    # ---- SETUP ----

    def prepare(self) -> None:
        """Have the destination build the twin.

        Raises:
            AttemptLostError: it was lost meanwhile.
            MigrateError: why the guest cannot go there.
        """
        request = self._saved.request
        description = self.open()
        reach(Point.SOURCE_PREPARING, self._id)
        with self._calling():
            prepared = self._out.link.peer.prepare(
                transfer.PrepareRequest(
                    migration_id=self._id,
                    protocol_version=PROTOCOL_VERSION,
                    guest=description,
                    page_endpoint=str(self._out.link.page_endpoint),
                    control_endpoint=str(self._out.link.control_endpoint),
                    token=self._saved.token,
                    mode=types.MigrationMode.ValueType(self._out.terms.mode),
                    order=request.order,
                    transport=choose_transport(request.transport),
                    max_bandwidth_bytes_per_s=request.max_bandwidth_bytes_per_s,
                    verify=request.verify,
                    compression=request.compression,
                    attempt=self.number,
                    peer_timeout_us=request.peer_timeout_us,
                    deadline_us=request.deadline_us,
                    on_deadline=request.on_deadline,
                    trace=request.trace,
                    recorded_pages=request.recorded_pages,
                )
            )
        compression = types.PAGE_COMPRESSION_NONE
        if prepared.compression == request.compression:
            compression = choose_compression(prepared.compression, prepared.transport)
        self._saved.transport, self._saved.compression = prepared.transport, compression
        # A restarted daemon must serve what was agreed on.
        self._out.ledger.save()
        self._record.update(
            lambda migration: figures.note_transport(migration, prepared.transport, Compression(compression))
        )
        reach(Point.SOURCE_PREPARED, self._id)

    # ---- PRECOPY ----

    def copy_before(self, follow: Callable[[types.Migration | None], None], is_forced: Callable[[], bool]) -> Next:
        """Move pages while the guest runs here, until it is time to switch over; say how.

        Args:
            follow: Told, often, how far the destination is, or None if it did not answer; what it raises ends it.
            is_forced: Whether the switchover shall come at once.

        Raises:
            AttemptLostError: the destination was lost.
            MigrateError: why it will not be.
        """
        if self._out.terms.mode == types.MIGRATION_MODE_POSTCOPY or self._source is None:
            return Next.SWITCH_WITH_REST
        self._advance(Event.PRECOPY)
        if self._saved.request.verify:
            self._source.digest_replies()
        self.publish()
        out = self._out
        self._precopy = Precopy(
            self._id,
            self.number,
            self._saved.request.peer_timeout_us,
            out.guest,
            out.link.peer,
            out.exports,
            out.clock,
            out.terms,
            self._record.live,
        )
        with self._calling():
            self._precopy.begin()
            reach(Point.SOURCE_PRECOPY, self._id)
            return self._precopy.run(follow, is_forced)

    def publish(self, *, generation: int | None = None) -> None:
        """Serve the guest's pages; in a generation, if the destination may know rounds that we do not."""
        if self._source is None or self._is_published:
            return
        compression = Compression(self._saved.compression or types.PAGE_COMPRESSION_NONE)
        destination = Endpoint.parse(self._saved.to).host
        self._out.exports.publish(
            self._id,
            self._saved.token,
            self._source,
            compression,
            destination,
            times_replies=self._saved.request.trace,
        )
        if generation is not None:
            self._out.exports.set_generation(self._id, generation)
        self._is_published = True

    def publish_again(self) -> None:
        """The destination has moved after the switchover: the pages are for whoever is there."""
        if self._is_published:
            self._out.exports.withdraw(self._id)
            self._is_published = False
            self.publish(generation=_LAST_GENERATION)

    def serve_again(self) -> None:
        """Serve the pages of a guest whose vCPUs had been told to stop before this daemon was started."""
        self.open()
        if self._source is not None and self._saved.request.verify:
            self._source.take_digests()
        self.publish(generation=_LAST_GENERATION)

    # ---- SWITCHOVER ----

    def switch_over(self, how: Next) -> None:
        """Stop the vCPUs and hand them over; returns when they run at the destination.

        Raises:
            AttemptLostError: they never ran there, and never will; they stand still here.
            MigrateError: likewise, for a reason that another try would meet again.
        """
        if self._source is None:
            raise LocalProtocolError("switchover before prepare")
        self._advance(Event.PREPARED if self._precopy is None else Event.SWITCHOVER)
        with_all = how is Next.SWITCH_WITH_ALL
        now_us = self._out.clock.now_us
        self.paused_us = now_us()
        self._out.guest.pause()
        stopped_us = now_us()
        reach(Point.SOURCE_PAUSED, self._id)
        if self._precopy is not None:
            with self._calling():
                self._precopy.last_round(fetch=with_all)
        memory_digest = self._source.take_digests() if self._saved.request.verify else 0
        # Pages are served from before the state is loaded, which may touch some.
        self.publish()
        told_us = now_us()
        state, touches = self._out.guest.save_state()
        self.downtime = types.DowntimeParts(
            pause_us=stopped_us - self.paused_us, last_round_us=told_us - stopped_us, save_us=now_us() - told_us
        )
        self._record.update(lambda migration: figures.note_touches(migration, touches))
        request = transfer.SwitchoverRequest(
            migration_id=self._id,
            state=state,
            guest_touches=touches,
            memory_digest=memory_digest,
            complete_within_us=self._out.terms.downtime_limit_us + _COMPLETE_GRACE_US if with_all else 0,
            attempt=self.number,
        )
        reach(Point.SOURCE_SWITCHING, self._id)
        try:
            there = self._out.link.peer.switch_over(request)
        except MigrateError as error:
            if error.holder is GuestHolder.SOURCE:
                if isinstance(error, GuestBusyError):
                    raise self._why_over(error) from error
                raise
            self._record.note_error(error)
            learn_whether_it_runs(self._record, lambda: self._out.link.peer, self.number, error, self._out.pause)
        else:
            self.downtime.last_pages_us, self.downtime.load_us = there.last_pages_us, there.load_state_us
            self.downtime.resume_us = there.resume_us

    # ---- ends ----

    def retreat(self, *, guest_stays: bool) -> None:
        """Serve no more, end the dirty log; in the guest too, if it stays."""
        self._out.exports.withdraw(self._id)
        if self._precopy is not None:
            self._precopy.end(guest_stays=guest_stays)

    def close(self) -> None:
        """Let go of the guest's memory."""
        self.retreat(guest_stays=False)
        if self._source is not None:
            self._source.close()
            self._source = None
        for memfd in self._memfds:
            os.close(memfd)
        self._memfds = []

    # ---- parts ----

    def _advance(self, event: Event) -> None:
        """A step that a cancellation may have come before."""
        with self._record.lock:
            if self._record.state is State.CANCELLING:
                raise CancelledError("cancelled")
            self._record.on(event)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """A scope of calls that the guest does not depend on yet: what is lost in it is the attempt, no more."""
        try:
            yield
        except GuestGoneError:
            raise
        except ChannelError as error:
            raise AttemptLostError(error.message) from error
        except (NotFoundError, GuestBusyError) as error:
            # What we prepared is not there any more; it tells why, if it is there at all.
            raise self._why_over(error) from error

    def _why_over(self, refusal: MigrateError) -> MigrateError:
        try:
            incoming = self._out.link.peer.get_incoming(self._id)
        except MigrateError:
            return AttemptLostError(refusal.message)
        is_over = incoming.state in (types.MIGRATION_STATE_FAILED, types.MIGRATION_STATE_CANCELLED)
        return gave_up(incoming) if is_over else refusal
