"""The states of a migration, and everything that may change them.

Each side has one table: (state, event) → next state. Whatever is not in the table is a protocol error: ours if our own
code raised the event, the peer's if a message did. The diagrams of docs/protocol.md are drawn from these tables
(scripts/gen_diagrams), and who holds the guest follows from the state alone, so that every error can say it.

The source and the destination pass through the same states at different moments. What counts is that each of the
destination's steps happens inside the source's step of the same name:

    source       SETUP ────────▶ PRECOPY ────────▶ SWITCHOVER ─────────────────────────▶ POSTCOPY ─────────▶ COMPLETED
                   │ Prepare  ▲ ok  │ Invalidate ▲   │ Switchover(state)        ▲ runs     ▲  serve pages │ ▲
                   ▼          │     ▼            ▼   ▼                          │          ▼              │ │ Complete
    destination  SETUP ───────┘  PRECOPY ── pages  SWITCHOVER ─ load ─ resume ─ POSTCOPY ─ place pages ─ END ─┘

PRECOPY is left out in mode postcopy. What is lost before the switchover costs an attempt: the source goes back to
SETUP, and its next attempt is a new migration at the destination. What is lost after it costs time: pages stand still
(POSTCOPY_PAUSED) until both sides have found each other again (POSTCOPY_RECOVER).
"""

from enum import Enum

from migrate.errors import GuestHolder, LocalProtocolError


class State(Enum):
    """States of a migration. Values equal migrate.v1.MigrationState."""

    SETUP = 1
    PRECOPY = 2
    SWITCHOVER = 3
    POSTCOPY = 4
    POSTCOPY_PAUSED = 5
    POSTCOPY_RECOVER = 6
    COMPLETED = 7
    CANCELLING = 8
    CANCELLED = 9
    FAILED = 10


class Side(Enum):
    """The two ends. Values equal migrate.v1.MigrationSide."""

    SOURCE = 1
    DESTINATION = 2


class Event(Enum):
    """What can happen to a migration."""

    PREPARED = "the destination is prepared; vCPUs are told to stop"
    PRECOPY = "the destination is prepared; a first pass over all pages begins, while the vCPUs run"
    INVALIDATED = "a round of the dirty log came, perhaps the first, which begins the precopy"
    CANCEL = "the operator wants it no more"
    UNDONE = "the destination keeps nothing of it"
    REFUSED = "the destination refused, or said that the guest never ran there and never will"
    SWITCHOVER = "vCPUs are told to stop; their state arrives"
    RUNNING = "the vCPUs run at the destination"
    NOT_RUNNING = "the state could not be loaded; the twin was destroyed"
    RETRY = "the attempt is lost, with a daemon or a link, before the guest ran there; another begins"
    LINK_LOST = "the page call broke, or the peer is silent"
    RECOVERING = "the peer is there again; missing pages are asked for again"
    END = "every page is at the destination, and both sides know"
    ABORTED = "the source gave up, or never came to the switchover"
    GUEST_LOST = "the guest process is gone, with pages that exist nowhere else"
    POISONED = "pages stayed away past the deadline: the guest runs on without them"


FINAL_STATES = frozenset({State.COMPLETED, State.CANCELLED, State.FAILED})

# The same on both sides, for neither can go back: the source hears of it, the destination does it.
_AFTER_THE_SWITCHOVER: dict[tuple[State, Event], State] = {
    (State.POSTCOPY, Event.LINK_LOST): State.POSTCOPY_PAUSED,
    (State.POSTCOPY, Event.END): State.COMPLETED,
    (State.POSTCOPY, Event.GUEST_LOST): State.FAILED,
    (State.POSTCOPY_PAUSED, Event.RECOVERING): State.POSTCOPY_RECOVER,
    (State.POSTCOPY_PAUSED, Event.END): State.COMPLETED,
    (State.POSTCOPY_PAUSED, Event.GUEST_LOST): State.FAILED,
    (State.POSTCOPY_PAUSED, Event.POISONED): State.FAILED,
    (State.POSTCOPY_RECOVER, Event.RUNNING): State.POSTCOPY,
    (State.POSTCOPY_RECOVER, Event.LINK_LOST): State.POSTCOPY_PAUSED,
    (State.POSTCOPY_RECOVER, Event.END): State.COMPLETED,
    (State.POSTCOPY_RECOVER, Event.GUEST_LOST): State.FAILED,
}

