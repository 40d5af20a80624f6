"""The `migrate` command: talks gRPC to daemons, draws, prints JSON."""

import os

# gRPC for Python cannot be told the lowest TLS version (grpc/grpc#37305). This list is for TLS 1.2 only, and of the one
# cipher in it nobody has the key, so that what is left is TLS 1.3. gRPC reads it once, when it is loaded.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-PSK-CHACHA20-POLY1305"
