"""PageService in C: serves FetchPages to any gRPC client. No Python runs between a request and its pages."""

import dataclasses
import logging
import socket
import threading
from dataclasses import dataclass
from typing import Any

from migrate.config import Endpoint
from migrate.errors import ConfigError, NativeError
from migrate.native._native import ffi, lib
from migrate.native.exports import Exports
from migrate.native.tls import NativeTls

_BACKLOG = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PageServerCounters:
    """What a page server has seen so far."""

    connections_now: int
    connections: int
    connections_failed: int
    handshakes_failed: int
    calls: int
    calls_failed: int
    requests: int
    data_pages: int


@dataclass(frozen=True, slots=True)
class PageServerPatience:
    """How long a page server bears with peers.

    Attributes:
        handshake_ns: Until a peer has proven who it is.
        idle_ns: Of a connection without a call.
        stuck_ns: Of a peer that takes nothing of what it asked for.
    """

    handshake_ns: int
    idle_ns: int
    stuck_ns: int

    @classmethod
    def usual(cls) -> "PageServerPatience":
        """That of docs/protocol.md."""
        usual = lib.mig_page_server_usual_patience()
        return cls(usual.handshake_ns, usual.idle_ns, usual.stuck_ns)


class PageServer:
    """Listens and serves, in threads of its own, until `close`. What peers did wrong goes to the log.

    Args:
        endpoint: Where to listen; port 0 takes a free one.
        exports: What to serve.
        tls: Serves hosts that prove who they are, and nobody else; None is plain text.
        patience: How long it bears with peers; None is as usual.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        exports: Exports,
        tls: NativeTls | None = None,
        patience: PageServerPatience | None = None,
    ) -> None:
        tls_handle = ffi.NULL if tls is None else tls.handle
        listener = _listen(endpoint)
        self.endpoint = Endpoint(endpoint.host, listener.getsockname()[1])
        ret = ffi.new("struct mig_page_server **")
        borne = dataclasses.asdict(patience or PageServerPatience.usual())
        borne_with = ffi.new("struct mig_page_server_patience *", borne)
        rc = lib.mig_page_server_create(listener.fileno(), exports.handle, tls_handle, borne_with[0], ret)
        if rc < 0:
            listener.close()
            raise NativeError("start the page server", -rc)
        listener.detach()
        self._exports = exports
        self._server: Any = ret[0]
        self._reporter = threading.Thread(target=self._report, name="page-server-events", daemon=True)
        self._reporter.start()

    def counters(self) -> PageServerCounters:
        """Read all counters."""
        shared = lib.mig_page_server_counters(self._server)
        return PageServerCounters(**{name: getattr(shared, name) for name in PageServerCounters.__slots__})

    def close(self) -> None:
        """End all connections, free. Idempotent."""
        if self._server == ffi.NULL:
            return
        lib.mig_page_server_quiet(self._server)
        self._reporter.join()
        lib.mig_page_server_destroy(self._server)
        self._server = ffi.NULL

    def _report(self) -> None:
        text = ffi.new("char[]", lib.MIG_EVENT_TEXT_BYTES)
        while lib.mig_page_server_next_event(self._server, text):
            _log.warning("page server: %s", ffi.string(text).decode(errors="replace"))


def _listen(endpoint: Endpoint) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = addresses[0]
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {endpoint}", remedy="choose a free port of this host") from error
    return listener
