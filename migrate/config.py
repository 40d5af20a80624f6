"""What a daemon is told on its command line, and the limits that hold everywhere."""

import re
from dataclasses import dataclass
from pathlib import Path

from migrate.errors import ConfigError

PROTOCOL_VERSION = 3
"""Spoken between daemons. A destination accepts its own version and the one before."""

REQUEST_PAGES_MAX = 256
"""Pages of one FetchPages request: 1 MiB, well within gRPC's default message limit."""

BACKGROUND_RUN_PAGES = 64
"""Pages of one background request: UFFDIO_COPY reaches its plateau at 64 KiB, the wire at 256 KiB."""

BACKGROUND_RUNS_IN_FLIGHT = 8

CONNECT_DEADLINE_S = 5.0

PEER_TIMEOUT_DEFAULT_US = 5_000_000
PEER_TIMEOUT_MIN_US = 200_000
"""Shorter, and a scheduler's whim would look like a lost peer."""
PEER_TIMEOUT_MAX_US = 3_600_000_000

ORDERS = {
    "precopy": "Ascending, once around.",
    "follow": "Ascending from the last fault on, for a guest that walks through its memory.",
    "bubble": "Outward from the last few faults, both ways, by turns (Hines, Deshpande, Gopalan: VEE 2009).",
}
"""Orders of the background that every destination has, for the C core does them; the first is the default."""

RECORDED_PAGES_MAX = 262_144
"""Pages that a migration may be told an earlier run faulted on: 1 GiB of them."""

_HOST_CHARS_MAX = 255
_ORDER_CHARS_MAX = 200
_MODULE_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_ORDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_PORT_MAX = 0xFFFF
_PORT_DIGITS = 5

SWITCHOVER_DEADLINE_S = 120.0
"""How long a prepared destination waits for its switchover before it gives the guest up as never arrived."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP address."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Read HOST:PORT, IPv6 hosts in brackets.

        Raises:
            ConfigError: not an address.
        """
        host, separator, port = text.rpartition(":")
        if (
            not separator
            or not host
            or not port.isascii()
            or not port.isdigit()
            or len(port) > _PORT_DIGITS
            or int(port) > _PORT_MAX
        ):
            raise ConfigError(f"{text[:_HOST_CHARS_MAX]!r} is not HOST:PORT")
        if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
            raise ConfigError(f"{text[:_HOST_CHARS_MAX]!r} is not HOST:PORT; an IPv6 host goes in brackets")
        if len(host) > _HOST_CHARS_MAX:
            raise ConfigError(f"a host's name has at most {_HOST_CHARS_MAX} characters, not {len(host)}")
        return cls(host.strip("[]"), int(port))

    @property
    def is_unspecified(self) -> bool:
        """Whether the host means every local address, and so tells a peer nothing."""
        return self.host in ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def check_order_word(order: str) -> None:
    """Whether an order of the background may be called so; whether there is one, its destination knows.

    Raises:
        ConfigError: it may not.
    """
    if len(order) > _ORDER_CHARS_MAX or not (_ORDER_NAME.fullmatch(order) or _MODULE_CLASS.fullmatch(order)):
        raise ConfigError(f"{order[:80]!r} is no order of the background: that is a name, or module:Class")


def check_recorded_count(count_pages: int) -> None:
    """Whether a migration may be told of so many pages that an earlier run faulted on.

    Raises:
        ConfigError: they are too many.
    """
    if count_pages > RECORDED_PAGES_MAX:
        raise ConfigError(f"at most {RECORDED_PAGES_MAX} recorded pages can be given, not {count_pages}")


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    """A daemon's settings.

    Attributes:
        listen: HOST:PORT of the control services; port 0 takes a free one.
        page_listen: HOST:PORT of the page service; None takes a free port beside the control services.
        state_dir: What outlives the daemon: sockets of guests, migrations under way. None makes a private directory
            that goes with the daemon, and its guests with it.
        advertise: HOST:PORT that peers are told instead of `listen`, where they reach it by another address.
        advertise_pages: Likewise of `page_listen`.
        tls_dir: The daemon's certificate, key, and whom it trusts (migrate/tls.py); None serves everybody in plaintext.
        qemu_dirs: Where files of QEMU guests that arrive may lie.
        programs_dir: What may be started as a guest of kind process, by name; None if nothing may.
        policies: Policies that peers may ask for as module:Class, beside those that are installed.
        ready_fd: Written one JSON line {"listen": …, "page_listen": …} once the daemon serves, then closed.
        metrics_listen: HOST:PORT where metrics are had by plain HTTP; None serves none.
        log_format: `text` or `json`.
    """

    listen: str
    page_listen: str | None = None
    state_dir: Path | None = None
    advertise: str | None = None
    advertise_pages: str | None = None
    tls_dir: Path | None = None
    qemu_dirs: tuple[Path, ...] = ()
    programs_dir: Path | None = None
    policies: tuple[str, ...] = ()
    ready_fd: int | None = None
    metrics_listen: str | None = None
    log_format: str = "text"
