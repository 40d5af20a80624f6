"""The native fetch against sources that lie or do not speak gRPC: the error says why, and nothing false is placed."""

import urllib.parse

import grpc
import pytest

from migrate.errors import ChannelError, IntegrityError, RemoteProtocolError
from migrate.native._native import ffi, lib
from migrate.v1 import page_service_pb2 as pb
from tests.harness.destination import PAGES, check_recovers, failure_of
from tests.harness.fake_source import Once, common, data_reply, is_background, zero_reply
from tests.harness.h2_peer import prefixed
from tests.harness.memory import PAGE

pytestmark = pytest.mark.uffd
RETRIED = {"CANCELLED", "UNAVAILABLE"}
REFUSED_STREAM, CANCEL, CALM = 7, 8, 11


# ---- sources that lie: nothing is placed, the error says what was wrong ----


LIES = {
    "wrong order": (lambda r: data_reply(r, request_id=r.request_id + 1), "is the oldest"),
    "request 0": (lambda r: zero_reply(r, request_id=0), "is the oldest"),
    "gap": (lambda r: zero_reply(r, first_page=r.first_page + 1), "expected"),
    "step back": (lambda r: zero_reply(r, first_page=2**64 - 1), "expected"),
    "no page": (lambda r: pb.FetchPagesResponse(**common(r, page_count=0), data=b""), "expected"),
    "no zero page": (lambda r: zero_reply(r, page_count=0), "expected"),
    "more data than asked": (
        lambda r: data_reply(r, page_count=r.page_count + 1, data=bytes((r.page_count + 1) * PAGE)),
        "has data up to page",
    ),
    "data too long": (lambda r: data_reply(r, data=bytes(r.page_count * PAGE + 1)), "not as long as it says"),
    "data too short": (lambda r: data_reply(r, data=bytes(r.page_count * PAGE - 1)), "not as long as it says"),
    "data of nothing": (lambda r: data_reply(r, data=b""), "not as long as it says"),
    "count of 2^32-1": (lambda r: data_reply(r, page_count=2**32 - 1), "not as long as it says"),
    "no content": (lambda r: pb.FetchPagesResponse(**common(r)), "without content"),
    "empty message": (lambda _: b"", "without content"),
    "another region": (lambda r: zero_reply(r, region=1), "region"),
    "not protobuf": (lambda _: b"\xff" * 40, "not a FetchPagesResponse"),
    "cut off": (lambda r: data_reply(r).SerializeToString()[:-1], "not a FetchPagesResponse"),
    "zero that is no message": (
        lambda r: pb.FetchPagesResponse(**common(r)).SerializeToString() + b"\x3a\x01\xff",
        "not a",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_lie_ends_the_fetch_with_a_protocol_error_and_places_nothing(destination, source, name):
    lie, words = LIES[name]

    def answer(call, request):
        call.reply(lie(request))
        return True

    error = failure_of(destination, source(on_request=answer).endpoint)
    assert type(error) is RemoteProtocolError
    assert words in error.message
    destination.fetch.stop()
    assert destination.placed_bytes == 0
    assert destination.pager.counters().missing_pages == PAGES


def test_reply_that_nobody_asked_for_is_a_protocol_error(destination, source):
    def begin(call):
        call.reply(pb.FetchPagesResponse(request_id=1, page_count=1, zero=pb.ZeroPages()))
        return True

    served = source(on_call=begin, on_request=lambda *_: True)
    error = failure_of(destination, served.endpoint)
    assert type(error) is RemoteProtocolError
    assert "no request is open" in error.message or "expected" in error.message


def test_second_answer_to_a_request_is_a_protocol_error(destination, source):
    def answer(call, request):
        call.answer(request)
        call.answer(request)
        return True

    assert type(failure_of(destination, source(on_request=answer).endpoint)) is RemoteProtocolError


@pytest.mark.parametrize("digest", [0, 12345])
def test_wrong_digest_is_an_integrity_error_and_places_nothing(destination, source, digest):
    error = failure_of(destination, source(digest=lambda *_: digest).endpoint, verify=True)
    assert type(error) is IntegrityError
    assert "do not have the source's digest" in error.message
    destination.fetch.stop()
    assert destination.placed_bytes == 0


def test_digests_are_not_looked_at_without_verify(destination, memory, source):
    check_recovers(destination, memory, source(digest=lambda *_: 12345).endpoint)


def test_right_digests_of_a_foreign_source_are_accepted(destination, memory, source):
    def digest(first, count):
        pages = [ffi.from_buffer(memory.page(page)) for page in range(first, first + count)]
        return lib.mig_digest_run(ffi.new("uint64_t[]", [lib.mig_digest_page(page) for page in pages]), count)

    check_recovers(destination, memory, source(digest=digest).endpoint, verify=True)


def test_replies_before_a_lie_stay_and_what_is_known_to_be_zero_is_served_after_it(destination, memory, source):
    """The guest runs on as far as it can when the link has failed."""

    def answer(call, request):
        if call.source.requests.index(request) == 0:
            call.reply(zero_reply(request, page_count=8) if request.page_count >= 8 else zero_reply(request))
        call.reply(b"\xff")
        return True

    error = failure_of(destination, source(on_request=answer).endpoint)
    assert type(error) is RemoteProtocolError
    assert destination.pager.counters().zero_pages >= 1
    destination.touch(0)
    destination.check_touched(memory, 1)


# ---- sources that do not speak gRPC ----


def http_status(code):
    return lambda call: call.peer.headers(
        call.stream_id, [(":status", str(code)), ("content-type", "text/html")], end=True
    )


def send_compressed(call):
    call.reply(b"", flag=1)


def send_too_much(call):
    call.headers()
    call.peer.data(call.stream_id, b"\0\x7f\xff\xff\xff" + bytes(100))


def end_without_trailers(call):
    call.headers()
    call.peer.data(call.stream_id, b"", end=True)


def end_in_a_message(call):
    call.headers()
    call.peer.data(call.stream_id, prefixed(bytes(100))[:50])
    call.end(0)


def send_many_headers(call):
    call.peer.headers(call.stream_id, [(":status", "200"), ("content-type", "application/grpc"), ("x", "y" * 9000)])


NOT_GRPC = {
    "HTTP 500": (http_status(500), "UNKNOWN: the server answered HTTP 500"),
    "HTTP 401": (http_status(401), "UNAUTHENTICATED: the server answered HTTP 401"),
    "HTTP 403": (http_status(403), "PERMISSION_DENIED: the server answered HTTP 403"),
    "HTTP 404": (http_status(404), "UNIMPLEMENTED: the server answered HTTP 404"),
    "HTTP 400": (http_status(400), "INTERNAL: the server answered HTTP 400"),
    "wrong content-type": (http_status(200), "UNKNOWN: the server does not speak gRPC"),
    "no content-type": (
        lambda call: call.peer.headers(call.stream_id, [(":status", "200")]),
        "UNKNOWN: the server does not speak gRPC",
    ),
    "compressed message": (send_compressed, "INTERNAL: a message is marked compressed"),
    "message of 2 GiB": (send_too_much, "RESOURCE_EXHAUSTED: a message of 2147483647 bytes"),
    "no trailers": (end_without_trailers, "INTERNAL: the server ended the call without trailers"),
    "end within a message": (end_in_a_message, "INTERNAL: the server stopped in the middle of a message"),
    "headers of 9 KiB": (send_many_headers, "RESOURCE_EXHAUSTED: the server's metadata is larger than 8 KiB"),
    "trailers without a status": (
        lambda call: (call.headers(), call.peer.headers(call.stream_id, [("x", "y")], end=True)),
        "UNKNOWN: the server ended the call without a status",
    ),
    "status that is no number": (lambda call: call.end("none", "x"), "UNKNOWN: the server ended the call without"),
    "status of 17": (lambda call: call.end(17, "x"), "UNKNOWN: "),
    "negative status": (lambda call: call.end(-1, "x"), "UNKNOWN: "),
    "status of 2^31": (lambda call: call.end(2**31, "x"), "UNKNOWN: "),
    "status of many digits": (lambda call: call.end(10**30, "x"), "UNKNOWN: "),
}


@pytest.mark.parametrize("name", NOT_GRPC)
def test_source_that_does_not_speak_grpc_is_a_channel_error_that_says_so(destination, source, name):
    act, words = NOT_GRPC[name]

    def begin(call):
        act(call)
        return True

    served = source(on_call=begin, on_request=lambda *_: True, on_end=lambda _: True)
    error = failure_of(destination, served.endpoint)
    assert type(error) is ChannelError
    assert words in error.message
    assert str(served.endpoint) in error.message
    assert destination.placed_bytes == 0


def test_status_of_2_32_is_no_status(destination, source):
    def begin(call):
        call.end(2**32, "x")
        return True

    served = source(on_call=begin, on_request=lambda *_: True, on_end=lambda _: True)
    assert type(failure_of(destination, served.endpoint)) is ChannelError


TEXTS = {
    "plain words, 100%": "plain words, 100%25",
    "ümläut ✓": urllib.parse.quote("ümläut ✓", safe=" "),
    "line\nbreak": "line%0abreak",
    "%zz stays, and % too": "%zz stays, and %25 too",
    "a lone %4": "a lone %4",
    "": "",
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]], ids=lambda code: code.name)
def test_status_of_the_source_reaches_the_error(destination, memory, source, code):
    number = code.value[0]
    text, encoded = list(TEXTS.items())[number % len(TEXTS)]

    if code.name in RETRIED:
        counters = check_recovers(
            destination, memory, source(on_call=Once(lambda call: call.end(number, encoded))).endpoint
        )
        assert counters.reconnects >= 1
        return

    def begin(call):
        call.end(number, encoded)
        return True

    error = failure_of(destination, source(on_call=begin).endpoint)
    assert type(error) is ChannelError
    assert error.message.endswith(f"{code.name}: {text}")


