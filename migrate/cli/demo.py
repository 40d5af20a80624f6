"""`migrate demo`: two daemons and a guest on this machine, one migration, a report."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Never, Unpack

import click

from migrate.cli.client import connect
from migrate.cli.demo_linux import LinuxGuest
from migrate.cli.exits import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED
from migrate.cli.local_daemon import GuestProcesses, LocalDaemon
from migrate.cli.migration import finish, follow
from migrate.cli.params import (
    GUEST_NAME,
    DaemonAt,
    GuestOptions,
    MigrationOptions,
    guest_options,
    guest_terms,
    json_option,
    migration_options,
    migration_terms,
)
from migrate.cli.progress import Reporter, progress_reporter
from migrate.cli.render import migration_detail, migration_json, print_json, print_table
from migrate.cli.tracing import TraceToFile, trace_option
from migrate.client import Client, pages_present
from migrate.errors import CallFailedError, MigrateError
from migrate.guest.probe import KVM, PROCESS, QEMU, Check, HostCapabilities, probe_host
from migrate.units import format_bytes
from migrate.v1 import types_pb2

AUTO = "auto"

_POLL_INTERVAL_S = 0.1
# Stamping takes well under a second for each GiB; a slow host gets plenty.
_POPULATE_DEADLINE_S = 600.0
_TOUCH_DEADLINE_S = 60.0


class _DemoOptions(GuestOptions, MigrationOptions):
    pass


@click.command()
@click.argument("name", type=GUEST_NAME, default="demo")
@guest_options(kind=AUTO, memory="256MiB", vcpus=2)
@migration_options()
@trace_option
@json_option
def demo(name: str, trace: Path | None, as_json: bool, **options: Unpack[_DemoOptions]) -> None:
    """Migrate a guest between two daemons on this machine, and report.

    Starts both daemons, creates a guest under load, moves it, has it check every page at the destination, and removes
    everything again. Exits with 1 if a page was wrong, or is not accounted for.
    """
    host = probe_host()
    options["kind"], why = _choose_kind(options["kind"], host)
    if options["kind"] == QEMU and (obstacles := host.obstacles(QEMU)):
        raise CallFailedError(f"no QEMU can move here: {obstacles[0].name}: {obstacles[0].detail}")
    click.echo(_headline(options, why), err=True)
    try:
        with _terminate_as_exit():
            migration = _run(name, options, trace)
    except KeyboardInterrupt:
        click.echo("migrate: interrupted; everything was removed", err=True)
        sys.exit(EXIT_INTERRUPTED)
    if as_json:
        print_json(migration_json(migration))
    else:
        print_table(migration_detail(migration))
    finish(migration)
    for flaw in _flaws(migration):
        click.echo(f"migrate: {flaw}", err=True)
    if _flaws(migration):
        sys.exit(EXIT_FAILED)


def _choose_kind(wanted: str, host: HostCapabilities) -> tuple[str, str]:
    """The kind of guest to take, and in words why it is not kvm."""
    obstacles = host.obstacles(KVM)
    if wanted != AUTO or not obstacles:
        return (KVM if wanted == AUTO else wanted), ""
    return PROCESS, _in_words(obstacles[0])


def _in_words(obstacle: Check) -> str:
    return f"a plain process, for this host cannot move KVM guests ({obstacle.name}: {obstacle.detail})"


def _headline(options: GuestOptions, why: str) -> str:
    vcpus = f"{options['vcpus']} vCPU{'s' if options['vcpus'] > 1 else ''}"
    work = "Linux under TCG" if options["kind"] == QEMU else options["workload"]
    return (
        f"migrate demo: two daemons on this machine, and one guest that moves between them: {options['kind']}, "
        f"{format_bytes(options['memory'])}, {vcpus}, {work}" + (f"; {why}" if why else "")
    )


def _run(name: str, options: _DemoOptions, trace: Path | None) -> types_pb2.Migration:
    """Do all of it; whatever happens, leave no process and no file."""
    traced = TraceToFile(trace)
    with ExitStack() as stack:
        base_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="migrate-demo-")))
        processes = GuestProcesses()
        stack.callback(processes.end_all)
        linux = LinuxGuest(base_dir) if options["kind"] == QEMU else None
        daemon_options = [*linux.daemon_options] if linux is not None else []
        if ":" in options["order"]:
            daemon_options += ["--policy", options["order"]]
        daemons = [LocalDaemon(side, base_dir, daemon_options) for side in ("source", "destination")]
        stack.callback(_stop_all, daemons, processes)
        for daemon in daemons:
            daemon.start()
        source = stack.enter_context(connect(DaemonAt(daemons[0].address)))
        destination = stack.enter_context(connect(DaemonAt(daemons[1].address)))
        try:
            with progress_reporter(source.address) as reporter, traced:
                return _migrate(source, destination, name, options, reporter, processes, linux, traced)
        except MigrateError:
            for daemon in daemons:
                _echo_log(daemon)
            raise
    raise AssertionError("unreachable: ExitStack swallows nothing here")


def _migrate(
    source: Client,
    destination: Client,
    name: str,
    options: _DemoOptions,
    reporter: Reporter,
    processes: GuestProcesses,
    linux: LinuxGuest | None,
    traced: TraceToFile,
) -> types_pb2.Migration:
    qemu_options = linux.qemu_options(options["memory"]) if linux is not None else []
    processes.add(source.guests.create(name, **guest_terms(options, qemu_options)).pid)
    if linux is not None:
        linux.await_ready(reporter)
    else:
        _await_running(source, name, reporter)
    terms = migration_terms(options)
    terms["trace"] = traced.is_wanted
    migration_id = source.migrations.start(name, destination.address, **terms)
    traced.begin(source, migration_id)
    # No other daemon takes the place of one of ours that dies.
    migration = follow(source, migration_id, reporter, away_s=0, note=traced.note)
    if migration.state != types_pb2.MIGRATION_STATE_COMPLETED:
        return migration
    if linux is not None:
        migration.guest_errors = len(linux.check(reporter))
        return migration
    reporter.report("auditing", 0, 0, "the guest compares every page")
    statistics = _audit(destination, name, migration.guest_touches_at_switchover)
    migration.guest_touches = statistics.touches
    migration.guest_errors = statistics.errors
    migration.guest_stall_us.CopyFrom(statistics.stall_us)
    return migration


def _await_running(source: Client, name: str, reporter: Reporter) -> None:
    """Wait until the guest has stamped its working set."""

    def is_running() -> bool:
        guest = source.guests.get(name)
        reporter.report("populating", guest.resident_bytes, guest.spec.memory_bytes)
        return bool(guest.state == types_pb2.GUEST_STATE_RUNNING)

    _await(is_running, _POPULATE_DEADLINE_S, "the guest has not stamped its working set")


def _audit(destination: Client, name: str, touches_at_switchover: int) -> types_pb2.GuestStatistics:
    """Wait until the guest has worked at the destination, then have it compare every page."""

    def has_moved_on() -> bool:
        return bool(destination.guests.statistics(name).touches > touches_at_switchover)

    _await(has_moved_on, _TOUCH_DEADLINE_S, "the guest does not run on at the destination")
    return destination.guests.audit(name)


def _await(condition: Callable[[], bool], deadline_s: float, otherwise: str) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_s:
            raise CallFailedError(f"{otherwise} after {deadline_s:.0f} s")
        time.sleep(_POLL_INTERVAL_S)


def _stop_all(daemons: list[LocalDaemon], processes: GuestProcesses) -> None:
    """Delete all guests, then end the daemons. A second interrupt does not stop this half-way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for daemon in daemons:
        if daemon.address and daemon.exit_status() is None:
            _delete_guests(daemon, processes)
    for daemon in daemons:
        daemon.stop()


