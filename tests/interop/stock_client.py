"""A destination that knows nothing but proto/: stubs generated here, no module of this project imported.

Run as a script: stock_client.py PROTO_DIR OUT_DIR; speaks lines on stdin and stdout.
It serves TransferService; when Switchover comes, and so the guest is paused, it fetches every page of the guest, some
of them one by one and in odd order, writes them to OUT_DIR/memory, and refuses the switchover.
"""

import json
import sys
from concurrent import futures
from importlib.resources import files
from pathlib import Path

import grpc
from grpc_tools import protoc

# ruff: noqa: T201


def generate(proto_dir, out_dir):
    protos = [str(path) for path in sorted(Path(proto_dir).glob("migrate/v1/*.proto"))]
    status = protoc.main(
        [
            *("protoc", f"-I{proto_dir}", f"-I{files('grpc_tools') / '_proto'}"),
            *(f"--python_out={out_dir}", f"--grpc_python_out={out_dir}", *protos),
        ]
    )
    assert status == 0


def fetch(stub, pb, metadata, asked):
    """Pages of each (first, count) asked for: a list of bytes, in the order of the requests."""
    requests = [
        pb.FetchPagesRequest(request_id=index, first_page=first, page_count=count)
        for index, (first, count) in enumerate(asked)
    ]
    got = [b""] * len(asked)
    for response in stub.FetchPages(iter(requests), metadata=metadata):
        index = response.request_id
        first, count = asked[index]
        assert response.first_page == first + len(got[index]) // 4096
        kind = response.WhichOneof("content")
        got[index] += response.data if kind == "data" else bytes(response.page_count * 4096)
        got[index] = got[index][: count * 4096]
    assert [len(part) for part in got] == [count * 4096 for _, count in asked]
    return got


def fetch_status(stub, pb, metadata, **request):
    """The status that one request ends with."""
    try:
        list(stub.FetchPages(iter([pb.FetchPagesRequest(**request)]), metadata=metadata))
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def main():
    proto_dir, out_dir = sys.argv[1:3]
    generate(proto_dir, out_dir)
    sys.path.insert(0, out_dir)
    from migrate.v1 import (
        page_service_pb2 as pb,
    )
    from migrate.v1 import (
        page_service_pb2_grpc as page_rpc,
    )
    from migrate.v1 import (
        transfer_service_pb2 as transfer,
    )
    from migrate.v1 import (
        transfer_service_pb2_grpc as transfer_rpc,
    )
    from migrate.v1 import (
        types_pb2 as types,
    )

    assert pb.__file__.startswith(out_dir)

    class Destination(transfer_rpc.TransferServiceServicer):
        def Prepare(self, request, context):
            self.prepare = request
            return transfer.PrepareResponse(protocol_version=1, transport=1)

        def Abort(self, request, context):
            return transfer.AbortResponse()

        def Switchover(self, request, context):
            prepare = self.prepare
            pages = prepare.guest.regions[0].size_bytes // 4096
            metadata = [("migration-id", prepare.migration_id), ("authorization", f"Bearer {prepare.token}")]
            with grpc.insecure_channel(prepare.page_endpoint, options=[("grpc.enable_http_proxy", 0)]) as channel:
                stub = page_rpc.PageServiceStub(channel)
                runs = [(first, min(256, pages - first)) for first in range(0, pages, 256)]
                memory = b"".join(fetch(stub, pb, metadata, runs))
                Path(out_dir, "memory").write_bytes(memory)
                odd = [(page, 1) for page in range(pages - 1, 0, -97)]
                singles = fetch(stub, pb, metadata, odd)
                good = {"first_page": 0, "page_count": 1}
                result = {
                    "singles_equal": all(
                        part == memory[page * 4096 : (page + 1) * 4096]
                        for (page, _), part in zip(odd, singles, strict=True)
                    ),
                    "statuses": {
                        "beyond": fetch_status(stub, pb, metadata, first_page=pages, page_count=1),
                        "too many": fetch_status(stub, pb, metadata, first_page=0, page_count=257),
                        "none": fetch_status(stub, pb, metadata, first_page=0, page_count=0),
                        "region": fetch_status(stub, pb, metadata, region=1, **good),
                        "no token": fetch_status(stub, pb, metadata[:1], **good),
                        "wrong token": fetch_status(stub, pb, [metadata[0], ("authorization", "Bearer x")], **good),
                        "no migration": fetch_status(stub, pb, [("migration-id", "x"), metadata[1]], **good),
                    },
                }
            print(json.dumps(result), flush=True)
            sys.stdin.readline()
            # A refusal that names the source as the holder: the guest never ran here.
            info = types.ErrorInfo(
                type="MigrationAbortedError", message="refused by the stock client", holder=types.GUEST_HOLDER_SOURCE
            )
            context.set_trailing_metadata([("migrate-error-bin", info.SerializeToString())])
            context.abort(grpc.StatusCode.ABORTED, "refused by the stock client")

    server = grpc.server(futures.ThreadPoolExecutor(4))
    transfer_rpc.add_TransferServiceServicer_to_server(Destination(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(json.dumps({"port": port}), flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
