"""A destination that builds no twin: it answers as a test makes it, and comes for pages as badly as it is told to."""

import threading
from concurrent import futures

import grpc

from migrate.config import PROTOCOL_VERSION
from migrate.daemon.status import METADATA_ERROR
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import transfer_service_pb2_grpc as transfer_rpc
from migrate.v1 import types_pb2 as types

_METHODS = ("Prepare", "Invalidate", "Switchover", "GetIncoming", "Abort", "Complete", "ResumeMigration")


class HostileDestination:
    """Listens on a port of its own. `prepared` is the PrepareRequest that came last, with the token in it.

    Args:
        answers: Method -> what is called with the request and the context, and returns a message, or bytes.
    """

    def __init__(self, **answers):
        self.prepared = None
        self.came = threading.Event()
        self.calls = []
        self._answers = answers
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._answering(name),
                getattr(transfer, f"{name}Request").FromString,
                lambda reply: reply if isinstance(reply, bytes) else reply.SerializeToString(),
            )
            for name in _METHODS
        }
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        service = transfer.DESCRIPTOR.services_by_name["TransferService"].full_name
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stop(0).wait()

    @property
    def metadata(self):
        """With which the source serves its pages."""
        return (("migration-id", self.prepared.migration_id), ("authorization", f"Bearer {self.prepared.token}"))

    def _answering(self, name):
        def answer(request, context):
            self.calls.append(name)
            if name == "Prepare":
                self.prepared = request
                self.came.set()
            return self._answers.get(name, getattr(self, f"_{name}", _nothing(name)))(request, context)

        return answer

    def _Prepare(self, request, _context):
        return transfer.PrepareResponse(protocol_version=PROTOCOL_VERSION, transport=request.transport)

    def _GetIncoming(self, request, _context):
        pages = types.PageCounts(total=self.prepared.guest.spec.memory_bytes >> 12)
        seen = types.Migration(
            migration_id=request.migration_id,
            side=types.MIGRATION_SIDE_DESTINATION,
            state=types.MIGRATION_STATE_PRECOPY,
            pages=pages,
        )
        return transfer.GetIncomingResponse(migration=seen)


def _nothing(name):
    return lambda *_: getattr(transfer, f"{name}Response")()


def raising(kind, message="because I say so", holder=types.GUEST_HOLDER_NONE, status=grpc.StatusCode.INTERNAL):
    """An answer that is an error of that class's name, from whom it may be or not."""
    info = types.ErrorInfo(type=kind, message=message, holder=holder).SerializeToString()
    return raising_bytes(info, status)


def raising_bytes(info, status=grpc.StatusCode.INTERNAL):
    def answer(_request, context):
        context.set_trailing_metadata(((METADATA_ERROR, info),))
        context.abort(status, "no")

    return answer


def transfer_stub(channel):
    return transfer_rpc.TransferServiceStub(channel)
