"""The native page server and compression: which runs travel so, to whom, and that they arrive."""

import itertools

import pytest
from hyperframe import frame as frames

from migrate.native._native import ffi, lib
from migrate.native.compression import Compression
from tests.harness.h2_peer import WINDOW_MAX, Peer, Settings, request
from tests.harness.memory import (
    MIGRATION_ID,
    PAGE,
    ServedMemory,
    content_of,
    half_random_page_bytes,
    page_bytes,
    pages_of,
    random_page_bytes,
    requests_for,
    runs_of,
    stock_status,
)
from tests.harness.page_server import flood_caller

pytestmark = pytest.mark.timeout(60)
PAGES = 1024
FILLS = {"dense": page_bytes, "half random": half_random_page_bytes, "random": random_page_bytes}


@pytest.fixture
def serve():
    """Makes servers whose reader understands zstd."""
    made = []

    def make(fill=page_bytes, compression=Compression.ZSTD):
        made.append(ServedMemory(PAGES, compression=compression, fill=fill))
        return made[-1]

    yield make
    for each in made:
        each.close()


def fetched(served, asked):
    """The replies that a stock client gets; together they are what was asked for."""
    _, _, replies = stock_status(served.endpoint, requests_for(asked))
    assert pages_of(replies, asked) == [served.memory.run(*each) for each in asked]
    return replies


def kinds_of(replies):
    return {reply.WhichOneof("content") for reply in replies}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", [4, 5, 64, 256])
def test_stock_client_gets_bulk_runs_compressed_if_they_shrink(serve, fill, size):
    replies = fetched(serve(FILLS[fill]), runs_of(PAGES, size))
    assert kinds_of(replies) == {"data" if fill == "random" else "compressed", "zero"}
    for reply in replies:
        if reply.WhichOneof("content") == "compressed":
            assert len(reply.compressed.data) <= reply.page_count * PAGE * 7 // 8


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_requests_are_never_compressed(serve, size):
    served = serve()
    asked = runs_of(PAGES, size)
    assert kinds_of(fetched(served, asked)) == {"data", "zero"}
    # Nor beside bulk ones of the same call.
    mixed = [run for pair in zip(runs_of(PAGES, 64), asked, strict=False) for run in pair]
    replies = fetched(served, mixed)
    assert {r.WhichOneof("content") for r in replies if mixed[r.request_id - 1][1] == size} <= {"data", "zero"}
    assert "compressed" in kinds_of(replies)


def test_only_the_reader_who_understands_it_gets_compressed_runs(serve):
    assert kinds_of(fetched(serve(compression=Compression.NONE), runs_of(PAGES))) == {"data", "zero"}


def test_runs_that_shrink_and_runs_that_do_not_mix(serve):
    def fill(page):
        return random_page_bytes(page) if page // 64 % 2 else page_bytes(page)

    replies = fetched(serve(fill), runs_of(PAGES, 64))
    for reply in replies:
        kind = reply.WhichOneof("content")
        assert kind == "zero" or (kind == "data") == bool(reply.first_page // 64 % 2)


@pytest.mark.parametrize("taken", [True, False], ids=["taken before", "of each reply"])
def test_digest_is_that_of_the_pages_before_they_were_compressed(serve, taken):
    served = serve()
    if taken:
        served.source.take_digests()
    else:
        served.source.digest_replies()
    for reply in fetched(served, runs_of(PAGES, 100)):
        if reply.WhichOneof("content") == "zero":
            continue
        content = content_of(reply)
        pages = [ffi.from_buffer(content[at : at + PAGE]) for at in range(0, len(content), PAGE)]
        digests = ffi.new("uint64_t[]", [lib.mig_digest_page(page) for page in pages])
        assert reply.digest == lib.mig_digest_run(digests, len(pages))


def test_compressed_bytes_live_until_a_slow_peer_has_taken_them(serve):
    """Its windows and buffers are small, and it reads only once the server can send no more."""
    served = serve(half_random_page_bytes)
    asked = [(first, 256) for first in (0, 256, 512)] * 16
    with flood_caller(served) as peer:
        stream = peer.stream(1)
        peer.receive(lambda: len(stream.data) > 20 * 256 * PAGE // 2, "many replies")
        peer.data(1, b"", end=True)
        peer.receive_end()
        responses = stream.responses()
        assert pages_of(responses, asked) == [served.memory.run(*each) for each in asked]
        assert "compressed" in kinds_of(responses)


def test_compressed_bytes_live_while_flow_control_holds_them_back(serve):
    """The window opens in small steps, in which requests go on arriving."""
    served = serve(half_random_page_bytes)
    asked = list(zip(range(0, 800, 20), itertools.cycle([1, 200, 3, 4, 50, 4, 1]), strict=False))
    with Peer.connect(served.endpoint) as peer:
        peer.opens_windows = False
        peer.greet_server({Settings.INITIAL_WINDOW_SIZE: 0}, WINDOW_MAX - 65535)
        peer.call()
        stream = peer.stream(1)
        for each in requests_for(asked):
            peer.ask(1, each)
            peer.receive_pong()
            peer.send_frames(frames.WindowUpdateFrame(1, window_increment=30_011))
            peer.receive_pong()
        peer.data(1, b"", end=True)
        peer.send_frames(frames.WindowUpdateFrame(1, window_increment=1 << 28))
        peer.receive_end()
        assert pages_of(stream.responses(), asked) == [served.memory.run(*each) for each in asked]


def test_withdrawal_does_not_touch_what_was_compressed_before(serve):
    """It is a copy: whoever runs on the memory afterwards cannot change it, and it keeps nobody waiting."""
    served = serve()
    with Peer.connect(served.endpoint) as peer:
        peer.opens_windows = False
        peer.greet_server({Settings.INITIAL_WINDOW_SIZE: 0})
        peer.call()
        peer.ask(1, request(8, 8, request_id=1), end=True)
        peer.receive_pong()
        peer.receive_pong()
        served.exports.withdraw(MIGRATION_ID)
        peer.send_frames(frames.WindowUpdateFrame(1, window_increment=1 << 20))
        stream = peer.receive_end()
        assert stream.status[0] == 0
        assert pages_of(stream.responses(), [(8, 8)]) == [served.memory.run(8, 8)]
