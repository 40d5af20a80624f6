"""`migrate guest`: what lives on a daemon's host."""

from pathlib import Path
from typing import Unpack

import click

from migrate.cli.client import AUDIT_DEADLINE_S, connect
from migrate.cli.params import GUEST_NAME, DaemonAt, GuestOptions, daemon_option, guest_options, guest_spec, json_option
from migrate.cli.render import (
    guest_detail,
    guest_json,
    guest_state_word,
    guest_table,
    print_json,
    statistics_detail,
    statistics_json,
    stdout_console,
)
from migrate.v1 import guest_service_pb2, types_pb2

_name_argument = click.argument("name", type=GUEST_NAME)


@click.group()
def guest() -> None:
    """Create, look at, pause, resume and delete guests."""


@guest.command()
@_name_argument
@guest_options(kind="kvm", memory="1GiB", vcpus=1)
@click.argument("qemu_options", nargs=-1, metavar="[-- QEMU OPTIONS]")
@daemon_option
def create(name: str, qemu_options: tuple[str, ...], daemon: DaemonAt, **options: Unpack[GuestOptions]) -> None:
    """Create guest NAME and let it run.

    A guest of kind kvm or process runs a memory workload that checks itself and times its own stalls. One of kind qemu
    is an unpatched QEMU: what follows `--` are its options, but for RAM and vCPUs.
    """
    if qemu_options and options["kind"] != "qemu":
        raise click.UsageError("options of QEMU are for --kind qemu")
    spec = guest_spec(name, options)
    if qemu_options:
        spec.qemu.options.extend(qemu_options)
    _create(daemon, spec, "created")


@guest.command()
@_name_argument
@click.option("--qmp", metavar="SOCKET", help="Where the monitor of a QEMU listens, on the daemon's host.")
@click.option("--socket", metavar="SOCKET", help="Where a program listens that opted in, on the daemon's host.")
@daemon_option
def attach(name: str, qmp: str | None, socket: str | None, daemon: DaemonAt) -> None:
    """Take over what runs already, as guest NAME: a QEMU, or a program that opted in to being moved.

    It runs on as it was. RAM of a QEMU must be a shared file; if it cannot be moved, the error says what is missing.
    """
    if (qmp is None) == (socket is None):
        raise click.UsageError("give either --qmp or --socket")
    if qmp is not None:
        qemu = types_pb2.QemuSpec(qmp_socket=str(Path(qmp).absolute()))
        spec = types_pb2.GuestSpec(name=name, kind=types_pb2.GUEST_KIND_QEMU, qemu=qemu)
    else:
        process = types_pb2.ProcessSpec(socket=str(Path(str(socket)).absolute()))
        spec = types_pb2.GuestSpec(name=name, kind=types_pb2.GUEST_KIND_PROCESS, process=process)
    _create(daemon, spec, "taken over")


def _create(daemon: DaemonAt, spec: types_pb2.GuestSpec, verb: str) -> None:
    with connect(daemon) as remote:
        request = guest_service_pb2.CreateGuestRequest(spec=spec)
        created = remote.call(remote.guests.CreateGuest, request).guest
    click.echo(f"guest {created.spec.name} {verb}, {guest_state_word(created.state)}, pid {created.pid}")


@guest.command("list")
@daemon_option
@json_option
def list_guests(daemon: DaemonAt, as_json: bool) -> None:
    """List the guests of a daemon, by name."""
    with connect(daemon) as remote:
        guests = remote.call(remote.guests.ListGuests, guest_service_pb2.ListGuestsRequest()).guests
    if as_json:
        print_json([guest_json(item) for item in guests])
    else:
        stdout_console().print(guest_table(guests))


@guest.command()
@_name_argument
@daemon_option
@json_option
def show(name: str, daemon: DaemonAt, as_json: bool) -> None:
    """Show guest NAME."""
    with connect(daemon) as remote:
        found = remote.call(remote.guests.GetGuest, guest_service_pb2.GetGuestRequest(name=name)).guest
    if as_json:
        print_json(guest_json(found))
    else:
        stdout_console().print(guest_detail(found))


@guest.command()
@_name_argument
@click.option("--audit", is_flag=True, help="Have the guest compare every page of its working set first.")
@daemon_option
@json_option
def stats(name: str, audit: bool, daemon: DaemonAt, as_json: bool) -> None:
    """Show what guest NAME has counted and timed."""
    with connect(daemon) as remote:
        if audit:
            request = guest_service_pb2.AuditGuestRequest(name=name)
            statistics = remote.call(remote.guests.AuditGuest, request, deadline_s=AUDIT_DEADLINE_S).statistics
        else:
            watch = guest_service_pb2.WatchGuestStatisticsRequest(name=name, interval_us=0)
            statistics = remote.first(remote.guests.WatchGuestStatistics, watch).statistics
    if as_json:
        print_json(statistics_json(statistics))
    else:
        stdout_console().print(statistics_detail(statistics))


@guest.command()
@_name_argument
@daemon_option
def pause(name: str, daemon: DaemonAt) -> None:
    """Pause the vCPUs of guest NAME."""
    with connect(daemon) as remote:
        remote.call(remote.guests.PauseGuest, guest_service_pb2.PauseGuestRequest(name=name))
    click.echo(f"guest {name} paused")


@guest.command()
@_name_argument
@daemon_option
def resume(name: str, daemon: DaemonAt) -> None:
    """Let the vCPUs of guest NAME run again."""
    with connect(daemon) as remote:
        remote.call(remote.guests.ResumeGuest, guest_service_pb2.ResumeGuestRequest(name=name))
    click.echo(f"guest {name} resumed")


@guest.command()
@_name_argument
@daemon_option
def delete(name: str, daemon: DaemonAt) -> None:
    """End guest NAME and free its RAM."""
    with connect(daemon) as remote:
        remote.call(remote.guests.DeleteGuest, guest_service_pb2.DeleteGuestRequest(name=name))
    click.echo(f"guest {name} deleted")
