"""When a migration switches over. Pure: what was measured goes in, what to do next comes out.

A precopy round sends what the guest wrote during the round before it. Rounds shrink as long as pages move faster than
the guest writes them; the downtime is the time that the last round takes, while the vCPUs stand still.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from migrate.units import pages_to_bytes
from migrate.v1 import types_pb2 as types

DOWNTIME_LIMIT_DEFAULT_US = 50_000
# Of the downtime, what is not pages: pausing, saving, loading and resuming vCPUs, and the calls between (measured: 3 to
# 5 ms on loopback for a small state).
OVERHEAD_US = 6_000
# A round that is not at least this much smaller than the smallest before it brings the end no nearer.
SHRINKS_TO = 0.9
# So many rounds in a row without progress are no accident.
STUCK_ROUNDS = 3
# Where the rest follows by postcopy, rounds only serve to free stale pages before the vCPUs stop for the last of them.
SETTLE_ROUNDS_MAX = 3
SETTLED_PAGES = 2_000


class Next(Enum):
    """What a source does after a round."""

    ANOTHER_ROUND = "send what was written, with the vCPUs running"
    ANOTHER_LOOK = "say what was written, but leave it for postcopy"
    SWITCH_WITH_ALL = "stop the vCPUs, send the rest, then run them there"
    SWITCH_WITH_REST = "stop the vCPUs, run them there, the rest follows by postcopy"
    GIVE_UP = "the guest stays at the source"


@dataclass(frozen=True, slots=True)
class Round:
    """One look at the dirty log.

    Attributes:
        dirty_pages: Written since the look before.
        duration_us: Since the look before.
    """

    dirty_pages: int
    duration_us: int

    @property
    def dirty_pages_per_s(self) -> float:
        """How fast the guest writes pages that it had not written in this round before."""
        return self.dirty_pages * 1_000_000 / max(1, self.duration_us)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the operator asked for.

    Attributes:
        mode: A migrate.v1.MigrationMode.
        downtime_limit_us: In mode precopy.
        on_no_convergence: A migrate.v1.NoConvergence.
    """

    mode: int
    downtime_limit_us: int = DOWNTIME_LIMIT_DEFAULT_US
    on_no_convergence: int = types.NO_CONVERGENCE_POSTCOPY


def transfer_us(pages: int, bandwidth_bytes_per_s: float) -> float:
    """How long pages take at a bandwidth."""
    return pages_to_bytes(pages) * 1_000_000 / max(1.0, bandwidth_bytes_per_s)


def next_step(terms: Terms, rounds: Sequence[Round], bandwidth_bytes_per_s: float) -> Next:
    """What to do after the last of `rounds`, all of whose earlier pages have arrived.

    Args:
        terms: What was asked for.
        rounds: All looks at the dirty log so far, the first one after the first pass over all pages.
        bandwidth_bytes_per_s: At which pages arrived of late.
    """
    if terms.mode == types.MIGRATION_MODE_HYBRID:
        return _settle(rounds)
    last = rounds[-1]
    if OVERHEAD_US + transfer_us(last.dirty_pages, bandwidth_bytes_per_s) <= terms.downtime_limit_us:
        return Next.SWITCH_WITH_ALL
    if not is_stuck(rounds) or terms.on_no_convergence == types.NO_CONVERGENCE_WAIT:
        return Next.ANOTHER_ROUND
    if terms.on_no_convergence == types.NO_CONVERGENCE_FAIL:
        return Next.GIVE_UP
    return Next.SWITCH_WITH_REST


def is_stuck(rounds: Sequence[Round]) -> bool:
    """Whether the rounds have stopped shrinking: compared with the smallest, for they go up and down by themselves."""
    if len(rounds) <= STUCK_ROUNDS:
        return False
    before, recent = rounds[:-STUCK_ROUNDS], rounds[-STUCK_ROUNDS:]
    return min(one.dirty_pages for one in recent) > min(one.dirty_pages for one in before) * SHRINKS_TO


def _settle(rounds: Sequence[Round]) -> Next:
    if rounds[-1].dirty_pages <= SETTLED_PAGES or len(rounds) >= SETTLE_ROUNDS_MAX:
        return Next.SWITCH_WITH_REST
    return Next.ANOTHER_LOOK
