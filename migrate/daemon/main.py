"""One daemon process: servers up, wait for a signal, leave nothing behind."""

import ctypes
import functools
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from migrate.config import DaemonConfig, Endpoint
from migrate.daemon.guests import GuestRegistry
from migrate.daemon.limits import CALLS_MAX, SERVER_OPTIONS, LimitInterceptor
from migrate.daemon.migrations import MigrationRegistry
from migrate.daemon.peer import GrpcPeer
from migrate.daemon.programs import Programs
from migrate.daemon.services import GuestServicer, MigrationServicer, TransferServicer
from migrate.daemon.state_dir import StateDir
from migrate.daemon.status import ErrorInterceptor
from migrate.errors import ConfigError
from migrate.native.exports import Exports
from migrate.native.pageserver import PageServer
from migrate.pager.fetcher import make_fetcher
from migrate.pager.orders import Orders
from migrate.pageserver.servicer import PageServicer
from migrate.telemetry.clock import Clock
from migrate.telemetry.logs import configure_logging
from migrate.v1 import (
    guest_service_pb2,
    guest_service_pb2_grpc,
    migration_service_pb2,
    migration_service_pb2_grpc,
    page_service_pb2,
    page_service_pb2_grpc,
    transfer_service_pb2,
    transfer_service_pb2_grpc,
)
from migrate.v1 import types_pb2 as types

if TYPE_CHECKING:
    from migrate.daemon.metrics import MetricsServer
    from migrate.daemon.tls import DaemonTls

_GRACE_S = 1.0
# A control call waits for the GIL behind at most a few threads that place pages; 1 ms turns keep it within its 50 ms.
_SWITCH_INTERVAL_S = 0.001

# A malloc arena keeps what the largest messages took of it; there would be eight for each core (mallopt(3)).
_M_ARENA_MAX, _ARENAS_MAX = -8, 2

_log = logging.getLogger(__name__)


class Daemon:
    """Servers and registries of one daemon.

    Args:
        config: Its settings.

    Raises:
        ConfigError: an address cannot be listened on, or one of the directories or policies cannot be used.
    """

    def __init__(self, config: DaemonConfig) -> None:
        listen = Endpoint.parse(config.listen)
        page_listen = Endpoint.parse(config.page_listen) if config.page_listen else Endpoint(listen.host, 0)
        programs = Programs(config.programs_dir)
        orders = Orders(config.policies)
        self._tls = None if config.tls_dir is None else _open_tls(config.tls_dir)
        self._is_mortal = config.state_dir is None
        self._state = StateDir(config.state_dir or Path(tempfile.mkdtemp(prefix="migrate-")))
        self.stopping = threading.Event()
        self._exports = Exports()
        self._guests = GuestRegistry(self._state.socket_dir, config.qemu_dirs, programs)
        self._migrations = MigrationRegistry(
            self._guests,
            self._exports,
            Clock(),
            self._state,
            peer_of=functools.partial(GrpcPeer, tls=None if self._tls is None else self._tls.files),
            fetcher_of=make_fetcher if self._tls is None else self._tls.make_fetcher,
            orders=orders,
        )
        self._health = health.HealthServicer()
        self._control = self._build_control_server()
        try:
            self.control_endpoint = _bind(self._control, listen, self._tls)
            self._pages = PageServer(page_listen, self._exports, None if self._tls is None else self._tls.native)
        except ConfigError:
            self._leave_state()
            raise
        self._metrics: MetricsServer | None = None
        if config.metrics_listen:
            # As with TLS: its library is not loaded otherwise.
            from migrate.daemon import metrics  # noqa: PLC0415

            try:
                self._metrics = metrics.MetricsServer(
                    Endpoint.parse(config.metrics_listen), self._guests, self._migrations, self._pages
                )
            except ConfigError:
                self._leave_state()
                raise
        self.page_endpoint = self._pages.endpoint
        control = Endpoint.parse(config.advertise) if config.advertise else self.control_endpoint
        pages = Endpoint.parse(config.advertise_pages) if config.advertise_pages else self.page_endpoint
        self._migrations.control_endpoint = control
        self._migrations.page_endpoints = {
            types.PAGE_TRANSPORT_NATIVE_GRPC: pages,
            types.PAGE_TRANSPORT_GRPCIO: control,
        }

    def start(self) -> None:
        """Take up what a daemon before this one left in the state directory, and serve.

        Raises:
            StateDirError: it cannot be read.
        """
        self._guests.adopt()
        self._migrations.restore(self._state.load())
        self._control.start()
        if self._metrics is not None:
            self._metrics.start()
        for service in ("", *_SERVICE_NAMES):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Stop serving. What nobody could find again ends: without a state directory of the operator's, guests do."""
        self.stopping.set()
        self._health.enter_graceful_shutdown()
        if self._metrics is not None:
            self._metrics.close()
        control_stopped = self._control.stop(_GRACE_S)
        if not self._is_mortal:
            control_stopped.wait()
            _log.info("guests and migrations wait in %s for the next daemon", self._state.path)
            return
        self._migrations.close()
        self._pages.close()
        if self._tls is not None:
            self._tls.close()
        # A call that waits for its guest ends with the guest, so the guests go first.
        self._guests.close()
        control_stopped.wait()
        self._leave_state()

    @property
    def metrics_endpoint(self) -> Endpoint | None:
        """Where metrics are served; None if nowhere."""
        return None if self._metrics is None else self._metrics.endpoint

    def describe_tls(self) -> str:
        """What it presents to those who call, in words for the log."""
        return ", in plaintext" if self._tls is None else f", as {self._tls.describe()}"

    def _build_control_server(self) -> grpc.Server:
        interceptors: list[grpc.ServerInterceptor] = [ErrorInterceptor()]
        check_party = None
        if self._tls is not None:
            interceptors.append(self._tls.interceptor())
            check_party = self._tls.access.check_party
        server = grpc.server(
            futures.ThreadPoolExecutor(CALLS_MAX, "control"),
            interceptors=[LimitInterceptor(), *interceptors],
            options=SERVER_OPTIONS,
            maximum_concurrent_rpcs=CALLS_MAX,
        )
        guest_service_pb2_grpc.add_GuestServiceServicer_to_server(GuestServicer(self._guests, self.stopping), server)
        migration_service_pb2_grpc.add_MigrationServiceServicer_to_server(
            MigrationServicer(self._migrations, self.stopping), server
        )
        transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(
            TransferServicer(self._migrations, check_party), server
        )
        page_service_pb2_grpc.add_PageServiceServicer_to_server(PageServicer(self._exports, check_party), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVICE_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _leave_state(self) -> None:
        self._state.close()
        if self._is_mortal:
            shutil.rmtree(self._state.path, ignore_errors=True)


_SERVICE_NAMES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (guest_service_pb2, "GuestService"),
        (migration_service_pb2, "MigrationService"),
        (transfer_service_pb2, "TransferService"),
        (page_service_pb2, "PageService"),
    )
)


