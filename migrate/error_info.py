"""Errors as messages, both ways: on the gRPC wire, on a guest's socket, in a migration's record."""

from migrate.errors import GuestHolder, MigrateError, error_class
from migrate.v1 import types_pb2 as types


def wire_holder(holder: GuestHolder) -> "types.GuestHolder.ValueType":
    """The wire's number for a holder; the enums have equal values."""
    return types.GuestHolder.ValueType(holder.value)


def error_info(error: MigrateError, holder: GuestHolder | None = None) -> types.ErrorInfo:
    """An error as a message.

    Args:
        error: Which.
        holder: Who holds the guest, where that is known better than when the error was raised.
    """
    known = error.holder if holder is None else holder
    return types.ErrorInfo(type=error.type_name, message=error.message, holder=wire_holder(known), remedy=error.remedy)


def error_of(info: types.ErrorInfo) -> MigrateError:
    """The error that a message describes, built without its class's own constructor, whose arguments did not travel."""
    cls = error_class(info.type)
    error = cls.__new__(cls)
    MigrateError.__init__(error, info.message, holder=GuestHolder(info.holder), remedy=info.remedy)
    return error
