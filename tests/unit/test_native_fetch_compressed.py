"""The native fetch and compressed runs: those that were agreed on arrive, all others end it, and nothing is placed."""

import pytest

from migrate.errors import IntegrityError, RemoteProtocolError
from migrate.native._native import ffi, lib
from migrate.native.compression import Compression
from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import types_pb2 as types
from tests.harness.destination import PAGES, check_recovers, failure_of
from tests.harness.fake_source import common, is_background, is_urgent, urgent_first
from tests.harness.memory import PAGE
from tests.harness.waiting import wait_until
from tests.harness.zstd import BLOCK_BYTES_MAX, compressed, frame, rle

pytestmark = [pytest.mark.uffd, pytest.mark.timeout(60)]
ZSTD = Compression.ZSTD


def compressed_reply(request, data, compression=types.PAGE_COMPRESSION_ZSTD, **other):
    content = pb.Compressed(compression=compression, data=data)
    return pb.FetchPagesResponse(**common(request, **other), compressed=content)


def frame_of(count):
    """An honest frame of so many pages."""
    return frame(*(rle(b"x", PAGE, last=False) for _ in range(count - 1)), rle(b"x", PAGE), claims_bytes=count * PAGE)


def answer_compressed(call, request):
    """All that shrinks, zero pages too, goes compressed; the rest plain."""
    for response in call.answers(request):
        pages = call.source.memory.run(response.first_page, response.page_count)
        data = compressed(pages)
        if data is not None:
            response.compressed.compression = types.PAGE_COMPRESSION_ZSTD
            response.compressed.data = data
            response.digest = call.source.digest(response.first_page, response.page_count)
        call.reply(response)
    return True


def right_digest(memory):
    def digest(first, count):
        pages = [ffi.from_buffer(memory.page(page)) for page in range(first, first + count)]
        return lib.mig_digest_run(ffi.new("uint64_t[]", [lib.mig_digest_page(page) for page in pages]), count)

    return digest


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@pytest.mark.parametrize(
    "wanted", [lambda *_: True, is_background, is_urgent], ids=["both links", "background", "urgent"]
)
def test_compressed_runs_arrive_on_either_link_beside_plain_ones(destination, memory, source, wanted, verify):
    def answer(call, request):
        return wanted(call, request) and answer_compressed(call, request)

    made = source(on_request=urgent_first(answer), digest=right_digest(memory))
    check_recovers(destination, memory, made.endpoint, verify=verify, compression=ZSTD)


def test_source_may_send_plain_runs_though_compression_was_agreed_on(destination, memory, source):
    check_recovers(destination, memory, source().endpoint, compression=ZSTD)


def test_wrong_digest_of_a_compressed_run_is_an_integrity_error_and_places_nothing(destination, source):
    made = source(on_request=answer_compressed, digest=lambda *_: 12345)
    error = failure_of(destination, made.endpoint, verify=True, compression=ZSTD)
    assert type(error) is IntegrityError
    destination.fetch.stop()
    assert destination.pager.counters().background_pages == 0


LIES = {
    "not zstd": (lambda r: compressed_reply(r, b"\xff" * 100), "a compressed run that is not zstd"),
    "no bytes": (lambda r: compressed_reply(r, b""), "a compressed run that is not zstd"),
    "no compression named": (lambda r: compressed_reply(r, frame_of(r.page_count), 0), "another compression than zstd"),
    "compression none": (lambda r: compressed_reply(r, bytes(r.page_count * PAGE), 1), "another compression than zstd"),
    "unknown compression": (lambda r: compressed_reply(r, frame_of(r.page_count), 7), "another compression than zstd"),
    "empty content": (lambda r: pb.FetchPagesResponse(**common(r), compressed=pb.Compressed()), "another compression"),
    "too long": (lambda r: compressed_reply(r, frame_of(r.page_count + 1)), "claims to hold"),
    "too short": (lambda r: compressed_reply(r, frame_of(r.page_count), page_count=r.page_count - 1), "claims to hold"),
    "holds less": (
        lambda r: compressed_reply(r, frame(rle(b"x", 1), claims_bytes=r.page_count * PAGE)),
        "a compressed run that is broken",
    ),
    "cut off": (lambda r: compressed_reply(r, frame_of(r.page_count)[:-1]), "a compressed run that is broken"),
    "bytes behind it": (lambda r: compressed_reply(r, frame_of(r.page_count) + b"x"), "behind its end"),
    "no length": (lambda r: compressed_reply(r, frame(rle(b"x", PAGE))), "does not say how long it is"),
    "bomb": (
        lambda r: compressed_reply(
            r, frame(*[rle(b"x", BLOCK_BYTES_MAX, last=False)] * 200_000, claims_bytes=r.page_count * PAGE)
        ),
        "broken",
    ),
    "bomb that says so": (
        lambda r: compressed_reply(
            r, frame(*[rle(b"x", BLOCK_BYTES_MAX, last=False)] * 200_000, claims_bytes=BLOCK_BYTES_MAX * 200_000)
        ),
        "claims to hold 26214400000",
    ),
    "more pages than asked": (
        lambda r: compressed_reply(r, frame_of(r.page_count + 1), page_count=r.page_count + 1),
        "has data up to page",
    ),
    "count of 2^32-1": (lambda r: compressed_reply(r, frame_of(1), page_count=2**32 - 1), "has data up to page"),
    "another run's": (lambda r: compressed_reply(r, frame_of(r.page_count), first_page=9), "expected"),
}


def check_refused(destination, made, words, **terms):
    """The error says it, the client leaves, and nothing of it is in the guest's memory."""
    error = failure_of(destination, made.endpoint, **terms)
    assert type(error) is RemoteProtocolError
    assert error.message.startswith(("the source sent ", "a reply ", "reply "))
    assert words in error.message
    wait_until(lambda: any(peer.is_closed for peer in made.peers), 10, "the connection to be ended")
    destination.fetch.stop()
    assert destination.placed_bytes == 0
    assert destination.pager.counters().missing_pages == PAGES


@pytest.mark.parametrize("name", LIES)
def test_lie_in_a_compressed_run_ends_the_fetch_and_places_nothing(destination, source, name):
    lie, words = LIES[name]

    def answer(call, request):
        call.reply(lie(request))
        return True

    check_refused(destination, source(on_request=answer), words, compression=ZSTD)


@pytest.mark.parametrize("wanted", [is_background, is_urgent], ids=["background", "urgent"])
def test_compressed_run_that_was_not_agreed_on_is_a_protocol_error_that_says_so(destination, source, wanted):
    def answer(call, request):
        if wanted(call, request):
            call.reply(compressed_reply(request, frame_of(request.page_count)))
        return True

    destination.touch(PAGES - 1)  # which the capped background does not come to before
    words = "compressed run, but no compression was agreed on"
    check_refused(destination, source(on_request=answer), words, max_bandwidth_bytes_per_s=PAGE)
