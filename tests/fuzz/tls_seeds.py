"""Seeds of the targets tls and certificate; see fuzz_tls.c for what the first byte means, tls_end.c for scripts."""

import datetime as dt
import ipaddress
import struct

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# The first byte of an input for tls: what the rest is, and what is tested.
RAW, DISTURBED, HONEST = range(3)
CLIENT, BY_ADDRESS, COMPRESSES, HAS_PEERS, IS_LATE = 4, 8, 16, 32, 64
# The first byte of an input for certificate.
NAMES, CERTIFICATE, LISTED, SHAKES_HANDS = 0, 1, 2, 4

# What befalls a flight of the handshake.
ALL, PART, EDIT, OTHERWISE, BYTES, END = (bytes([operation]) for operation in range(6))
# What happens between frames.
ANY_RECORD, KEY_UPDATE, ALERT, PADDING, RECORD_LENGTH, DAMAGE, PLAIN, CUT = (bytes([16 + n]) for n in range(8))
KEY_UPDATE_REQUESTED, FATAL_ALERT, HOLD, POST_HANDSHAKE = b"\x91", b"\x92", b"\x94", b"\x90"

# The peer takes nothing any more: what it is sent breaks.
DEAF = b"\x8b"

HANDSHAKE_RECORD, ALERT_RECORD = 22, 21
ROLE = "urn:migrate:role:host"


def counted(data):
    """Bytes of a script, with how many they are."""
    return bytes([len(data)]) + data


def number(value):
    """A number of a script."""
    return bytes([value]) if value < 0xFF else b"\xff" + struct.pack(">I", value)


def portions(data):
    """Bytes as they come, in portions of an input of RAW."""
    return b"".join(counted(data[at : at + 255]) for at in range(0, len(data), 255))


def record(kind, body):
    return struct.pack(">BHH", kind, 0x0303, len(body)) + body


def vector(data, length_bytes=2):
    return len(data).to_bytes(length_bytes, "big") + data


def extension(number, data):
    return struct.pack(">H", number) + vector(data)


def message(kind, body):
    return bytes([kind]) + vector(body, 3)


def client_hello(*, protocols=(b"h2",), versions=b"\x02\x03\x04", has_share=True):
    share = struct.pack(">H", 29) + vector(bytes(range(1, 33))) if has_share else b""
    extensions = (
        extension(0, vector(b"\0" + vector(b"one.example")))
        + extension(10, vector(b"\x00\x1d\x00\x17"))
        + extension(13, vector(b"\x04\x03\x08\x04\x08\x07"))
        + extension(43, versions)
        + extension(51, vector(share))
    )
    if protocols:
        extensions += extension(16, vector(b"".join(vector(each, 1) for each in protocols)))
    suites, compressions = vector(b"\x13\x01\x13\x02"), b"\x01\x00"
    return message(1, b"\x03\x03" + bytes(32) + vector(bytes(32), 1) + suites + compressions + vector(extensions))


def server_hello():
    extensions = extension(43, b"\x03\x04") + extension(51, b"\x00\x1d" + vector(bytes(range(1, 33))))
    return message(2, b"\x03\x03" + bytes(range(32)) + vector(bytes(32), 1) + b"\x13\x01\x00" + vector(extensions))


