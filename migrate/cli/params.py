"""Option types and option sets that several commands share. A value that makes no sense is a usage error."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from migrate.cli.extras import recorded_pages
from migrate.client.terms import (
    COMPRESSIONS,
    DEADLINE_ACTIONS,
    KINDS,
    MODES,
    NO_CONVERGENCE,
    TRANSPORTS,
    WORKLOADS,
    GuestTerms,
    MigrationTerms,
)
from migrate.config import ORDERS, Endpoint, check_order_word
from migrate.errors import ConfigError
from migrate.units import PAGE_SIZE_BYTES, parse_duration_us, parse_rate_bytes_per_s, parse_size_bytes

DEFAULT_DAEMON = "127.0.0.1:7400"

# What a signed 64-bit field holds; nobody has an exbibyte of RAM.
_QUANTITY_MAX = 2**63 - 1
_GUEST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Parsed(click.ParamType[int | str]):
    """A type with a parser of ours behind it; defaults may be given as text or as the parsed value."""

    def __init__(self, name: str, parse: Callable[[str], int | str]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int):
            return value
        try:
            parsed = self._parse(value)
        except ConfigError as exc:
            self.fail(exc.message, param, ctx)
        if isinstance(parsed, int) and parsed > _QUANTITY_MAX:
            self.fail(f"{value!r} is more than any host has", param, ctx)
        return parsed


def _endpoint(text: str) -> str:
    return str(Endpoint.parse(text))


def _guest_name(text: str) -> str:
    if not _GUEST_NAME.fullmatch(text):
        raise ConfigError(f"{text!r} is not a name: 1 to 64 of A-Z a-z 0-9 . _ -, starting with a letter or digit")
    return text


def _ram_bytes(text: str) -> int:
    count_bytes = parse_size_bytes(text)
    if count_bytes <= 0 or count_bytes % PAGE_SIZE_BYTES:
        raise ConfigError(f"{text!r} is not a positive multiple of {PAGE_SIZE_BYTES} bytes")
    return count_bytes


def _order(text: str) -> str:
    check_order_word(text)
    return text


def complete_order(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Orders of this host; the destination may have others."""
    from migrate.pager.orders import installed_orders  # noqa: PLC0415 - no command needs it

    return [
        CompletionItem(source.name, help=source.where)
        for source in installed_orders()
        if source.name.startswith(incomplete)
    ]


ENDPOINT = _Parsed("HOST:PORT", _endpoint)
GUEST_NAME = _Parsed("NAME", _guest_name)
RAM_SIZE = _Parsed("SIZE", _ram_bytes)
DURATION = _Parsed("DURATION", parse_duration_us)
RATE = _Parsed("RATE", parse_rate_bytes_per_s)
ORDER = _Parsed("ORDER", _order)


@dataclass(frozen=True, slots=True)
class DaemonAt:
    """Which daemon to talk to, and how.

    Attributes:
        address: HOST:PORT.
        tls_dir: Our certificate, key, and whom we trust; None talks in plaintext.
    """

    address: str
    tls_dir: Path | None = None


_daemon_address = click.option(
    "--daemon",
    type=ENDPOINT,
    envvar="MIGRATE_DAEMON",
    default=DEFAULT_DAEMON,
    show_default=True,
    show_envvar=True,
    help="The daemon to talk to.",
)
tls_dir_option = click.option(
    "--tls-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="MIGRATE_TLS_DIR",
    show_envvar=True,
    help="Certificate, key, and whom to trust, for a daemon that has a --tls-dir.",
)


def daemons_option(command: _Command) -> _Command:
    """As daemon_option, but --daemon may be given several times; the command gets `daemons` and `tls_dir`."""
    several = click.option(
        "--daemon",
        "daemons",
        type=ENDPOINT,
        envvar="MIGRATE_DAEMON",
        default=(DEFAULT_DAEMON,),
        multiple=True,
        show_default=True,
        show_envvar=True,
        help="A daemon to talk to; may be given several times.",
    )
    return several(tls_dir_option(command))


def daemon_option(command: _Command) -> _Command:
    """Options that say which daemon to talk to; the command gets them as `daemon`, a DaemonAt."""

    @functools.wraps(command)
    def with_daemon(*args: Any, daemon: str, tls_dir: Path | None, **kwargs: Any) -> Any:
        return command(*args, daemon=DaemonAt(daemon, tls_dir), **kwargs)

    return cast("_Command", _daemon_address(tls_dir_option(with_daemon)))


