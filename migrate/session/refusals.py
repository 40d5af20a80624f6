"""Why a destination does not run a guest, as its source must hear it: will another try fare better?"""

from migrate.errors import (
    AttemptLostError,
    ChannelError,
    GuestGoneError,
    MigrateError,
    MigrationAbortedError,
    NativeError,
    RemoteProtocolError,
    StateDirError,
)


def as_lost_attempt(error: MigrateError) -> MigrateError:
    """What a broken link or a peer's daemon that died looks like, before the guest runs, is worth another try."""
    is_lost = isinstance(error, ChannelError | RemoteProtocolError) and not isinstance(error, GuestGoneError)
    return AttemptLostError(error.message) if is_lost else error


def why_not_running(error: Exception) -> MigrationAbortedError:
    """The state could not be loaded, or the vCPUs not told to run."""
    if not isinstance(error, MigrateError):
        return AttemptLostError("the destination could not run the guest: its daemon is shutting down")
    lost = as_lost_attempt(error)
    cls = AttemptLostError if isinstance(lost, AttemptLostError) else MigrationAbortedError
    return _said_at_source(cls, "run the guest", error)


def why_not_prepared(error: MigrateError) -> MigrateError:
    """What this host lacks says by itself where it is lacked; what ran out does not."""
    if isinstance(error, StateDirError | NativeError | GuestGoneError):
        return _said_at_source(MigrationAbortedError, "prepare for the guest", error)
    return error


def _said_at_source(cls: type[MigrationAbortedError], what: str, error: MigrateError) -> MigrationAbortedError:
    why, remedy = error.message, error.remedy
    if isinstance(error, GuestGoneError):
        why = f"its process there died ({why})"
        remedy = "look for the out-of-memory killer in the kernel log of the destination"
    return cls(f"the destination could not {what}: {why}", remedy=remedy)
