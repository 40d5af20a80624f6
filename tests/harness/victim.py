"""A daemon that hostile peers are let loose on, and the honest guest that must not notice."""

import contextlib
import os
import re
from collections import Counter
from pathlib import Path

import grpc

from migrate.config import Endpoint
from migrate.daemon.limits import CALLS_MAX
from migrate.daemon.status import received_error
from migrate.guest.client import GuestClient
from migrate.v1 import guest_service_pb2 as guest
from tests.harness.daemons import DaemonProcess
from tests.harness.h2_peer import caller_without_a_window
from tests.harness.processes import guest_pids
from tests.harness.waiting import wait_until

RSS_GROWTH_MAX_BYTES = 16 << 20
HONEST = "honest"
_OTHER_THREADS_MAX = 32
_ANSWER_S = 5
_BUGS = ("died of a bug", "Exception calling application", "Exception iterating", "Exception servicing")


class Victim:
    """The daemon; its log is kept. `close` says whether it is as it was when `settle` was called."""

    def __init__(self, directory):
        self.log = directory / "daemon.log"
        self.daemon = DaemonProcess(state_dir=directory / "state", log=self.log)
        self.control, self.pages = Endpoint.parse(self.daemon.address), Endpoint.parse(self.daemon.page_address)
        self.daemon.create(HONEST, memory_mib=32)
        self.daemon.wait_populated(HONEST)

    def settle(self):
        """Have it make what it makes once: the threads of its calls. What it has then is the measure."""
        wait_until(self._has_all_threads, 60, "the daemon to have all its threads")
        self.check_well()
        self._before = wait_until(self._still, 20, "the daemon to settle")

    def _has_all_threads(self):
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(caller_without_a_window(self.control))
            self.check_well()
        return self.threads() >= CALLS_MAX

    def threads(self):
        return len(os.listdir(f"/proc/{self.pid}/task"))

    @property
    def pid(self):
        return self.daemon.process.pid

    def check_well(self):
        """It answers, and the honest guest touches pages."""
        assert HONEST in self._names()
        before = self._touches()
        wait_until(lambda: self._touches() > before, 10, "the honest guest to run on")

    def wait_alone(self):
        """Until the honest guest is the only one."""
        wait_until(lambda: self._names() == [HONEST], 20, "the other guests to be gone")
        wait_until(lambda: len(guest_pids(self.daemon.state_dir)) == 1, 20, "their processes to be gone")

    def delete(self, name):
        self.daemon.guests.DeleteGuest(guest.DeleteGuestRequest(name=name), timeout=30)

    def fence_files(self):
        return len(list((self.daemon.state_dir / "migrations").iterdir()))

    def check_as_before(self):
        """No descriptor, guest or thread more than at first, and little memory."""
        self.wait_alone()
        wait_until(lambda: self.descriptors() == self._before[0], 30, self._difference())
        growth_bytes = self.rss_bytes() - self._before[1]
        assert growth_bytes <= RSS_GROWTH_MAX_BYTES, f"RSS grew by {growth_bytes >> 10} KiB"
        assert self.threads() <= CALLS_MAX + _OTHER_THREADS_MAX
        assert [line for line in self.log.read_text().splitlines() if any(words in line for words in _BUGS)] == []
        assert self.daemon.audit(HONEST).errors == 0

    def descriptors(self):
        """What it has open, by kind."""
        found = Counter()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[re.sub(r"\[\d+\]|\d+", "", str(link.readlink()))] += 1
        return found

    def rss_bytes(self):
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def close(self):
        self.daemon.close()

    def _touches(self):
        # By its own word: a stream of statistics may be more than the daemon has room for at this moment.
        with contextlib.closing(GuestClient(self.daemon.state_dir / "guests" / f"{HONEST}.sock")) as client:
            return client.statistics().touches

    def _names(self):
        reply = wait_until(self._list, _ANSWER_S, "the daemon to answer")
        return [each.spec.name for each in reply.guests]

    def _list(self):
        """What it answers; None if it has too many calls at this moment, and says so at once."""
        try:
            return self.daemon.guests.ListGuests(guest.ListGuestsRequest(), timeout=_ANSWER_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return None
            raise

    def _still(self):
        """What it has, once its connections are down to ours."""
        now = self.descriptors()
        return (now, self.rss_bytes()) if now["socket:"] <= self._sockets_of_its_own() else None

    def _sockets_of_its_own(self):
        return 6  # two listeners, the honest guest, us, and what grpc wakes itself with

    def _difference(self):
        now = self.descriptors()
        return f"its descriptors to be as before: too many are {now - self._before[0]}, gone {self._before[0] - now}"


def refusal_of(call, *arguments, **options):
    """(status, the error as the other end rebuilds it) of a call that must be refused."""
    options.setdefault("timeout", 30)
    try:
        reply = call(*arguments, **options)
        if hasattr(reply, "__next__"):
            next(reply)
    except grpc.RpcError as error:
        return error.code().name, received_error(error, "the daemon")
    raise AssertionError("it was not refused")
