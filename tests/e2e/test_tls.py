"""Daemons with TLS: migrations between them, whom they refuse, and what those are told."""

import hashlib
import shutil
import socket
import ssl

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from migrate.config import Endpoint
from migrate.handshake import why_refused
from migrate.tls import Role, read_tls_dir
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import transfer_service_pb2_grpc as transfer_rpc
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.daemons import CALL_S, DaemonProcess, channel_to
from tests.harness.tls_dirs import Certificates, valid_between
from tests.harness.waiting import wait_until

GRPCIO = types.PAGE_TRANSPORT_GRPCIO
NATIVE = types.PAGE_TRANSPORT_NATIVE_GRPC
TRANSPORTS = [pytest.param(GRPCIO, id="grpcio"), pytest.param(NATIVE, id="native")]


@pytest.fixture(scope="module")
def daemon(certificates, tmp_path_factory):
    """One for all tests that leave it as it was."""
    log = tmp_path_factory.mktemp("daemon") / "log"
    running = DaemonProcess(tls_dir=certificates.host(), operator=certificates.operator(), log=log)
    yield running
    running.close()


@pytest.fixture
def guest_of(daemon):
    """A guest that is not there any more afterwards."""
    daemon.create("g", kind="process", memory_mib=16, touch_rate_per_s=2_000)
    yield daemon
    daemon.guests.DeleteGuest(guest.DeleteGuestRequest(name="g"), timeout=CALL_S)


def status_of(address, tls_dir, roots=None, key=None):
    """How a call ends that everybody may make who is let in."""
    if tls_dir is None:
        channel = channel_to(address)
    else:
        credentials = grpc.ssl_channel_credentials(
            (roots or tls_dir / "ca.pem").read_bytes(),
            (tls_dir / "key.pem").read_bytes(),
            (tls_dir / "cert.pem").read_bytes(),
        )
        channel = grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])
    with channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def asked(daemon, tls_dir, *words):
    """`migrate guest list` with a TLS directory."""
    options = [] if tls_dir is None else ["--tls-dir", str(tls_dir)]
    return cli.run(*(words or ("guest", "list")), *options, daemon=daemon)


# ---- migrations ----


@pytest.mark.uffd
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", [pytest.param("kvm", marks=pytest.mark.kvm), "process"])
def test_guest_moves_over_tls_and_back(start_daemon, certificates, kind, transport):
    source = start_daemon(certificates.host("alpha"))
    destination = start_daemon(certificates.host("beta"))
    source.create("g", kind=kind, memory_mib=16, touch_rate_per_s=2_000)
    source.wait_populated("g")

    there = source.migrate(destination, transport=transport, verify=True)
    assert there.state == types.MIGRATION_STATE_COMPLETED, there.error
    wait_until(lambda: destination.guest("g").migration_id == "", 10, "the destination to let go")
    back = destination.migrate(source, transport=transport)

    assert back.state == types.MIGRATION_STATE_COMPLETED, back.error
    assert source.audit("g").errors == 0


@pytest.mark.uffd
def test_command_line_over_tls(start_daemon, certificates):
    source, destination = start_daemon(), start_daemon()
    env = {"MIGRATE_TLS_DIR": str(certificates.operator())}
    created = cli.run("guest", "create", "g", "--kind", "process", "--memory", "16MiB", daemon=source, env=env)
    assert created.exit_code == 0, created.stderr

    moved = cli.run(
        *("start", "g", "--to", destination.address, "--transport", "grpcio", "--mode", "postcopy", "--json"),
        daemon=source,
        env=env,
    )

    assert moved.exit_code == 0, moved.stderr
    assert cli.json_of(moved)["state"] == "completed"
    assert cli.run("list", "--json", daemon=destination, env=env).exit_code == 0


