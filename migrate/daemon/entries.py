"""What is written down of a migration at its start, from the request that begins it on either side."""

import secrets

from migrate.config import Endpoint
from migrate.daemon.guests import HostedGuest
from migrate.session.rules import choose_compression, choose_transport
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types


def source_entry(
    migration_id: str,
    request: operator.StartMigrationRequest,
    guest: HostedGuest,
    mode: "types.MigrationMode.ValueType",
) -> saved.SavedMigration:
    """A migration that an operator starts here."""
    source = saved.SavedSource(
        request=request,
        token=secrets.token_urlsafe(32),
        instance=guest.client.instance,
        to=request.to,
        kind=guest.spec.kind,
    )
    source.request.mode = mode
    return saved.SavedMigration(migration_id=migration_id, source=source)


def destination_entry(request: transfer.PrepareRequest, peer_host: str) -> saved.SavedMigration:
    """An attempt that arrives here.

    Args:
        request: What the source says of it.
        peer_host: Where the call came from.

    Raises:
        ConfigError: an endpoint is none.
    """
    transport = choose_transport(request.transport)
    destination = saved.SavedDestination(
        guest=request.guest.spec.name,
        token=request.token,
        attempt=request.attempt or 1,
        control_endpoint=str(reachable(request.control_endpoint, peer_host)),
        page_endpoint=str(reachable(request.page_endpoint, peer_host)),
        mode=request.mode,
        order=request.order,
        transport=transport,
        compression=choose_compression(request.compression, transport),
        max_bandwidth_bytes_per_s=request.max_bandwidth_bytes_per_s,
        verify=request.verify,
        peer_timeout_us=request.peer_timeout_us,
        deadline_us=request.deadline_us,
        on_deadline=request.on_deadline,
        trace=request.trace,
        recorded_pages=request.recorded_pages,
    )
    return saved.SavedMigration(migration_id=request.migration_id, destination=destination)


def reachable(endpoint: str, peer_host: str) -> Endpoint:
    """A peer's endpoint, with the host that its call came from where it names none.

    Raises:
        ConfigError: it is no endpoint.
    """
    parsed = Endpoint.parse(endpoint)
    return Endpoint(peer_host, parsed.port) if parsed.is_unspecified else parsed
