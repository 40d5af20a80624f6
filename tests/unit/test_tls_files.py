"""`migrate tls`, TLS directories, and what certificates say."""

import logging
import os
import shutil
import stat

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID

from migrate import tls
from migrate.authority import Authority
from migrate.errors import AlreadyExistsError, ConfigError
from migrate.tls import Role, TlsFiles, read_tls_dir
from tests.harness.cli import json_of, run
from tests.harness.tls_dirs import Certificates, valid_between


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(tls, "_SETTLE_S", 0)


@pytest.fixture
def certificates(tmp_path):
    return Certificates(tmp_path / "ca")


class FakeTime:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def certificate_of(directory):
    return tls.read_certificates(directory / "cert.pem")[0]


def usages(directory):
    return set(certificate_of(directory).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


# ---- the commands ----


def test_init_issue_show(tmp_path):
    assert run("tls", "init", str(tmp_path / "ca")).exit_code == 0
    issued = run("tls", "issue", str(tmp_path / "ca"), "alpha", "--address", "alpha.example", "--address", "192.0.2.7")
    assert issued.exit_code == 0, issued.stderr

    shown = json_of(run("tls", "show", str(tmp_path / "ca" / "alpha"), "--json"))[0]
    assert (shown["name"], shown["role"], shown["valid"]) == ("alpha", "host", True)
    assert shown["addresses"] == ["alpha.example", "192.0.2.7"]
    words = run("tls", "show", str(tmp_path / "ca" / "alpha" / "cert.pem")).stdout
    assert "alpha.example, 192.0.2.7" in words
    assert "364 days from now" in words


def test_keys_are_nobody_elses(tmp_path):
    mask = os.umask(0)
    try:
        directory = Authority.create(tmp_path / "ca").issue("alpha", Role.HOST)
    finally:
        os.umask(mask)

    assert mode_of(tmp_path / "ca") == mode_of(directory) == 0o700
    assert mode_of(tmp_path / "ca" / "ca.key") == mode_of(directory / "key.pem") == 0o600
    assert sorted(path.name for path in directory.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]


def test_init_never_overwrites(tmp_path):
    run("tls", "init", str(tmp_path))
    before = (tmp_path / "ca.key").read_bytes()

    again = run("tls", "init", str(tmp_path))

    assert again.exit_code == 1
    assert "is never overwritten" in again.stderr
    assert (tmp_path / "ca.key").read_bytes() == before


def test_issue_again_only_to_renew(certificates):
    directory = certificates.host("alpha")
    before = read_tls_dir(directory)

    with pytest.raises(AlreadyExistsError, match="--renew"):
        certificates.authority.issue("alpha", Role.HOST)
    assert read_tls_dir(directory) == before
    certificates.renew("alpha", Role.HOST)

    assert read_tls_dir(directory).key_pem != before.key_pem


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("../alpha",), "is not a name"),
        (("alpha", "--address", "a b"), "neither a host name nor an IP address"),
        (("alpha", "--address", "*.example"), "neither a host name nor an IP address"),
        (("alpha", "--role", "viewer", "--address", "a.example"), "only a host"),
        (("alpha", "--days", "0"), "1 to"),
        (("a_b..c",), "neither a host name"),
    ],
)
def test_issue_refuses_nonsense(tmp_path, arguments, words):
    run("tls", "init", str(tmp_path))

    result = run("tls", "issue", str(tmp_path), *arguments)

    assert result.exit_code == 1
    assert words in result.stderr


def test_issue_without_a_ca_says_how_to_make_one(tmp_path):
    result = run("tls", "issue", str(tmp_path), "alpha")

    assert result.exit_code == 1
    assert "ca.key" in result.stderr


def test_only_hosts_may_stand_behind_an_address(certificates):
    assert usages(certificates.host()) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    for directory in (certificates.operator(), certificates.viewer()):
        assert usages(directory) == {ExtendedKeyUsageOID.CLIENT_AUTH}


def test_lifetimes_are_sane(certificates):
    certificate = certificate_of(certificates.host())
    ca = tls.read_certificates(certificates.authority.path / "ca.pem")[0]

    assert 365 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 366
    assert 3650 <= (ca.not_valid_after_utc - ca.not_valid_before_utc).days <= 3651
    assert certificate_of(certificates.operator()).serial_number != certificate.serial_number


def test_no_certificate_outlives_its_ca(tmp_path):
    authority = Authority.create(tmp_path / "ca", days=30)

    certificate = certificate_of(authority.issue("alpha", Role.HOST))

    assert certificate.not_valid_after_utc == tls.read_certificates(tmp_path / "ca" / "ca.pem")[0].not_valid_after_utc


# ---- what a certificate says ----


@pytest.mark.parametrize("role", Role)
def test_role_is_read_back(certificates, role):
    assert read_tls_dir(certificates.issue("someone", role)).identity.role is role


def test_names_match_as_a_whole(certificates):
    identity = read_tls_dir(certificates.host(addresses=("Alpha.example", "192.0.2.7", "2001:db8::7"))).identity

    for host in ("alpha.example", "ALPHA.EXAMPLE.", "192.0.2.7", "2001:db8:0::7", "[2001:db8::7]"):
        assert identity.is_valid_for(host), host
    for host in ("example", "a.alpha.example", "alpha.example.org", "192.0.2.8", "::ffff:192.0.2.7", "", "host"):
        assert not identity.is_valid_for(host), host


