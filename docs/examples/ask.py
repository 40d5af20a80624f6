#!/usr/bin/env python3
"""Makes any call of a daemon with stock gRPC alone: what the call looks like, the daemon says itself (reflection).

    ask.py HOST:PORT list
    ask.py HOST:PORT SERVICE/METHOD [JSON]

Needs grpcio and grpcio-reflection, and nothing of migrate. With MIGRATE_TLS_DIR, it speaks TLS.
"""

import os
import sys
from pathlib import Path

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def open_channel(address: str) -> grpc.Channel:
    """In plain text, or with the certificate of a TLS directory."""
    options = [("grpc.enable_http_proxy", 0)]
    tls_dir = os.environ.get("MIGRATE_TLS_DIR")
    if not tls_dir:
        return grpc.insecure_channel(address, options)
    ca, key, certificate = ((Path(tls_dir) / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem"))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options)


def main(address: str, name: str, text: str = "{}") -> None:
    """Print the answer, or each of a stream of them, as a line of JSON."""
    with open_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        if name == "list":
            print(*sorted(database.get_services()), sep="\n")
            return
        service, _, method_name = name.rpartition("/")
        method = DescriptorPool(database).FindServiceByName(service).FindMethodByName(method_name)
        request_class = message_factory.GetMessageClass(method.input_type)
        answer_class = message_factory.GetMessageClass(method.output_type)
        make = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = make(f"/{name}", request_class.SerializeToString, answer_class.FromString)
        answer = call(json_format.Parse(text, request_class()), timeout=60)
        for message in answer if method.server_streaming else [answer]:
            print(json_format.MessageToJson(message, indent=None))


if __name__ == "__main__":
    main(*sys.argv[1:])
