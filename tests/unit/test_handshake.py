"""The reason why a TLS connection does not come about, against servers that fail in their own ways."""

import socket
import ssl
import threading
import time

import pytest

from migrate import handshake
from migrate.config import Endpoint
from migrate.handshake import why_refused
from tests.harness.tls_dirs import Certificates, valid_between


@pytest.fixture
def certificates(tmp_path):
    return Certificates(tmp_path / "ca")


@pytest.fixture
def serve():
    """Runs a function on the first connection to an endpoint; the endpoint."""
    listeners, threads = [], []

    def start(answer):
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(20)
        listeners.append(listener)

        def run():
            connection, _ = listener.accept()
            connection.settimeout(20)
            with connection:
                try:
                    answer(connection)
                except OSError:
                    return

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return Endpoint("127.0.0.1", listener.getsockname()[1])

    yield start
    for thread in threads:
        thread.join(20)
    for listener in listeners:
        listener.close()


def tls_answer(directory, ca, *, version=ssl.TLSVersion.TLSv1_3):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = min(version, context.minimum_version)
    context.maximum_version = version
    context.set_alpn_protocols(["h2"])

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as stream:
            stream.send(b"\0")
            stream.recv(1)

    return answer


def test_nothing_stands_in_the_way(serve, certificates):
    host = certificates.host()

    assert why_refused(serve(tls_answer(host, host / "ca.pem")), certificates.operator()) == ""


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"validity": (-2, -1)}, "its certificate has expired"),
        ({"validity": (1, 2)}, "its certificate is not valid yet"),
        ({"addresses": ("other.example",)}, "its certificate is not for 127.0.0.1"),
    ],
)
def test_server_certificate_that_does_not_do(serve, certificates, fields, reason):
    if "validity" in fields:
        fields = {"validity": valid_between(*fields["validity"])}
    host = certificates.host(**fields)

    assert reason in why_refused(serve(tls_answer(host, host / "ca.pem")), certificates.operator())


def test_server_that_is_no_host(serve, certificates):
    operator = certificates.operator()

    assert "is not that of a host" in why_refused(serve(tls_answer(operator, operator / "ca.pem")), operator)


def test_server_of_another_ca(serve, certificates, tmp_path):
    stranger = Certificates(tmp_path / "other").host()

    reason = why_refused(serve(tls_answer(stranger, stranger / "ca.pem")), certificates.operator())

    assert reason == f"its certificate was not signed by a CA in {certificates.operator() / 'ca.pem'}"


def test_server_that_trusts_another_ca(serve, certificates, tmp_path):
    other = Certificates(tmp_path / "other").host()

    reason = why_refused(serve(tls_answer(certificates.host(), other / "ca.pem")), certificates.operator())

    assert "it does not accept our certificate ('operator', from 'migrate CA" in reason
    assert reason.endswith("(unknown ca)")


def test_server_of_an_older_tls(serve, certificates):
    host = certificates.host()
    answer = tls_answer(host, host / "ca.pem", version=ssl.TLSVersion.TLSv1_2)

    assert why_refused(serve(answer), certificates.operator()) == "it speaks no TLS 1.3"


def test_server_that_speaks_plaintext(serve, certificates):
    # What a gRPC server says first: SETTINGS.
    endpoint = serve(lambda connection: (connection.send(bytes(9)), connection.recv(4096)))

    assert why_refused(endpoint, certificates.operator()) == "it speaks no TLS, and was called with"


def test_plaintext_to_a_server_with_tls(serve, certificates):
    host = certificates.host()
    assert why_refused(serve(tls_answer(host, host / "ca.pem")), None) == "it speaks TLS, and was called without"


def test_plaintext_to_a_server_without(serve):
    assert why_refused(serve(lambda connection: connection.send(bytes(9))), None) == ""


@pytest.mark.parametrize("with_tls", [True, False])
def test_silent_server_costs_the_deadline_and_no_more(serve, certificates, monkeypatch, with_tls):
    monkeypatch.setattr(handshake, "DEADLINE_S", 0.2)
    done = threading.Event()
    endpoint = serve(lambda connection: done.wait(10))
    began_s = time.monotonic()

    try:
        assert why_refused(endpoint, certificates.operator() if with_tls else None) == ""
        assert time.monotonic() - began_s < 5
    finally:
        done.set()


def test_nobody_there(certificates):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = Endpoint("127.0.0.1", closed.getsockname()[1])

    assert why_refused(endpoint, certificates.operator()) == ""
    assert why_refused(endpoint, None) == ""


def test_our_own_files_may_be_the_reason(certificates):
    directory = certificates.operator(validity=valid_between(-2, -1))

    assert "expired at" in why_refused(Endpoint("127.0.0.1", 1), directory)