# ---- what makes a directory unusable ----


def broken(certificates, name):
    """A good TLS directory, to be broken."""
    return certificates.host(name)


def _missing(directory, _):
    (directory / "cert.pem").unlink()


def _garbage(directory, _):
    (directory / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")


def _garbage_key(directory, _):
    (directory / "key.pem").write_text("nonsense")


def _other_key(directory, certificates):
    shutil.copy(certificates.host("other") / "key.pem", directory)


def _readable_key(directory, _):
    (directory / "key.pem").chmod(0o640)


def _ed25519_key(directory, _):
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "key.pem").write_bytes(pem)


def _expired(directory, certificates):
    certificates.renew(directory.name, Role.HOST, validity=valid_between(-10, -1))


def _early(directory, certificates):
    certificates.renew(directory.name, Role.HOST, validity=valid_between(1, 10))


def _no_role(directory, certificates):
    shutil.copy(certificates.authority.path / "ca.pem", directory / "cert.pem")
    shutil.copy(certificates.authority.path / "ca.key", directory / "key.pem")


@pytest.mark.parametrize(
    ("breakage", "file", "reason"),
    [
        (_missing, "cert.pem", "No such file"),
        (_garbage, "ca.pem", "is not a certificate"),
        (_garbage_key, "key.pem", "is not a private key"),
        (_other_key, "key.pem", "is not the key of"),
        (_readable_key, "key.pem", "others can read"),
        (_ed25519_key, "key.pem", "not an elliptic-curve key"),
        (_expired, "cert.pem", "expired at"),
        (_early, "cert.pem", "is not valid before"),
        (_no_role, "cert.pem", "names no role"),
    ],
)
def test_unusable_directory_says_which_file_and_why(certificates, breakage, file, reason):
    directory = broken(certificates, "alpha")
    breakage(directory, certificates)

    with pytest.raises(ConfigError) as caught:
        read_tls_dir(directory)

    assert file in caught.value.message
    assert reason in caught.value.message
    assert caught.value.type_name == "ConfigError"


def test_material_never_shows_its_key(certificates):
    material = read_tls_dir(certificates.host())

    assert "PRIVATE" not in repr(material)
    assert "PRIVATE" not in str(material)


# ---- peers/ ----


def test_without_peers_everybody_whom_the_ca_vouches_for_is_accepted(certificates):
    material = read_tls_dir(certificates.host())

    assert material.accepts("any")
    assert material.server_roots_pem == material.ca_pem


def test_peers_are_those_in_the_directory(certificates, tmp_path):
    directory, friend = certificates.host(), certificates.host("friend")
    stranger = Certificates(tmp_path / "other").host("stranger")
    (directory / "peers").mkdir()
    shutil.copy(friend / "cert.pem", directory / "peers" / "friend.pem")
    shutil.copy(stranger / "cert.pem", directory / "peers" / "stranger.pem")

    material = read_tls_dir(directory)

    assert material.accepts(read_tls_dir(friend).identity.fingerprint)
    assert not material.accepts(material.identity.fingerprint)
    # A certificate in peers/ is no CA: it counts only if one vouches for it.
    assert material.server_roots_pem == (friend / "cert.pem").read_bytes()


def test_empty_peers_accepts_nobody(certificates):
    directory = certificates.host()
    (directory / "peers").mkdir()

    material = read_tls_dir(directory)

    assert not material.accepts(material.identity.fingerprint)
    with pytest.raises(ConfigError, match="holds no certificate"):
        _ = material.server_roots_pem


# ---- replacement ----


def test_replaced_files_are_noticed_a_second_later(certificates):
    now = FakeTime()
    files = TlsFiles(certificates.host(), now)
    before = files.current()
    certificates.renew("host", Role.HOST)

    assert files.current() is before
    now.now_s += tls.LOOK_INTERVAL_S

    assert files.current().identity.fingerprint != before.identity.fingerprint
    assert files.current() is files.current()


def test_bad_replacement_is_logged_once_and_not_used(certificates, caplog):
    now = FakeTime()
    directory = certificates.host()
    files = TlsFiles(directory, now)
    before = files.current()
    (directory / "cert.pem").write_text("nonsense")

    for _ in range(3):
        now.now_s += tls.LOOK_INTERVAL_S
        assert files.current() is before
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "cert.pem is not a certificate" in caplog.text
    certificates.renew("host", Role.HOST)
    now.now_s += tls.LOOK_INTERVAL_S

    assert files.current() is not before


def test_removed_peer_is_noticed(certificates):
    now = FakeTime()
    directory, friend = certificates.host(), certificates.operator()
    (directory / "peers").mkdir()
    copied = directory / "peers" / "friend.pem"
    shutil.copy(friend / "cert.pem", copied)
    files = TlsFiles(directory, now)
    fingerprint = read_tls_dir(friend).identity.fingerprint
    assert files.current().accepts(fingerprint)

    copied.unlink()
    now.now_s += tls.LOOK_INTERVAL_S

    assert not files.current().accepts(fingerprint)
