"""A small guest's memory on the source: what is in it, served or not, and what a stock client gets of it."""

import contextlib
import hashlib
import os

import grpc

from migrate.config import Endpoint
from migrate.native.compression import Compression
from migrate.native.exports import Exports
from migrate.native.page_source import PageSource
from migrate.native.pageserver import PageServer
from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import page_service_pb2_grpc as rpc
from migrate.v1 import types_pb2 as types
from tests.harness.zstd import decompressed

PAGE = 4096
MIGRATION_ID, TOKEN = "m", "t"
METADATA = (("migration-id", MIGRATION_ID), ("authorization", f"Bearer {TOKEN}"))
CHANNEL_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
_CALL_S = 30


def page_bytes(page):
    """What the page of this number holds; no two are alike."""
    return page.to_bytes(8, "little") * (PAGE // 16) + bytes([page % 255 + 1]) * (PAGE // 2)


def random_page_bytes(page):
    """What nothing compresses."""
    return hashlib.shake_128(page.to_bytes(8, "little")).digest(PAGE)


def half_random_page_bytes(page):
    """What shrinks to about a half."""
    return random_page_bytes(page)[: PAGE // 2] + bytes(PAGE // 2)


class Memory:
    """A memfd: mostly data, with zero pages (7 of 64), and a hole of the last eighth.

    Args:
        pages: Its length.
        fill: Called with the number of a page of data; its bytes.
    """

    def __init__(self, pages, fill=page_bytes):
        self.pages = pages
        self.fill = fill
        self.data_end = pages - pages // 8
        self.fd = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, pages * PAGE)
        for page in range(self.data_end):
            os.pwrite(self.fd, self.page(page), page * PAGE)

    def page(self, page):
        is_zero = page >= self.data_end or page % 64 in (0, 5, 6, 7, 20, 40, 63)
        return bytes(PAGE) if is_zero else self.fill(page)

    def run(self, first_page, page_count):
        return b"".join(self.page(page) for page in range(first_page, first_page + page_count))

    def close(self):
        os.close(self.fd)


class ServedMemory:
    """A memory that the native page server serves as migration "m" to who has the token "t"."""

    def __init__(
        self,
        pages=1024,
        host="127.0.0.1",
        compression=Compression.NONE,
        fill=page_bytes,
        tls=None,
        peer_name="",
        patience=None,
    ):
        self.memory = Memory(pages, fill)
        self.compression = compression
        self.source = PageSource(self.memory.fd, pages)
        self.exports = Exports()
        self.exports.publish(MIGRATION_ID, TOKEN, self.source, compression, peer_name)
        self.server = PageServer(Endpoint(host, 0), self.exports, tls, patience)

    @property
    def endpoint(self):
        return self.server.endpoint

    def publish_again(self):
        """After a withdrawal. Does nothing if it is still published."""
        self.exports.withdraw(MIGRATION_ID)
        self.exports.publish(MIGRATION_ID, TOKEN, self.source, self.compression)

    def close(self):
        self.server.close()
        self.exports.withdraw(MIGRATION_ID)
        self.source.close()
        self.memory.close()


def runs_of(pages, size=256):
    return [(first, min(size, pages - first)) for first in range(0, pages, size)]


def content_of(response):
    """The pages of a reply, whatever they travelled as."""
    kind = response.WhichOneof("content")
    if kind == "compressed":
        assert response.compressed.compression == types.PAGE_COMPRESSION_ZSTD
        return decompressed(response.compressed.data, response.page_count)
    return response.data if kind == "data" else bytes(response.page_count * PAGE)


def pages_of(responses, asked):
    """The bytes of each (first, count) asked for, from the replies to requests numbered from 1; checks their order."""
    got = [b""] * len(asked)
    last = 1
    for response in responses:
        assert response.request_id in {last, last + 1}, "replies come in request order"
        last = response.request_id
        first, count = asked[last - 1]
        assert response.first_page == first + len(got[last - 1]) // PAGE, "runs ascend without gaps"
        content = content_of(response)
        assert len(content) == response.page_count * PAGE
        got[last - 1] = (got[last - 1] + content)[: count * PAGE]
    assert [len(part) for part in got] == [count * PAGE for _, count in asked], "every request is answered whole"
    return got


def requests_for(asked):
    return [
        pb.FetchPagesRequest(request_id=index, first_page=first, page_count=count)
        for index, (first, count) in enumerate(asked, 1)
    ]


def stock_channel(endpoint, credentials=None, options=()):
    """A channel on a connection of its own."""
    options = (*CHANNEL_OPTIONS, *options)
    if credentials is None:
        return grpc.insecure_channel(str(endpoint), options=options)
    return grpc.secure_channel(str(endpoint), credentials, options=options)


def stock_fetch(endpoint, asked, metadata=METADATA, credentials=None, options=()):
    """Fetch runs with a stock grpcio client on a connection of its own; the bytes of each."""
    with stock_channel(endpoint, credentials, options) as channel:
        responses = rpc.PageServiceStub(channel).FetchPages(
            iter(requests_for(asked)), metadata=metadata, timeout=_CALL_S
        )
        return pages_of(responses, asked)


def stock_status(endpoint, requests, metadata=METADATA, timeout=_CALL_S, credentials=None):
    """(code, details, replies) of a call by a stock client."""
    replies = []
    with stock_channel(endpoint, credentials) as channel:
        call = rpc.PageServiceStub(channel).FetchPages(iter(requests), metadata=metadata, timeout=timeout)
        with contextlib.suppress(grpc.RpcError):
            replies.extend(call)
        return call.code(), call.details(), replies