SOURCE_TABLE: dict[tuple[State, Event], State] = {
    (State.SETUP, Event.PREPARED): State.SWITCHOVER,
    (State.SETUP, Event.PRECOPY): State.PRECOPY,
    (State.SETUP, Event.RETRY): State.SETUP,
    (State.SETUP, Event.CANCEL): State.CANCELLING,
    (State.SETUP, Event.REFUSED): State.FAILED,
    (State.SETUP, Event.GUEST_LOST): State.FAILED,
    (State.PRECOPY, Event.SWITCHOVER): State.SWITCHOVER,
    (State.PRECOPY, Event.RETRY): State.SETUP,
    (State.PRECOPY, Event.CANCEL): State.CANCELLING,
    (State.PRECOPY, Event.REFUSED): State.FAILED,
    (State.PRECOPY, Event.GUEST_LOST): State.FAILED,
    (State.CANCELLING, Event.UNDONE): State.CANCELLED,
    (State.SWITCHOVER, Event.RUNNING): State.POSTCOPY,
    (State.SWITCHOVER, Event.RETRY): State.SETUP,
    (State.SWITCHOVER, Event.REFUSED): State.FAILED,
    (State.SWITCHOVER, Event.GUEST_LOST): State.FAILED,
    **_AFTER_THE_SWITCHOVER,
    (State.POSTCOPY_PAUSED, Event.RUNNING): State.POSTCOPY,
}

DESTINATION_TABLE: dict[tuple[State, Event], State] = {
    (State.SETUP, Event.SWITCHOVER): State.SWITCHOVER,
    (State.SETUP, Event.INVALIDATED): State.PRECOPY,
    (State.SETUP, Event.REFUSED): State.FAILED,
    (State.SETUP, Event.ABORTED): State.CANCELLED,
    (State.SETUP, Event.GUEST_LOST): State.CANCELLED,
    (State.PRECOPY, Event.INVALIDATED): State.PRECOPY,
    (State.PRECOPY, Event.SWITCHOVER): State.SWITCHOVER,
    (State.PRECOPY, Event.REFUSED): State.FAILED,
    (State.PRECOPY, Event.ABORTED): State.CANCELLED,
    (State.PRECOPY, Event.GUEST_LOST): State.CANCELLED,
    (State.SWITCHOVER, Event.RUNNING): State.POSTCOPY,
    (State.SWITCHOVER, Event.NOT_RUNNING): State.FAILED,
    **_AFTER_THE_SWITCHOVER,
}

_TABLES = {Side.SOURCE: SOURCE_TABLE, Side.DESTINATION: DESTINATION_TABLE}

_HOLDERS = {
    State.SETUP: GuestHolder.SOURCE,
    State.PRECOPY: GuestHolder.SOURCE,
    State.CANCELLING: GuestHolder.SOURCE,
    State.SWITCHOVER: GuestHolder.SOURCE,
    State.POSTCOPY: GuestHolder.SPLIT,
    State.POSTCOPY_PAUSED: GuestHolder.SPLIT,
    State.POSTCOPY_RECOVER: GuestHolder.SPLIT,
    State.COMPLETED: GuestHolder.DESTINATION,
    State.CANCELLED: GuestHolder.SOURCE,
}


class Machine:
    """One side's place in its table, and with it the holder of the guest.

    Not thread-safe: a session guards it with its own lock.

    Args:
        side: Which end.
        state: Where a session that is taken up again stands; one that has ended tells its holder.
        holder: Of a session that has ended.
    """

    def __init__(self, side: Side, state: State = State.SETUP, holder: GuestHolder | None = None) -> None:
        self.side = side
        self.state = state
        self.holder = _HOLDERS[state] if holder is None else holder

    def can(self, event: Event) -> bool:
        """Whether an event is allowed now."""
        return (self.state, event) in _TABLES[self.side]

    def on(self, event: Event) -> State:
        """Take one step; return the new state.

        Raises:
            LocalProtocolError: the table has no such step.
        """
        before = self.state
        after = _TABLES[self.side].get((before, event))
        if after is None:
            raise LocalProtocolError(f"{self.side.name.lower()}: {event.name} is not allowed in {before.name}")
        self.state = after
        if after is not State.FAILED:
            self.holder = _HOLDERS[after]
        elif event is Event.POISONED:
            self.holder = GuestHolder.DESTINATION
        elif event is Event.GUEST_LOST and (self.side is Side.SOURCE or before not in (State.SETUP, State.PRECOPY)):
            self.holder = GuestHolder.NONE
        return after

    @property
    def is_final(self) -> bool:
        """Whether nothing can happen any more."""
        return self.state in FINAL_STATES
