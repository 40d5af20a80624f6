"""The other daemon's TransferService, over gRPC: what sessions know as PeerPort."""

from collections.abc import Callable
from typing import TypeVar

import grpc

from migrate.config import Endpoint
from migrate.daemon.status import received_error
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import transfer_service_pb2_grpc as rpc
from migrate.v1 import types_pb2 as types

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_SHORT_S = 5.0
_PREPARE_S = 30.0
_SWITCHOVER_S = 60.0
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", 64 << 20))


class GrpcPeer:
    """A connection to one daemon. Thread-safe.

    Args:
        endpoint: Where it listens.
        role: "source" or "destination", for error messages.
    """

    def __init__(self, endpoint: Endpoint, role: str) -> None:
        self._name = f"the {role} daemon at {endpoint}"
        self._channel = grpc.insecure_channel(str(endpoint), options=_OPTIONS)
        self._stub = rpc.TransferServiceStub(self._channel)

    def prepare(self, request: transfer.PrepareRequest) -> transfer.PrepareResponse:
        """Build the empty twin."""
        return self._call(self._stub.Prepare, request, _PREPARE_S)

    def switch_over(self, request: transfer.SwitchoverRequest) -> transfer.SwitchoverResponse:
        """Hand over the state; returns when the guest runs there."""
        return self._call(self._stub.Switchover, request, _SWITCHOVER_S)

    def invalidate(self, request: transfer.InvalidateRequest) -> None:
        """Say which pages are stale."""
        self._call(self._stub.Invalidate, request, _SHORT_S)

    def get_incoming(self, migration_id: str, await_complete_us: int = 0) -> types.Migration:
        """The migration as the destination sees it, at once, or when no page is missing or the time is over."""
        request = transfer.GetIncomingRequest(migration_id=migration_id, await_complete_us=await_complete_us)
        return self._call(self._stub.GetIncoming, request, _SHORT_S).migration

    def complete(self, request: transfer.CompleteRequest) -> None:
        """END."""
        self._call(self._stub.Complete, request, _SHORT_S)

    def abort(self, migration_id: str, reason: str) -> None:
        """Undo Prepare; returns only if the guest never ran there and never will."""
        self._call(self._stub.Abort, transfer.AbortRequest(migration_id=migration_id, reason=reason), _PREPARE_S)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _call(self, method: Callable[..., _Response], request: _Request, timeout_s: float) -> _Response:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise received_error(error, self._name) from error
