"""Real daemons as separate processes, and short words for what tests do with them."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from migrate.channels import channel_credentials, open_channel
from migrate.tls import read_tls_dir
from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import guest_service_pb2_grpc as guest_rpc
from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import migration_service_pb2_grpc as migration_rpc
from migrate.v1 import transfer_service_pb2_grpc as transfer_rpc
from migrate.v1 import types_pb2 as types
from tests.harness.ports import ReservedPort
from tests.harness.processes import end_guests
from tests.harness.waiting import wait_until
from tests.harness.zygote import ZYGOTE

FINAL = {
    types.MIGRATION_STATE_COMPLETED,
    types.MIGRATION_STATE_FAILED,
    types.MIGRATION_STATE_CANCELLED,
    types.MIGRATION_STATE_POSTCOPY_PAUSED,
}
CALL_S = 30
_STDERR = 2
DISTRIBUTIONS = {
    "uniform": types.WORKLOAD_DISTRIBUTION_UNIFORM,
    "zipf": types.WORKLOAD_DISTRIBUTION_ZIPF,
    "sequential": types.WORKLOAD_DISTRIBUTION_SEQUENTIAL,
    "idle": types.WORKLOAD_DISTRIBUTION_IDLE,
}


def channel_to(address, tls_dir=None):
    # With a pool of its own, it does not inherit the back-off of a channel to a daemon that was killed there.
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    credentials = None if tls_dir is None else channel_credentials(read_tls_dir(tls_dir))
    return open_channel(address, credentials, options)


def _execute(command, words, env, ready_fd, stderr):
    command = [*command, *words, "--ready-fd", str(ready_fd)]
    return subprocess.Popen(command, pass_fds=[ready_fd], env=env, stderr=stderr)


class DaemonProcess:
    """One `migrate daemon`, ended by close() and checked for a clean exit.

    Args:
        host: Where it listens, if `listen` says nothing else: on ports that stay free while it is dead, with a
            `state_dir`; on some that the kernel chooses, without.
        prefix: Words before the command.
        options: Words after it.
        env: Variables besides those that are there.
        listen: HOST:PORT of its control calls.
        page_listen: HOST:PORT of its page calls.
        state_dir: Where its guests are found again. They outlive the daemon then, but not close().
        log: A file that takes what it, and its guests, say on stderr, instead of ours.
        tls_dir: Its TLS directory.
        operator: The TLS directory by which we call it.
        forked: Not a Python of its own, but forked from one that has loaded what it loads. Not with a prefix.

    Attributes:
        words: With which it starts, and starts again, but for its addresses.
    """

    def __init__(
        self,
        host="127.0.0.1",
        prefix=(),
        options=(),
        env=None,
        *,
        listen=None,
        page_listen=None,
        state_dir=None,
        log=None,
        tls_dir=None,
        operator=None,
        forked=False,
    ):
        self.state_dir = state_dir
        self.log = log
        self.operator = operator
        self._launch = (
            ZYGOTE.migrate if forked else functools.partial(_execute, [*prefix, sys.executable, "-m", "migrate"])
        )
        self.words = ["daemon", *options]
        self.words += [] if state_dir is None else ["--state-dir", str(state_dir)]
        self.words += [] if tls_dir is None else ["--tls-dir", str(tls_dir)]
        self._env = {**os.environ, **(env or {})}
        self._ports = []
        if state_dir is not None and listen is None:
            self._ports = [ReservedPort(), ReservedPort()]
            listen, page_listen = (f"{host}:{port.number}" for port in self._ports)
        try:
            self._start(listen or f"{host}:0", page_listen)
        except BaseException:
            self._release_ports()
            raise

    def _start(self, listen, page_listen):
        ready_read, ready_write = os.pipe()
        words = [*self.words, "--listen", listen]
        words += [] if page_listen is None else ["--page-listen", page_listen]
        with contextlib.nullcontext() if self.log is None else self.log.open("ab") as log:
            stderr = _STDERR if log is None else log.fileno()
            self.process = self._launch(words, self._env, ready_write, stderr)
        os.close(ready_write)
        with os.fdopen(ready_read) as stream:
            line = stream.readline()
        assert line, f"the daemon exited with {self.process.wait()}"
        ready = json.loads(line)
        self.address = ready["listen"]
        self.page_address = ready["page_listen"]
        self.metrics_address = ready.get("metrics_listen")
        self.connect(self.address)

    @property
    def advertised(self):
        """Where its peers call it."""
        return self.address

    def connect(self, address):
        self.channel = channel_to(address, self.operator)
        self.guests = guest_rpc.GuestServiceStub(self.channel)
        self.migrations = migration_rpc.MigrationServiceStub(self.channel)
        self.transfer = transfer_rpc.TransferServiceStub(self.channel)

    def kill(self):
        """SIGKILL, and wait until it is gone. Its guests live on."""
        self.process.kill()
        self.process.wait(30)

    def restart(self, listen=None, page_listen=None):
        """A new process after the old one has ended: the same options, and, if nothing else is said, addresses."""
        assert self.process.poll() is not None
        # A channel of before may wait for seconds before it connects again.
        self.channel.close()
        self._start(listen or self.address, page_listen or self.page_address)

    def close(self):
        try:
            if self.process.poll() is None:
                if self.state_dir is not None:
                    self._delete_guests()
                self.process.send_signal(signal.SIGTERM)
                assert self.process.wait(30) == 0
        finally:
            self.channel.close()
            if self.process.poll() is None:
                self.kill()
            if self.state_dir is not None:
                end_guests(self.state_dir)
            self._release_ports()

    def _release_ports(self):
        for port in self._ports:
            port.close()

    def _delete_guests(self):
        # One that a migration holds is left to end_guests, as is one that is on its way out.
        with contextlib.suppress(grpc.RpcError):
            for name in self.guest_names():
                with contextlib.suppress(grpc.RpcError):
                    self.guests.DeleteGuest(guest.DeleteGuestRequest(name=name), timeout=CALL_S)

    # ---- guests ----

    def create(self, name="g", kind="kvm", memory_mib=32, vcpus=1, workload="uniform", **spec):
        spec_message = types.GuestSpec(
            name=name,
            kind=types.GuestKind.Value(f"GUEST_KIND_{kind.upper()}"),
            memory_bytes=memory_mib << 20,
            vcpus=vcpus,
            workload=types.WorkloadSpec(
                distribution=DISTRIBUTIONS[workload],
                write_ratio=spec.pop("write_ratio", 0.5),
                working_set_bytes=spec.pop("working_set_mib", 0) << 20,
                touch_rate_per_s=spec.pop("touch_rate_per_s", 0),
                seed=spec.pop("seed", 1),
            ),
        )
        assert not spec
        return self.guests.CreateGuest(guest.CreateGuestRequest(spec=spec_message), timeout=CALL_S).guest

    def guest(self, name="g"):
        return self.guests.GetGuest(guest.GetGuestRequest(name=name), timeout=CALL_S).guest

    def list_guests(self):
        return list(self.guests.ListGuests(guest.ListGuestsRequest(), timeout=CALL_S).guests)

    def guest_names(self):
        return [listed.spec.name for listed in self.list_guests()]

    def statistics(self, name="g"):
        replies = self.guests.WatchGuestStatistics(guest.WatchGuestStatisticsRequest(name=name), timeout=CALL_S)
        return next(iter(list(replies))).statistics

    def audit(self, name="g"):
        return self.guests.AuditGuest(guest.AuditGuestRequest(name=name), timeout=CALL_S).statistics

    def wait_populated(self, name="g"):
        wait_until(lambda: self.guest(name).state == types.GUEST_STATE_RUNNING, 30, f"{name} to have populated its RAM")

    # ---- migrations ----

    def start(self, to, name="g", **terms):
        request = migration.StartMigrationRequest(
            guest=name,
            to=to if isinstance(to, str) else to.address,
            mode=types.MIGRATION_MODE_POSTCOPY,
            order="precopy",
            transport=types.PAGE_TRANSPORT_NATIVE_GRPC,
        )
        for term, value in terms.items():
            if term == "recorded_pages":
                request.recorded_pages.extend(value)
            else:
                setattr(request, term, value)
        return self.migrations.StartMigration(request, timeout=CALL_S).migration_id

    def migration(self, migration_id):
        request = migration.GetMigrationRequest(migration_id=migration_id)
        return self.migrations.GetMigration(request, timeout=CALL_S).migration

    def migrations_now(self):
        return list(self.migrations.ListMigrations(migration.ListMigrationsRequest(), timeout=CALL_S).migrations)

    def cancel(self, migration_id):
        request = migration.CancelMigrationRequest(migration_id=migration_id)
        return self.migrations.CancelMigration(request, timeout=CALL_S).migration

    def wait_final(self, migration_id, deadline_s=50):
        def final():
            found = self.migration(migration_id)
            return found if found.state in FINAL else None

        return wait_until(final, deadline_s, "the migration to end")

    def wait_completed(self, migration_id, deadline_s=50):
        """Wait until it is complete, whatever stood in the way; the migration."""

        def completed():
            found = self.migration(migration_id)
            return found if found.state == types.MIGRATION_STATE_COMPLETED else None

        return wait_until(completed, deadline_s, "the migration to complete")

    def list(self):
        """All migrations that the daemon knows of."""
        return self.migrations.ListMigrations(migration.ListMigrationsRequest(), timeout=CALL_S).migrations

    def migrate(self, to, name="g", **terms):
        return self.wait_final(self.start(to, name, **terms))


@contextlib.contextmanager
def together(*makers):
    """Daemons, of which each maker starts one, that start at one time and are closed at one time."""
    with ThreadPoolExecutor(len(makers)) as pool:
        starting = [pool.submit(maker) for maker in makers]
        try:
            yield tuple(started.result() for started in starting)
        finally:
            close_together([started.result() for started in starting if started.exception() is None])


def close_together(daemons):
    """Close daemons at one time; what went wrong with any of them is raised."""
    with ThreadPoolExecutor(len(daemons) or 1) as pool:
        for closed in [pool.submit(daemon.close) for daemon in daemons]:
            closed.result()


def two_daemons(**options):
    """A source and a destination on loopback, until the context is left."""
    return together(*[functools.partial(DaemonProcess, **options)] * 2)
