"""What a source does that does not know whether its guest runs at the destination: it asks, and never guesses.

The question is Abort. It is either carried out, which fences the attempt at the destination durably (it never ran there
and never will), or refused, because vCPUs run there or may soon; then GetIncoming says which. No other answer, and no
silence, tells anything.
"""

from collections.abc import Callable

from migrate.errors import AttemptLostError, GuestBusyError, MigrateError, MigrationAbortedError
from migrate.session.backoff import between_tries
from migrate.session.ports import PeerPort
from migrate.session.precopy import gave_up
from migrate.session.record import MigrationRecord
from migrate.session.states import State
from migrate.v1 import types_pb2 as types

_RUNNING_STATES = frozenset(
    {
        types.MIGRATION_STATE_POSTCOPY,
        types.MIGRATION_STATE_POSTCOPY_PAUSED,
        types.MIGRATION_STATE_POSTCOPY_RECOVER,
        types.MIGRATION_STATE_COMPLETED,
    }
)


def learn_whether_it_runs(
    record: MigrationRecord,
    peer_now: Callable[[], PeerPort],
    attempt: int,
    lost: MigrateError,
    pause: Callable[[float], None],
) -> None:
    """Ask until it is known that the guest runs at the destination, by an answer or by END.

    Args:
        record: Of the migration, in SWITCHOVER.
        peer_now: The destination, which may come to listen elsewhere.
        attempt: The one whose Switchover may have arrived.
        lost: Why nobody knows.
        pause: Waits some seconds; raises what ends the asking.

    Raises:
        MigrationAbortedError: it never ran there and never will; an AttemptLostError if another try may fare better.
    """
    backoff = between_tries()
    while record.state is State.SWITCHOVER:
        try:
            runs, never = _fence_or_see_it_run(record.migration_id, peer_now(), attempt, lost)
        except MigrateError as error:
            # Whatever error the call ended with, it is no answer.
            record.note_error(error)
        else:
            if never is not None:
                raise never from lost
            if runs:
                return
        pause(backoff.next_s())


def _fence_or_see_it_run(
    migration_id: str, peer: PeerPort, attempt: int, lost: MigrateError
) -> tuple[bool, MigrationAbortedError | None]:
    """One question. Whether it runs there, or has; or why it never did and never will. Neither: not known yet."""
    try:
        peer.abort(migration_id, "the answer to Switchover was lost", attempt)
    except GuestBusyError:
        incoming = peer.get_incoming(migration_id)
        if incoming.state == types.MIGRATION_STATE_FAILED and incoming.holder == types.GUEST_HOLDER_SOURCE:
            return False, gave_up(incoming)
        has_failed = incoming.state == types.MIGRATION_STATE_FAILED  # after it ran
        return has_failed or incoming.state in _RUNNING_STATES, None
    return False, AttemptLostError(f"{lost.message}; the destination never ran the guest")
