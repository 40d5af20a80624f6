"""The error tree. Each error says what failed, on which side, who holds the guest now, and what to do.

The axis that matters to an operator is the holder: a failed migration whose guest still runs at the source is a
nuisance, one whose guest is lost is an incident. `grpc_status` names the status that daemon/status.py answers with.
"""

import os
from enum import Enum
from typing import ClassVar


class GuestHolder(Enum):
    """Which host holds the guest now. Values equal migrate.v1.GuestHolder."""

    UNSPECIFIED = 0
    SOURCE = 1
    DESTINATION = 2
    SPLIT = 3
    NONE = 4

    @classmethod
    def _missing_(cls, _value: object) -> "GuestHolder":
        """What a peer invents, or a newer one knows, tells us nothing."""
        return cls.UNSPECIFIED

    def describe(self) -> str:
        """Say it in words."""
        return _HOLDER_WORDS[self]


_HOLDER_WORDS = {
    GuestHolder.UNSPECIFIED: "no guest is concerned",
    GuestHolder.SOURCE: "the guest is at the source",
    GuestHolder.DESTINATION: "the guest is at the destination",
    GuestHolder.SPLIT: "the guest is split: vCPUs at the destination, pages on both hosts",
    GuestHolder.NONE: "the guest is lost",
}


class MigrateError(Exception):
    """Root of all errors that this package raises on purpose."""

    grpc_status: ClassVar[str] = "INTERNAL"
    default_holder: ClassVar[GuestHolder] = GuestHolder.UNSPECIFIED

    def __init__(self, message: str, *, holder: GuestHolder | None = None, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.holder = self.default_holder if holder is None else holder
        self.remedy = remedy

    @property
    def type_name(self) -> str:
        """The name that travels on the wire."""
        return type(self).__name__

    def __str__(self) -> str:
        text = self.message
        if self.holder is not GuestHolder.UNSPECIFIED:
            text += f"; {self.holder.describe()}"
        if self.remedy:
            text += f"; {self.remedy}"
        return text


class ConfigError(MigrateError):
    """What was asked for makes no sense. Nothing was changed."""

    grpc_status = "INVALID_ARGUMENT"


class TraceError(MigrateError):
    """A trace cannot be written or read."""

    grpc_status = "FAILED_PRECONDITION"


class NotFoundError(MigrateError):
    """There is no such guest or migration here."""

    grpc_status = "NOT_FOUND"


class AlreadyExistsError(MigrateError):
    """The name is taken."""

    grpc_status = "ALREADY_EXISTS"


class GuestBusyError(MigrateError):
    """The guest's present state does not allow it."""

    grpc_status = "FAILED_PRECONDITION"


class PermissionDeniedError(MigrateError):
    """A token is missing or wrong, or the caller's role does not allow the call."""

    grpc_status = "PERMISSION_DENIED"


class UnsupportedHostError(MigrateError):
    """This host cannot do it as it is set up now."""

    grpc_status = "FAILED_PRECONDITION"


class KvmUnavailableError(UnsupportedHostError):
    """/dev/kvm is missing, closed to us, or too old."""


class UffdUnavailableError(UnsupportedHostError):
    """No userfaultfd of the kind needed is to be had."""


class TraceUnavailableError(UnsupportedHostError):
    """Another process cannot be made to run a system call for us. It runs on as it was."""


class DirtyScanUnavailableError(UnsupportedHostError):
    """The kernel cannot tell which pages of another process were written."""


class MissingFeatureError(UnsupportedHostError):
    """A feature that the guest relies on does not exist here: page size, protocol version, vCPU feature."""


class NotEnoughMemoryError(UnsupportedHostError):
    """The guest does not fit."""

    grpc_status = "RESOURCE_EXHAUSTED"


class LimitError(MigrateError):
    """As much as this daemon allows at one time is there already; the message names the limit."""

    grpc_status = "RESOURCE_EXHAUSTED"


class NativeError(MigrateError):
    """A system call of the C core failed."""

    def __init__(self, operation: str, errno_value: int, *, remedy: str = "") -> None:
        super().__init__(f"{operation}: {os.strerror(errno_value)}", remedy=remedy)
        self.operation = operation
        self.errno = errno_value


class UffdError(NativeError):
    """A userfaultfd operation failed."""


class DirtyScanError(NativeError):
    """A dirty scan failed; what it has not told is lost, so that all pages count as dirty."""


class KvmError(NativeError):
    """A KVM operation failed."""


class QemuError(MigrateError):
    """QEMU refused a command, or could not do it; the message has its words."""

    grpc_status = "FAILED_PRECONDITION"


class ProgramError(MigrateError):
    """A program that opted in to being moved says that it cannot do what was asked; the message has its words."""

    grpc_status = "FAILED_PRECONDITION"


class StateDirError(MigrateError):
    """What must outlive the daemon could not be written down, or read again."""

    grpc_status = "RESOURCE_EXHAUSTED"


class ChannelError(MigrateError):
    """The other side cannot be reached, or the connection broke."""

    grpc_status = "UNAVAILABLE"


class PeerUnreachableError(ChannelError):
    """No connection to the other side could be made: nothing of the call has arrived there."""


class PeerNotTrustedError(ChannelError):
    """The other side did not prove that it is who it should be, or did not believe us."""

    grpc_status = "UNAUTHENTICATED"


class DaemonLostError(ChannelError):
    """The daemon that was called does not answer, or the connection broke: what became of the call is not known."""


class GuestGoneError(ChannelError):
    """The guest process closed its socket: it is dead."""

    grpc_status = "DATA_LOSS"


class ProtocolError(MigrateError):
    """Two parties disagree about what may be said now."""


class LocalProtocolError(ProtocolError):
    """Our own bug: a step that the state table does not allow."""


class RemoteProtocolError(ProtocolError):
    """The peer said what it may not say, or what cannot be true."""

    grpc_status = "ABORTED"


class IntegrityError(RemoteProtocolError):
    """A page does not have the digest that its source computed."""

    grpc_status = "DATA_LOSS"


class MigrationAbortedError(MigrateError):
    """The migration ended before the switchover; the guest runs on where it was."""

    grpc_status = "ABORTED"
    default_holder = GuestHolder.SOURCE


class AttemptLostError(MigrationAbortedError):
    """A daemon or a link was lost before the switchover; the guest runs on where it was, another try may succeed."""


class PostcopyPausedError(MigrateError):
    """The migration stands still after the switchover; both halves wait for each other."""

    grpc_status = "UNAVAILABLE"
    default_holder = GuestHolder.SPLIT


class CallFailedError(MigrateError):
    """A call failed, or what was waited for did not come, for a reason that no other class of these names."""


LOST_REMEDY = "restore the guest from a backup"


class GuestLostError(MigrateError):
    """A half of the guest is gone for good."""

    grpc_status = "DATA_LOSS"
    default_holder = GuestHolder.NONE


def error_class(type_name: str) -> type[MigrateError]:
    """The class of that wire name; MigrateError for one from a newer peer."""
    return _by_name().get(type_name, MigrateError)


def _by_name() -> dict[str, type[MigrateError]]:
    found: dict[str, type[MigrateError]] = {}
    pending: list[type[MigrateError]] = [MigrateError]
    while pending:
        cls = pending.pop()
        if cls.__module__ == __name__:  # what others derive steers their own threads, and is not for peers to raise
            found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found
