"""TLS of a daemon: what its servers present, what its clients present, and how both change while it runs."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc

from migrate.channels import channel_credentials
from migrate.daemon.access import Access, AccessInterceptor
from migrate.errors import MigrateError
from migrate.native.tls import NativeTls
from migrate.pager.fetcher import Fetcher, FetchTerms, make_fetcher
from migrate.telemetry.clock import Clock
from migrate.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, LOOK_INTERVAL_S, PEERS_DIR, TlsFiles, TlsMaterial, describe
from migrate.v1 import types_pb2 as types

_log = logging.getLogger(__name__)


class DaemonTls:
    """One TLS directory for all servers and clients of a daemon.

    Args:
        path: The directory.

    Attributes:
        files: What is in it.
        native: The same, for the page endpoint in C.
        access: Who may call.

    Raises:
        ConfigError: it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.files = TlsFiles(path)
        self.native = _native_tls(path)
        self.access = Access(self.files)
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="tls-watch", daemon=True)
        self._watcher.start()

    def describe(self) -> str:
        """What we present to those who call, in words for the log."""
        return describe(self.files.current().identity)

    def server_credentials(self) -> grpc.ServerCredentials:
        """What a gRPC server presents, and asks for: every handshake has the files of that moment."""
        presented = self.files.current()

        def fetch() -> "grpc.ServerCertificateConfiguration | None":
            nonlocal presented
            material = self.files.current()
            if material is presented:
                return None
            presented = material
            return _server_configuration(material)

        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(presented),
            fetch,  # type: ignore[arg-type]  # None means no change, which the stubs do not know
            require_client_authentication=True,
        )

    def interceptor(self) -> grpc.ServerInterceptor:
        """What asks `access` before every call of a gRPC server."""
        return AccessInterceptor(self.access)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """What a gRPC client presents that connects now.

        Raises:
            ConfigError: peers are named, but none that a CA vouches for.
        """
        return channel_credentials(self.files.current())

    def make_fetcher(
        self, transport: int, terms: FetchTerms, clock: Clock, on_failure: Callable[[MigrateError], None]
    ) -> Fetcher:
        """As migrate.pager.fetcher has it, over TLS.

        Raises:
            ConfigError: peers are named, but none that a CA vouches for.
        """
        if transport == types.PAGE_TRANSPORT_GRPCIO:
            return make_fetcher(transport, terms, clock, on_failure, credentials=self.channel_credentials())
        # The address is resolved before the handshake, so that the name to be checked goes along.
        over_tls = replace(terms, tls=self.native, server_name=terms.endpoint.host)
        return make_fetcher(transport, over_tls, clock, on_failure)

    def close(self) -> None:
        """Look at the files no more. Idempotent."""
        self._stopping.set()
        self._watcher.join()
        self.native.close()

    def _watch(self) -> None:
        """The page endpoint in C does not ask for every handshake, so it is told; and so is whoever reads the log."""
        known = self.files.current()
        mourned = None
        while not self._stopping.wait(LOOK_INTERVAL_S):
            material = self.files.current()
            if material is not mourned and (reason := material.identity.why_not_valid()):
                mourned = material
                _log.error("%s: nobody accepts us until it is replaced", reason)
            if material is known:
                continue
            known = material
            try:
                self.native.reload()
            except MigrateError as error:
                _log.error("the page endpoint goes on with the files it had: %s", error)


def _native_tls(path: Path) -> NativeTls:
    """TLS of the page endpoint in C, from a TLS directory."""
    return NativeTls(path / CA_FILE, path / CERTIFICATE_FILE, path / KEY_FILE, path / PEERS_DIR)


def _server_configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    pair = (material.key_pem, material.certificate_pem)
    return grpc.ssl_server_certificate_configuration([pair], material.ca_pem)
