"""With TLS, a migration is a matter of its two hosts: no third one gets its pages, or has a say in it."""

import itertools
import queue
import shutil

import grpc
import pytest

from migrate.config import PROTOCOL_VERSION
from migrate.native.exports import BEARER, METADATA_AUTHORIZATION, METADATA_MIGRATION_ID
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import guest_service_pb2_grpc as guest_rpc
from migrate.v1 import page_service_pb2 as page
from migrate.v1 import page_service_pb2_grpc as page_rpc
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import transfer_service_pb2_grpc as transfer_rpc
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import CALL_S, channel_to
from tests.harness.waiting import wait_until

GRPCIO = types.PAGE_TRANSPORT_GRPCIO
TRANSPORTS = [pytest.param(GRPCIO, id="grpcio"), pytest.param(types.PAGE_TRANSPORT_NATIVE_GRPC, id="native")]
# Certificates that are valid for the address of both daemons are those of their hosts.
ELSEWHERE = ("gamma.example", "127.0.0.2")

pytestmark = pytest.mark.uffd


class Moving:
    """A migration whose pages move slowly, from a host that has a list of peers."""

    def __init__(self, source, destination, transport, peers):
        self.source, self.destination, self.peers = source, destination, peers
        source.create("g", kind="process", memory_mib=32, touch_rate_per_s=1000)
        source.wait_populated("g")
        self.id = source.start(destination, transport=transport, max_bandwidth_bytes_per_s=1 << 20)
        wait_until(lambda: source.migration(self.id).state == types.MIGRATION_STATE_POSTCOPY, 20, "the guest to run")
        entry = saved.SavedMigration.FromString((source.state_dir / "migrations" / f"{self.id}.pb").read_bytes())
        self.token = entry.source.token
        self.pages_address = source.address if transport == GRPCIO else source.page_address

    def fetch(self, channel, requests, migration_id=None, token=None):
        """A page call of ours."""
        authorization = BEARER + (self.token if token is None else token)
        metadata = ((METADATA_MIGRATION_ID, migration_id or self.id), (METADATA_AUTHORIZATION, authorization))
        return page_rpc.PageServiceStub(channel).FetchPages(requests, metadata=metadata, timeout=CALL_S)

    def fetch_code(self, tls_dir, **terms):
        """How a page call ends that asks for one page."""
        with channel_to(self.pages_address, tls_dir) as channel:
            requests = iter([page.FetchPagesRequest(request_id=1, first_page=0, page_count=1)])
            try:
                list(self.fetch(channel, requests, **terms))
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK


@pytest.fixture(params=TRANSPORTS)
def moving(request, start_daemon, certificates, tmp_path):
    directory = tmp_path / "alpha"
    shutil.copytree(certificates.host("alpha"), directory)
    (directory / "peers").mkdir()
    everybody = (certificates.host("beta"), certificates.host("gamma", addresses=ELSEWHERE), certificates.viewer())
    for peer in (*everybody, certificates.operator()):
        shutil.copy(peer / "cert.pem", directory / "peers" / f"{peer.name}.pem")
    source = start_daemon(directory, state_dir=tmp_path / "state")
    return Moving(source, start_daemon(certificates.host("beta")), request.param, directory / "peers")


def test_pages_are_for_the_named_host_with_the_token(moving, certificates, strangers, tmp_path):
    beta, gamma = certificates.host("beta"), certificates.host("gamma", addresses=ELSEWHERE)

    assert moving.fetch_code(beta) == grpc.StatusCode.OK
    assert moving.fetch_code(beta, token=moving.token + "x") == grpc.StatusCode.PERMISSION_DENIED
    assert moving.fetch_code(beta, token=moving.token[:1]) == grpc.StatusCode.PERMISSION_DENIED
    assert moving.fetch_code(beta, migration_id="m") == grpc.StatusCode.NOT_FOUND
    assert moving.fetch_code(gamma) == grpc.StatusCode.PERMISSION_DENIED
    # The endpoint in C refuses them, as it does strangers, in the handshake.
    refused = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
    for directory in (certificates.operator(), certificates.viewer(), strangers.host()):
        assert moving.fetch_code(directory) in refused
    assert moving.fetch_code(None) == grpc.StatusCode.UNAVAILABLE
    # Nobody finds it in a log.
    assert all(moving.token not in log.read_text() for log in tmp_path.glob("*.log"))