def raw_seeds():
    hello = record(HANDSHAKE_RECORD, client_hello())
    changed = record(20, b"\x01")
    sealed = record(23, bytes(64))
    return {
        "hello": portions(hello + changed + sealed),
        "hellobyte": b"".join(counted(hello[at : at + 1]) for at in range(60)) + portions(hello[60:]),
        "hellorecords": portions(
            b"".join(record(22, client_hello()[at : at + 40]) for at in range(0, len(client_hello()), 40))
        ),
        "retry": portions(record(HANDSHAKE_RECORD, client_hello(has_share=False)) + changed + hello),
        "noalpn": portions(record(HANDSHAKE_RECORD, client_hello(protocols=()))),
        "http11": portions(record(HANDSHAKE_RECORD, client_hello(protocols=(b"http/1.1", b"h3")))),
        "tls12": portions(record(HANDSHAKE_RECORD, client_hello(versions=b"\x02\x03\x03"))),
        "sslv2": portions(b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(37)),
        "plain": portions(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        "alert": portions(record(ALERT_RECORD, b"\x02\x28")),
        "nothing": b"",
    }


def raw_client_seeds():
    return {
        "serverhello": portions(record(HANDSHAKE_RECORD, server_hello()) + record(23, bytes(64))),
        "serverplain": portions(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        "serveralert": portions(record(ALERT_RECORD, b"\x02\x46")),
    }


def otherwise(*edits, record_bytes=16383, kind=0, padding_bytes=0):
    """The sealed messages of a flight anew; an edit is where, how many bytes go, and which come."""
    header = number(record_bytes) + bytes([kind, padding_bytes])
    changes = (number(at) + bytes([removed]) + counted(added) for at, removed, added in edits)
    return OTHERWISE + bytes([len(edits)]) + header + b"".join(changes) + ALL


def disturbed_seeds(before):
    """What befalls the flight with the peer's certificate; `before` lets those before it through."""
    return {
        "parts": (PART + b"\x04") * 4 + (PART + b"\x40") * 20,
        "anew": before + otherwise(),
        "smallrecords": before + otherwise(record_bytes=7, padding_bytes=5),
        "flipped": EDIT + b"\x20\x01" + counted(b"\xff") + ALL,
        "sealedflipped": before + EDIT + number(512) + b"\x01" + counted(b"\xff") + ALL,
        "othercertificate": before + otherwise((96, 2, b"\x30\x80")),
        "nocertificate": before + otherwise((0, 0, message(11, b"\0\0\0\0"))),
        "onlydata": before + otherwise(kind=23),
        "onlyalert": before + otherwise((0, 255, b"\x02\x2a"), kind=21),
        "twice": BYTES + counted(record(HANDSHAKE_RECORD, client_hello())[:200]) + ALL,
        "changes": before + BYTES + counted(record(20, b"\x01") * 20) + ALL,
        "warned": BYTES + counted(record(ALERT_RECORD, b"\x01\x00")) + ALL,
        "leaves": before + END + b"\x30",
    }


def honest_seeds(ask):
    """Scripts through a good connection, of which the page that is asked for, or the answer, is a part."""
    refused = (42, 43, 44, 45, 46, 48, 49, 70, 116, 120)
    return {
        "script": ask * 3,
        "updates": (KEY_UPDATE_REQUESTED + ask) * 4 + KEY_UPDATE + ask,
        "badupdate": POST_HANDSHAKE + counted(message(24, b"\x07")) + ask,
        "unreadupdates": b"\x0b" + (KEY_UPDATE_REQUESTED * 8 + ask) * 6 + b"\x0b" + ask,
        "onlyupdates": b"\x0b" + KEY_UPDATE_REQUESTED * 100 + b"\x0b" + ask,
        "manyupdates": HOLD + number(16383) + KEY_UPDATE_REQUESTED * 40 + RECORD_LENGTH + b"\x40" + ask,
        "deaf": DEAF + ask * 2,
        "deaflater": ask + DEAF + ask * 2,
        "closes": ask + ALERT + b"\x00" + ask,
        **{f"alert{number}": FATAL_ALERT + bytes([number]) + ask for number in refused},
        "warning": ALERT + b"\x5a" + ask,
        "request": POST_HANDSHAKE + counted(message(0, b"")) + ask,
        "renegotiates": POST_HANDSHAKE + counted(client_hello()[:250]) + ask,
        "ticket": POST_HANDSHAKE + counted(message(4, bytes(8) + b"\x01\x01" + vector(b"ticket") + b"\0\0")) + ask,
        "wantscertificate": POST_HANDSHAKE + counted(message(13, vector(b"x", 1) + vector(b""))) + ask,
        "emptyrecords": (ANY_RECORD + b"\x17\x00") * 40 + ask,
        "nothinginside": ANY_RECORD + b"\x00\x00" + ask,
        "oddtype": ANY_RECORD + b"\x2a" + counted(b"?") + ask,
        "padded": PADDING + b"\x40" + ask + PADDING + number(16384) + ask,
        "bytes": RECORD_LENGTH + b"\x00" + ask * 2,
        "held": HOLD + b"\x10" + ask * 8 + RECORD_LENGTH + number(16383) + ask,
        "damaged": ask + DAMAGE + b"\x09\x01" + ask * 2,
        "damagedlength": DAMAGE + b"\x03\x20" + ask * 3,
        "plain": PLAIN + counted(b"PRI * HTTP/2.0\r\n\r\n") + ask,
        "cut": CUT + b"\x09" + ask * 3,
        "halfupdate": POST_HANDSHAKE + counted(b"\x18\x00\x00") + ask,
    }


def tls_seeds():
    """Name to input."""
    server_ask, client_answer = b"\x02\x01\x00\x00\x28", b"\x02\x03\x04" + b"\x02\x35"
    kinds = (
        ("", RAW, raw_seeds()),
        ("client-", RAW | CLIENT, raw_client_seeds()),
        ("disturbed-", DISTURBED, disturbed_seeds(ALL)),
        ("disturbed-client-", DISTURBED | CLIENT | BY_ADDRESS, disturbed_seeds(b"")),
        ("honest-", HONEST, honest_seeds(server_ask)),
        ("honest-client-", HONEST | CLIENT, honest_seeds(client_answer)),
        ("listed-", HONEST | HAS_PEERS | COMPRESSES, {"script": server_ask * 3}),
        ("late-", HONEST | IS_LATE, {"server": b""}),
    )
    return {prefix + name: bytes([how]) + seed for prefix, how, seeds in kinds for name, seed in seeds.items()}


def certificate(names, *, usages=(ExtendedKeyUsageOID.CLIENT_AUTH,)):
    """A certificate that is the same in every run."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(3)
        .not_valid_before(dt.datetime(2000, 1, 1, tzinfo=dt.UTC))
        .not_valid_after(dt.datetime(2049, 1, 1, tzinfo=dt.UTC))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    )
    return built.sign(key, None).public_bytes(Encoding.DER)


def certificate_seeds():
    """Name to input."""
    role, other_role = x509.UniformResourceIdentifier(ROLE), x509.UniformResourceIdentifier("urn:migrate:role:viewer")
    address, address6 = (x509.IPAddress(ipaddress.ip_address(text)) for text in ("127.0.0.1", "::2"))
    subject = x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ROLE)]))
    other = x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x0c\x01x")
    alternatives = {
        "host": [address, address6, x509.DNSName("one.a.b"), role],
        "wildcard": [x509.DNSName("*.a.b"), role],
        "viewer": [address, other_role],
        "roles": [other_role, role, role],
        "kinds": [
            x509.RFC822Name(f"x@{ROLE}"),
            subject,
            other,
            x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
            role,
        ],
        "dnsrole": [x509.DNSName(ROLE)],
    }
    ders = {name: x509.SubjectAlternativeName(names).public_bytes() for name, names in alternatives.items()}
    ders["none"] = b"\x30\x00"
    ders["nul"] = b"\x30\x18\x86\x16" + ROLE.encode() + b"\0"
    ders["longform"] = b"\x30\x18\x86\x81\x15" + ROLE.encode()
    ders["pieces"] = b"\x30\x1b\xa6\x19\x16\x07" + ROLE[:7].encode() + b"\x16\x0e" + ROLE[7:].encode()
    ders["indefinite"] = b"\x30\x80\x86\x15" + ROLE.encode() + b"\x00\x00"
    ders["notder"] = b"\x86\x15" + ROLE.encode()
    ders["shortaddress"] = b"\x30\x1c\x87\x03\x7f\x00\x00\x86\x15" + ROLE.encode()
    seeds = {f"names-{name}": bytes([NAMES]) + der for name, der in ders.items()}
    seeds["hands-viewer"] = bytes([NAMES | SHAKES_HANDS]) + ders["viewer"]
    seeds["listed-host"] = bytes([NAMES | LISTED | SHAKES_HANDS]) + ders["host"]
    for name in ("host", "viewer", "kinds"):
        seeds[f"whole-{name}"] = bytes([CERTIFICATE]) + certificate(alternatives[name])
    return seeds
