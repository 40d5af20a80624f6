"""A small certificate authority: makes the CA, and certificates for hosts and the people who operate them."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrate.errors import AlreadyExistsError, ConfigError
from migrate.files import replace_file
from migrate.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, ROLE_URI_PREFIX, Role, read_private_key

CA_KEY_FILE = "ca.key"
CA_DAYS_DEFAULT = 3650
DAYS_DEFAULT = 365
DAYS_MAX = 36_500

# Clocks of hosts differ a little; a certificate that is not yet valid somewhere is a nuisance.
_BACKDATED = timedelta(minutes=5)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*")


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when a certificate is valid."""

    not_before: datetime
    not_after: datetime

    @classmethod
    def from_now(cls, days: int) -> "Validity":
        """Valid at once, also where the clock is behind, and for so many days.

        Raises:
            ConfigError: not a number of days that makes sense.
        """
        if not 1 <= days <= DAYS_MAX:
            raise ConfigError(f"a certificate is valid for 1 to {DAYS_MAX} days, not {days}")
        now = datetime.now(UTC)
        return cls(now - _BACKDATED, now + timedelta(days=days))


class Authority:
    """A CA in a directory: ca.pem, which everybody may read, and ca.key, which nobody but its owner may.

    Args:
        path: The directory.

    Raises:
        ConfigError: there is no CA in it, or it cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._key = read_private_key(path / CA_KEY_FILE)
        try:
            self._ca_pem = (path / CA_FILE).read_bytes()
            self._certificate = x509.load_pem_x509_certificate(self._ca_pem)
        except OSError as error:
            raise ConfigError(
                f"{path / CA_FILE} cannot be read: {error.strerror}", remedy=f"`migrate tls init {path}` makes a CA"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{path / CA_FILE} is not a certificate in PEM form") from error
        if self._key.public_key() != self._certificate.public_key():
            raise ConfigError(f"{path / CA_KEY_FILE} is not the key of {path / CA_FILE}")

    @classmethod
    def create(cls, path: Path, days: int = CA_DAYS_DEFAULT) -> "Authority":
        """Make a CA in a directory, which is made, too, if need be.

        Raises:
            AlreadyExistsError: there is one in it.
            ConfigError: it cannot be written.
        """
        validity = Validity.from_now(days)
        for name in (CA_FILE, CA_KEY_FILE):
            if (path / name).exists():
                raise AlreadyExistsError(f"{path / name} exists", remedy="a CA is never overwritten: name another")
        key = ec.generate_private_key(ec.SECP256R1())
        # Two CAs of one name confuse whoever looks for an issuer by it.
        subject = _common_name(f"migrate CA {x509.random_serial_number():x}"[:30])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(validity.not_before)
            .not_valid_after(validity.not_after)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(is_ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(path / CA_KEY_FILE, _key_pem(key), mode=0o600)
            replace_file(path / CA_FILE, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        return cls(path)

    def issue(
        self,
        name: str,
        role: Role,
        addresses: Sequence[str] = (),
        days: int = DAYS_DEFAULT,
        *,
        renew: bool = False,
        validity: Validity | None = None,
    ) -> Path:
        """Make a TLS directory for somebody: the CA's certificate, a certificate, its key.

        Args:
            name: Who it is for; names the directory.
            role: What its holder may do.
            addresses: Names and IP addresses by which a host is called; none means `name`.
            days: How long it is valid.
            renew: Whether there may be one already, which is replaced, each file at once.
            validity: In place of `days`.

        Raises:
            AlreadyExistsError: there is one already.
            ConfigError: a name or an address is none, or nothing can be written.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is not a name: 1 to 64 of A-Z a-z 0-9 . _ -, starting with a letter or digit")
        if addresses and role is not Role.HOST:
            raise ConfigError("only a host is called by an address", remedy="leave --address out, or use --role host")
        names = [_general_name(address) for address in addresses or (name,)] if role is Role.HOST else []
        directory = self.path / name
        if (directory / KEY_FILE).exists() and not renew:
            raise AlreadyExistsError(f"{directory / KEY_FILE} exists", remedy="--renew replaces it")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, role, names, key.public_key(), validity or Validity.from_now(days))
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            replace_file(directory / KEY_FILE, _key_pem(key), mode=0o600)
            replace_file(directory / CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
            replace_file(directory / CA_FILE, self._ca_pem, mode=0o644)
        except OSError as error:
            raise ConfigError(f"{directory} cannot be written: {error.strerror}") from error
        return directory

    def _sign(
        self,
        name: str,
        role: Role,
        names: Sequence[x509.GeneralName],
        public_key: ec.EllipticCurvePublicKey,
        validity: Validity,
    ) -> x509.Certificate:
        # Only a host may stand behind a server's address.
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] if role is Role.HOST else []
        role_name = x509.UniformResourceIdentifier(ROLE_URI_PREFIX + role.value)
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        # What the CA no longer vouches for, nobody it has vouched for does.
        not_after = min(validity.not_after, self._certificate.not_valid_after_utc)
        if not_after <= validity.not_before:
            raise ConfigError(f"the CA in {self.path} has expired", remedy="make another with `migrate tls init`")
        return (
            x509.CertificateBuilder()
            .subject_name(_common_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(validity.not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(is_ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([*usages, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([*names, role_name]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(issuer_key, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        if not _HOST_NAME.fullmatch(address):
            raise ConfigError(f"{address!r} is neither a host name nor an IP address") from None
        return x509.DNSName(address)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