def _delete_guests(daemon: LocalDaemon, processes: GuestProcesses) -> None:
    try:
        with connect(DaemonAt(daemon.address)) as client:
            guests = client.guests.list()
            for guest in guests:
                processes.add(guest.pid)
            for guest in guests:
                client.guests.delete(guest.spec.name)
    except MigrateError:
        # A guest in the middle of a migration cannot be deleted; its process is ended after the daemons.
        return


def _echo_log(daemon: LocalDaemon) -> None:
    tail = daemon.log_tail()
    if tail:
        click.echo(f"--- end of the {daemon.name} daemon's log\n{tail}", err=True)


def _flaws(migration: types_pb2.Migration) -> list[str]:
    """What is wrong with a migration that says it is complete."""
    pages = migration.pages
    flaws = []
    if migration.guest_errors:
        flaws.append(f"the guest found {migration.guest_errors} pages that are not as it left them")
    if pages_present(pages) != pages.total:
        flaws.append(f"{pages_present(pages)} pages are accounted for, of {pages.total}")
    if pages.total * migration.page_size_bytes != migration.memory_bytes:
        flaws.append(f"{pages.total} pages do not make {migration.memory_bytes} bytes")
    return flaws


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Have SIGTERM unwind the stack as Ctrl-C does."""

    def on_terminate(_number: int, _frame: FrameType | None) -> Never:
        sys.exit(EXIT_TERMINATED)

    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