def test_source_that_is_not_trusted_is_told_why(start_daemon, strangers, tmp_path, certificates):
    source = start_daemon(strangers.host(), strangers.operator())
    destination = start_daemon()
    source.create("g", kind="process", memory_mib=16, touch_rate_per_s=2_000)

    ended = source.migrate(destination, transport=GRPCIO)

    assert ended.state == types.MIGRATION_STATE_FAILED
    assert ended.holder == types.GUEST_HOLDER_SOURCE
    assert ended.error.type == "PeerUnreachableError"
    assert "was not signed by a CA in" in ended.error.message
    assert destination.guest_names() == []


def test_plaintext_daemon_is_told_that_its_destination_speaks_tls(daemon, tmp_path):
    source = DaemonProcess()
    try:
        source.create("g", kind="process", memory_mib=16, touch_rate_per_s=2_000)
        ended = source.migrate(daemon, transport=GRPCIO)
    finally:
        source.close()

    assert ended.state == types.MIGRATION_STATE_FAILED
    assert "it speaks TLS, and was called without" in ended.error.message


def test_daemon_is_told_that_its_destination_speaks_plaintext(guest_of):
    destination = DaemonProcess()
    try:
        ended = guest_of.migrate(destination, transport=GRPCIO)
    finally:
        destination.close()

    assert ended.state == types.MIGRATION_STATE_FAILED
    assert "it speaks no TLS, and was called with" in ended.error.message


# ---- who is let in ----


def test_certificate_of_another_ca_is_not_let_in(daemon, strangers, certificates):
    assert status_of(daemon.address, strangers.operator(), certificates.operator() / "ca.pem") == (
        grpc.StatusCode.UNAVAILABLE
    )
    wait_until(lambda: "unable to get local issuer" in daemon.log.read_text(), 10, "the log to name the reason")


@pytest.mark.parametrize(("begin_days", "end_days", "word"), [(-2, -1, "expired"), (1, 2, "not yet valid")])
def test_certificate_out_of_its_time_is_not_let_in(daemon, certificates, begin_days, end_days, word):
    directory = certificates.operator(f"o{begin_days + 2}", validity=valid_between(begin_days, end_days))

    assert status_of(daemon.address, directory) == grpc.StatusCode.UNAVAILABLE

    wait_until(lambda: word in daemon.log.read_text(), 10, "the log to name the reason")
    refused = asked(daemon, directory)
    assert refused.exit_code == 1
    assert "cert.pem: the certificate of" in refused.stderr


def test_nobody_without_a_certificate_is_let_in(daemon, certificates):
    credentials = grpc.ssl_channel_credentials((certificates.host() / "ca.pem").read_bytes())
    with grpc.secure_channel(daemon.address, credentials) as channel, pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)

    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert status_of(daemon.address, None) == grpc.StatusCode.UNAVAILABLE


def test_everybody_with_a_certificate_may_ask_after_health(daemon, certificates):
    for directory in (certificates.operator(), certificates.viewer(), certificates.host("beta")):
        assert status_of(daemon.address, directory) == grpc.StatusCode.OK


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_only_tls_1_3(daemon, certificates, version):
    context = ssl.create_default_context(cafile=certificates.operator() / "ca.pem")
    context.load_cert_chain(certificates.operator() / "cert.pem", certificates.operator() / "key.pem")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    endpoint = Endpoint.parse(daemon.address)

    with socket.create_connection((endpoint.host, endpoint.port), CALL_S) as connection:
        if version is ssl.TLSVersion.TLSv1_3:
            with context.wrap_socket(connection, server_hostname=endpoint.host) as stream:
                assert stream.recv(1)
        else:
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                context.wrap_socket(connection, server_hostname=endpoint.host)


# ---- roles ----


