"""PageService on grpcio: the reference that any other implementation is compared with."""

import time
from collections.abc import Callable, Iterator

import grpc

from migrate.config import REQUEST_PAGES_MAX
from migrate.errors import ConfigError
from migrate.native.exports import METADATA_AUTHORIZATION, METADATA_MIGRATION_ID, Export, Exports
from migrate.native.page_source import Run, RunBuffer
from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import page_service_pb2_grpc as rpc

_ZERO = pb.ZeroPages()


class PageServicer(rpc.PageServiceServicer):
    """Answers requests in their order, from the exports that the caller has the token for.

    Args:
        exports: What is served.
        check_party: Raises if the caller, token or not, must not have the pages of that migration, which are for that
            host alone.
    """

    def __init__(
        self, exports: Exports, check_party: Callable[[str, str, grpc.ServicerContext], None] | None = None
    ) -> None:
        self._exports = exports
        self._check_party = check_party

    def FetchPages(  # noqa: N802 - the name is the proto's
        self, request_iterator: Iterator[pb.FetchPagesRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.FetchPagesResponse]:
        """Serve one stream.

        Raises:
            MigrateError: the first request that cannot be answered ends the stream.
        """
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        migration_id, authorization = metadata.get(METADATA_MIGRATION_ID, ""), metadata.get(METADATA_AUTHORIZATION, "")
        buffer = RunBuffer(REQUEST_PAGES_MAX)
        with self._exports.find(migration_id, authorization) as export:
            if self._check_party is not None and export.peer_name:
                self._check_party(migration_id, export.peer_name, context)
            for request in request_iterator:
                yield from self._answer(export, request, buffer)

    def _answer(
        self, export: Export, request: pb.FetchPagesRequest, buffer: RunBuffer
    ) -> Iterator[pb.FetchPagesResponse]:
        began_ns = time.monotonic_ns()
        with export.reading() as source:
            if request.region != 0:
                raise ConfigError(f"the guest has one RAM region, number 0, not number {request.region}")
            generation = export.generation
            # Read all before the first reply leaves: the scope must not stay open while the peer is slow.
            runs = list(source.read(request.first_page, request.page_count, buffer))
        for run in runs:
            read_ns = time.monotonic_ns() - began_ns if export.times_replies else 0
            yield _response(request, run, generation, read_ns)


def _response(request: pb.FetchPagesRequest, run: Run, generation: int, read_ns: int) -> pb.FetchPagesResponse:
    response = pb.FetchPagesResponse(
        request_id=request.request_id,
        region=request.region,
        first_page=run.first_page,
        page_count=min(run.count_pages, 0xFFFFFFFF),
        generation=generation,
        digest=run.digest,
        read_ns=read_ns,
    )
    if run.data is None:
        response.zero.CopyFrom(_ZERO)
    else:
        response.data = run.data
    return response
