"""Who may make which call. With TLS, every call of every service is looked up here before anything else is done."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc

from migrate.daemon.status import BeforeEach, within
from migrate.errors import PeerNotTrustedError, PermissionDeniedError
from migrate.tls import LOOK_INTERVAL_S, Identity, Role, TlsFiles, identity_of_pem

_log = logging.getLogger(__name__)

_HOSTS = frozenset({Role.HOST})
_OPERATORS = frozenset({Role.OPERATOR})
_READERS = frozenset({Role.OPERATOR, Role.VIEWER})
_ALL = frozenset(Role)

# A call that does not stand here is nobody's. A host speaks for its guests' migrations, and operates nothing.
CALLS: Mapping[str, frozenset[Role]] = {
    "/migrate.v1.GuestService/CreateGuest": _OPERATORS,
    "/migrate.v1.GuestService/ListGuests": _READERS,
    "/migrate.v1.GuestService/GetGuest": _READERS,
    "/migrate.v1.GuestService/PauseGuest": _OPERATORS,
    "/migrate.v1.GuestService/ResumeGuest": _OPERATORS,
    "/migrate.v1.GuestService/DeleteGuest": _OPERATORS,
    # It makes the guest work.
    "/migrate.v1.GuestService/AuditGuest": _OPERATORS,
    "/migrate.v1.GuestService/WatchGuestStatistics": _READERS,
    "/migrate.v1.MigrationService/StartMigration": _OPERATORS,
    "/migrate.v1.MigrationService/GetMigration": _READERS,
    "/migrate.v1.MigrationService/ListMigrations": _READERS,
    "/migrate.v1.MigrationService/WatchMigration": _READERS,
    # It tells which pages a guest touches, and is gone once it was read.
    "/migrate.v1.MigrationService/WatchTrace": _OPERATORS,
    "/migrate.v1.MigrationService/StartSwitchover": _OPERATORS,
    "/migrate.v1.MigrationService/CancelMigration": _OPERATORS,
    "/migrate.v1.MigrationService/RecoverMigration": _OPERATORS,
    "/migrate.v1.TransferService/Prepare": _HOSTS,
    "/migrate.v1.TransferService/Invalidate": _HOSTS,
    "/migrate.v1.TransferService/Switchover": _HOSTS,
    "/migrate.v1.TransferService/GetIncoming": _HOSTS,
    "/migrate.v1.TransferService/Complete": _HOSTS,
    "/migrate.v1.TransferService/RecordTrace": _HOSTS,
    "/migrate.v1.TransferService/Abort": _HOSTS,
    "/migrate.v1.TransferService/ResumeMigration": _HOSTS,
    "/migrate.v1.PageService/FetchPages": _HOSTS,
    "/grpc.health.v1.Health/Check": _ALL,
    "/grpc.health.v1.Health/List": _ALL,
    "/grpc.health.v1.Health/Watch": _ALL,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _ALL,
}

_TLS_VERSION = b"TLSv1.3"


class Access:
    """Knows callers by their certificates. Thread-safe.

    Args:
        files: Whom this daemon trusts.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files

    def identify(self, context: grpc.ServicerContext) -> Identity:
        """Who calls. The handshake has seen to it that a CA vouches for the certificate, and the caller has its key.

        What may have changed since the handshake is looked at for every call.

        Raises:
            PeerNotTrustedError: nobody whom we know.
        """
        auth: Mapping[str, Any] = context.auth_context()
        pems: Sequence[bytes] = auth.get("x509_pem_cert") or ()
        if len(pems) != 1:
            raise PeerNotTrustedError("the call came without a certificate")
        versions = auth.get("ssl_tls_version") or (_TLS_VERSION,)
        if list(versions) != [_TLS_VERSION]:
            raise PeerNotTrustedError("the call came by an older TLS than 1.3")
        try:
            identity = identity_of_pem(pems[0])
        except ValueError as error:
            raise PeerNotTrustedError("the call came with a certificate that cannot be read") from error
        if reason := identity.why_not_valid():
            raise PeerNotTrustedError(reason, remedy="issue another, and call again")
        if not self._files.current().accepts(identity.fingerprint):
            raise PeerNotTrustedError(
                f"the certificate of {identity.name!r} is not among the peers that are accepted here"
            )
        return identity

    def check_call(self, method: str, context: grpc.ServicerContext) -> Identity:
        """Let a call through, or not.

        Args:
            method: As gRPC has it, /PACKAGE.SERVICE/METHOD.
            context: Of the call.

        Raises:
            PeerNotTrustedError: nobody whom we know makes it.
            PermissionDeniedError: its role does not allow it.
        """
        identity = self.identify(context)
        allowed = CALLS.get(method, frozenset())
        if identity.role not in allowed:
            role = identity.role.value if identity.role else "nobody in particular"
            raise PermissionDeniedError(
                f"{identity.name!r} is {role}, who may not call {method.lstrip('/')}",
                remedy=f"that takes the role {' or '.join(sorted(r.value for r in allowed))}" if allowed else "",
            )
        return identity

    def check_party(self, migration_id: str, host: str, context: grpc.ServicerContext) -> None:
        """Let the caller have a part in a migration whose other side is a host, or not.

        Raises:
            PeerNotTrustedError: nobody whom we know.
            PermissionDeniedError: another host.
        """
        identity = self.identify(context)
        if not identity.is_valid_for(host):
            raise PermissionDeniedError(
                f"the other side of migration {migration_id!r} is {host}:"
                f" the certificate of {identity.name!r} is not valid for that"
            )


def _now_and_then(check: Callable[[], None]) -> BeforeEach:
    """A check that has just been done, and is done again when what it looks at may have changed."""
    done_s = time.monotonic()

    def before_each() -> None:
        nonlocal done_s
        now_s = time.monotonic()
        if now_s - done_s >= LOOK_INTERVAL_S:
            done_s = now_s
            check()

    return before_each


class AccessInterceptor(grpc.ServerInterceptor):
    """Asks Access before every call of every service, and every second of one that streams its answers.

    Stands within ErrorInterceptor, which answers refusals.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], "grpc.RpcMethodHandler[Any, Any] | None"],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap one method of any service."""
        method = handler_call_details.method
        return within(continuation(handler_call_details), lambda context: self._checked(method, context))

    @contextlib.contextmanager
    def _checked(self, method: str, context: grpc.ServicerContext) -> Iterator[BeforeEach]:
        def check() -> None:
            self._access.check_call(method, context)

        try:
            check()
            yield _now_and_then(check)
        except (PeerNotTrustedError, PermissionDeniedError) as error:
            _log.warning("a call from %s was refused: %s", context.peer(), error.message)
            raise
