"""What a live daemon serves as metrics is what docs/metrics.md promises, and adds up."""

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from migrate.v1 import types_pb2 as types
from tests.harness.daemons import DaemonProcess, two_daemons
from tests.harness.tls_dirs import Certificates
from tests.harness.waiting import wait_until

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
METRICS = ("--metrics-listen", "127.0.0.1:0")
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (?P<type>\w+) \|(?P<labels>[^|]*)\|(?P<unit>[^|]*)\|")
CONTENT_TYPE = "text/plain"


def get(daemon, path="/metrics", **headers):
    request = urllib.request.Request(f"http://{daemon.metrics_address}{path}", headers=headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as response:
        return response.headers["Content-Type"], response.read().decode()


def families(daemon):
    return {family.name: family for family in text_string_to_metric_families(get(daemon)[1])}


def value(daemon, sample_name, **labels):
    found = [
        sample.value
        for family in families(daemon).values()
        for sample in family.samples
        if sample.name == sample_name and sample.labels == labels
    ]
    assert len(found) == 1, (sample_name, labels, found)
    return found[0]


def documented():
    rows = [match for line in DOCUMENT.read_text().splitlines() if (match := ROW.match(line))]
    return {row["name"]: (row["type"], set(re.findall(r"`(\w+)`", row["labels"]))) for row in rows}


def served(daemon):
    """Name, type and labels of every metric, in the words of the document."""
    found = {}
    for name, family in families(daemon).items():
        # The text format has no type for it.
        kind = "info" if name.endswith("_info") else family.type
        shown = f"{name}_total" if kind == "counter" else name
        found[shown] = (kind, {label for sample in family.samples for label in sample.labels} - {"le"})
    return found


@pytest.fixture
def daemons():
    with two_daemons(options=METRICS) as made:
        yield made


@pytest.mark.uffd
def test_metrics_are_those_of_the_document_and_add_up(daemons):
    source, destination = daemons
    source.create(kind="process", memory_mib=32, touch_rate_per_s=5_000)
    source.wait_populated()
    assert value(source, "migrate_guests", kind="process", state="running") == 1
    assert value(source, "migrate_guest_memory_bytes", kind="process") == 32 << 20

    # Slow enough for the guest to come before the background, on however busy a machine.
    moved = source.migrate(destination, max_bandwidth_bytes_per_s=32 << 20)
    assert moved.state == types.MIGRATION_STATE_COMPLETED
    # END is acknowledged first; then the source lets it go.
    wait_until(lambda: source.guest_names() == [], 10, "the source to let the guest go")
    with pytest.raises(grpc.RpcError, match="no guest named 'g'"):
        source.start(destination)
    wait_until(lambda: value(destination, "migrate_guests", kind="process", state="running") == 1, 10, "arrival")

    assert served(source) == documented()
    assert set(served(destination)) == set(documented())
    for daemon, side in ((source, "source"), (destination, "destination")):
        pages = {kind: value(daemon, "migrate_pages_total", side=side, kind=kind) for kind in ("zero", "precopy")}
        pages |= {kind: value(daemon, "migrate_pages_total", side=side, kind=kind) for kind in ("urgent", "background")}
        assert sum(pages.values()) == moved.pages.total
        assert pages["urgent"] == moved.pages.urgent
        assert value(daemon, "migrate_wire_bytes_total", side=side) == moved.bytes_on_wire > 0
        assert value(daemon, "migrate_migrations_started_total", side=side) == 1
        assert value(daemon, "migrate_migrations_ended_total", side=side, state="completed") == 1
        assert value(daemon, "migrate_migrations", side=side, state="postcopy") == 0
        assert 10 << 20 < value(daemon, "process_resident_memory_bytes") < 2 << 30
    assert value(source, "migrate_downtime_seconds_count") == 1
    assert value(source, "migrate_downtime_seconds_sum") == pytest.approx(moved.downtime_us / 1e6)
    assert value(destination, "migrate_downtime_seconds_count") == 0
    assert value(destination, "migrate_fault_latency_seconds_count") == moved.fault_latency_us.count > 0
    latency_sum_us = moved.fault_latency_us.mean * moved.fault_latency_us.count
    assert value(destination, "migrate_fault_latency_seconds_sum") == pytest.approx(latency_sum_us / 1e6, rel=1e-3)
    assert value(source, "migrate_page_server_calls_total") >= 2
    assert value(source, "migrate_page_server_data_pages_total") > 0
    assert value(source, "migrate_errors_total", of="call", type="NotFoundError") >= 1


@pytest.mark.uffd
def test_migration_under_way_is_seen_and_no_name_is(daemons):
    source, destination = daemons
    source.create("very-secret", kind="process", memory_mib=32, workload="idle")
    source.wait_populated("very-secret")
    migration_id = source.start(destination, "very-secret", max_bandwidth_bytes_per_s=8 << 20)

    def postcopy(daemon, side):
        return value(daemon, "migrate_migrations", side=side, state="postcopy")

    wait_until(lambda: postcopy(source, "source") and postcopy(destination, "destination"), 20, "postcopy")
    assert value(source, "migrate_guests", kind="process", state="moving") == 1
    wait_until(lambda: value(destination, "migrate_wire_bytes_total", side="destination") > 0, 20, "bytes to be seen")
    for daemon in daemons:
        text = get(daemon)[1]
        for word in ("very-secret", migration_id, source.address, destination.page_address):
            assert word not in text
    assert source.wait_final(migration_id).state == types.MIGRATION_STATE_COMPLETED


def test_metrics_port_answers_nothing_else_and_survives_who_says_nothing(daemons):
    daemon = daemons[0]
    host, port = daemon.metrics_address.split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(12)]
    for each in silent:
        each.close()
    wait_until(lambda: _answers(daemon), 20, "the port to answer")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(daemon, "/debug")
    assert get(daemon)[0].startswith(CONTENT_TYPE)
    assert "openmetrics" in get(daemon, Accept="application/openmetrics-text")[0]


def _answers(daemon):
    try:
        return get(daemon)
    except OSError:
        return None


def test_metrics_are_plain_http_on_loopback_beside_tls(tmp_path):
    certificates = Certificates(tmp_path / "ca")
    daemon = DaemonProcess(options=METRICS, tls_dir=certificates.host(), operator=certificates.operator())
    try:
        assert "migrate_build_info" in get(daemon)[1]
    finally:
        daemon.close()


def test_daemon_without_the_option_serves_none():
    daemon = DaemonProcess()
    try:
        assert daemon.metrics_address is None
    finally:
        daemon.close()
