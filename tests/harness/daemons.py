"""Real daemons as separate processes, and short words for what tests do with them."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import grpc

from migrate.v1 import guest_service_pb2 as guest
from migrate.v1 import guest_service_pb2_grpc as guest_rpc
from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import migration_service_pb2_grpc as migration_rpc
from migrate.v1 import transfer_service_pb2_grpc as transfer_rpc
from migrate.v1 import types_pb2 as types
from tests.harness.waiting import wait_until

FINAL = {
    types.MIGRATION_STATE_COMPLETED,
    types.MIGRATION_STATE_FAILED,
    types.MIGRATION_STATE_CANCELLED,
    types.MIGRATION_STATE_POSTCOPY_PAUSED,
}
CALL_S = 30
DISTRIBUTIONS = {
    "uniform": types.WORKLOAD_DISTRIBUTION_UNIFORM,
    "zipf": types.WORKLOAD_DISTRIBUTION_ZIPF,
    "sequential": types.WORKLOAD_DISTRIBUTION_SEQUENTIAL,
    "idle": types.WORKLOAD_DISTRIBUTION_IDLE,
}


def channel_to(address):
    return grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])


class DaemonProcess:
    """One `migrate daemon`, ended by close() and checked for a clean exit."""

    def __init__(self, host="127.0.0.1", prefix=(), options=(), env=None):
        ready_read, ready_write = os.pipe()
        command = [*prefix, sys.executable, "-m", "migrate", "daemon", "--listen", f"{host}:0"]
        command += ["--ready-fd", str(ready_write), *options]
        self.process = subprocess.Popen(command, pass_fds=[ready_write], env={**os.environ, **(env or {})})
        os.close(ready_write)
        with os.fdopen(ready_read) as stream:
            line = stream.readline()
        assert line, f"the daemon exited with {self.process.wait()}"
        ready = json.loads(line)
        self.address = ready["listen"]
        self.page_address = ready["page_listen"]
        self.connect(self.address)

    def connect(self, address):
        self.channel = channel_to(address)
        self.guests = guest_rpc.GuestServiceStub(self.channel)
        self.migrations = migration_rpc.MigrationServiceStub(self.channel)
        self.transfer = transfer_rpc.TransferServiceStub(self.channel)

    def close(self):
        self.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(30) == 0

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

    def guest_names(self):
        return [g.spec.name for g in self.guests.ListGuests(guest.ListGuestsRequest(), timeout=CALL_S).guests]

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
            setattr(request, term, value)
        return self.migrations.StartMigration(request, timeout=CALL_S).migration_id

    def migration(self, migration_id):
        request = migration.GetMigrationRequest(migration_id=migration_id)
        return self.migrations.GetMigration(request, timeout=CALL_S).migration

    def cancel(self, migration_id):
        request = migration.CancelMigrationRequest(migration_id=migration_id)
        return self.migrations.CancelMigration(request, timeout=CALL_S).migration

    def wait_final(self, migration_id, deadline_s=50):
        def final():
            found = self.migration(migration_id)
            return found if found.state in FINAL else None

        return wait_until(final, deadline_s, "the migration to end")

    def migrate(self, to, name="g", **terms):
        return self.wait_final(self.start(to, name, **terms))


@contextlib.contextmanager
def two_daemons(**options):
    """A source and a destination on loopback."""
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(2):
            daemon = DaemonProcess(**options)
            stack.callback(daemon.close)
            made.append(daemon)
        yield tuple(made)
