"""Errors on the gRPC wire, both ways: status code, message, and ErrorInfo in trailing metadata."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from migrate.error_info import error_info, error_of
from migrate.errors import ChannelError, MigrateError, PeerUnreachableError
from migrate.v1 import types_pb2 as types

METADATA_ERROR = "migrate-error-bin"
_NOT_CONNECTED = "failed to connect"


def abort(context: grpc.ServicerContext, error: MigrateError) -> NoReturn:
    """End a call with an error."""
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
        handler: Any = continuation(handler_call_details)
        if handler is None:
            return None
        if handler.unary_unary is not None:
            return handler._replace(unary_unary=_guarded(handler.unary_unary))  # type: ignore[no-any-return]
        if handler.unary_stream is not None:
            return handler._replace(unary_stream=_guarded_stream(handler.unary_stream))  # type: ignore[no-any-return]
        if handler.stream_stream is not None:
            return handler._replace(stream_stream=_guarded_stream(handler.stream_stream))  # type: ignore[no-any-return]
        return handler  # type: ignore[no-any-return]


def _guarded(method: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    @functools.wraps(method)
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(request, context)
        except MigrateError as error:
            abort(context, error)

    return call


def _guarded_stream(
    method: Callable[[Any, grpc.ServicerContext], Iterator[Any]],
) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
    @functools.wraps(method)
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(request, context)
        except MigrateError as error:
            abort(context, error)

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
