"""The session of docs/operations.md, made by a stock gRPC client that knows nothing of us."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess, two_daemons
from tests.harness.tls_dirs import Certificates

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "docs/examples/ask.py"


def session():
    """Commands, and what they print."""
    block = re.search(r"```console\n(.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL).group(1)
    steps = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [step.split("\n", 1) for step in steps]


def ask(*words, **env):
    command = [sys.executable, str(ROOT / SCRIPT), *words]
    # It works where the package is not.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=50, cwd="/", env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.uffd
def test_session_of_the_document_is_what_happens():
    with two_daemons() as (source, destination):
        addresses = {"127.0.0.1:7400": source.address, "127.0.0.1:7500": destination.address}
        for command, printed in session():
            words = shlex.split(command)
            assert words[0] == SCRIPT
            for known, real in addresses.items():
                words = [word.replace(known, real) for word in words]
            if "WatchGuestStatistics" in command:
                moved = source.wait_final(source.list()[0].migration_id)
                assert moved.state == types.MIGRATION_STATE_COMPLETED

            got = ask(*words[1:])

            assert re.fullmatch(re.escape(printed).replace("…", ".*"), got), (command, got)


def test_stock_client_calls_over_tls(tmp_path):
    certificates = Certificates(tmp_path / "ca")
    operator = certificates.operator()
    daemon = DaemonProcess(tls_dir=certificates.host(), operator=operator)
    try:
        checked = ask(daemon.address, "grpc.health.v1.Health/Check", MIGRATE_TLS_DIR=str(operator))
        assert checked == '{"status": "SERVING"}\n'
    finally:
        daemon.close()
