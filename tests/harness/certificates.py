"""Certificates for a test: good ones, and each kind of bad one."""

import datetime as dt
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrate.native.tls import NativeTls

NAMES = ("127.0.0.1", "::1", "localhost", "one.example")
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_DAY = dt.timedelta(days=1)
NOW, PAST, FUTURE = (-_DAY, _DAY), (-2 * _DAY, -_DAY), (_DAY, 2 * _DAY)


@dataclass(frozen=True)
class Identity:
    """The files of one party."""

    ca: Path
    cert: Path
    key: Path

    def native(self, peers=None):
        return NativeTls(self.ca, self.cert, self.key, peers)

    def trusting(self, other):
        """The same party, which trusts another authority."""
        return Identity(other.ca, self.cert, self.key)

    def become(self, other):
        """Replace our files by another's."""
        for ours, theirs in zip((self.ca, self.cert, self.key), (other.ca, other.cert, other.key), strict=True):
            ours.write_bytes(theirs.read_bytes())

    def context(self, purpose, *, protocols=("h2",), has_certificate=True, version=ssl.TLSVersion.TLSv1_3):
        """Python's own TLS, which does not check names; purpose is whom it authenticates."""
        made = ssl.create_default_context(purpose, cafile=self.ca)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_REQUIRED
        made.minimum_version = made.maximum_version = version
        if has_certificate:
            made.load_cert_chain(self.cert, self.key)
        if protocols:
            made.set_alpn_protocols(protocols)
        return made

    def client_context(self, **options):
        return self.context(ssl.Purpose.SERVER_AUTH, **options)

    def server_context(self, **options):
        return self.context(ssl.Purpose.CLIENT_AUTH, **options)

    def channel_credentials(self):
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes())

    def server_credentials(self):
        pair = (self.key.read_bytes(), self.cert.read_bytes())
        return grpc.ssl_server_credentials([pair], self.ca.read_bytes(), require_client_auth=True)


class Authority:
    """A certificate authority; its certificate, and those it issues, lie in a directory."""

    def __init__(self, directory):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {directory.name}")])
        self.ca = directory / "ca.crt"
        basics = x509.BasicConstraints(ca=True, path_length=None)
        built = self._builder(self._name, self._key, NOW).add_extension(basics, critical=True)
        self.ca.write_bytes(_pem(built.sign(self._key, hashes.SHA256())))

    def issue(self, name="host", *, names=NAMES, role="host", usages=BOTH, valid=NOW, password=None):
        """An identity. Names are DNS names and addresses; a role of None is none."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        alternatives = [_general_name(each) for each in names]
        if role is not None:
            alternatives.append(x509.UniformResourceIdentifier(f"urn:migrate:role:{role}"))
        built = self._builder(subject, key, valid)
        if alternatives:
            built = built.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        if usages:
            built = built.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        identity = Identity(*(self.directory / f"{name}.{kind}" for kind in ("ca", "crt", "key")))
        identity.ca.write_bytes(self.ca.read_bytes())
        identity.cert.write_bytes(_pem(built.sign(self._key, hashes.SHA256())))
        cipher = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        identity.key.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)
        )
        return identity

    def _builder(self, subject, key, valid):
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + valid[0])
            .not_valid_after(now + valid[1])
        )


def _general_name(text):
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)
