"""Guests under load that move compressed: every page arrives as it was, and the wire carries less."""

import itertools
import json
import os
import subprocess
import sys

import grpc
import pytest

from migrate.daemon.status import received_error
from migrate.errors import ConfigError
from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types
from tests.harness.operator import delete_everywhere

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(60)]
DEADLINE_S = 50.0
MODES = {
    "postcopy": types.MIGRATION_MODE_POSTCOPY,
    "hybrid": types.MIGRATION_MODE_HYBRID,
    "precopy": types.MIGRATION_MODE_PRECOPY,
}
_names = (f"guest-{number}" for number in itertools.count())


@pytest.fixture
def name(source, destination):
    """A name for a guest, which is deleted wherever it is."""
    chosen = next(_names)
    yield chosen
    delete_everywhere(chosen, source, destination)


@pytest.mark.kvm
@pytest.mark.parametrize("mode", ["postcopy", "hybrid"])
def test_demo_moves_every_page_compressed(tmp_path, mode):
    options = ["--kind", "kvm", "--memory", "64MiB", "--mode", mode, "--compress", "zstd", "--verify", "--json"]
    demo = subprocess.run(
        [sys.executable, "-m", "migrate", "demo", *options],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert demo.returncode == 0, demo.stderr
    report = json.loads(demo.stdout.splitlines()[-1])
    assert (report["state"], report["mode"], report["guest_errors"]) == ("completed", mode, 0)
    assert report["verified_pages"] == report["pages"]["total"]
    assert report["bytes_on_wire"] < report["memory_bytes"]
    if mode == "postcopy":
        # Nothing moves twice, and the workload's pages are nearly empty.
        moved_one_by_one = report["pages"]["urgent"] * report["page_size_bytes"]
        assert report["bytes_on_wire"] - moved_one_by_one < report["memory_bytes"] / 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kvm
@pytest.mark.parametrize("mode", MODES)
def test_both_sides_show_what_was_agreed_on(source, destination, name, mode):
    source.create(name, memory_mib=32, vcpus=2, workload="idle")
    source.wait_populated(name)
    moved = source.migrate(destination, name, mode=MODES[mode], compression=types.PAGE_COMPRESSION_ZSTD, verify=True)
    assert (moved.state, moved.error.message) == (types.MIGRATION_STATE_COMPLETED, "")
    assert moved.compression == types.PAGE_COMPRESSION_ZSTD
    assert destination.migration(moved.migration_id).compression == types.PAGE_COMPRESSION_ZSTD
    assert moved.bytes_on_wire < moved.memory_bytes / 2
    assert destination.audit(name).errors == 0


@pytest.mark.parametrize("transport", [types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO])
def test_nothing_is_compressed_unless_asked_for(source, destination, name, transport):
    source.create(name, kind="process", memory_mib=16)
    source.wait_populated(name)
    moved = source.migrate(destination, name, transport=transport)
    assert moved.state == types.MIGRATION_STATE_COMPLETED
    assert moved.compression == types.PAGE_COMPRESSION_NONE
    assert moved.bytes_on_wire > (moved.pages.total - moved.pages.zero) * moved.page_size_bytes


def test_compression_with_grpcio_is_refused_before_anything_happens(source, destination, name):
    source.create(name, kind="process", memory_mib=16)
    before = len(source.migrations.ListMigrations(migration.ListMigrationsRequest(), timeout=30).migrations)
    with pytest.raises(grpc.RpcError) as caught:
        source.start(destination, name, compression=types.PAGE_COMPRESSION_ZSTD, transport=types.PAGE_TRANSPORT_GRPCIO)
    error = received_error(caught.value, "the daemon")
    assert isinstance(error, ConfigError)
    assert "--transport native" in error.remedy
    assert source.guest(name).migration_id == ""
    assert len(source.migrations.ListMigrations(migration.ListMigrationsRequest(), timeout=30).migrations) == before


@pytest.mark.parametrize(
    ("asked", "transport", "answered"),
    [
        (types.PAGE_COMPRESSION_ZSTD, types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_COMPRESSION_ZSTD),
        (types.PAGE_COMPRESSION_ZSTD, types.PAGE_TRANSPORT_GRPCIO, types.PAGE_COMPRESSION_NONE),
        (types.PAGE_COMPRESSION_NONE, types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_COMPRESSION_NONE),
        (types.PAGE_COMPRESSION_UNSPECIFIED, types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_COMPRESSION_NONE),
        (9, types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_COMPRESSION_NONE),
    ],
)
def test_destination_answers_what_it_understands(source, destination, name, asked, transport, answered):
    request = transfer.PrepareRequest(
        migration_id=f"asked-{asked}-{transport}",
        protocol_version=2,
        guest=types.GuestDescription(
            spec=types.GuestSpec(
                name=name,
                kind=types.GUEST_KIND_PROCESS,
                memory_bytes=16 << 20,
                vcpus=1,
                workload=types.WorkloadSpec(distribution=types.WORKLOAD_DISTRIBUTION_IDLE, seed=1),
            ),
            page_size_bytes=4096,
            regions=[types.RamRegion(size_bytes=16 << 20)],
        ),
        # Pages are not asked for yet; there must only be somebody there.
        page_endpoint=source.page_address if transport == types.PAGE_TRANSPORT_NATIVE_GRPC else source.address,
        control_endpoint=source.address,
        token="t",  # noqa: S106 - nobody's secret
        mode=types.MIGRATION_MODE_POSTCOPY,
        order="precopy",
        transport=transport,
        compression=asked,
    )
    prepared = destination.transfer.Prepare(request, timeout=30)
    try:
        assert (prepared.transport, prepared.compression) == (transport, answered)
    finally:
        destination.transfer.Abort(transfer.AbortRequest(migration_id=request.migration_id, reason="seen"), timeout=30)
