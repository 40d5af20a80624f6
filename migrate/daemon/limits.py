"""What a daemon allows at most, so that no peer takes what others need. docs/protocol.md lists the same."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from migrate.daemon.status import abort
from migrate.errors import LimitError, ProtocolError

GUESTS_MAX = 256
INCOMING_MAX = 64
"""Incoming migrations whose guest does not run here yet: each has a twin, which is a process."""

ENDED_MAX = 4096
"""Migrations that ended without running at their destination, fences included. The oldest make room."""

ENDED_WHOLE_MAX = 64
"""Of these, how many stay in memory with all that they had while they lived."""

FENCE_KEPT_S = 60.0
"""An Abort does not drop what is younger to make room: no call of a daemon is under way for longer."""

REASON_CHARS_MAX = 500

CALLS_MAX = 256
"""Calls at one time, each of which has a thread."""

WATCHES_MAX = 64
PAGE_STREAMS_MAX = 64
_REQUEST_S = 5.0
_WAITING_MAX = CALLS_MAX // 2
_LOOK_S = 0.5
_PAGE_SERVICE = "/migrate.v1.PageService/"

SERVER_OPTIONS = (
    # Two daemons on one port would each take some of the calls.
    ("grpc.so_reuseport", 0),
    # The largest are a Switchover, whose state is a packet of the guest protocol, and a round of stale pages: 1 MiB.
    ("grpc.max_receive_message_length", 2 << 20),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.max_allowed_incoming_connections", 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 120_000),
    # Peers look for us as often as their --peer-timeout wants; gRPC would take that for an attack.
    ("grpc.http2.max_ping_strikes", 0),
)


class LimitInterceptor(grpc.ServerInterceptor):
    """Bounds how many streams are open, and how long a call may wait for its request, which costs a thread."""

    def __init__(self) -> None:
        self._watches = _Slots("streams that follow something", WATCHES_MAX)
        self._page_streams = _Slots("page streams of transport grpcio", PAGE_STREAMS_MAX)
        self._patience = _Patience()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "grpc.RpcMethodHandler[Any, Any] | None"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap one method of any service."""
        handler: Any = continuation(handler_call_details)
        if handler is None:
            return None
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._patient(handler.unary_unary), *codec)
        slots = self._page_streams if handler_call_details.method.startswith(_PAGE_SERVICE) else self._watches
        if handler.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(slots.limited(self._patient(handler.unary_stream)), *codec)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(slots.limited(handler.stream_stream), *codec)
        return handler  # type: ignore[no-any-return]

    def _patient(self, method: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[..., Any]:
        # grpcio would wait for the one request as long as the peer likes, and we could not tell.
        def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._patience.lasting(context):
                request = next(requests, None)
            if request is None:
                abort(context, ProtocolError("the call ended before its request"))
            return method(request, context)

        return call


class _Slots:
    """So many streams at one time."""

    def __init__(self, what: str, count_max: int) -> None:
        self._words = f"this daemon has {count_max} {what} open, which is its limit"
        self._free = threading.BoundedSemaphore(count_max)

    def limited(self, method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def call(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            if not self._free.acquire(blocking=False):
                abort(context, LimitError(self._words, remedy="try again later"))
            try:
                yield from method(requests, context)
            finally:
                self._free.release()

        return call


class _Patience:
    """Cancels calls whose request does not come, and the one that waits longest where too many do."""

    def __init__(self) -> None:
        self._waiting: dict[grpc.ServicerContext, float] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="patience", daemon=True).start()

    @contextlib.contextmanager
    def lasting(self, context: grpc.ServicerContext) -> Iterator[None]:
        """A scope that is left in time, or the call is cancelled."""
        with self._changed:
            self._waiting[context] = time.monotonic() + _REQUEST_S
            self._changed.notify()
            longest = next(iter(self._waiting))
            is_crowded = len(self._waiting) > _WAITING_MAX
            if is_crowded:
                del self._waiting[longest]
        if is_crowded:
            longest.cancel()  # an honest call's request is right behind its headers
        try:
            yield
        finally:
            with self._changed:
                self._waiting.pop(context, None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                now_s = time.monotonic()
                overdue = [context for context, until_s in self._waiting.items() if until_s <= now_s]
            for context in overdue:
                context.cancel()
            time.sleep(_LOOK_S)
