"""Connections of gRPC clients: in plaintext or over TLS, and how a lost one is noticed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
import grpc.aio

if TYPE_CHECKING:  # cryptography takes a while to load, and only TLS needs it
    from migrate.tls import TlsMaterial

ChannelOptions = Sequence[tuple[str, int]]


def open_channel(address: str, credentials: grpc.ChannelCredentials | None, options: ChannelOptions) -> grpc.Channel:
    """A channel to HOST:PORT, which the first call connects; without credentials, in plaintext."""
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def open_aio_channel(
    address: str, credentials: grpc.ChannelCredentials | None, options: ChannelOptions
) -> grpc.aio.Channel:
    """The same for asyncio, where an event loop runs."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def channel_credentials(material: "TlsMaterial") -> grpc.ChannelCredentials:
    """Credentials for a channel that is made now, from a TLS directory; they do not change with the files.

    Raises:
        ConfigError: peers are named, but none that a CA vouches for.
    """
    return grpc.ssl_channel_credentials(material.server_roots_pem, material.key_pem, material.certificate_pem)


def keepalive_options(silence_ms: int, answer_ms: int) -> ChannelOptions:
    """Of a connection that is asked for a sign of life after a silence, and is lost if none comes in time.

    grpcio 1.85 never looks at keepalive_timeout_ms (grpc/grpc#39239), and gives up a PING after ping_timeout_ms. It
    sends one a second at most, so that a loss is not known sooner than in about a second and a half.
    A stock server that is not told to bear such PINGs ends a connection on which it has nothing to send.
    """
    return (
        ("grpc.keepalive_time_ms", silence_ms),
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
