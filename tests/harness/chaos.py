"""One run of chaos: a guest moves between two daemons while its plan befalls it, and then everything is looked at.

    source daemon ◄── proxies: control, pages ── destination daemon
                  ──── proxy: control ─────────►

Each daemon is told to advertise its proxy, so that no call and no page takes another way.
"""

import contextlib
import os
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from migrate.barriers import Point
from migrate.errors import MigrateError
from migrate.guest.client import GuestClient
from migrate.v1 import migration_service_pb2 as migration
from migrate.v1 import types_pb2 as types
from tests.harness.barriers import Barriers
from tests.harness.chaos_checks import (
    check_alone,
    check_gone,
    check_leaves_nothing,
    check_lets_go,
    check_log,
    compare_memory,
)
from tests.harness.chaos_plan import KILLS, Kind, Links, Plan
from tests.harness.chaos_side import ASK_S, NAME, NO_ANSWER, POLL_S, ChaosError, Side, describe, wait_for
from tests.harness.chaos_watch import CopiesWatch
from tests.harness.processes import guest_pids, is_alive

DEADLINE_S = 120
_BACK_S = 60
# After both say that it is over, how long a daemon may take to a point that comes later still.
_LATE_S = 1.0
_GIVEN_UP = (types.MIGRATION_STATE_FAILED, types.MIGRATION_STATE_CANCELLED)
_DONE, _MISSED, _LATE, _UNTOUCHED = "done", "never reached", "too late", "nothing passed"


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        plan: What was to happen.
        problems: All that is wrong; none is perfection.
        fates: What became of each event of the plan, in its order.
        seconds: From the start of the migration until both daemons called it completed.
        back_seconds: What the way back took, with nothing in the way; 0 if it was not asked for.
        attempts, recoveries: How often it was tried, and how often its pages began to flow again.
        looks: How often the guest's two processes were looked at.
        seen_twice: How often both were seen to run at one time.
        compared_pages: Pages that were compared byte for byte.
        guest_errors: What the guest itself found wrong.
    """

    plan: Plan
    problems: list = field(default_factory=list)
    fates: list = field(default_factory=list)
    seconds: float = 0.0
    back_seconds: float = 0.0
    attempts: int = 0
    recoveries: int = 0
    looks: int = 0
    seen_twice: int = 0
    compared_pages: int = 0
    guest_errors: int = 0

    @property
    def added_seconds(self):
        """What the events cost; None if that is not known."""
        return self.seconds - self.back_seconds if self.back_seconds else None

    def happened(self):
        """The events that really befell it."""
        return [event for event, fate in zip(self.plan.events, self.fates, strict=False) if fate == _DONE]

    def __str__(self):
        fates = [*self.fates, *["?"] * (len(self.plan.events) - len(self.fates))]
        events = "; ".join(
            f"{event}{'' if fate == _DONE else f' ({fate})'}"
            for event, fate in zip(self.plan.events, fates, strict=True)
        )
        added = "" if self.added_seconds is None else f" ({self.added_seconds:+.2f})"
        end = "; ".join(self.problems) if self.problems else f"perfect after {self.seconds:.2f} s{added}"
        tries = f", attempts {self.attempts}, recoveries {self.recoveries}"
        return f"run {self.plan.number}: {self.plan} | {events or 'nothing'} | {end}{tries}"


def run_chaos(plan, *, seed, deadline_s=DEADLINE_S, with_way_back=True, keep_logs=None):
    """Carry a plan out, and look at everything afterwards.

    Args:
        plan: Of the run.
        seed: Of the plan: the proxies flip bits by it, too.
        deadline_s: When a migration that is not completed never will be.
        with_way_back: Also move the guest back with nothing in the way, which shows what the events cost.
        keep_logs: A directory that gets the daemons' logs of a run that is not perfect.
    """
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    outcome = Outcome(plan)
    try:
        with _Run(plan, outcome, directory, random.Random(f"{seed}/{plan.number}/bits"), deadline_s) as run:  # noqa: S311
            run.migrate()
            run.check()
            if with_way_back:
                run.go_back()
            run.leave()
    except (ChaosError, AssertionError, MigrateError, OSError, *NO_ANSWER, pytest.fail.Exception) as error:
        outcome.problems.append(f"{type(error).__name__}: {error}".partition("\n\tdebug_error")[0])
    finally:
        if outcome.problems and keep_logs is not None:
            keep_logs.mkdir(parents=True, exist_ok=True)
            for log in directory.glob("*.log"):
                shutil.copy(log, keep_logs / f"run-{plan.number}-{log.name}")
        shutil.rmtree(directory, ignore_errors=True)
    return outcome


class _Run:
    """The daemons, links and threads of one run; a context that leaves nothing."""

    def __init__(self, plan, outcome, directory, chooser, deadline_s):
        self.plan, self.outcome = plan, outcome
        self._directory = directory
        self._chooser = chooser
        self._deadline_s = deadline_s
        # No event happens any more; and those under way break off.
        self._is_over, self._is_given_up = threading.Event(), threading.Event()
        self._threads = []
        self._began_s = None
        self._has_begun = threading.Event()
        self._memory_fd = None

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._barriers = stack.enter_context(Barriers(self._directory / "barriers"))
            with ThreadPoolExecutor(2) as executor:
                made = [executor.submit(self._make_side, name) for name in ("source", "destination")]
                for side in made:
                    if side.exception() is None:
                        stack.callback(side.result().close)
                self.source, self.destination = (side.result() for side in made)
            self._watch = stack.enter_context(CopiesWatch(self.source.socket, self.destination.socket))
            self._start_guest()
            stack.callback(os.close, self._memory_fd)
            # Whatever happened, nothing is held and nothing is in the way when the daemons end.
            stack.callback(self.source.heal)
            stack.callback(self.destination.heal)
            stack.callback(self._stop_events)
            stack.callback(self._barriers.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        # However it ended, this must never have been.
        self.outcome.looks, self.outcome.seen_twice = self._watch.looks, len(self._watch.seen_twice)
        if self._watch.seen_twice:
            self.outcome.problems.append(f"two copies ran at {self._watch.seen_twice[:5]} s")
        return self._stack.__exit__(*exception)

    def _make_side(self, name):
        return Side(name, self._directory, self._barriers.env, self._chooser)

    def _start_guest(self):
        plan = self.plan
        shape = {"kind": plan.kind, "memory_mib": plan.memory_mib, "vcpus": plan.vcpus, "workload": plan.workload}
        shape |= {"write_ratio": plan.write_ratio, "touch_rate_per_s": plan.touch_rate_per_s, "seed": plan.number + 1}
        self._spec = self.source.daemon.create(NAME, **shape).spec
        self.source.daemon.wait_populated(NAME)
        client = GuestClient(self.source.socket)
        with contextlib.closing(client):
            # Its memory stays as it was at the end, for as long as we hold on to it.
            _, _, self._source_pid, (self._memory_fd,) = client.describe()

    # ---- the migration, and what befalls it ----

    def migrate(self):
        """Move the guest while everything happens that shall; return when both daemons call it completed."""
        self.outcome.fates = ["?"] * len(self.plan.events)
        for event in self.plan.events:
            if event.barrier is not None:
                self._barriers.hold(event.barrier)
        for index, event in enumerate(self.plan.events):
            thread = threading.Thread(target=self._play, args=[index, event], name=f"event-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._began_s = time.monotonic()
        self._has_begun.set()
        self._migration_id = self._start(self.source, self.destination.control.address)
        self._wait_completed(self.source, self.destination, self._deadline_s)
        self.outcome.seconds = time.monotonic() - self._began_s
        self._await_late_barriers()
        self._is_over.set()
        self._join_events()
        if self.outcome.problems:
            raise ChaosError("so the run is over")
        # A daemon that was killed after the end must still know it.
        self._wait_completed(self.source, self.destination, self._deadline_s)

    def _join_events(self):
        for thread in self._threads:
            thread.join(self._deadline_s)
            if thread.is_alive():
                raise ChaosError(f"{thread.name} does not end")

    def _stop_events(self):
        """Whatever the run came to, nothing happens to what is closed now."""
        self._is_given_up.set()
        self._is_over.set()
        self._join_events()

    def _start(self, side, to):
        """Have a migration started; a daemon that was killed over it is asked again, unless it knows of one."""
        deadline_s = time.monotonic() + self._deadline_s
        while True:
            try:
                known = side.daemon.migrations.ListMigrations(migration.ListMigrationsRequest(), timeout=ASK_S)
                leaving = [each.migration_id for each in known.migrations if each.side == types.MIGRATION_SIDE_SOURCE]
                return leaving[-1] if leaving else self._start_once(side, to)
            except NO_ANSWER as error:
                if time.monotonic() > deadline_s:
                    raise ChaosError(f"the {side.name} does not start the migration") from error
            time.sleep(POLL_S)

    def _start_once(self, side, to):
        plan = self.plan
        return side.daemon.start(
            to,
            NAME,
            mode=types.MigrationMode.Value(f"MIGRATION_MODE_{plan.mode.upper()}"),
            transport=types.PAGE_TRANSPORT_GRPCIO if plan.transport == "grpcio" else types.PAGE_TRANSPORT_NATIVE_GRPC,
            compression=types.PageCompression.Value(f"PAGE_COMPRESSION_{plan.compression.upper()}"),
            verify=plan.verify,
            max_bandwidth_bytes_per_s=plan.bandwidth_bytes_per_s,
            peer_timeout_us=plan.peer_timeout_us,
        )

    def _wait_completed(self, source, destination, deadline_s):
        """Both records, once both say that the migration is completed."""
        ends_s = time.monotonic() + deadline_s
        while True:
            records = left, came = [side.record(self._migration_id) for side in (source, destination)]
            known = [record for record in records if record is not None]
            self.outcome.attempts = max([self.outcome.attempts, *(record.attempt for record in known)])
            self.outcome.recoveries = max([self.outcome.recoveries, *(record.recoveries for record in known)])
            self.outcome.guest_errors = max([self.outcome.guest_errors, *(record.guest_errors for record in known)])
            if [record.state for record in known] == [types.MIGRATION_STATE_COMPLETED] * 2:
                return
            if left is not None and left.state in _GIVEN_UP:
                raise ChaosError(f"the migration ended as {describe(left)}")
            if self.outcome.problems:
                raise ChaosError("so the run is over")
            source.check_lives()
            destination.check_lives()
            if time.monotonic() > ends_s:
                raise ChaosError(
                    f"not completed after {deadline_s} s: source {describe(left)}, destination {describe(came)}"
                )
            time.sleep(POLL_S)

    def _await_late_barriers(self):
        """Points may come after both records say completed: give the daemons the time to get there."""
        ends_s = time.monotonic() + _LATE_S
        late = {Point.SOURCE_ENDED, Point.DESTINATION_ACKNOWLEDGED, Point.DESTINATION_ENDED, Point.SOURCE_LEFT}
        awaited = [index for index, event in enumerate(self.plan.events) if event.barrier in late]
        while any(self.outcome.fates[index] == "?" for index in awaited) and time.monotonic() < ends_s:
            time.sleep(POLL_S)

    def _play(self, index, event):
        """The thread of one event."""
        try:
            self.outcome.fates[index] = self._befall(event)
        except BaseException as error:  # noqa: BLE001 - it is the run's, which stops for it
            self.outcome.problems.append(f"{event}: {type(error).__name__}: {error}")

    def _befall(self, event):
        if event.barrier is not None:
            while not self._barriers.held(event.barrier):
                if self._is_over.wait(0.002):
                    self._barriers.release(event.barrier)
                    return _MISSED
        else:
            self._has_begun.wait(self._deadline_s)
            if self._is_over.wait(max(0, self._began_s + event.at_s - time.monotonic())):
                return _LATE
        if event.kind in KILLS:
            return self._kill(event)
        return self._break(event)

    def _kill(self, event):
        sides = {Kind.KILL_SOURCE: [self.source], Kind.KILL_DESTINATION: [self.destination]}
        with contextlib.ExitStack() as stack:
            # In one order, whoever asks. One that another event has killed must be there again first.
            for side in (killed := sides.get(event.kind, [self.source, self.destination])):
                stack.enter_context(side.lock)
            for side in killed:
                side.daemon.kill()
            if event.barrier is not None:
                self._barriers.release(event.barrier)
            if not self._is_given_up.wait(event.pause_s):
                for side in killed:
                    side.daemon.restart()
        return _DONE

    def _break(self, event):
        proxies = self._proxies(event)
        before = [proxy.corrupted[event.direction] for proxy in proxies]
        for proxy in proxies:
            _do_to(proxy, event)
        if event.barrier is not None:
            self._barriers.release(event.barrier)
        if event.pause_s:
            self._is_given_up.wait(event.pause_s)
            for proxy in proxies:
                proxy.heal()
        if event.kind is Kind.CORRUPT:
            # It counts once the bit has been flipped.
            while [proxy.corrupted[event.direction] for proxy in proxies] == before:
                if self._is_over.wait(POLL_S):
                    return _UNTOUCHED
        return _DONE

    def _proxies(self, event):
        control = [self.source.control, self.destination.control]
        # Stock gRPC serves pages where it serves everything.
        pages = [self.source.control if self.plan.transport == "grpcio" else self.source.pages]
        return {Links.CONTROL: control, Links.PAGES: pages, Links.ALL: list(dict.fromkeys(control + pages))}[
            event.links
        ]

    def go_back(self):
        """Move the guest back on links that are whole again, on the same terms: what a migration takes by itself."""
        self.source.heal()
        self.destination.heal()
        began_s = time.monotonic()
        self._migration_id = self._start_once(self.destination, self.source.control.address)
        self._wait_completed(self.destination, self.source, _BACK_S)
        self.outcome.back_seconds = time.monotonic() - began_s
        wait_for(lambda: guest_pids(self.destination.state_dir) == [], "the guest to have left the destination")
        self._check_alone(self.source)

    # ---- what must be true afterwards ----

    def check(self):
        """The guest is at the destination alone, whole, and runs; nothing of it is left at the source."""
        wait_for(lambda: not is_alive(self._source_pid), "the guest's process at the source to be gone")
        check_gone(self.source)
        self._check_alone(self.destination)
        if not self.plan.write_ratio:
            self.outcome.compared_pages = compare_memory(self._spec, self._memory_fd, self.destination)
        for side in (self.source, self.destination):
            check_lets_go(side)

    def _check_alone(self, side):
        audited = check_alone(side)
        self.outcome.guest_errors = max(self.outcome.guest_errors, audited.errors)
        if audited.errors or audited.first_error or not audited.audits:
            raise ChaosError(f"the audit at the {side.name} found {audited.errors} errors: {audited.first_error}")

    def leave(self):
        """Delete the guest, end the daemons: no process and no socket of theirs is left."""
        for side in (self.source, self.destination):
            check_leaves_nothing(side)
            check_log(side)


def _do_to(proxy, event):
    if event.kind is Kind.CUT and event.after_bytes >= 0:
        proxy.cut_after(event.after_bytes, event.direction)
    elif event.kind is Kind.CUT:
        proxy.cut()
    elif event.kind is Kind.RESET:
        proxy.reset()
    elif event.kind is Kind.HALF_CLOSE:
        proxy.half_close(event.direction)
    elif event.kind is Kind.BLACKHOLE:
        proxy.blackhole()
    elif event.kind is Kind.REFUSE:
        proxy.refuse()
        proxy.cut()
    elif event.kind is Kind.CORRUPT:
        proxy.corrupt_after(event.after_bytes, event.direction)
