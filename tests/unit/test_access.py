"""Who may make which call: the table, and what looks it up."""

import shutil

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from migrate import tls
from migrate.daemon.access import CALLS, Access
from migrate.errors import PeerNotTrustedError, PermissionDeniedError
from migrate.tls import Role, TlsFiles
from migrate.v1 import guest_service_pb2, migration_service_pb2, page_service_pb2, transfer_service_pb2
from tests.harness.tls_dirs import Certificates, valid_between

MODULES = [
    guest_service_pb2,
    migration_service_pb2,
    page_service_pb2,
    transfer_service_pb2,
    health_pb2,
    reflection_pb2,
]
METHODS = sorted(
    f"/{service.full_name}/{method.name}"
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
READING = ("Get", "List", "Watch")


@pytest.fixture
def certificates(tmp_path):
    return Certificates(tmp_path / "ca")


@pytest.fixture
def files(certificates, now):
    return TlsFiles(certificates.host(), now)


@pytest.fixture
def now():
    class Now:
        now_s = 0.0

        def __call__(self):
            return self.now_s

    return Now()


class Call:
    """A call by somebody, as gRPC shows it."""

    def __init__(self, directory=None, version=b"TLSv1.3"):
        self._auth = {"ssl_tls_version": [version]}
        if directory is not None:
            self._auth["x509_pem_cert"] = [(directory / "cert.pem").read_bytes()]

    def auth_context(self):
        return self._auth


def test_every_method_of_every_service_stands_in_the_table():
    assert sorted(CALLS) == METHODS


def test_every_served_service_is_looked_at():
    packages = {method.split("/")[1].rpartition(".")[0] for method in METHODS}
    assert packages == {"migrate.v1", "grpc.health.v1", "grpc.reflection.v1alpha"}


@pytest.mark.parametrize("method", METHODS)
def test_viewers_only_read(method):
    service, name = method.lstrip("/").split("/")
    if service.startswith("grpc."):
        assert CALLS[method] == set(Role)
    elif Role.VIEWER in CALLS[method]:
        assert name.startswith(READING)
        assert Role.OPERATOR in CALLS[method]


@pytest.mark.parametrize("method", METHODS)
def test_hosts_transfer_and_operators_operate(method):
    service = method.lstrip("/").split("/")[0].rpartition(".")[2]
    if service in ("TransferService", "PageService"):
        assert CALLS[method] == {Role.HOST}
    elif service in ("GuestService", "MigrationService"):
        assert Role.HOST not in CALLS[method]
        assert Role.OPERATOR in CALLS[method]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", METHODS)
def test_access_is_the_table(certificates, files, role, method):
    call = Call(certificates.issue("someone", role))

    if role in CALLS[method]:
        assert Access(files).check_call(method, call).role is role
    else:
        with pytest.raises(PermissionDeniedError) as caught:
            Access(files).check_call(method, call)
        assert role.value in caught.value.message
        assert method.lstrip("/") in caught.value.message


def test_call_that_stands_in_no_table_is_nobodys(certificates, files):
    for role in Role:
        with pytest.raises(PermissionDeniedError):
            Access(files).check_call("/migrate.v1.GuestService/Fancy", Call(certificates.issue(role.value, role)))


def test_without_a_certificate_nobody_is_anybody(files):
    with pytest.raises(PeerNotTrustedError, match="without a certificate") as caught:
        Access(files).check_call("/grpc.health.v1.Health/Check", Call())

    assert grpc.StatusCode[caught.value.grpc_status] is grpc.StatusCode.UNAUTHENTICATED


def test_older_tls_is_refused(certificates, files):
    with pytest.raises(PeerNotTrustedError, match=r"older TLS than 1\.3"):
        Access(files).identify(Call(certificates.operator(), b"TLSv1.2"))


def test_certificate_that_expired_since_the_handshake(certificates, files):
    call = Call(certificates.operator(validity=valid_between(-2, -1)))

    with pytest.raises(PeerNotTrustedError, match="expired"):
        Access(files).identify(call)


def test_peer_that_was_removed_since_the_handshake(certificates, files, now):
    call = Call(certificates.operator())
    peers = certificates.host() / "peers"
    peers.mkdir()
    shutil.copy(certificates.operator() / "cert.pem", peers / "o.pem")
    now.now_s += tls.LOOK_INTERVAL_S
    assert Access(files).identify(call).name == "operator"

    (peers / "o.pem").unlink()
    now.now_s += tls.LOOK_INTERVAL_S

    with pytest.raises(PeerNotTrustedError, match="not among the peers"):
        Access(files).identify(call)


def test_pages_are_for_the_host_that_the_migration_goes_to(certificates, files):
    access = Access(files)
    call = Call(certificates.host("beta", addresses=("beta.example", "192.0.2.8")))

    access.check_party("m", "beta.example", call)
    access.check_party("m", "192.0.2.8", call)
    for host in ("alpha.example", "192.0.2.7", "beta"):
        with pytest.raises(PermissionDeniedError, match="is not valid for that"):
            access.check_party("m", host, call)
