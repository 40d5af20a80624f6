"""A TLS directory: whom its owner is, whom it trusts, what a certificate says of its holder.

    ca.pem      certificates of the CAs whose word counts, one or more
    cert.pem    the owner's certificate, and after it those between it and the CA, if there are any
    key.pem     its private key, closed to everybody else
    peers/      optional: only holders of a certificate in one of its *.pem are accepted

Any of them may be replaced while a daemon runs. Nothing here holds a connection; nothing here logs a key.
"""

import ipaddress
import logging
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from migrate.errors import ConfigError

CA_FILE = "ca.pem"
CERTIFICATE_FILE = "cert.pem"
KEY_FILE = "key.pem"
PEERS_DIR = "peers"
ROLE_URI_PREFIX = "urn:migrate:role:"

LOOK_INTERVAL_S = 1.0
# Files that belong together are replaced one after the other.
_SETTLE_TRIES = 10
_SETTLE_S = 0.05
_PEM_BYTES_MAX = 1 << 20

_log = logging.getLogger(__name__)


class Role(Enum):
    """What the holder of a certificate is, and so what it may do (migrate/daemon/access.py)."""

    HOST = "host"
    OPERATOR = "operator"
    VIEWER = "viewer"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a certificate says of its holder.

    Attributes:
        name: Its common name.
        role: What it is; None if the certificate does not say so, or says two things.
        dns_names: Host names by which it may be called, in lower case.
        addresses: IP addresses likewise.
        fingerprint: SHA-256 of the certificate, in hex.
        issuer: Common name of who signed it.
        not_before: From when it is valid.
        not_after: Until when.
    """

    name: str
    role: Role | None
    dns_names: frozenset[str]
    addresses: frozenset[ipaddress.IPv4Address | ipaddress.IPv6Address]
    fingerprint: str
    issuer: str
    not_before: datetime
    not_after: datetime

    def is_valid_for(self, host: str) -> bool:
        """Whether it may be called by that name or address. Names match as a whole; there are no wildcards."""
        try:
            return ipaddress.ip_address(host.strip("[]")) in self.addresses
        except ValueError:
            return host.lower().removesuffix(".") in self.dns_names

    def why_not_valid(self, at: datetime | None = None) -> str:
        """Why it is not valid now, or at another time; empty if it is."""
        now = at or datetime.now(UTC)
        if now > self.not_after:
            return f"the certificate of {self.name!r} expired at {_time_words(self.not_after)}"
        if now < self.not_before:
            return f"the certificate of {self.name!r} is not valid before {_time_words(self.not_before)}"
        return ""


@dataclass(frozen=True, slots=True, repr=False)
class TlsMaterial:
    """What a TLS directory held when it was read.

    Attributes:
        path: The directory.
        ca_pem: The CAs.
        certificate_pem: The owner's certificate, with what stands between it and a CA.
        key_pem: Its key. Never shown, never logged.
        identity: What the certificate says.
        peer_pems: Certificates of accepted peers by fingerprint; None if every one is that a CA vouches for.
    """

    path: Path
    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    identity: Identity
    peer_pems: dict[str, bytes] | None

    @property
    def server_roots_pem(self) -> bytes:
        """Whom a client trusts: the CAs, or, of the accepted peers, those that a CA vouches for.

        gRPC takes a certificate that is no CA's for a root, and then trusts that one certificate.
        """
        if self.peer_pems is None:
            return self.ca_pem
        authorities = x509.load_pem_x509_certificates(self.ca_pem)
        vouched = [pem for pem in self.peer_pems.values() if _is_vouched_for(pem, authorities)]
        if not vouched:
            raise ConfigError(f"{self.path / PEERS_DIR} holds no certificate that a CA of {CA_FILE} has signed")
        return b"".join(vouched)

    def accepts(self, fingerprint: str) -> bool:
        """Whether the holder of a certificate, which a CA vouches for, is accepted."""
        return self.peer_pems is None or fingerprint in self.peer_pems

    def __repr__(self) -> str:
        return f"TlsMaterial({str(self.path)!r}, {self.identity.name!r})"


class TlsFiles:
    """A TLS directory whose files may be replaced at any time. Thread-safe.

    Args:
        path: The directory.
        now_s: The clock that says when to look again.

    Raises:
        ConfigError: it cannot be used.
    """

    def __init__(self, path: Path, now_s: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._now_s = now_s
        self._lock = threading.Lock()
        self._seen = _signature(path)
        self._material = read_tls_dir(path)
        self._looked_s = now_s()

    def current(self) -> TlsMaterial:
        """What the directory holds, as of a second ago; the same object as long as nothing changes.

        What cannot be used does not take the place of what can: it is logged, once, and the old serves on.
        """
        with self._lock:
            now_s = self._now_s()
            if now_s - self._looked_s < LOOK_INTERVAL_S:
                return self._material
            self._looked_s = now_s
            signature = _signature(self.path)
            if signature == self._seen:
                return self._material
            self._seen = signature
            try:
                material = read_tls_dir(self.path)
            except ConfigError as error:
                _log.error("new files in %s are not used: %s", self.path, error)
                return self._material
            if material != self._material:
                self._material = material
                _log.info("%s was read again: %s", self.path, describe(material.identity))
            return self._material


def read_tls_dir(path: Path) -> TlsMaterial:
    """Read a TLS directory and check that it can be used now.

    Raises:
        ConfigError: which file cannot be, and why.
    """
    for _ in range(_SETTLE_TRIES - 1):
        try:
            return _read_tls_dir(path)
        except _UnsettledError:
            time.sleep(_SETTLE_S)
    return _read_tls_dir(path)


class _UnsettledError(ConfigError):
    """Two files do not belong together: perhaps one of them is being replaced."""

    @property
    def type_name(self) -> str:
        return ConfigError.__name__


def _read_tls_dir(path: Path) -> TlsMaterial:
    ca_pem = _read(path / CA_FILE)
    _certificates(ca_pem, path / CA_FILE)
    certificate_pem = _read(path / CERTIFICATE_FILE)
    certificate = _certificates(certificate_pem, path / CERTIFICATE_FILE)[0]
    key = read_private_key(path / KEY_FILE)
    if key.public_key() != certificate.public_key():
        raise _UnsettledError(f"{path / KEY_FILE} is not the key of {path / CERTIFICATE_FILE}")
    identity = identity_of(certificate)
    if reason := identity.why_not_valid():
        raise ConfigError(f"{path / CERTIFICATE_FILE}: {reason}", remedy="issue another: `migrate tls issue --renew`")
    if identity.role is None:
        raise ConfigError(
            f"{path / CERTIFICATE_FILE} names no role, or more than one", remedy="`migrate tls issue --role` makes one"
        )
    return TlsMaterial(path, ca_pem, certificate_pem, _read(path / KEY_FILE), identity, _read_peers(path / PEERS_DIR))


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key, from a file that nobody else can read.

    Raises:
        ConfigError: others can, or it is none.
    """
    pem = _read(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"others can read {path} (its mode is {mode:04o})",
            remedy=f"chmod 600 {path}, and issue another if somebody may have",
        )
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is not a private key in PEM form, or needs a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an elliptic-curve key", remedy="use P-256, as `migrate tls` does")
    return key


