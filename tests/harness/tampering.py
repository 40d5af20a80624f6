"""A man in the middle of a migration: forwards every call, and changes pages on their way to the destination."""

from concurrent import futures

import grpc

from migrate.v1 import page_service_pb2_grpc as page_rpc
from migrate.v1 import transfer_service_pb2_grpc as transfer_rpc
from tests.harness.daemons import channel_to


class TamperingPeer(transfer_rpc.TransferServiceServicer, page_rpc.PageServiceServicer):
    """Stands before a destination daemon; the source is told its address.

    Args:
        destination: Address of the real destination.
        tamper: Called with each FetchPagesResponse, which it may change.
        prepare: Called with the PrepareRequest before it is forwarded, which it may change.
    """

    def __init__(self, destination, tamper=lambda response: None, prepare=lambda request: None):
        self._tamper = tamper
        self._prepare = prepare
        self._channels = [channel_to(destination)]
        self._destination = transfer_rpc.TransferServiceStub(self._channels[0])
        self._source_pages = None
        self._server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
        transfer_rpc.add_TransferServiceServicer_to_server(self, self._server)
        page_rpc.add_PageServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stop(0).wait()
        for channel in self._channels:
            channel.close()

    def _forward(self, method, request, context):
        try:
            return method(request, timeout=60)
        except grpc.RpcError as error:
            context.set_trailing_metadata(
                [(k, v) for k, v in error.trailing_metadata() or () if k.startswith("migrate-")]
            )
            context.abort(error.code(), error.details())

    def Prepare(self, request, context):
        self._channels.append(channel_to(request.page_endpoint))
        self._source_pages = page_rpc.PageServiceStub(self._channels[-1])
        request.page_endpoint = self.address
        self._prepare(request)
        return self._forward(self._destination.Prepare, request, context)

    def Switchover(self, request, context):
        return self._forward(self._destination.Switchover, request, context)

    def GetIncoming(self, request, context):
        return self._forward(self._destination.GetIncoming, request, context)

    def Abort(self, request, context):
        return self._forward(self._destination.Abort, request, context)

    def FetchPages(self, request_iterator, context):
        metadata = [(k, v) for k, v in context.invocation_metadata() if k in ("migration-id", "authorization")]
        call = self._source_pages.FetchPages(request_iterator, metadata=metadata)
        context.add_callback(call.cancel)
        try:
            for response in call:
                self._tamper(response)
                yield response
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())
