"""The other daemon's TransferService, over gRPC: what sessions know as PeerPort."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from migrate.channels import ChannelOptions, channel_credentials, keepalive_options, open_channel
from migrate.config import Endpoint
from migrate.daemon.status import received_error
from migrate.errors import (
    ChannelError,
    GuestGoneError,
    GuestLostError,
    MigrationAbortedError,
    PeerUnreachableError,
)
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import transfer_service_pb2_grpc as rpc
from migrate.v1 import types_pb2 as types

if TYPE_CHECKING:
    from migrate.tls import TlsFiles, TlsMaterial

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_PREPARE_S = 30.0
_SWITCHOVER_S = 60.0
# How gRPC says that somebody is there, but no connection came about.
_HANDSHAKE_WORDS = ("handshake failed", "Hostname Verification Check failed", "Socket closed", "SETTINGS frame")


class GrpcPeer:
    """A connection to one daemon. Thread-safe.

    Args:
        endpoint: Where it listens.
        role: "source" or "destination", for error messages.
        timeout_s: A daemon that gives no sign of life for so long is lost.
        tls: Our certificate, and whom we trust; None connects in plaintext.
    """

    def __init__(self, endpoint: Endpoint, role: str, timeout_s: float, tls: "TlsFiles | None" = None) -> None:
        self._name = f"the {role} daemon at {endpoint}"
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._tls = tls
        self._presented: TlsMaterial | None = None
        self._channels: list[grpc.Channel] = []
        self._is_closed = False
        self._lock = threading.Lock()
        self._stub: rpc.TransferServiceStub | None = None

    def prepare(self, request: transfer.PrepareRequest) -> transfer.PrepareResponse:
        """Build the empty twin."""
        return self._call_destination(lambda stub: stub.Prepare, request, _PREPARE_S, is_first=True)

    def switch_over(self, request: transfer.SwitchoverRequest) -> transfer.SwitchoverResponse:
        """Hand over the state; returns when the guest runs there."""
        return self._call_destination(lambda stub: stub.Switchover, request, _SWITCHOVER_S)

    def invalidate(self, request: transfer.InvalidateRequest) -> None:
        """Say which pages are stale."""
        self._call_destination(lambda stub: stub.Invalidate, request, self._timeout_s)

    def get_incoming(self, migration_id: str, await_complete_us: int = 0, *, live: bool = False) -> types.Migration:
        """The migration as the destination sees it, at once, or when no page is missing or the time is over."""
        request = transfer.GetIncomingRequest(migration_id=migration_id, await_complete_us=await_complete_us, live=live)
        timeout_s = self._timeout_s + await_complete_us / 1_000_000
        return self._call_destination(lambda stub: stub.GetIncoming, request, timeout_s).migration

    def complete(self, request: transfer.CompleteRequest) -> None:
        """END."""
        self._call(lambda stub: stub.Complete, request, self._timeout_s)

    def record_trace(self, request: transfer.RecordTraceRequest) -> None:
        """Hand over a part of a trace."""
        self._call(lambda stub: stub.RecordTrace, request, self._timeout_s)

    def abort(self, migration_id: str, reason: str, attempt: int) -> None:
        """Undo Prepare; returns only if this attempt and those before it never ran there and never will."""
        request = transfer.AbortRequest(migration_id=migration_id, reason=reason, attempt=attempt)
        self._call_destination(lambda stub: stub.Abort, request, _PREPARE_S)

    def resume_migration(self, request: transfer.ResumeMigrationRequest) -> transfer.ResumeMigrationResponse:
        """Say where we are now, and hear how far the other side is."""
        return self._call(lambda stub: stub.ResumeMigration, request, self._timeout_s)

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._is_closed = True
        for channel in self._channels:
            channel.close()

    def _call_destination(
        self,
        method_of: Callable[[rpc.TransferServiceStub], Callable[..., _Response]],
        request: _Request,
        timeout_s: float,
        *,
        is_first: bool = False,
    ) -> _Response:
        try:
            return self._call(method_of, request, timeout_s, is_first=is_first)
        except (GuestLostError, GuestGoneError) as error:
            # What became of our own guest is not for the other host to say.
            raise MigrationAbortedError(error.message, holder=error.holder, remedy=error.remedy) from error

    def _call(
        self,
        method_of: Callable[[rpc.TransferServiceStub], Callable[..., _Response]],
        request: _Request,
        timeout_s: float,
        *,
        is_first: bool = False,
    ) -> _Response:
        try:
            return method_of(self._connected())(request, timeout=timeout_s)
        except grpc.RpcError as error:
            received = received_error(error, self._name)
            if isinstance(received, PeerUnreachableError) and (reason := self._why_refused(received, is_first)):
                raise PeerUnreachableError(
                    f"{self._name} cannot be talked to: {reason}",
                    remedy="`migrate tls show` says what is in a certificate",
                ) from error
            raise received from error
        except ValueError as error:  # of a channel that was closed before the call was made
            raise ChannelError(f"{self._name} listens elsewhere now") from error

    def _connected(self) -> rpc.TransferServiceStub:
        """The service, by the certificate of now: a channel keeps the one that it was made with.

        Calls may be under way on the channel of before, so that it is closed with us.

        Raises:
            ConfigError: the TLS files trust nobody.
            ValueError: we are closed.
        """
        material = None if self._tls is None else self._tls.current()
        with self._lock:
            if self._is_closed:
                raise ValueError("closed")
            if self._stub is None or material is not self._presented:
                self._channels.append(_channel(self._endpoint, self._timeout_s, material))
                self._presented = material
                self._stub = rpc.TransferServiceStub(self._channels[-1])
            return self._stub

    def _why_refused(self, error: PeerUnreachableError, is_first: bool) -> str:
        """The reason, if it is TLS. To look costs a connection: peers in plaintext are spared it after Prepare."""
        if not any(words in error.message for words in _HANDSHAKE_WORDS) or (self._tls is None and not is_first):
            return ""
        # What a daemon without TLS need not load before it serves.
        from migrate.handshake import why_refused  # noqa: PLC0415

        return why_refused(self._endpoint, None if self._tls is None else self._tls.path)


def _channel(endpoint: Endpoint, timeout_s: float, material: "TlsMaterial | None") -> grpc.Channel:
    credentials = None if material is None else channel_credentials(material)
    return open_channel(str(endpoint), credentials, _options(timeout_s))


def _options(timeout_s: float) -> ChannelOptions:
    timeout_ms = int(timeout_s * 1000)
    return (
        ("grpc.enable_http_proxy", 0),
        # A migration's figures are the most that is answered.
        ("grpc.max_receive_message_length", 64 << 10),
        # One TCP connection of our own: what another migration's peer has learned of a link is not ours.
        ("grpc.use_local_subchannel_pool", 1),
        # A link that swallows everything is noticed within the timeout, though a call may wait for longer.
        *keepalive_options(timeout_ms // 2, timeout_ms // 2),
        # Despite its name, the last of these is also how long gRPC gives an attempt to connect.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.min_reconnect_backoff_ms", timeout_ms),
    )