def read_certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a file, at least one.

    Raises:
        ConfigError: there is none in it.
    """
    return _certificates(_read(path), path)


def identity_of(certificate: x509.Certificate) -> Identity:
    """What a certificate says of its holder."""
    roles: set[Role | None] = set()
    dns_names: list[str] = []
    addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for name in _alternative_names(certificate):
        if isinstance(name, x509.DNSName):
            dns_names.append(name.value.lower())
        elif isinstance(name, x509.IPAddress) and isinstance(name.value, ipaddress.IPv4Address | ipaddress.IPv6Address):
            addresses.append(name.value)
        elif isinstance(name, x509.UniformResourceIdentifier) and name.value.startswith(ROLE_URI_PREFIX):
            roles.add(_role(name.value.removeprefix(ROLE_URI_PREFIX)))
    return Identity(
        name=_common_name(certificate.subject),
        role=roles.pop() if len(roles) == 1 else None,
        dns_names=frozenset(dns_names),
        addresses=frozenset(addresses),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        issuer=_common_name(certificate.issuer),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


@lru_cache(maxsize=256)
def identity_of_pem(pem: bytes) -> Identity:
    """What a certificate says of its holder.

    Raises:
        ValueError: it is none.
    """
    return identity_of(x509.load_pem_x509_certificate(pem))


def describe(identity: Identity) -> str:
    """A certificate in a few words, for a log."""
    role = identity.role.value if identity.role else "nobody in particular"
    return f"{identity.name!r}, {role}, until {_time_words(identity.not_after)}"


def _signature(path: Path) -> tuple[object, ...]:
    """What changes when a file is replaced, added or removed."""
    files = [path / CA_FILE, path / CERTIFICATE_FILE, path / KEY_FILE, path / PEERS_DIR]
    files += sorted((path / PEERS_DIR).glob("*.pem"))
    found: list[object] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            found.append((file.name, None))
        else:
            found.append((file.name, status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode))
    return tuple(found)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(_PEM_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", remedy="`migrate tls issue` makes a TLS directory"
        ) from error
    if len(data) > _PEM_BYTES_MAX:
        raise ConfigError(f"{path} is larger than any certificate")
    return data


def _certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} is not a certificate in PEM form") from error


def _read_peers(path: Path) -> dict[str, bytes] | None:
    if not path.exists():
        return None
    peers: dict[str, bytes] = {}
    try:
        for file in sorted(path.glob("*.pem")):
            for certificate in _certificates(_read(file), file):
                pem = certificate.public_bytes(serialization.Encoding.PEM)
                peers[certificate.fingerprint(hashes.SHA256()).hex()] = pem
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return peers


def _is_vouched_for(pem: bytes, authorities: list[x509.Certificate]) -> bool:
    certificate = x509.load_pem_x509_certificate(pem)
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def _alternative_names(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return []
    return list(extension.value)


def _role(text: str) -> Role | None:
    try:
        return Role(text)
    except ValueError:
        return None


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _time_words(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
