"""A stock grpcio client, built only from proto/, reads a paused guest's pages and gets exactly its bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.guest.client import GuestClient
from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess
from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd]
PROTO = Path(__file__).parents[2] / "proto"
MEMORY_BYTES = 32 << 20


@pytest.fixture
def source(tmp_path):
    daemon = DaemonProcess(state_dir=tmp_path / "state")
    yield daemon
    daemon.close()


@pytest.fixture
def stock(tmp_path):
    out = tmp_path / "stock"
    out.mkdir()
    # Isolated (-I): neither this tree nor an installed copy of the project can be imported by accident.
    process = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).parent / "stock_client.py"), str(PROTO), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def ram_of_paused_guest(tmp_path):
    client = GuestClient(tmp_path / "state" / "guests" / "g.sock")
    try:
        _, state, _, (memfd,) = client.describe()
        try:
            return state, os.pread(memfd, MEMORY_BYTES, 0)
        finally:
            os.close(memfd)
    finally:
        client.close()


def test_stock_client_reads_every_page(source, stock, tmp_path):
    port = json.loads(stock.stdout.readline())["port"]
    source.create(memory_mib=32, working_set_mib=16, vcpus=2)
    source.wait_populated()
    migration_id = source.start(f"127.0.0.1:{port}")
    result = json.loads(stock.stdout.readline())
    state, memory = ram_of_paused_guest(tmp_path)
    assert state == types.GUEST_STATE_PAUSED
    assert (tmp_path / "stock" / "memory").read_bytes() == memory
    assert any(memory)
    assert result["singles_equal"]
    assert result["statuses"] == {
        "beyond": "INVALID_ARGUMENT",
        "too many": "INVALID_ARGUMENT",
        "none": "INVALID_ARGUMENT",
        "region": "INVALID_ARGUMENT",
        "no token": "PERMISSION_DENIED",
        "wrong token": "PERMISSION_DENIED",
        "no migration": "NOT_FOUND",
    }
    stock.stdin.write("\n")
    stock.stdin.flush()
    failed = source.wait_final(migration_id)
    assert (failed.state, failed.holder) == (types.MIGRATION_STATE_FAILED, types.GUEST_HOLDER_SOURCE)
    before = source.statistics()
    wait_until(lambda: source.statistics().touches > before.touches, 10, "the guest to run on")
    assert source.audit().errors == 0
