"""`migrate tls`: a CA, certificates for hosts and operators, and what is in them."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from migrate.cli.params import json_option
from migrate.cli.render import print_json, print_table

if TYPE_CHECKING:
    from migrate.tls import Identity

_ROLES = ("host", "operator", "viewer")
_DIRECTORY = click.Path(file_okay=False, path_type=Path)
_EXISTING = click.Path(exists=True, path_type=Path)

# cryptography takes a while to load, and only these commands, and those that are given --tls-dir, need it.


@click.group()
def tls() -> None:
    """Make a CA, issue certificates, look at them.

    Daemons and operators trust each other if one CA vouches for both; what each may do is its role.
    """


@tls.command()
@click.argument("directory", type=_DIRECTORY)
@click.option("--days", type=int, default=3650, show_default=True, help="How long the CA is valid.")
def init(directory: Path, days: int) -> None:
    """Make a CA in DIRECTORY.

    Whoever has its key, ca.key, can become any host and any operator: keep it away from the hosts.
    """
    from migrate.authority import CA_KEY_FILE, Authority  # noqa: PLC0415

    Authority.create(directory, days)
    click.echo(f"CA made in {directory}; keep {directory / CA_KEY_FILE} to yourself")


@tls.command()
@click.argument("directory", type=_DIRECTORY)
@click.argument("name")
@click.option(
    "--role", type=click.Choice(_ROLES), default="host", show_default=True, help="What the holder is, and may do."
)
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="HOST_OR_IP",
    help="By which others call the host; give it for each.  [default: NAME]",
)
@click.option("--days", type=int, default=365, show_default=True, help="How long the certificate is valid.")
@click.option("--renew", is_flag=True, help="Replace the certificate and key that NAME has.")
def issue(directory: Path, name: str, role: str, addresses: tuple[str, ...], days: int, renew: bool) -> None:
    """Issue a certificate for NAME with the CA in DIRECTORY.

    DIRECTORY/NAME is then ready to be copied to where --tls-dir shall name it.
    """
    from migrate.authority import Authority  # noqa: PLC0415
    from migrate.tls import Role  # noqa: PLC0415

    made = Authority(directory).issue(name, Role(role), addresses, days, renew=renew)
    click.echo(f"{made} is ready to be copied, and to be given to --tls-dir")


@tls.command()
@click.argument("file_or_directory", type=_EXISTING)
@json_option
def show(file_or_directory: Path, as_json: bool) -> None:
    """Say what is in a certificate, or in a TLS directory, and whether it can be used."""
    from migrate.tls import identity_of, read_certificates, read_tls_dir  # noqa: PLC0415

    if file_or_directory.is_dir():
        identities = [read_tls_dir(file_or_directory).identity]
    else:
        identities = [identity_of(certificate) for certificate in read_certificates(file_or_directory)]
    if as_json:
        print_json([_json(identity) for identity in identities])
        return
    for identity in identities:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for word, value in _rows(identity):
            table.add_row(word, value)
        print_table(table)


def _json(identity: "Identity") -> dict[str, Any]:
    return {
        "name": identity.name,
        "role": identity.role.value if identity.role else None,
        "addresses": _addresses(identity),
        "issuer": identity.issuer,
        "not_before": identity.not_before.isoformat(),
        "not_after": identity.not_after.isoformat(),
        "fingerprint": identity.fingerprint,
        "valid": not identity.why_not_valid(),
    }


def _rows(identity: "Identity") -> list[tuple[str, str]]:
    left = identity.not_after - datetime.now(UTC)
    return [
        ("name", identity.name),
        ("role", identity.role.value if identity.role else "none"),
        ("addresses", ", ".join(_addresses(identity)) or "none"),
        ("issuer", identity.issuer),
        ("valid from", f"{identity.not_before:%Y-%m-%d %H:%M:%S} UTC"),
        ("valid until", f"{identity.not_after:%Y-%m-%d %H:%M:%S} UTC, {left.days} days from now"),
        ("fingerprint", identity.fingerprint),
    ]


def _addresses(identity: "Identity") -> list[str]:
    return sorted(identity.dns_names) + sorted(map(str, identity.addresses))
