"""How failures reach the person at the keyboard: words, exit codes, and no proxy between."""

import json
import os
import socket
import subprocess
import sys

import grpc
import pytest

from migrate.client import Client, connection
from migrate.errors import ChannelError, GuestHolder
from migrate.v1 import types_pb2
from tests.harness.cli import run
from tests.harness.fake_daemon import FakeDaemon, make_migration, serve


@pytest.fixture
def daemon():
    with serve(FakeDaemon()) as running:
        yield running


def closed_port():
    """A loopback port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_error_info_is_printed_with_holder_and_remedy(daemon):
    info = types_pb2.ErrorInfo(
        type="NotEnoughMemoryError",
        message="2 GiB do not fit",
        holder=types_pb2.GUEST_HOLDER_SOURCE,
        remedy="free memory",
    )
    daemon.failure = (grpc.StatusCode.RESOURCE_EXHAUSTED, info)

    result = run("guest", "list", daemon=daemon)

    assert result.exit_code == 1
    assert result.stderr == "migrate: 2 GiB do not fit; the guest is at the source; free memory\n"
    assert result.stdout == ""


def test_error_info_without_holder_does_not_speak_of_one(daemon):
    info = types_pb2.ErrorInfo(type="NotFoundError", message="there is no guest gamma here")
    daemon.failure = (grpc.StatusCode.NOT_FOUND, info)

    assert run("guest", "show", "gamma", daemon=daemon).stderr == "migrate: there is no guest gamma here\n"


def test_error_info_of_a_newer_daemon_is_understood_as_far_as_possible(daemon):
    info = types_pb2.ErrorInfo(type="FancyError", message="something new", holder=99)
    daemon.failure = (grpc.StatusCode.INTERNAL, info)

    result = run("guest", "list", daemon=daemon)

    assert (result.exit_code, result.stderr) == (1, "migrate: something new\n")


def test_paused_error_exits_with_3(daemon):
    info = types_pb2.ErrorInfo(type="PostcopyPausedError", message="it stands", holder=types_pb2.GUEST_HOLDER_SPLIT)
    daemon.failure = (grpc.StatusCode.UNAVAILABLE, info)

    assert run("status", daemon=daemon).exit_code == 3


def test_unavailable_without_info_names_the_daemon(daemon):
    daemon.failure = (grpc.StatusCode.UNAVAILABLE, None)

    result = run("guest", "list", daemon=daemon)

    assert result.exit_code == 1
    assert daemon.address in result.stderr
    assert f"migrate daemon --listen {daemon.address}" in result.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, "did not answer in time"),
        (grpc.StatusCode.UNIMPLEMENTED, "does not offer this call"),
        (grpc.StatusCode.INTERNAL, "answered INTERNAL: canned"),
    ],
)
def test_other_statuses_in_words(daemon, status, words):
    daemon.failure = (status, None)

    result = run("guest", "list", daemon=daemon)

    assert result.exit_code == 1
    assert words in result.stderr


def test_stream_failures_are_translated_as_calls_are(daemon):
    info = types_pb2.ErrorInfo(type="NotFoundError", message="there is no guest gamma here")
    daemon.failure = (grpc.StatusCode.NOT_FOUND, info)

    assert run("guest", "stats", "gamma", daemon=daemon).stderr == "migrate: there is no guest gamma here\n"


def test_nobody_listening_is_known_at_once():
    address = f"127.0.0.1:{closed_port()}"

    result = run("guest", "list", "--daemon", address)

    assert result.exit_code == 1
    assert f"no daemon answers at {address}" in result.stderr
    assert f"migrate daemon --listen {address}" in result.stderr


def test_silent_peer_ends_with_the_deadline(monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"

        with Client(address) as client, pytest.raises(ChannelError, match="no daemon answers"):
            client.guests.list()


def test_proxies_of_the_environment_are_ignored(daemon):
    proxy = f"http://127.0.0.1:{closed_port()}"
    env = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTPS_PROXY"), proxy)
    env |= {"no_proxy": "", "no_grpc_proxy": "", "NO_PROXY": ""}

    assert run("guest", "list", daemon=daemon, env=env).exit_code == 0


def test_option_wins_over_environment(daemon):
    env = {"MIGRATE_DAEMON": f"127.0.0.1:{closed_port()}"}

    assert run("guest", "list", "--daemon", daemon.address, env=env).exit_code == 0


def test_undecodable_error_info_falls_back_to_the_status():
    class Failure(grpc.RpcError, grpc.Call):
        def code(self):
            return grpc.StatusCode.INTERNAL

        def details(self):
            return "torn"

        def trailing_metadata(self):
            return (("migrate-error-bin", b"\xff\xff\xff"),)

    Failure.__abstractmethods__ = frozenset()

    error = connection.translate(Failure(), "127.0.0.1:1", None)

    assert error.message == "the daemon at 127.0.0.1:1 answered INTERNAL: torn"
    assert error.holder is GuestHolder.UNSPECIFIED


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_cannot_be_shown_is_said_in_other_signs(daemon, encoding):
    error = types_pb2.ErrorInfo(type="MigrateError", message="2 → 3 Ω")
    daemon.watched = [make_migration(error=error)]
    told = {}
    for form in ("words", "json"):
        options = ["--daemon", daemon.address, *(["--json"] if form == "json" else [])]
        command = [sys.executable, "-m", "migrate", "status", "m-1", "--watch", *options]
        env = {**os.environ, "PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
        told[form] = subprocess.run(command, capture_output=True, env=env, check=True, timeout=30)

    words = told["words"].stdout.decode(encoding)
    assert ("p50 1 us" if encoding == "ascii" else "p50 1 µs") in words
    assert "2 -> 3 \\u03a9" in words
    assert json.loads(told["json"].stdout)["error"]["message"] == "2 → 3 Ω"
