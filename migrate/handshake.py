"""Why a TLS connection does not come about: one handshake with the same files, only to learn the reason.

gRPC says that it could not connect, and often no more. The reason is for people to read; nothing is decided by it.
"""

import socket
import ssl
from contextlib import suppress
from pathlib import Path

from migrate.config import Endpoint
from migrate.errors import ConfigError
from migrate.tls import CERTIFICATE_FILE, KEY_FILE, PEERS_DIR, TlsMaterial, read_tls_dir

DEADLINE_S = 2.0
# Of OpenSSL, x509_vfy.h.
_EXPIRED, _NOT_YET_VALID = 10, 9
_UNKNOWN_ISSUERS = (2, 18, 19, 20, 21)
_OTHER_NAMES = (62, 64)
_WRONG_PURPOSE = 26


def why_refused(endpoint: Endpoint, tls_dir: Path | None) -> str:
    """Try once, for two seconds at most, and say what stands in the way; empty if that is not TLS.

    Args:
        endpoint: Who does not answer.
        tls_dir: What was presented to it, and whom it had to be; None for plaintext.
    """
    if tls_dir is None:
        return "it speaks TLS, and was called without" if _speaks_tls(endpoint) else ""
    try:
        material = read_tls_dir(tls_dir)
        context = _context(material)
    except ConfigError as error:
        return error.message
    except OSError as error:
        return f"the files in {tls_dir} cannot be used: {error}"
    with suppress(OSError):
        return _why_no_handshake(endpoint, material, context)
    return ""


def _why_no_handshake(endpoint: Endpoint, material: TlsMaterial, context: ssl.SSLContext) -> str:
    with socket.create_connection((endpoint.host, endpoint.port), DEADLINE_S) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=endpoint.host) as stream:
                # In TLS 1.3, what the other side thinks of our certificate comes after the handshake.
                return "" if stream.recv(1) else _refusal(material)
        except ssl.SSLCertVerificationError as error:
            return _why_not_trusted(error, endpoint, material)
        except ssl.SSLError as error:
            return _why_broken(error, material)
        except ConnectionResetError:
            return _refusal(material)


def _context(material: TlsMaterial) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=material.server_roots_pem.decode("ascii", errors="replace"))
    if material.peer_pems is not None:
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    context.load_cert_chain(material.path / CERTIFICATE_FILE, material.path / KEY_FILE)
    return context


def _speaks_tls(endpoint: Endpoint) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # Nothing is said over this connection.
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with (
        suppress(OSError),
        socket.create_connection((endpoint.host, endpoint.port), DEADLINE_S) as connection,
        context.wrap_socket(connection),
    ):
        return True
    return False


def _refusal(material: TlsMaterial) -> str:
    identity = material.identity
    return (
        f"it does not accept our certificate ({identity.name!r}, from {identity.issuer!r}): it may not trust that CA, "
        "or its clock differs; its log says which"
    )


def _why_not_trusted(error: ssl.SSLCertVerificationError, endpoint: Endpoint, material: TlsMaterial) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "its certificate has expired"
    if code == _NOT_YET_VALID:
        return "its certificate is not valid yet; do the clocks agree?"
    if code in _OTHER_NAMES:
        return f"its certificate is not for {endpoint.host}"
    if code == _WRONG_PURPOSE:
        return "its certificate is not that of a host"
    if code in _UNKNOWN_ISSUERS:
        whom = f"a CA in {material.path / 'ca.pem'}"
        if material.peer_pems is not None:
            whom += f", or is not one of those in {material.path / PEERS_DIR}"
        return f"its certificate was not signed by {whom}"
    return f"its certificate was refused: {error.verify_message}"


def _why_broken(error: ssl.SSLError, material: TlsMaterial) -> str:
    reason = error.reason or ""
    if reason in ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return "it speaks no TLS, and was called with"
    if reason in ("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "SSLV3_ALERT_HANDSHAKE_FAILURE"):
        return "it speaks no TLS 1.3"
    if "EOF" in reason or "ALERT" in reason:
        detail = reason.lower().partition("alert_")[2].replace("_", " ")
        return _refusal(material) + (f" ({detail})" if detail else "")
    return f"the handshake failed: {reason.lower().replace('_', ' ') or error}"