def run_daemon(config: DaemonConfig) -> None:
    """Run a daemon until SIGTERM or SIGINT. Does not return if guests outlive it.

    Raises:
        ConfigError: an address cannot be listened on, or a directory cannot be used.
        StateDirError: what is in it cannot be read.
    """
    configure_logging(config.log_format)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS_MAX)
    daemon = Daemon(config)
    # A handler that set an event could interrupt the very thread that holds the event's lock: a pipe has none.
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(wake_read, True)
    signal.set_wakeup_fd(wake_write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        daemon.start()
        _log.info("control at %s, pages at %s%s", daemon.control_endpoint, daemon.page_endpoint, daemon.describe_tls())
        if daemon.metrics_endpoint is not None:
            _log.info("metrics at http://%s/metrics", daemon.metrics_endpoint)
        if config.ready_fd is not None:
            _tell_ready(config.ready_fd, daemon)
        os.read(wake_read, 1)
    finally:
        daemon.close()
    if config.state_dir is not None:
        # As if killed: threads that serve migrations have nothing to say that the state directory does not.
        logging.shutdown()
        os._exit(0)


def _tell_ready(ready_fd: int, daemon: Daemon) -> None:
    ready = {"listen": str(daemon.control_endpoint), "page_listen": str(daemon.page_endpoint)}
    if daemon.metrics_endpoint is not None:
        ready["metrics_listen"] = str(daemon.metrics_endpoint)
    with os.fdopen(ready_fd, "w") as stream:
        stream.write(json.dumps(ready) + "\n")


def _open_tls(path: Path) -> "DaemonTls":
    # Guests may be waiting for this daemon, and certificates take a while to load.
    from migrate.daemon.tls import DaemonTls  # noqa: PLC0415

    return DaemonTls(path)


def _bind(server: grpc.Server, endpoint: Endpoint, tls: "DaemonTls | None") -> Endpoint:
    try:
        if tls is None:
            port = server.add_insecure_port(str(endpoint))
        else:
            port = server.add_secure_port(str(endpoint), tls.server_credentials())
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {endpoint}", remedy="choose a free port of this host") from error
    return Endpoint(endpoint.host, port)
