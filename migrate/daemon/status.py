"""Errors on the gRPC wire, both ways: status code, message, and ErrorInfo in trailing metadata."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from migrate.error_info import error_info, error_of
from migrate.errors import ChannelError, MigrateError, PeerUnreachableError
from migrate.telemetry.totals import TOTALS
from migrate.v1 import types_pb2 as types

METADATA_ERROR = "migrate-error-bin"
_NOT_CONNECTED = "failed to connect"
# What a scope may want to be called before each answer of a call that streams.
BeforeEach = Callable[[], None]
_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def abort(context: grpc.ServicerContext, error: MigrateError) -> NoReturn:
    """End a call with an error."""
    TOTALS.note_error("call", error.type_name)
    context.set_trailing_metadata(((METADATA_ERROR, error_info(error).SerializeToString()),))
    context.abort(grpc.StatusCode[error.grpc_status], str(error))
    raise AssertionError("unreachable")


class ErrorInterceptor(grpc.ServerInterceptor):
    """Turns what a servicer raises into a status: a MigrateError into its own; grpcio logs the rest."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "grpc.RpcMethodHandler[Any, Any] | None"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap one method of any service."""
        return within(continuation(handler_call_details), _answering)


@contextlib.contextmanager
def _answering(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except MigrateError as error:
        abort(context, error)


def within(
    handler: Any, scope_of: Callable[[grpc.ServicerContext], contextlib.AbstractContextManager[BeforeEach | None]]
) -> "grpc.RpcMethodHandler[Any, Any] | None":
    """A handler, of whichever kind of call, all of whose work is done within a scope.

    Args:
        handler: What gRPC found for a call; None if it found none.
        scope_of: Makes the scope, from the call's context; it may yield what is called before each streamed answer.
    """
    if handler is None:
        return None
    for kind in _KINDS:
        behaviour = getattr(handler, kind)
        if behaviour is not None:
            wrap = _streaming_within if kind.endswith("_stream") else _within
            return handler._replace(**{kind: wrap(behaviour, scope_of)})  # type: ignore[no-any-return]
    raise MigrateError("gRPC has a new kind of call")


def _within(behaviour: Callable[..., Any], scope_of: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(behaviour)
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        with scope_of(context):
            return behaviour(request, context)

    return call


def _streaming_within(behaviour: Callable[..., Iterator[Any]], scope_of: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(behaviour)
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with scope_of(context) as before_each:
            for response in behaviour(request, context):
                if before_each is not None:
                    before_each()
                yield response

    return call


def received_error(error: grpc.RpcError, peer: str) -> MigrateError:
    """The error that a peer raised, or ChannelError if the call itself broke and nobody knows how it ended."""
    call: Any = error
    for key, value in call.trailing_metadata() or ():
        if key == METADATA_ERROR:
            with contextlib.suppress(DecodeError):
                return error_of(types.ErrorInfo.FromString(value))
    code: grpc.StatusCode = call.code()
    details = call.details() or ""
    # gRPC has one status for "nobody there" and "gone while it worked", but different words.
    cls = PeerUnreachableError if code is grpc.StatusCode.UNAVAILABLE and _NOT_CONNECTED in details else ChannelError
    return cls(f"{peer} did not answer: {code.name}: {details}")