@pytest.mark.timeout(150)
def test_page_call_that_runs_ends_when_its_peer_is_revoked(moving, certificates):
    asked = queue.Queue()
    with channel_to(moving.pages_address, certificates.host("beta")) as channel:
        call = moving.fetch(channel, iter(asked.get, None))
        request_ids = itertools.count(1)

        def page_comes():
            asked.put(page.FetchPagesRequest(request_id=next(request_ids), first_page=0, page_count=1))
            return next(call)

        assert page_comes().page_count == 1
        (moving.peers / "beta.pem").unlink()

        def code_of_end():
            try:
                page_comes()
            except grpc.RpcError as error:
                return error.code()
            return None

        # By grpcio, the call is answered; in C, the connection ends.
        ended = wait_until(code_of_end, 10, "the call to end")
        assert ended in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
        asked.put(None)
    shutil.copy(certificates.host("beta") / "cert.pem", moving.peers / "beta.pem")
    assert moving.source.wait_completed(moving.id, 120).state == types.MIGRATION_STATE_COMPLETED


# ---- calls ----


def calls_of(migration_id, token, control_endpoint):
    """What another host may try with the id of a migration that it is no part of, and even its token."""
    named = {"migration_id": migration_id}
    taken = {**named, "token": token, "control_endpoint": control_endpoint}
    spec = types.GuestSpec(name="h", kind=types.GUEST_KIND_PROCESS, memory_bytes=16 << 20, vcpus=1)
    return {
        "Prepare": transfer.PrepareRequest(
            **taken,
            protocol_version=PROTOCOL_VERSION,
            page_endpoint="127.0.0.2:1",
            attempt=99,
            guest=types.GuestDescription(
                spec=spec, page_size_bytes=4096, regions=[types.RamRegion(size_bytes=16 << 20)]
            ),
        ),
        "Invalidate": transfer.InvalidateRequest(**named, generation=1, attempt=1),
        "Switchover": transfer.SwitchoverRequest(**named, attempt=1),
        "GetIncoming": transfer.GetIncomingRequest(**named),
        "Complete": transfer.CompleteRequest(**named, token=token),
        "RecordTrace": transfer.RecordTraceRequest(**named, token=token),
        "Abort": transfer.AbortRequest(**named, reason="x", attempt=99),
        "ResumeMigration": transfer.ResumeMigrationRequest(**taken, page_endpoint="127.0.0.2:1"),
    }


METHODS = sorted(calls_of("", "", ""))


def test_these_are_all_calls():
    service = transfer.DESCRIPTOR.services_by_name["TransferService"]
    assert sorted(method.name for method in service.methods) == METHODS


@pytest.mark.parametrize("moving", TRANSPORTS[1:], indirect=True)
def test_third_host_has_no_say(moving, certificates):
    """Neither as itself, nor in the name of the host that it is not."""
    gamma = certificates.host("gamma", addresses=ELSEWHERE)
    for daemon, party in ((moving.source, "destination"), (moving.destination, "source")):
        for claimed in ("127.0.0.2:1", "127.0.0.1:1"):
            calls = calls_of(moving.id, moving.token, claimed)
            with channel_to(daemon.address, gamma) as channel:
                stub = transfer_rpc.TransferServiceStub(channel)
                for name, request in calls.items():
                    with pytest.raises(grpc.RpcError) as caught:
                        getattr(stub, name)(request, timeout=CALL_S)
                    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED, (party, name)
                    assert "is 127.0.0.1: the certificate of 'gamma' is not valid for that" in caught.value.details()
    for daemon in (moving.source, moving.destination):
        assert daemon.migration(moving.id).state == types.MIGRATION_STATE_POSTCOPY


def test_host_prepares_in_no_other_name(start_daemon, certificates):
    destination = start_daemon(certificates.host("beta"))
    request = calls_of("f" * 12, "t" * 43, "127.0.0.1:1")["Prepare"]
    gamma = certificates.host("gamma", addresses=ELSEWHERE)
    with channel_to(destination.address, gamma) as channel, pytest.raises(grpc.RpcError) as caught:
        transfer_rpc.TransferServiceStub(channel).Prepare(request, timeout=CALL_S)
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert destination.guest_names() == []


def test_watching_ends_when_the_viewer_is_revoked(start_daemon, certificates, tmp_path):
    directory = tmp_path / "host"
    shutil.copytree(certificates.host(), directory)
    (directory / "peers").mkdir()
    for peer in (certificates.operator(), certificates.viewer()):
        shutil.copy(peer / "cert.pem", directory / "peers" / f"{peer.name}.pem")
    daemon = start_daemon(directory)
    daemon.create("g", kind="process", memory_mib=16, touch_rate_per_s=2_000)
    with channel_to(daemon.address, certificates.viewer()) as channel:
        request = guest.WatchGuestStatisticsRequest(name="g", interval_us=100_000)
        watched = guest_rpc.GuestServiceStub(channel).WatchGuestStatistics(request, timeout=CALL_S)
        next(watched)

        (directory / "peers" / "viewer.pem").unlink()

        with pytest.raises(grpc.RpcError) as caught:
            list(watched)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "'viewer' is not among the peers" in caught.value.details()
