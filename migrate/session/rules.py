"""What a destination demands before it builds a guest's twin. Pure: facts in, an error out."""

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from migrate.config import (
    ORDERS,
    PEER_TIMEOUT_MAX_US,
    PEER_TIMEOUT_MIN_US,
    PROTOCOL_VERSION,
    check_order_word,
    check_recorded_count,
)
from migrate.errors import (
    ConfigError,
    GuestHolder,
    MissingFeatureError,
    NotEnoughMemoryError,
    PermissionDeniedError,
    UnsupportedHostError,
)
from migrate.units import PAGE_SIZE_BYTES, bytes_to_pages, format_bytes, is_page_aligned
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

SUPPORTED_MODES = frozenset({types.MIGRATION_MODE_POSTCOPY, types.MIGRATION_MODE_HYBRID, types.MIGRATION_MODE_PRECOPY})
SUPPORTED_TRANSPORTS = frozenset({types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO})
COMPRESSING_TRANSPORTS = frozenset({types.PAGE_TRANSPORT_NATIVE_GRPC})
SUPPORTED_COMPRESSIONS = frozenset(
    {types.PAGE_COMPRESSION_UNSPECIFIED, types.PAGE_COMPRESSION_NONE, types.PAGE_COMPRESSION_ZSTD}
)
MEMORY_MAX_BYTES = 1 << 40
TOKEN_CHARS_MAX = 256
DESCRIPTION_BYTES_MAX = 32 << 10
"""A guest process is told of itself on its command line, where an argument ends at 128 KiB, in hexadecimal."""

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the destination has to offer.

    Attributes:
        available_bytes: Memory.
        orders: Of the background, as they may be asked for.
    """

    available_bytes: int
    orders: Collection[str] = tuple(ORDERS)


def choose_transport(asked: int) -> "types.PageTransport.ValueType":
    """What a destination fetches with. All transports are the same gRPC, so any of them reaches any page server."""
    if asked in SUPPORTED_TRANSPORTS:
        return types.PageTransport.ValueType(asked)
    return types.PAGE_TRANSPORT_NATIVE_GRPC


def choose_compression(asked: int, transport: int) -> "types.PageCompression.ValueType":
    """How the runs of a transport may be compressed: as asked for if both know how, else not at all.

    Args:
        asked: A migrate.v1.PageCompression.
        transport: The migrate.v1.PageTransport that fetches the pages.
    """
    if asked == types.PAGE_COMPRESSION_ZSTD and transport in COMPRESSING_TRANSPORTS:
        return types.PAGE_COMPRESSION_ZSTD
    return types.PAGE_COMPRESSION_NONE


def check_compression(asked: int, transport: int) -> None:
    """Whether an operator's wish can be met by this version; a destination may still decline it.

    Raises:
        ConfigError: it cannot.
    """
    if asked not in SUPPORTED_COMPRESSIONS:
        raise ConfigError("this version compresses pages with zstd, or not at all")
    if asked == types.PAGE_COMPRESSION_ZSTD and choose_transport(transport) not in COMPRESSING_TRANSPORTS:
        raise ConfigError(
            "transport grpcio does not compress pages", remedy="use --transport native, or --compress none"
        )


def choose_mode(asked: int, *, has_dirty_log: bool, reason: str) -> "types.MigrationMode.ValueType":
    """The mode of a migration for which none was asked for: hybrid, where the guest can tell what it writes.

    Args:
        asked: A migrate.v1.MigrationMode.
        has_dirty_log: Whether it can.
        reason: Why it cannot.

    Raises:
        ConfigError: the guest cannot be moved in the mode that was asked for.
    """
    if asked == types.MIGRATION_MODE_UNSPECIFIED:
        return types.MIGRATION_MODE_HYBRID if has_dirty_log else types.MIGRATION_MODE_POSTCOPY
    if asked in (types.MIGRATION_MODE_HYBRID, types.MIGRATION_MODE_PRECOPY) and not has_dirty_log:
        raise ConfigError(
            f"the guest keeps no log of the pages that it writes: {reason or 'it does not say why'}",
            remedy="move it with --mode postcopy",
        )
    return types.MigrationMode.ValueType(asked)


def check_peer_timeout(peer_timeout_us: int) -> None:
    """Whether a peer can be told from a lost one so soon.

    Raises:
        ConfigError: it cannot.
    """
    if peer_timeout_us and peer_timeout_us < PEER_TIMEOUT_MIN_US:
        raise ConfigError(
            f"a peer is not lost after {peer_timeout_us / 1000:g} ms: the least is {PEER_TIMEOUT_MIN_US / 1000:g} ms"
        )
    if peer_timeout_us > PEER_TIMEOUT_MAX_US:
        raise ConfigError(f"a peer timeout is at most {PEER_TIMEOUT_MAX_US / 1e6:g} s, not {peer_timeout_us / 1e6:g} s")


def is_id(migration_id: str) -> bool:
    """Whether a migration may be called so: its file is."""
    return _ID.fullmatch(migration_id) is not None


def check_id(migration_id: str) -> None:
    """Whether a migration may be called so.

    Raises:
        ConfigError: it may not.
    """
    if not is_id(migration_id):
        raise ConfigError(
            f"{migration_id[:80]!r} is no id of a migration: 1 to 64 of letters, digits, '_', '-' and, but first, '.'"
        )


def check_token(token: str, known: str) -> None:
    """Whether a caller knows what only this migration's peer knows. Takes as long for a wrong one.

    Raises:
        PermissionDeniedError: it does not.
    """
    if not secrets.compare_digest(token.encode(), known.encode()):
        raise PermissionDeniedError("the token is not this migration's")


def check_terms(mode: int, order: str) -> None:
    """Whether a migration can be done in the way it is asked for; both sides ask. It knows no orders, only their words.

    Raises:
        ConfigError: not by this version.
    """
    if mode not in SUPPORTED_MODES:
        raise ConfigError("this version migrates in modes postcopy, hybrid and precopy")
    check_order_word(order)


def check_order(order: str, orders: Collection[str]) -> None:
    """Whether a destination has an order of the background.

    Raises:
        UnsupportedHostError: it has not.
    """
    if order in orders:
        return
    remedy = "install its package at the destination and start the daemon there again"
    if ":" in order:
        remedy = f"start the destination's daemon with --policy {order}: it imports nothing that a peer names"
    raise UnsupportedHostError(
        f"the destination has no order {order!r}; it has {', '.join(orders)}", holder=GuestHolder.SOURCE, remedy=remedy
    )


def check_recorded_pages(recorded_pages: Sequence[int], region_pages: int) -> None:
    """Whether pages that an earlier run faulted on can be those of a guest.

    Raises:
        ConfigError: they cannot.
    """
    check_recorded_count(len(recorded_pages))
    if recorded_pages and max(recorded_pages) >= region_pages:
        raise ConfigError(f"the guest has {region_pages} pages: page {max(recorded_pages)} was recorded of another one")


def check_prepare(request: transfer.PrepareRequest, facts: HostFacts) -> None:
    """Whether this destination may build the twin that a source asks for. Changes nothing.

    Raises:
        MissingFeatureError: protocol version or page size do not match.
        ConfigError: the description makes no sense.
        UnsupportedHostError: there is no such order of the background here.
        NotEnoughMemoryError: what the guest occupies now does not fit.
    """
    if not PROTOCOL_VERSION - 1 <= request.protocol_version <= PROTOCOL_VERSION or request.protocol_version < 1:
        raise MissingFeatureError(
            f"the source speaks protocol version {request.protocol_version}, the destination {PROTOCOL_VERSION}",
            remedy="run the same or the next version of migrate on both hosts",
        )
    description = request.guest
    if description.page_size_bytes != PAGE_SIZE_BYTES:
        raise MissingFeatureError(
            f"the guest's RAM has pages of {description.page_size_bytes} bytes,"
            f" the destination offers pages of {PAGE_SIZE_BYTES}"
        )
    if not request.migration_id or not request.token:
        raise ConfigError("a migration needs an id and a token")
    check_id(request.migration_id)
    if len(request.token) > TOKEN_CHARS_MAX:
        raise ConfigError(f"a token has at most {TOKEN_CHARS_MAX} characters, not {len(request.token)}")
    if description.ByteSize() > DESCRIPTION_BYTES_MAX:
        raise ConfigError(
            f"a guest's description has at most {DESCRIPTION_BYTES_MAX} bytes, not {description.ByteSize()}"
        )
    if len(description.regions) != 1 or description.regions[0].region != 0:
        raise ConfigError(f"a guest has one RAM region, number 0; this one comes with {len(description.regions)}")
    region = description.regions[0]
    if region.size_bytes != description.spec.memory_bytes or not is_page_aligned(region.size_bytes):
        raise ConfigError(
            f"a region of {region.size_bytes} bytes is not the guest's memory of {description.spec.memory_bytes} bytes"
        )
    if not 0 < region.size_bytes <= MEMORY_MAX_BYTES:
        raise ConfigError(f"{format_bytes(region.size_bytes)} is no size of a guest's memory")
    check_terms(request.mode, request.order)
    check_order(request.order, facts.orders)
    check_recorded_pages(request.recorded_pages, bytes_to_pages(region.size_bytes))
    check_peer_timeout(request.peer_timeout_us)
    if region.resident_bytes > facts.available_bytes:
        raise NotEnoughMemoryError(
            f"the guest occupies {format_bytes(region.resident_bytes)},"
            f" the destination has {format_bytes(facts.available_bytes)} available",
            remedy="free memory at the destination or choose another one",
        )
