"""Two daemons whose guests and migrations outlive them, and the barriers at which they can be held."""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from migrate.errors import MigrateError
from migrate.guest.client import GuestClient
from migrate.v1 import types_pb2 as types
from tests.harness.barriers import Barriers
from tests.harness.chaos_watch import CopiesWatch
from tests.harness.daemons import DaemonProcess, together
from tests.harness.processes import end_guests
from tests.harness.proxied import ProxiedDaemon
from tests.harness.waiting import wait_until

PEER_TIMEOUT_US = 1_000_000
_RUNS = (types.GUEST_STATE_RUNNING, types.GUEST_STATE_POPULATING)


@dataclass
class Pair:
    """Both hosts of a migration.

    Attributes:
        source: Where the guest is at first.
        destination: Where it goes.
        barriers: At which both can be held.
        directory: Of both state directories.
    """

    source: DaemonProcess
    destination: DaemonProcess
    barriers: Barriers
    directory: object

    def start(self, name="g", **terms):
        """Begin to move a guest, with a short peer timeout; the migration's id."""
        return self.source.start(self.destination.advertised, name, **{"peer_timeout_us": PEER_TIMEOUT_US, **terms})

    def of_point(self, point):
        """The daemon that reaches a barrier."""
        return self.source if point.value.startswith("source") else self.destination

    def look_into(self, daemon, name="g"):
        """A connection of our own to a guest, whatever its daemon does."""
        return GuestClient(daemon.state_dir / "guests" / f"{name}.sock")

    def describe(self, daemon, name="g"):
        """Description and state of a guest, as its process says, whatever its daemon does."""
        with contextlib.closing(self.look_into(daemon, name)) as client:
            seen = client.look()
        return seen.description, seen.state

    def state_of(self, daemon, name="g"):
        """What a guest process says of itself; None if there is none."""
        try:
            return self.describe(daemon, name)[1]
        except (MigrateError, OSError):
            return None

    def runners(self, name="g"):
        """Where the guest runs at this moment, as its processes say."""
        found = [self.state_of(daemon, name) for daemon in (self.source, self.destination)]
        runs = [word for word, state in zip(("source", "destination"), found, strict=True) if state in _RUNS]
        return " and ".join(runs) or "nobody"

    def kill_guest(self, daemon):
        """SIGKILL for every guest of a daemon that is dead itself."""
        assert daemon.process.poll() is not None
        assert end_guests(daemon.state_dir)

    def restart(self, *daemons):
        """Start daemons again that were killed, at one time."""
        with ThreadPoolExecutor(len(daemons)) as pool:
            list(pool.map(lambda daemon: daemon.restart(), daemons))

    def watch(self, name="g"):
        """Sees whether two copies of a guest ever run; a context manager."""
        return CopiesWatch(
            *(daemon.state_dir / "guests" / f"{name}.sock" for daemon in (self.source, self.destination))
        )

    def wait_state(self, daemon, migration_id, *states, deadline_s=40):
        """Wait until a daemon, which may be starting, shows a migration in one of the states; the migration."""

        def found():
            with contextlib.suppress(grpc.RpcError):
                shown = daemon.migration(migration_id)
                return shown if shown.state in states else None
            return None

        return wait_until(found, deadline_s, f"a state of {[types.MigrationState.Name(state) for state in states]}")

    def check_moved(self, migration_id, name="g"):
        """Both sides say that it is complete, the guest is at the destination alone, and every page is right."""
        moved = self.wait_state(self.source, migration_id, types.MIGRATION_STATE_COMPLETED)
        arrived = self.wait_state(self.destination, migration_id, types.MIGRATION_STATE_COMPLETED)
        assert (moved.holder, arrived.holder) == (types.GUEST_HOLDER_DESTINATION,) * 2
        pages = arrived.pages
        assert pages.zero + pages.precopy + pages.urgent + pages.background == pages.total
        wait_until(lambda: name not in self.source.guest_names(), 10, "the source to let the guest go")
        wait_until(
            lambda: not self.destination.guest(name).migration_id, 10, "the destination to let it be moved again"
        )
        self.check_runs(self.destination, name)
        return arrived

    def check_runs(self, daemon, name="g"):
        """The guest touches pages, and every one is as it left it."""
        before = daemon.statistics(name).touches
        wait_until(lambda: daemon.statistics(name).touches > before, 20, "the guest to touch more pages")
        audited = daemon.audit(name)
        assert (audited.errors, audited.first_error) == (0, "")


@contextlib.contextmanager
def recoverable_pair(directory, *, proxied=False, keep_logs=False, of_destination=None, of_source=None, **options):
    """Both daemons, on loopback, with state directories under `directory`, and logs if they are kept.

    Their links can be broken if they are proxied. Options are those of DaemonProcess, for both or for one of them.
    """
    of_one = {"source": of_source or {}, "destination": of_destination or {}}
    with contextlib.ExitStack() as stack:
        barriers = stack.enter_context(Barriers(directory / "barriers"))
        kind = ProxiedDaemon if proxied else DaemonProcess

        def start(name):
            log = directory / f"{name}.log" if keep_logs else None
            chosen = {"state_dir": directory / name, "log": log, **options, **of_one[name]}
            chosen.setdefault("forked", "prefix" not in chosen)
            return kind(env=barriers.env, **chosen)

        starting = together(*(functools.partial(start, name) for name in ("source", "destination")))
        yield Pair(*stack.enter_context(starting), barriers, directory)
