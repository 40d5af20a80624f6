"""A connection to a daemon, and what its failures mean to the person at the keyboard."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from migrate.channels import channel_credentials, open_channel
from migrate.cli.params import DaemonAt
from migrate.config import CONNECT_DEADLINE_S, Endpoint
from migrate.errors import (
    ChannelError,
    GuestHolder,
    MigrateError,
    PostcopyPausedError,
    error_class,
)
from migrate.v1 import guest_service_pb2_grpc, migration_service_pb2_grpc, types_pb2

CALL_DEADLINE_S = 60.0
# An audit compares every page of the working set.
AUDIT_DEADLINE_S = 900.0
ERROR_METADATA_KEY = "migrate-error-bin"

_Response = TypeVar("_Response")


class CallFailedError(MigrateError):
    """A daemon refused a call, or failed at it."""


@dataclass(frozen=True)
class Daemon:
    """The services of one daemon; every failure of a call is a MigrateError."""

    at: DaemonAt
    guests: guest_service_pb2_grpc.GuestServiceStub
    migrations: migration_service_pb2_grpc.MigrationServiceStub

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self.at.address

    def call(
        self,
        method: Callable[..., _Response],
        request: Any,
        *,
        deadline_s: float | None = CALL_DEADLINE_S,
    ) -> _Response:
        """Make a call with one answer.

        Raises:
            MigrateError: what the daemon says went wrong, or that it does not answer.
        """
        try:
            return method(request, timeout=deadline_s)
        except grpc.RpcError as exc:
            raise translate(exc, self.at) from exc

    def first(self, method: Callable[..., Any], request: Any) -> Any:
        """Make a call with a stream of answers and take the first.

        Raises:
            MigrateError: as for call(), or that the stream is empty.
        """
        with closing(self.stream(method, request)) as responses:
            for response in responses:
                return response
        raise CallFailedError(f"the daemon at {self.address} ended the call without an answer")

    def stream(self, method: Callable[..., Any], request: Any) -> Generator[Any, None, None]:
        """Make a call with a stream of answers; closing the generator cancels it.

        Raises:
            MigrateError: as for call().
        """
        responses = method(request)
        try:
            yield from responses
        except grpc.RpcError as exc:
            raise translate(exc, self.at) from exc
        finally:
            responses.cancel()


@contextmanager
def connect(at: DaemonAt) -> Iterator[Daemon]:
    """Open a channel to a daemon; the first call connects, or fails if nobody answers there.

    Raises:
        ConfigError: the TLS directory cannot be used.
    """
    channel = _channel(at)
    try:
        yield Daemon(
            at=at,
            guests=guest_service_pb2_grpc.GuestServiceStub(channel),
            migrations=migration_service_pb2_grpc.MigrationServiceStub(channel),
        )
    except (KeyboardInterrupt, SystemExit):
        # A signal may have left a call half made, and close() would wait for it for ever: the process ends without.
        raise
    except BaseException:
        channel.close()
        raise
    else:
        channel.close()


def _channel(at: DaemonAt) -> grpc.Channel:
    options = (
        # A proxy for the web has no business between an operator and a daemon.
        ("grpc.enable_http_proxy", 0),
        # Despite its name, this is also how long gRPC gives an attempt to connect.
        ("grpc.min_reconnect_backoff_ms", int(CONNECT_DEADLINE_S * 1000)),
    )
    if at.tls_dir is None:
        return open_channel(at.address, None, options)
    # cryptography takes a while to load, and only TLS needs it.
    from migrate.tls import read_tls_dir  # noqa: PLC0415

    return open_channel(at.address, channel_credentials(read_tls_dir(at.tls_dir)), options)


def translate(exc: grpc.RpcError, at: DaemonAt) -> MigrateError:
    """The error that a failed call stands for."""
    address = at.address
    info = _error_info(exc)
    code = exc.code() if isinstance(exc, grpc.Call) else grpc.StatusCode.UNKNOWN
    if info is not None:
        return error_from_info(info)
    if code is grpc.StatusCode.UNAVAILABLE:
        # gRPC does not tell why a handshake failed.
        from migrate.handshake import why_refused  # noqa: PLC0415

        if reason := why_refused(Endpoint.parse(address), at.tls_dir):
            return ChannelError(
                f"the daemon at {address} cannot be talked to: {reason}",
                remedy="name a TLS directory that fits with --tls-dir or MIGRATE_TLS_DIR",
            )
        return ChannelError(
            f"no daemon answers at {address}",
            remedy=f"start one there with `migrate daemon --listen {address}`, or name another with --daemon or "
            "MIGRATE_DAEMON",
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return ChannelError(
            f"the daemon at {address} did not answer in time",
            remedy="look at its log, and ask again with `migrate list`",
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CallFailedError(f"what answers at {address} does not offer this call", remedy="check --daemon")
    details = exc.details() if isinstance(exc, grpc.Call) else str(exc)
    return CallFailedError(f"the daemon at {address} answered {code.name}: {details}")


def error_from_info(info: types_pb2.ErrorInfo) -> MigrateError:
    """The error that a call or a migration ended with, as its daemon described it."""
    paused = issubclass(error_class(info.type), PostcopyPausedError)
    try:
        holder = GuestHolder(info.holder)
    except ValueError:
        holder = GuestHolder.UNSPECIFIED
    # Most classes are of no use here, or need what stays on the daemon's host, such as an errno.
    cls = PostcopyPausedError if paused else CallFailedError
    return cls(info.message or info.type, holder=holder, remedy=info.remedy)


def _error_info(exc: grpc.RpcError) -> types_pb2.ErrorInfo | None:
    if not isinstance(exc, grpc.Call):
        return None
    for key, value in exc.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            with suppress(DecodeError):
                return types_pb2.ErrorInfo.FromString(value)
    return None