recorded_option = click.option(
    "--recorded",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=lambda _ctx, _param, path: [] if path is None else recorded_pages(path),
    help="A trace, for an order that goes by the pages that an earlier run faulted on.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class GuestOptions(TypedDict):
    """What guest_options() passes to a command."""

    kind: str
    memory: int
    vcpus: int
    workload: str
    write_ratio: float
    working_set: int
    touch_rate: int
    seed: int


class MigrationOptions(TypedDict):
    """What migration_options() passes to a command."""

    mode: str | None
    downtime_limit: int
    on_no_convergence: str
    order: str
    recorded: list[int]
    max_bandwidth: int
    transport: str
    compress: str
    verify: bool
    peer_timeout: int
    deadline: int
    on_deadline: str


def guest_options(*, kind: str, memory: str, vcpus: int) -> Callable[[_Command], _Command]:
    """Options of `guest create`, with the defaults that differ between commands."""
    kinds = _choice([*KINDS] if kind in KINDS else [kind, *KINDS])
    return _stack(
        click.option("--kind", type=kinds, default=kind, show_default=True, help="What kind of thing the guest is."),
        click.option("--memory", type=RAM_SIZE, default=memory, show_default=True, help="RAM of the guest."),
        click.option("--vcpus", type=click.IntRange(1), default=vcpus, show_default=True, help="Number of vCPUs."),
        click.option(
            "--workload",
            type=_choice(WORKLOADS),
            default="uniform",
            show_default=True,
            help="Which pages the guest touches.",
        ),
        click.option(
            "--write-ratio",
            type=click.FloatRange(0, 1),
            default=0.5,
            show_default=True,
            help="Share of touches that write.",
        ),
        click.option("--working-set", type=RAM_SIZE, default=0, help="Bytes touched.  [default: nearly all of RAM]"),
        click.option(
            "--touch-rate",
            type=click.IntRange(0),
            default=0,
            metavar="N",
            help="Touches a second for each vCPU.  [default: as fast as it goes]",
        ),
        click.option(
            "--seed",
            type=click.IntRange(0, 2**64 - 1),
            default=1,
            show_default=True,
            metavar="N",
            help="Seeds the choice of pages.",
        ),
    )


def migration_options() -> Callable[[_Command], _Command]:
    """Options of `start` that say how to migrate."""
    return _stack(
        click.option(
            "--mode",
            type=_choice(MODES),
            help="When the switchover happens.  [default: hybrid, or postcopy for a guest without a dirty log]",
        ),
        click.option(
            "--downtime-limit",
            type=DURATION,
            default="50ms",
            show_default=True,
            help="In mode precopy, how long the vCPUs may stand still.",
        ),
        click.option(
            "--on-no-convergence",
            type=_choice(NO_CONVERGENCE),
            default="postcopy",
            show_default=True,
            help="In mode precopy, what to do if the guest writes faster than its pages move.",
        ),
        click.option(
            "--order",
            type=ORDER,
            default=next(iter(ORDERS)),
            show_default=True,
            shell_complete=complete_order,
            help="Order of the background: one that `migrate policies` lists at the destination, or MODULE:CLASS.",
        ),
        recorded_option,
        click.option("--max-bandwidth", type=RATE, default=0, help="Cap of the background.  [default: none]"),
        click.option(
            "--transport",
            type=_choice(TRANSPORTS),
            default="native",
            show_default=True,
            help="What carries the pages.",
        ),
        click.option(
            "--compress",
            type=_choice(COMPRESSIONS),
            default="none",
            show_default=True,
            help="What the pages are compressed with, but for those that a vCPU waits for.",
        ),
        click.option("--verify", is_flag=True, help="Compare a digest of every page, and of all memory at the end."),
        click.option(
            "--peer-timeout",
            type=DURATION,
            default="5s",
            show_default=True,
            help="Silence after which a daemon counts as lost.",
        ),
        click.option(
            "--deadline",
            type=DURATION,
            default=0,
            help="How long pages may stay away after the switchover.  [default: for ever]",
        ),
        click.option(
            "--on-deadline",
            type=_choice(DEADLINE_ACTIONS),
            default="stop",
            show_default=True,
            help="What the destination does then: end the guest, or let it run on without those pages.",
        ),
    )


def guest_terms(options: GuestOptions, qemu_options: Sequence[str] = ()) -> GuestTerms:
    """What the client needs to make a guest."""
    return {
        "kind": options["kind"],
        "memory_bytes": options["memory"],
        "vcpus": options["vcpus"],
        "workload": options["workload"],
        "write_ratio": options["write_ratio"],
        "working_set_bytes": options["working_set"],
        "touch_rate_per_s": options["touch_rate"],
        "seed": options["seed"],
        "qemu_options": qemu_options,
    }


def migration_terms(options: MigrationOptions) -> MigrationTerms:
    """What the client needs to start a migration."""
    return {
        "mode": options["mode"],
        "downtime_limit_us": options["downtime_limit"],
        "on_no_convergence": options["on_no_convergence"],
        "order": options["order"],
        "recorded_pages": options["recorded"],
        "transport": options["transport"],
        "max_bandwidth_bytes_per_s": options["max_bandwidth"],
        "verify": options["verify"],
        "compression": options["compress"],
        "peer_timeout_us": options["peer_timeout"],
        "deadline_us": options["deadline"],
        "on_deadline": options["on_deadline"],
    }


def _choice(words: Sequence[str] | dict[str, Any]) -> click.Choice[str]:
    return click.Choice([*words])


def _stack(*options: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        # Options are listed in the order in which decorators stand, which is the reverse of their application.
        for option in reversed(options):
            command = cast("_Command", option(command))
        return command

    return decorate