def code_and_words(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_viewer_reads_and_does_nothing(guest_of, certificates):
    daemon = guest_of

    assert asked(daemon, certificates.viewer()).exit_code == 0
    assert asked(daemon, certificates.viewer(), "list").exit_code == 0
    assert asked(daemon, certificates.viewer(), "guest", "stats", "g").exit_code == 0
    for words in (
        ("guest", "pause", "g"),
        ("guest", "delete", "g"),
        ("guest", "stats", "g", "--audit"),
        ("start", "g", "--to", "127.0.0.1:1"),
        ("cancel", "m"),
    ):
        refused = asked(daemon, certificates.viewer(), *words)
        assert refused.exit_code == 1, words
        assert "'viewer' is viewer, who may not call migrate.v1." in refused.stderr, words
    assert "was refused: 'viewer' is viewer, who may not call" in daemon.log.read_text()
    assert daemon.guest("g").state != types.GUEST_STATE_PAUSED


def test_operator_is_no_host(daemon):
    stub = transfer_rpc.TransferServiceStub(daemon.channel)
    request = transfer.AbortRequest(migration_id="m", reason="x", attempt=1)

    code, words = code_and_words(lambda: stub.Abort(request, timeout=CALL_S))

    assert code == grpc.StatusCode.PERMISSION_DENIED
    assert "'operator' is operator, who may not call migrate.v1.TransferService/Abort" in words


def test_host_is_no_operator(daemon, certificates):
    for words in (("guest", "list"), ("list",), ("start", "g", "--to", "127.0.0.1:1")):
        refused = asked(daemon, certificates.host("beta"), *words)
        assert refused.exit_code == 1
        assert "'beta' is host, who may not call migrate.v1." in refused.stderr


def test_operator_cannot_pose_as_a_host(start_daemon, certificates):
    impostor = start_daemon(certificates.operator("impostor"))

    refused = asked(impostor, certificates.operator())

    assert refused.exit_code == 1
    assert "its certificate is not that of a host" in refused.stderr


# ---- words ----


def test_command_is_told_of_another_ca(daemon, strangers):
    refused = asked(daemon, strangers.operator())

    assert refused.exit_code == 1
    assert f"the daemon at {daemon.address} cannot be talked to: its certificate was not signed by a CA in" in (
        refused.stderr
    )


def test_command_is_told_that_it_is_not_accepted(daemon, strangers, certificates, tmp_path):
    shutil.copytree(strangers.operator(), tmp_path / "mixed")
    shutil.copy(certificates.operator() / "ca.pem", tmp_path / "mixed")

    refused = asked(daemon, tmp_path / "mixed")

    assert "it does not accept our certificate ('operator', from 'migrate CA" in refused.stderr


def test_command_is_told_of_a_wrong_name(start_daemon, certificates):
    elsewhere = start_daemon(certificates.host("elsewhere", addresses=("elsewhere.example",)))

    assert "its certificate is not for 127.0.0.1" in asked(elsewhere, certificates.operator()).stderr


def test_command_is_told_of_an_expired_daemon(start_daemon, certificates, tmp_path):
    # A daemon does not start with one, so it gets it while it runs, and keeps the old.
    directory = tmp_path / "host"
    shutil.copytree(certificates.host(), directory)
    daemon = start_daemon(directory)
    expired = certificates.host("expired", validity=valid_between(-2, -1))
    for name in ("key.pem", "cert.pem"):
        shutil.copy(expired / name, directory)

    wait_until(lambda: asked(daemon, certificates.operator()).exit_code == 0, 5, "an answer")
    wait_until(
        lambda: asked(daemon, certificates.operator()) and "are not used" in daemon.log.read_text(), 10, "the log"
    )
    assert "expired at" in daemon.log.read_text()


def test_command_without_tls_is_told_to_use_it(daemon):
    refused = asked(daemon, None)

    assert refused.exit_code == 1
    assert "it speaks TLS, and was called without; name a TLS directory" in refused.stderr


def test_command_with_tls_is_told_of_plaintext(certificates):
    daemon = DaemonProcess()
    try:
        assert "it speaks no TLS, and was called with" in asked(daemon, certificates.operator()).stderr
    finally:
        daemon.close()


def test_reason_is_none_where_all_is_well_or_nobody_is_there(daemon, certificates):
    assert why_refused(Endpoint.parse(daemon.address), certificates.operator()) == ""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert why_refused(Endpoint("127.0.0.1", port), certificates.operator()) == ""
    assert why_refused(Endpoint("127.0.0.1", port), None) == ""


def test_daemon_does_not_start_with_a_bad_directory(certificates, tmp_path):
    shutil.copytree(certificates.host(), tmp_path / "bad")
    (tmp_path / "bad" / "key.pem").chmod(0o644)
    log = tmp_path / "log"

    with pytest.raises(AssertionError, match="exited with 1"):
        DaemonProcess(tls_dir=tmp_path / "bad", log=log)

    assert "others can read" in log.read_text()


# ---- changes while it runs ----


def test_certificates_are_replaced_without_a_restart(start_daemon, tmp_path):
    own = Certificates(tmp_path / "own")
    directory = own.host("changing")
    daemon = start_daemon(directory, own.operator())
    pid = daemon.process.pid
    before = presented(daemon)
    assert daemon.guest_names() == []

    own.renew("changing", Role.HOST, ("127.0.0.1",))

    wait_until(lambda: presented(daemon) != before, 10, "the new certificate to be presented")
    assert presented(daemon) == read_tls_dir(directory).identity.fingerprint
    # Calls over the connection of before go on.
    assert daemon.guest_names() == []
    assert daemon.process.pid == pid
    assert asked(daemon, own.operator()).exit_code == 0


def presented(daemon):
    """Fingerprint of the certificate that a daemon shows to a new connection."""
    endpoint = Endpoint.parse(daemon.address)
    pem = ssl.get_server_certificate((endpoint.host, endpoint.port))
    der = ssl.PEM_cert_to_DER_cert(pem)
    return hashlib.sha256(der).hexdigest()


@pytest.mark.uffd
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_migration_goes_on_while_certificates_are_replaced(start_daemon, tmp_path, transport):
    own = Certificates(tmp_path / "own")
    source = start_daemon(own.host("alpha"), own.operator())
    destination = start_daemon(own.host("beta"), own.operator())
    source.create("g", kind="process", memory_mib=32)
    source.wait_populated("g")
    migration_id = source.start(destination, transport=transport, max_bandwidth_bytes_per_s=6 << 20)
    before = presented(source), presented(destination)

    for name in ("alpha", "beta"):
        own.renew(name, Role.HOST, ("127.0.0.1",))
    wait_until(
        lambda: presented(source) != before[0] and presented(destination) != before[1], 10, "new ones to be presented"
    )

    assert source.wait_completed(migration_id).state == types.MIGRATION_STATE_COMPLETED
    assert destination.audit("g").errors == 0


def test_removed_peer_is_refused_at_once_on_its_old_connection(start_daemon, certificates, tmp_path):
    directory = tmp_path / "host"
    shutil.copytree(certificates.host(), directory)
    (directory / "peers").mkdir()
    for peer in (certificates.operator(), certificates.viewer()):
        shutil.copy(peer / "cert.pem", directory / "peers" / f"{peer.name}.pem")
    daemon = start_daemon(directory)
    assert asked(daemon, certificates.viewer()).exit_code == 0
    with channel_to(daemon.address, certificates.viewer()) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)

        (directory / "peers" / "viewer.pem").unlink()

        def is_refused():
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
            except grpc.RpcError as error:
                return (error.code(), error.details())
            return None

        code, words = wait_until(is_refused, 10, "the viewer to be refused")
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "'viewer' is not among the peers" in words
    assert "'viewer' is not among the peers" in asked(daemon, certificates.viewer()).stderr
    assert asked(daemon, certificates.operator()).exit_code == 0


def test_client_with_peers_calls_nobody_else(daemon, certificates, tmp_path):
    directory = tmp_path / "operator"
    shutil.copytree(certificates.operator(), directory)
    (directory / "peers").mkdir()
    shutil.copy(certificates.host() / "cert.pem", directory / "peers" / "host.pem")
    assert asked(daemon, directory).exit_code == 0

    shutil.copy(certificates.host("beta") / "cert.pem", directory / "peers" / "host.pem")

    refused = asked(daemon, directory)
    assert refused.exit_code == 1
    assert "or is not one of those in" in refused.stderr