@pytest.mark.parametrize("code", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DATA_LOSS], ids=lambda code: code.name)
@pytest.mark.parametrize("text", TEXTS)
def test_status_text_is_decoded(destination, source, code, text):
    def begin(call):
        call.end(code.value[0], TEXTS[text])
        return True

    error = failure_of(destination, source(on_call=begin).endpoint)
    assert error.message.endswith(f"{code.name}: {text}")


def test_long_status_text_is_cut(destination, source):
    def begin(call):
        call.end(5, "%C3%A4" * 1000)
        return True

    error = failure_of(destination, source(on_call=begin).endpoint)
    assert "NOT_FOUND: ää" in error.message
    assert len(error.message) < 320


def test_error_after_replies_reaches_the_error(destination, source):
    def answer(call, request):
        call.answer(request)
        call.end(9, "enough")
        return True

    error = failure_of(destination, source(on_request=Once(answer, is_background)).endpoint)
    assert type(error) is ChannelError
    assert error.message.endswith("ended the background page call: FAILED_PRECONDITION: enough")


def test_ok_with_requests_unanswered_is_a_protocol_error(destination, source):
    def answer(call, _request):
        call.end(0)
        return True

    error = failure_of(destination, source(on_request=answer, on_end=lambda _: True).endpoint)
    assert type(error) is RemoteProtocolError
    assert "unanswered" in error.message


@pytest.mark.parametrize("code", range(0xE))
def test_reset_of_a_call_is_a_status_and_only_some_are_tried_again(destination, memory, source, code):
    served = source(on_request=Once(lambda call, _: call.peer.reset(call.stream_id, code)), on_end=lambda _: False)
    if code in (REFUSED_STREAM, CANCEL):
        assert check_recovers(destination, memory, served.endpoint).reconnects >= 1
        return
    error = failure_of(destination, served.endpoint)
    assert type(error) is ChannelError
    assert ("RESOURCE_EXHAUSTED" if code == CALM else "INTERNAL") in error.message
    assert "the server reset the call: " in error.message
