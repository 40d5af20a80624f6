"""What a gRPC client presents, and whom it trusts, from a TLS directory."""

import grpc

from migrate.tls import TlsMaterial


def channel_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """Credentials for a channel that is made now; they do not change with the files.

    Raises:
        ConfigError: peers are named, but none that a CA vouches for.
    """
    return grpc.ssl_channel_credentials(material.server_roots_pem, material.key_pem, material.certificate_pem)
