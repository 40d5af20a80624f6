"""A daemon's metrics, in Prometheus' words, over plain HTTP. docs/metrics.md lists them all.

Names and labels are a contract. No label holds a name of a guest, an id or an address: there would be no end of them,
and whoever reaches the port reads them.
"""

import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import MetricsHandler
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from migrate.config import PROTOCOL_VERSION, Endpoint
from migrate.daemon.guests import GuestRegistry, HostedGuest
from migrate.daemon.migrations import MigrationRegistry
from migrate.errors import ConfigError, MigrateError
from migrate.native.pageserver import PageServer
from migrate.telemetry.host import available_bytes
from migrate.telemetry.totals import PAGE_KINDS, TOTALS, Buckets
from migrate.v1 import types_pb2 as types

_KINDS = {value: name.removeprefix("GUEST_KIND_").lower() for name, value in types.GuestKind.items() if value}
_SIDES = {value: name.removeprefix("MIGRATION_SIDE_").lower() for name, value in types.MigrationSide.items() if value}
_STATES = {value: name.removeprefix("MIGRATION_STATE_").lower() for name, value in types.MigrationState.items()}
_ENDS = (types.MIGRATION_STATE_COMPLETED, types.MIGRATION_STATE_CANCELLED, types.MIGRATION_STATE_FAILED)
_STATES_UNDER_WAY = [value for value in _STATES if value and value not in _ENDS]
# One that a migration holds is not asked: it may be in its switchover.
_MOVING, _UNKNOWN = "moving", "unknown"
_GUEST_STATES = {
    types.GUEST_STATE_POPULATING: "populating",
    types.GUEST_STATE_RUNNING: "running",
    types.GUEST_STATE_PAUSED: "paused",
}

_REQUEST_S = 5.0
_REQUESTS_MAX = 8


class DaemonCollector(Collector):
    """Reads all metrics of a daemon whenever they are asked for.

    Args:
        guests: Of this host.
        migrations: Of this daemon.
        pages: Its page server.
    """

    def __init__(self, guests: GuestRegistry, migrations: MigrationRegistry, pages: PageServer) -> None:
        self._guests = guests
        self._migrations = migrations
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        """See Collector."""
        build = InfoMetricFamily("migrate_build", "What this daemon is.")
        build.add_metric([], {"version": version("migrate"), "protocol": str(PROTOCOL_VERSION)})
        yield build
        yield GaugeMetricFamily(
            "migrate_host_available_bytes", "Memory of the host that can be had.", value=available_bytes()
        )
        yield from self._of_guests()
        yield from self._of_migrations()
        yield from self._of_pages()
        yield from self._of_page_server()
        errors = CounterMetricFamily(
            "migrate_errors", "Errors that came of migrations, or that calls were answered with.", labels=["of", "type"]
        )
        for (where, type_name), count in sorted(TOTALS.errors().items()):
            errors.add_metric([where, type_name], count)
        yield errors

    def _of_guests(self) -> Iterator[Metric]:
        guests = self._guests.all()
        states = Counter((int(guest.spec.kind), _state_of(guest)) for guest in guests)
        memory_bytes: Counter[int] = Counter()
        for guest in guests:
            memory_bytes[guest.spec.kind] += guest.spec.memory_bytes
        by_state = GaugeMetricFamily("migrate_guests", "Guests of this host.", labels=["kind", "state"])
        memory = GaugeMetricFamily("migrate_guest_memory_bytes", "RAM that guests were given.", labels=["kind"])
        for kind, word in _KINDS.items():
            memory.add_metric([word], memory_bytes[kind])
            for state in (*_GUEST_STATES.values(), _MOVING, _UNKNOWN):
                by_state.add_metric([word, state], states[kind, state])
        yield by_state
        yield memory

    def _of_migrations(self) -> Iterator[Metric]:
        under_way: Counter[tuple[int, int]] = Counter()
        for migration in self._migrations.list():
            if migration.state not in _ENDS:
                under_way[migration.side, migration.state] += 1
                TOTALS.note_figures(migration)
        now = GaugeMetricFamily("migrate_migrations", "Migrations that have not ended.", labels=["side", "state"])
        started = CounterMetricFamily("migrate_migrations_started", "Migrations begun or taken up.", labels=["side"])
        ended = CounterMetricFamily("migrate_migrations_ended", "Migrations that ended.", labels=["side", "state"])
        pauses = CounterMetricFamily(
            "migrate_pauses", "How often pages came to stand still after a switchover.", labels=["side"]
        )
        known_started, known_ended, known_pauses = TOTALS.started(), TOTALS.ended(), TOTALS.pauses()
        for side, word in _SIDES.items():
            started.add_metric([word], known_started.get(side, 0))
            pauses.add_metric([word], known_pauses.get(side, 0))
            for state in _STATES_UNDER_WAY:
                now.add_metric([word, _STATES[state]], under_way[side, state])
            for state in _ENDS:
                ended.add_metric([word, _STATES[state]], known_ended.get((side, state), 0))
        yield now
        yield started
        yield ended
        yield pauses
        yield CounterMetricFamily(
            "migrate_attempts_lost", "Attempts that were lost before their switchover.", value=TOTALS.retries()
        )
        yield _histogram(
            "migrate_downtime_seconds", "Source vCPUs paused to destination vCPUs running.", TOTALS.downtime
        )

    def _of_pages(self) -> Iterator[Metric]:
        pages = CounterMetricFamily("migrate_pages", "Pages of migrations.", labels=["side", "kind"])
        wire = CounterMetricFamily("migrate_wire_bytes", "Bytes of page calls, both directions.", labels=["side"])
        known_pages, known_bytes = TOTALS.pages(), TOTALS.wire_bytes()
        for side, word in _SIDES.items():
            wire.add_metric([word], known_bytes.get(side, 0))
            for kind in PAGE_KINDS:
                pages.add_metric([word, kind], known_pages.get((side, kind), 0))
        yield pages
        yield wire
        yield _histogram(
            "migrate_fault_latency_seconds",
            "Kernel event read to page placed.",
            TOTALS.fault_latency,
        )

    def _of_page_server(self) -> Iterator[Metric]:
        seen = self._pages.counters()
        yield GaugeMetricFamily(
            "migrate_page_server_open_connections", "Connections that are open.", value=seen.connections_now
        )
        for name, words, value in (
            ("connections", "Connections that were made.", seen.connections),
            (
                "connections_failed",
                "Connections that broke the rules, or were too many.",
                seen.connections_failed,
            ),
            ("handshakes_failed", "Of these, those that did not prove who they are.", seen.handshakes_failed),
            ("calls", "Page calls.", seen.calls),
            ("calls_refused", "Page calls that were refused or broken off.", seen.calls_failed),
            ("requests", "Requests for pages.", seen.requests),
            ("data_pages", "Pages that were sent as data.", seen.data_pages),
        ):
            yield CounterMetricFamily(f"migrate_page_server_{name}", words, value=value)


