"""Connections to a daemon, blocking and for asyncio: how one is made, and what its failures mean."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from migrate.channels import channel_credentials, open_aio_channel, open_channel
from migrate.client.calls import GUESTS, MIGRATIONS, Call
from migrate.config import CONNECT_DEADLINE_S, Endpoint
from migrate.error_info import error_of
from migrate.errors import CallFailedError, DaemonLostError, MigrateError
from migrate.v1 import guest_service_pb2_grpc, migration_service_pb2_grpc, types_pb2

ERROR_METADATA_KEY = "migrate-error-bin"

_Result = TypeVar("_Result")


class Connection:
    """A connection that blocks. Thread-safe.

    Args:
        address: HOST:PORT of the daemon.
        tls_dir: Our certificate, key, and whom we trust; None talks in plaintext.

    Raises:
        ConfigError: the TLS directory cannot be used.
    """

    def __init__(self, address: str, tls_dir: Path | None) -> None:
        self.address = address
        self._tls_dir = tls_dir
        self._channel = open_channel(address, _credentials(tls_dir), _options())
        self._services = _services(self._channel)

    def call(self, call: Call[_Result]) -> _Result:
        """Make a call with one answer.

        Raises:
            MigrateError: what the daemon says went wrong, or that it does not answer.
        """
        try:
            response = getattr(self._services[call.service], call.method)(call.request, timeout=call.deadline_s)
        except grpc.RpcError as exc:
            raise translate(exc, self.address, self._tls_dir) from exc
        return call.result(response)

    def stream(self, call: Call[_Result]) -> Generator[_Result, None, None]:
        """Make a call with a stream of answers; closing the generator cancels it.

        Raises:
            MigrateError: as for call().
        """
        responses = getattr(self._services[call.service], call.method)(call.request, timeout=call.deadline_s)
        try:
            for response in responses:
                yield call.result(response)
        except grpc.RpcError as exc:
            raise translate(exc, self.address, self._tls_dir) from exc
        finally:
            responses.cancel()

    def close(self) -> None:
        """End all calls, and the connection."""
        self._channel.close()


class AioConnection:
    """A connection for asyncio, made where an event loop runs.

    Args:
        address: HOST:PORT of the daemon.
        tls_dir: Our certificate, key, and whom we trust; None talks in plaintext.

    Raises:
        ConfigError: the TLS directory cannot be used.
    """

    def __init__(self, address: str, tls_dir: Path | None) -> None:
        self.address = address
        self._tls_dir = tls_dir
        self._channel = open_aio_channel(address, _credentials(tls_dir), _options())
        self._services = _services(self._channel)

    async def call(self, call: Call[_Result]) -> _Result:
        """See Connection."""
        try:
            response = await getattr(self._services[call.service], call.method)(call.request, timeout=call.deadline_s)
        except grpc.RpcError as exc:
            raise await self._translate(exc) from exc
        return call.result(response)

    async def stream(self, call: Call[_Result]) -> AsyncGenerator[_Result, None]:
        """See Connection."""
        responses = getattr(self._services[call.service], call.method)(call.request, timeout=call.deadline_s)
        try:
            async for response in responses:
                yield call.result(response)
        except grpc.RpcError as exc:
            raise await self._translate(exc) from exc
        finally:
            responses.cancel()

    async def close(self) -> None:
        """End all calls, and the connection."""
        await self._channel.close()

    async def _translate(self, exc: grpc.RpcError) -> MigrateError:
        # It may make a connection of its own to learn the reason, which blocks.
        return await asyncio.to_thread(translate, exc, self.address, self._tls_dir)


def _services(channel: Any) -> dict[str, Any]:
    return {
        GUESTS: guest_service_pb2_grpc.GuestServiceStub(channel),
        MIGRATIONS: migration_service_pb2_grpc.MigrationServiceStub(channel),
    }


def _credentials(tls_dir: Path | None) -> grpc.ChannelCredentials | None:
    if tls_dir is None:
        return None
    # cryptography takes a while to load, and only TLS needs it.
    from migrate.tls import read_tls_dir  # noqa: PLC0415

    return channel_credentials(read_tls_dir(tls_dir))


def _options() -> tuple[tuple[str, int], ...]:
    return (
        # A proxy for the web has no business between an operator and a daemon.
        ("grpc.enable_http_proxy", 0),
        # Despite its name, this is also how long gRPC gives an attempt to connect.
        ("grpc.min_reconnect_backoff_ms", int(CONNECT_DEADLINE_S * 1000)),
    )


def translate(exc: grpc.RpcError, address: str, tls_dir: Path | None) -> MigrateError:
    """The error that a failed call stands for; it may block for seconds to learn why there is no connection."""
    call: Any = exc
    if not hasattr(call, "code"):
        return CallFailedError(f"the call to the daemon at {address} failed: {exc}")
    info = _error_info(call)
    code: grpc.StatusCode = call.code()
    if info is not None:
        return error_from_info(info)
    if code is grpc.StatusCode.UNAVAILABLE:
        return _no_answer(address, tls_dir)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DaemonLostError(
            f"the daemon at {address} did not answer in time",
            remedy="look at its log, and ask again with `migrate list`",
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CallFailedError(f"what answers at {address} does not offer this call", remedy="check --daemon")
    return CallFailedError(f"the daemon at {address} answered {code.name}: {call.details()}")


def error_from_info(info: types_pb2.ErrorInfo) -> MigrateError:
    """The error that a call or a migration ended with, as its daemon described it."""
    error = error_of(info)
    error.message = info.message or info.type
    return error


def _no_answer(address: str, tls_dir: Path | None) -> DaemonLostError:
    # gRPC does not tell why a handshake failed.
    from migrate.handshake import why_refused  # noqa: PLC0415

    if reason := why_refused(Endpoint.parse(address), tls_dir):
        return DaemonLostError(
            f"the daemon at {address} cannot be talked to: {reason}",
            remedy="name a TLS directory that fits with --tls-dir or MIGRATE_TLS_DIR",
        )
    return DaemonLostError(
        f"no daemon answers at {address}",
        remedy=f"start one there with `migrate daemon --listen {address}`, or name another with --daemon or "
        "MIGRATE_DAEMON",
    )


def _error_info(call: Any) -> types_pb2.ErrorInfo | None:
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_METADATA_KEY and isinstance(value, bytes):
            with suppress(DecodeError):
                return types_pb2.ErrorInfo.FromString(value)
    return None
