"""`migrate guest`: what lives on a daemon's host."""

from pathlib import Path
from typing import Unpack

import click

from migrate.cli.client import connect
from migrate.cli.completion import complete_guest
from migrate.cli.params import (
    GUEST_NAME,
    DaemonAt,
    GuestOptions,
    daemon_option,
    guest_options,
    guest_terms,
    json_option,
)
from migrate.cli.render import (
    guest_detail,
    guest_json,
    guest_table,
    print_json,
    print_table,
    statistics_detail,
    statistics_json,
)
from migrate.client import guest_state_word
from migrate.v1 import types_pb2

_new_name_argument = click.argument("name", type=GUEST_NAME)
_name_argument = click.argument("name", type=GUEST_NAME, shell_complete=complete_guest)


@click.group()
def guest() -> None:
    """Create, look at, pause, resume and delete guests."""


@guest.command()
@_new_name_argument
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
    with connect(daemon) as client:
        created = client.guests.create(name, **guest_terms(options, qemu_options))
    _echo_made(created, "created")


@guest.command()
@_new_name_argument
@click.option("--qmp", metavar="SOCKET", help="Where the monitor of a QEMU listens, on the daemon's host.")
@click.option("--socket", metavar="SOCKET", help="Where a program listens that opted in, on the daemon's host.")
@daemon_option
def attach(name: str, qmp: str | None, socket: str | None, daemon: DaemonAt) -> None:
    """Take over what runs already, as guest NAME: a QEMU, or a program that opted in to being moved.

    It runs on as it was. RAM of a QEMU must be a shared file; if it cannot be moved, the error says what is missing.
    """
    if (qmp is None) == (socket is None):
        raise click.UsageError("give either --qmp or --socket")
    with connect(daemon) as client:
        if qmp is not None:
            taken_over = client.guests.attach(name, qmp_socket=str(Path(qmp).absolute()))
        else:
            taken_over = client.guests.attach(name, program_socket=str(Path(str(socket)).absolute()))
    _echo_made(taken_over, "taken over")


def _echo_made(made: types_pb2.Guest, verb: str) -> None:
    click.echo(f"guest {made.spec.name} {verb}, {guest_state_word(made.state)}, pid {made.pid}")


@guest.command("list")
@daemon_option
@json_option
def list_guests(daemon: DaemonAt, as_json: bool) -> None:
    """List the guests of a daemon, by name."""
    with connect(daemon) as client:
        guests = client.guests.list()
    if as_json:
        print_json([guest_json(item) for item in guests])
    else:
        print_table(guest_table(guests))


@guest.command()
@_name_argument
@daemon_option
@json_option
def show(name: str, daemon: DaemonAt, as_json: bool) -> None:
    """Show guest NAME."""
    with connect(daemon) as client:
        found = client.guests.get(name)
    if as_json:
        print_json(guest_json(found))
    else:
        print_table(guest_detail(found))


@guest.command()
@_name_argument
@click.option("--audit", is_flag=True, help="Have the guest compare every page of its working set first.")
@daemon_option
@json_option
def stats(name: str, audit: bool, daemon: DaemonAt, as_json: bool) -> None:
    """Show what guest NAME has counted and timed."""
    with connect(daemon) as client:
        statistics = client.guests.audit(name) if audit else client.guests.statistics(name)
    if as_json:
        print_json(statistics_json(statistics))
    else:
        print_table(statistics_detail(statistics))


@guest.command()
@_name_argument
@daemon_option
def pause(name: str, daemon: DaemonAt) -> None:
    """Pause the vCPUs of guest NAME."""
    with connect(daemon) as client:
        client.guests.pause(name)
    click.echo(f"guest {name} paused")


@guest.command()
@_name_argument
@daemon_option
def resume(name: str, daemon: DaemonAt) -> None:
    """Let the vCPUs of guest NAME run again."""
    with connect(daemon) as client:
        client.guests.resume(name)
    click.echo(f"guest {name} resumed")


@guest.command()
@_name_argument
@daemon_option
def delete(name: str, daemon: DaemonAt) -> None:
    """End guest NAME and free its RAM."""
    with connect(daemon) as client:
        client.guests.delete(name)
    click.echo(f"guest {name} deleted")