def _state_of(guest: HostedGuest) -> str:
    if guest.migration_id:
        return _MOVING
    try:
        return _GUEST_STATES.get(guest.client.look().state, _UNKNOWN)
    except (MigrateError, OSError):
        return _UNKNOWN


def _histogram(name: str, words: str, buckets: Buckets) -> Metric:
    counts, sum_us = buckets.read()
    bounds = [repr(bound_us / 1_000_000) for bound_us in buckets.bounds_us]
    return HistogramMetricFamily(
        name, words, buckets=list(zip([*bounds, "+Inf"], counts, strict=True)), sum_value=sum_us / 1_000_000
    )


class MetricsServer:
    """Answers GET /metrics from `start` to `close`; a few at a time, each of whom has to be quick.

    Args:
        endpoint: Where to listen; port 0 takes a free one.
        guests: Of this host.
        migrations: Of this daemon.
        pages: Its page server.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self, endpoint: Endpoint, guests: GuestRegistry, migrations: MigrationRegistry, pages: PageServer
    ) -> None:
        registry = CollectorRegistry()
        registry.register(DaemonCollector(guests, migrations, pages))
        ProcessCollector(registry=registry)
        handler = _Handler.factory(registry)
        try:
            self._server = _Server(endpoint, handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {endpoint}", remedy="choose another --metrics-listen, a free port of this host"
            ) from error
        self.endpoint = Endpoint(endpoint.host, self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def close(self) -> None:
        """Stop, once those who are being answered have been: what they are told about goes next."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.wait_idle()


class _Handler(MetricsHandler):
    timeout = _REQUEST_S
    server_version = "migrate"
    sys_version = ""

    def do_GET(self) -> None:  # noqa: N802 - its caller's name for it
        """Answer."""
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        super().do_GET()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, endpoint: Endpoint, handler: Any) -> None:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, *_, address = found[0]
        self._free = threading.BoundedSemaphore(_REQUESTS_MAX)
        super().__init__((str(address[0]), int(address[1])), handler)

    def wait_idle(self) -> None:
        """Wait until nobody is being answered, and answer nobody more."""
        for _ in range(_REQUESTS_MAX):
            self._free.acquire(timeout=_REQUEST_S)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or not at all."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """That thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One who asks and goes away is no news."""
