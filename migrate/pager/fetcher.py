"""What a session needs of whoever fetches its pages, and the choice of one by transport."""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import grpc

from migrate.config import CONNECT_DEADLINE_S, Endpoint
from migrate.errors import ChannelError, ConfigError, MigrateError, PeerNotTrustedError
from migrate.native.compression import Compression
from migrate.native.fetcher import PEER_TIMEOUT_US, NativeFetch
from migrate.native.pager import Pager
from migrate.native.tls import NativeTls
from migrate.pager.grpcio_fetcher import GrpcioFetcher
from migrate.telemetry.clock import Clock
from migrate.v1 import types_pb2 as types

_WAIT_US = 1_000_000


@dataclass(frozen=True, slots=True)
class FetchTerms:
    """What is fetched, from where, and how.

    Attributes:
        endpoint: The source's PageService.
        migration_id: Names the migration to the source.
        token: Proves that we are its destination.
        verify: Every data run must carry its digest.
        max_bandwidth_bytes_per_s: Cap of the background; 0 is none.
        compression: What was agreed on; runs may come so, or plain. Transport grpcio takes none.
        peer_timeout_us: Within so long the loss of the source is known; 0 is PEER_TIMEOUT_US.
        tls: Both ends prove who they are; None is plain text. Transport native alone.
        server_name: What the source's certificate must be for; empty is the endpoint's host.
    """

    endpoint: Endpoint
    migration_id: str
    token: str
    verify: bool
    max_bandwidth_bytes_per_s: int
    compression: Compression = Compression.NONE
    peer_timeout_us: int = 0
    tls: NativeTls | None = None
    server_name: str = ""

    @property
    def connect_timeout_us(self) -> int:
        """How long the source may take to answer at first."""
        return min(int(CONNECT_DEADLINE_S * 1_000_000), self.peer_timeout_us or PEER_TIMEOUT_US)


class Fetcher(Protocol):
    """The page call of one incoming migration: urgent and background, each on a TCP connection of its own."""

    def connect(self) -> None:
        """Open both connections.

        Raises:
            ChannelError: the source's page service cannot be reached.
        """
        ...

    def start(self, pager: Pager) -> None:
        """Begin to fetch all that the pager misses, and to serve its faults."""
        ...

    def wake(self) -> None:
        """Look at the pager again: there may be something to ask for, or nothing any more."""
        ...

    def join(self) -> None:
        """Wait until both streams have ended by themselves, as they do once the pager is complete."""
        ...

    def close(self) -> None:
        """End what still runs, close both connections. The pager may be closed, or told to ask again, after this."""
        ...

    @property
    def wire_bytes(self) -> int:
        """Bytes of the page calls so far, both ways."""
        ...


class NativeFetcher:
    """The C client, and the thread that waits for its end.

    Args:
        terms: What to fetch.
        on_failure: Told, once, the error that made pages stop coming.
    """

    def __init__(self, terms: FetchTerms, on_failure: Callable[[MigrateError], None]) -> None:
        self._terms = terms
        self._on_failure = on_failure
        self._fetch: NativeFetch | None = None
        self._watcher: threading.Thread | None = None

    def connect(self) -> None:
        """See Fetcher."""
        terms = self._terms
        self._fetch = NativeFetch(
            _numeric_host(terms.endpoint),
            terms.endpoint.port,
            terms.migration_id,
            terms.token,
            verify=terms.verify,
            compression=terms.compression,
            max_bandwidth_bytes_per_s=terms.max_bandwidth_bytes_per_s,
            peer_timeout_us=terms.peer_timeout_us,
            tls=terms.tls,
            server_name=terms.server_name or terms.endpoint.host,
        )
        try:
            self._fetch.connect(terms.connect_timeout_us)
        except PeerNotTrustedError as error:
            raise PeerNotTrustedError(
                f"the destination and the source's page service at {terms.endpoint} do not trust each other: "
                f"{error.message}",
                remedy="both hosts need certificates of one authority, each for the name that the other calls it by",
            ) from error
        except ChannelError as error:
            raise ChannelError(
                f"the destination cannot reach the source's page service at {terms.endpoint}: {error.message}",
                remedy="give the source daemon a --page-listen address that the destination can connect to",
            ) from error

    def start(self, pager: Pager) -> None:
        """See Fetcher."""
        if self._fetch is None:
            raise ChannelError("the page service has not been connected to")
        self._fetch.start(pager)
        self._watcher = threading.Thread(target=self._watch, args=(self._fetch,), name="fetch-watch", daemon=True)
        self._watcher.start()

    def wake(self) -> None:
        """See Fetcher."""
        if self._fetch is not None:
            self._fetch.wake()

    def join(self) -> None:
        """See Fetcher."""
        if self._watcher is not None:
            self._watcher.join()

    def close(self) -> None:
        """See Fetcher."""
        if self._fetch is not None:
            self._fetch.stop()
            self.join()
            self._fetch.close()
            self._fetch = None

    @property
    def wire_bytes(self) -> int:
        """See Fetcher."""
        if self._fetch is None:
            return 0
        counters = self._fetch.counters()
        return counters.urgent_wire_bytes + counters.background_wire_bytes

    def _watch(self, fetch: NativeFetch) -> None:
        try:
            while not fetch.wait(_WAIT_US):
                pass
        except MigrateError as error:
            self._on_failure(error)


def make_fetcher(
    transport: int,
    terms: FetchTerms,
    clock: Clock,
    on_failure: Callable[[MigrateError], None],
    *,
    credentials: grpc.ChannelCredentials | None = None,
) -> Fetcher:
    """The fetcher of a transport.

    Args:
        transport: A migrate.v1.PageTransport.
        terms: What to fetch.
        clock: Times the pacing of the grpcio transport.
        on_failure: Told, once, the error that made pages stop coming.
        credentials: TLS of the grpcio transport; None connects in plaintext.

    Raises:
        ConfigError: the transport cannot do what the terms ask for.
    """
    if transport == types.PAGE_TRANSPORT_GRPCIO:
        if terms.tls is not None:  # rather than send the token in plain text
            raise ConfigError("transport grpcio does not take the native transport's TLS")
        return GrpcioFetcher(
            terms.endpoint,
            terms.migration_id,
            terms.token,
            verify=terms.verify,
            max_bandwidth_bytes_per_s=terms.max_bandwidth_bytes_per_s,
            peer_timeout_us=terms.peer_timeout_us,
            clock=clock,
            on_failure=on_failure,
            credentials=credentials,
        )
    return NativeFetcher(terms, on_failure)


def _numeric_host(endpoint: Endpoint) -> str:
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ChannelError(f"the destination cannot resolve the source's page endpoint {endpoint}") from error
    return str(found[0][4][0])
