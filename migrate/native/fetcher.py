"""The page call of one incoming migration in C: urgent and background threads, and no Python in either."""

from dataclasses import dataclass
from typing import Any

from migrate.errors import (
    ChannelError,
    GuestLostError,
    IntegrityError,
    MigrateError,
    NativeError,
    PeerNotTrustedError,
    RemoteProtocolError,
    UffdError,
)
from migrate.native._native import ffi, lib
from migrate.native.compression import Compression
from migrate.native.pager import Pager
from migrate.native.tls import NativeTls

PEER_TIMEOUT_US: int = lib.MIG_PEER_TIMEOUT_US
"""Within so long the loss of a source is known, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class FetchCounters:
    """How the page call is doing."""

    urgent_wire_bytes: int
    background_wire_bytes: int
    urgent_requests: int
    background_requests: int
    reconnects: int
    window_bytes: int
    run_pages: int
    rate_bytes_per_s: int
    base_rtt_ns: int
    queue_ns: int


class NativeFetch:
    """Fetches all pages that a pager misses.

    Args:
        host: Numeric address of the source's PageService.
        port: Its port.
        migration_id: Names the migration to the source.
        token: Proves that we are its destination.
        verify: Every data run must carry its digest.
        compression: What was agreed on; runs may come so, or plain.
        max_bandwidth_bytes_per_s: Cap of the background; 0 is none.
        peer_timeout_us: Within so long the loss of the source is known; 0 is PEER_TIMEOUT_US.
        tls: Both ends prove who they are; None is plain text.
        server_name: DNS name or numeric address that the source's certificate must be for; empty is `host`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        migration_id: str,
        token: str,
        *,
        verify: bool = False,
        compression: Compression = Compression.NONE,
        max_bandwidth_bytes_per_s: int = 0,
        peer_timeout_us: int = 0,
        tls: NativeTls | None = None,
        server_name: str = "",
    ) -> None:
        strings = [ffi.new("char[]", text.encode()) for text in (host, migration_id, token, server_name or host)]
        terms = ffi.new(
            "struct mig_fetch_terms *",
            {
                "host": strings[0],
                "port": port,
                "migration_id": strings[1],
                "token": strings[2],
                "verify": verify,
                "compression": compression,
                "max_bandwidth_bytes_per_s": max_bandwidth_bytes_per_s,
                "peer_timeout_us": peer_timeout_us,
                "tls": ffi.NULL if tls is None else tls.handle,
                "server_name": strings[3],
            },
        )
        ret = ffi.new("struct mig_fetch **")
        rc = lib.mig_fetch_create(terms, ret)
        if rc < 0:
            raise NativeError("make a fetch", -rc)
        self._fetch: Any = ret[0]

    def connect(self, timeout_us: int) -> None:
        """Open both connections, within the timeout.

        Raises:
            ChannelError: no gRPC server answers there; this fetch is then to be closed, and another one made.
            PeerNotTrustedError: one does, but it is not who it should be, or does not trust us.
        """
        lib.mig_fetch_connect(self._fetch, timeout_us)
        failure = self._failure()
        if failure is not None:
            raise failure

    def start(self, pager: Pager) -> None:
        """Begin to fetch, and to serve the pager's faults."""
        rc = lib.mig_fetch_start(self._fetch, pager.handle)
        if rc < 0:
            raise NativeError("start the fetch threads", -rc)

    def wait(self, timeout_us: int) -> bool:
        """Wait until both calls have ended by themselves, or `stop`; False after the timeout.

        Raises:
            MigrateError: what made pages stop coming.
        """
        rc: int = lib.mig_fetch_wait(self._fetch, timeout_us)
        failure = self._failure()
        if failure is not None:
            raise failure
        return rc != 0

    def wake(self) -> None:
        """Look at the pager again: there may be something to ask for."""
        lib.mig_fetch_wake(self._fetch)

    def stop(self) -> None:
        """End both threads; the pager may be closed after this. Idempotent."""
        lib.mig_fetch_stop(self._fetch)

    def close(self) -> None:
        """Stop, close both connections, free. No other call may be under way. Idempotent."""
        lib.mig_fetch_destroy(self._fetch)
        self._fetch = ffi.NULL

    def counters(self) -> FetchCounters:
        """Read all counters."""
        shared = lib.mig_fetch_counters(self._fetch)
        return FetchCounters(**{name: getattr(shared, name) for name in FetchCounters.__slots__})

    def _failure(self) -> MigrateError | None:
        failure = ffi.new("struct mig_fetch_failure *")
        lib.mig_fetch_read_failure(self._fetch, failure)
        text = ffi.string(failure.text).decode(errors="replace")
        if failure.reason == lib.MIG_FETCH_LOCAL:
            return UffdError(text, -failure.error)
        errors: dict[int, type[MigrateError]] = {
            lib.MIG_FETCH_LINK: ChannelError,
            lib.MIG_FETCH_STATUS: ChannelError,
            lib.MIG_FETCH_PROTOCOL: RemoteProtocolError,
            lib.MIG_FETCH_INTEGRITY: IntegrityError,
            lib.MIG_FETCH_GUEST: GuestLostError,
            lib.MIG_FETCH_TLS: PeerNotTrustedError,
        }
        return errors[failure.reason](text) if failure.reason else None
