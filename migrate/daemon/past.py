"""What a daemon makes of what one before it left: pure looks at saved migrations and adopted guests."""

from migrate.daemon.guests import GuestRegistry, HostedGuest
from migrate.error_info import error_info, wire_holder
from migrate.errors import (
    LOST_REMEDY,
    AttemptLostError,
    GuestBusyError,
    GuestHolder,
    GuestLostError,
    MigrateError,
)
from migrate.session.rules import check_token
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types


def is_at_source(entry: saved.SavedMigration) -> bool:
    """Whether a migration ended with the guest where it was: it never ran at the destination and never will."""
    return entry.final.holder == types.GUEST_HOLDER_SOURCE


def guests_that_never_ran(guests: GuestRegistry) -> list[HostedGuest]:
    """Twins whose daemon died before it ran them."""
    found = []
    for guest in guests.all():
        try:
            state = guest.client.look().state
        except MigrateError:  # it is gone, or answers as no guest of ours does: its migration will find out
            continue
        if state == types.GUEST_STATE_INCOMING:
            found.append(guest)
    return found


def end_of(
    entry: saved.SavedMigration, state: "types.MigrationState.ValueType", holder: GuestHolder
) -> types.Migration:
    """How an incoming migration ended whose daemon and twin are both gone."""
    incoming = entry.destination
    error: MigrateError = AttemptLostError("the destination daemon was started again before the guest ran there")
    if holder is GuestHolder.NONE:
        error = GuestLostError(
            "the guest process at the destination died with its daemon, after its vCPUs may have run",
            remedy=LOST_REMEDY,
        )
    return types.Migration(
        migration_id=entry.migration_id,
        side=types.MIGRATION_SIDE_DESTINATION,
        guest=incoming.guest,
        mode=incoming.mode,
        state=state,
        order=incoming.order,
        transport=incoming.transport,
        compression=incoming.compression,
        peer=incoming.control_endpoint,
        attempt=incoming.attempt,
        holder=wire_holder(holder),
        error=error_info(error, holder),
    )


def fence_of(migration_id: str, entry: saved.SavedMigration | None, attempt: int) -> saved.SavedMigration:
    """What is to be written so that an attempt, and those before it, never run here.

    Args:
        migration_id: Of the migration.
        entry: What is known of it; None if it never came here.
        attempt: That its source has given up.
    """
    fenced = saved.SavedMigration()
    if entry is None:
        fenced.migration_id = migration_id
        fenced.final.CopyFrom(end_of(fenced, types.MIGRATION_STATE_CANCELLED, GuestHolder.SOURCE))
    else:
        fenced.CopyFrom(entry)
    fenced.destination.fenced_attempt = max(attempt, fenced.destination.fenced_attempt)
    return fenced


def complete_past(entry: saved.SavedMigration, request: transfer.CompleteRequest) -> None:
    """END, said of a migration that ended at the source before this daemon was started.

    Raises:
        PermissionDeniedError: not its token.
        GuestBusyError: that was no good end.
    """
    check_token(request.token, entry.source.token)
    if entry.final.state != types.MIGRATION_STATE_COMPLETED:
        raise GuestBusyError(f"END makes no sense: {entry.final.error.message}")


def resume_past(
    entry: saved.SavedMigration, request: transfer.ResumeMigrationRequest
) -> transfer.ResumeMigrationResponse:
    """A peer asks after a migration that ended before this daemon was started.

    Raises:
        PermissionDeniedError: not its token.
        GuestLostError: it asks for pages that are lost.
    """
    check_token(request.token, entry.source.token or entry.destination.token)
    if entry.HasField("source") and entry.final.state == types.MIGRATION_STATE_FAILED:
        raise GuestLostError(entry.final.error.message)
    return transfer.ResumeMigrationResponse(migration=entry.final)
