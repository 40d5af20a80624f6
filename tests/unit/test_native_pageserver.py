"""The native page server's calls: what it refuses, answers, ends; after each, a stock client gets every page right."""

import contextlib
import os
import re
import socket
import struct
import threading

import grpc
import hpack
import pytest
from hyperframe import frame as frames

from migrate.v1 import page_service_pb2 as pb
from tests.harness.h2_peer import Peer, Settings, frame_bytes, prefixed, request
from tests.harness.memory import MIGRATION_ID, PAGE, ServedMemory, pages_of, requests_for, runs_of, stock_fetch
from tests.harness.page_server import PAGES, flood_caller, wait_logged
from tests.harness.waiting import wait_until

CONNECTIONS_MAX = 64
STREAMS_MAX = 16
OK, INVALID, DEADLINE, NOT_FOUND, DENIED, EXHAUSTED, UNIMPLEMENTED, INTERNAL = 0, 3, 4, 5, 7, 8, 12, 13
NO_ERROR, PROTOCOL_ERROR, CANCEL = 0, 1, 8


# ---- what is not gRPC, or not this service ----


@pytest.mark.parametrize(
    ("call", "is_answered"),
    [
        ({"content_type": "text/html"}, False),
        ({"content_type": "application/grp"}, False),
        ({"without": ("content-type",)}, False),
        ({"method": "GET", "end": True}, False),
        ({"method": "PUT"}, False),
        ({"content_type": "application/grpc+proto"}, True),
    ],
    ids=["html", "almost", "no content-type", "GET", "PUT", "grpc+proto"],
)
def test_only_grpc_is_answered_others_get_http_415(served, peer, call, is_answered):
    peer.greet_server()
    peer.call(**call)
    if is_answered:
        peer.ask(1, request(1), end=True)
    stream = peer.receive_end()
    assert stream.headers[":status"] == ("200" if is_answered else "415")
    assert stream.status[0] == (OK if is_answered else INTERNAL)


REFUSED_CALLS = {
    "unknown path": ({"path": "/migrate.v1.PageService/Fetch"}, UNIMPLEMENTED, "no method"),
    "long path": ({"path": "/" + "x" * 4000}, UNIMPLEMENTED, "no method"),
    "no token": ({"without": ("authorization",)}, DENIED, "token"),
    "wrong token": ({"token": "u"}, DENIED, "token"),
    "token with more behind it": ({"token": "tt"}, DENIED, "token"),
    "half a token": ({"authorization": "Bearer"}, DENIED, "token"),
    "long token": ({"token": "t" * 4000}, DENIED, "token"),
    "bare token": ({"authorization": "t"}, DENIED, "token"),
    "no migration": ({"without": ("migration-id",)}, NOT_FOUND, "''"),
    "unknown migration": ({"migration_id": "n"}, NOT_FOUND, "'n'"),
    "long migration": ({"migration_id": "n" * 4000}, NOT_FOUND, "'n{100}'"),
    "percent in a migration": ({"migration_id": "100%s%n"}, NOT_FOUND, "100%25s%25n"),
    "compression": ({"grpc_encoding": "gzip"}, UNIMPLEMENTED, "compressed"),
    "timeout without a unit": ({"grpc_timeout": "10"}, INVALID, "grpc-timeout"),
    "timeout with another unit": ({"grpc_timeout": "10s"}, INVALID, "grpc-timeout"),
    "timeout of nine digits": ({"grpc_timeout": "123456789S"}, INVALID, "grpc-timeout"),
    "negative timeout": ({"grpc_timeout": "-1S"}, INVALID, "grpc-timeout"),
    "metadata of 9 KiB": ({"x": "y" * 9000}, EXHAUSTED, "8 KiB"),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
def test_call_that_may_not_be_is_refused_with_status_and_words(served, peer, caplog, name):
    call, code, words = REFUSED_CALLS[name]
    peer.greet_server()
    peer.call(**call)
    stream = peer.receive_end()
    assert stream.headers[":status"] == "200"
    assert stream.status[0] == code
    assert re.search(words, stream.status[1])
    assert not stream.data
    wait_until(lambda: served.server.counters().calls_failed == 1, 10, "the refusal to be counted")
    wait_logged(caplog, r"refused a call of 127\.0\.0\.1 port \d+: [A-Z_]+: ")


@pytest.mark.parametrize("value", ["t\x7f", "t\0", "t\r\nx: y", " t"], ids=["DEL", "NUL", "CRLF", "blank"])
def test_metadata_that_http_forbids_ends_the_call(served, peer, value):
    peer.greet_server()
    peer.call(migration_id=value)
    stream = peer.receive_end()
    assert stream.reset_code == PROTOCOL_ERROR or stream.status[0] == NOT_FOUND


def test_metadata_of_64_kib_in_many_frames_costs_at_most_the_connection(served, peer):
    peer.greet_server()
    block = peer.encoder.encode([(":method", "POST"), ("x", "y" * 65000)], huffman=False)
    parts = [block[at : at + 16000] for at in range(0, len(block), 16000)]
    peer.send_frames(
        frames.HeadersFrame(1, parts[0]),
        *(frames.ContinuationFrame(1, part) for part in parts[1:-1]),
        frames.ContinuationFrame(1, parts[-1], flags=["END_HEADERS"]),
    )
    peer.receive(lambda: peer.stream(1).is_over or peer.goaway)
    assert peer.goaway or peer.stream(1).is_over


def test_hpack_bomb_is_not_expanded(served, peer):
    """A table entry of 4 KiB that is referred to thousands of times: 64 MB of headers in 16 KiB."""
    peer.greet_server()
    encoder = hpack.Encoder()
    encoder.header_table_size = 4096
    big = encoder.encode([("x-bomb", "y" * 3900)], huffman=False)
    peer.send_frames(frames.HeadersFrame(1, big + b"\xbe" * 12000, flags=["END_HEADERS"]))
    peer.receive(lambda: peer.stream(1).is_over or peer.goaway)
    assert peer.goaway or peer.stream(1).is_over


# ---- messages ----


BAD_MESSAGES = {
    "marked compressed": (prefixed(request(1), flag=1), INTERNAL, "compress"),
    "flag of 0xff": (prefixed(request(1), flag=255), INTERNAL, "compress"),
    "over the limit": (struct.pack(">BI", 0, 1025) + bytes(1025), EXHAUSTED, "1025 bytes"),
    "4 GiB": (struct.pack(">BI", 0, 2**32 - 1), EXHAUSTED, "4294967295 bytes"),
    "not protobuf": (prefixed(b"\xff\xff"), INVALID, "not a FetchPagesRequest"),
    "cut off": (prefixed(request(1).SerializeToString()[:-1]), INVALID, "not a FetchPagesRequest"),
    "empty, so no page": (prefixed(b""), INVALID, "0 pages from page 0"),
    "no page": (prefixed(request(0, 0)), INVALID, "0 pages"),
    "257 pages": (prefixed(request(0, 257)), INVALID, "257 pages"),
    "2^32-1 pages": (prefixed(request(0, 2**32 - 1)), INVALID, "4294967295 pages"),
    "behind the end": (prefixed(request(PAGES, 1)), INVALID, f"from page {PAGES} .* {PAGES}"),
    "across the end": (prefixed(request(PAGES - 1, 2)), INVALID, f"from page {PAGES - 1} "),
    "page 2^64-1": (prefixed(request(2**64 - 1, 2)), INVALID, "18446744073709551615"),
    "another region": (prefixed(request(1, 1, region=1)), INVALID, "not number 1"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_message_ends_the_call_after_the_replies_to_those_before(served, caller, caplog, name):
    sent, code, words = BAD_MESSAGES[name]
    asked = [(0, 16), (900, 10)]
    caller.ask(1, *requests_for(asked))
    stream = caller.stream(1)
    caller.receive(lambda: len(stream.responses()) and stream.responses()[-1].request_id == 2)
    caller.data(1, sent)
    caller.receive_end()
    assert stream.status[0] == code
    assert re.search(words, stream.status[1])
    assert pages_of(stream.responses(), asked) == [served.memory.run(*each) for each in asked]
    wait_until(lambda: served.server.counters().calls_failed == 1, 10, "the failure to be counted")
    wait_logged(caplog, "refused a call of ")


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_message_in_one_frame_with_good_ones_ends_the_call_with_its_status(served, caller, name):
    sent, code, words = BAD_MESSAGES[name]
    asked = [(0, 200), (500, 200), (900, 10)]
    caller.data(1, b"".join(map(prefixed, requests_for(asked))) + sent + prefixed(request(5, 5)))
    stream = caller.receive_end()
    assert stream.status[0] == code
    assert re.search(words, stream.status[1])
    # What does not even parse ends the call at once; a request is refused when its turn comes.
    answered = asked if " page" in words else asked[: len({each.request_id for each in stream.responses()})]
    assert pages_of(stream.responses(), answered) == [served.memory.run(*each) for each in answered]


def test_call_without_requests_ends_well(served, caller):
    caller.data(1, b"", end=True)
    assert caller.receive_end().status == (OK, "")


def test_headers_that_end_the_stream_are_a_call_without_requests(served, peer):
    peer.greet_server()
    peer.call(end=True)
    assert peer.receive_end().status == (OK, "")


def test_trailers_of_a_client_end_its_requests(served, caller):
    caller.ask(1, request(1, 4))
    caller.headers(1, [("x-trailer", "y")], end=True)
    stream = caller.receive_end()
    assert stream.status == (OK, "")
    assert pages_of(stream.responses(), [(1, 4)]) == [served.memory.run(1, 4)]


@pytest.mark.parametrize("cut", [1, 4, 5, 6])
def test_half_close_in_the_middle_of_a_message_is_an_error(served, caller, cut):
    caller.data(1, prefixed(request(1, 4))[:cut], end=True)
    stream = caller.receive_end()
    assert stream.status[0] == INVALID
    assert "middle of a message" in stream.status[1]


def test_half_close_with_many_requests_open_is_answered_whole_then_ok(served, caller):
    asked = [(first, 16) for first in range(0, PAGES, 16)] * 4
    caller.ask(1, *requests_for(asked), end=True)
    stream = caller.receive_end()
    assert pages_of(stream.responses(), asked) == [served.memory.run(*each) for each in asked]
    assert stream.status == (OK, "")
    assert served.server.counters().requests == len(asked)


def test_requests_that_fill_the_window_wait_and_are_answered_in_order(served, caller):
    """The stream's window bounds what a greedy peer can queue; it opens again as requests are answered."""
    asked = [(page % PAGES, 1) for page in range(20_000)]
    left = bytearray(b"".join(map(prefixed, requests_for(asked))))
    window = 65535
    stream = caller.stream(1)
    opened = []
    original = caller._take

    def take(taken, length):
        if isinstance(taken, frames.WindowUpdateFrame) and taken.stream_id == 1:
            opened.append(taken.window_increment)
        original(taken, length)

    caller._take = take
    while left or window < 0:
        part = bytes(left[: min(window, 16000)])
        if part:
            caller.data(1, part)
            del left[: len(part)]
            window -= len(part)
        elif left:
            assert caller.receive(lambda: opened, "the window to open")
        window += sum(opened)
        opened.clear()
    caller.data(1, b"", end=True)
    caller.receive(lambda: stream.is_over)
    assert stream.status == (OK, "")
    pages = {page: served.memory.page(page) for page in range(PAGES)}
    responses = stream.responses()
    assert [each.request_id for each in responses] == list(range(1, len(asked) + 1))
    assert all((each.data or bytes(PAGE)) == pages[page] for each, (page, _) in zip(responses, asked, strict=True))


def test_padding_does_not_eat_the_window(served, caller):
    asked = [(page, 1) for page in range(300)]
    for each in requests_for(asked):
        caller.send_frames(frames.DataFrame(1, prefixed(each), flags=["PADDED"], pad_length=255))
    caller.data(1, b"", end=True)
    stream = caller.receive_end()
    assert pages_of(stream.responses(), asked) == [served.memory.run(*each) for each in asked]


# ---- time, and the server's own wishes ----


@pytest.mark.parametrize("timeout", ["30m", "30000u", "30000000n"])
def test_deadline_ends_the_call_in_time(served, peer, timeout):
    peer.greet_server()
    peer.call(grpc_timeout=timeout)
    assert peer.receive_end().status == (DEADLINE, "the call's deadline has passed")


def test_far_deadlines_do_not_overflow(served, peer):
    peer.greet_server()
    for stream_id, timeout in ((1, "99999999H"), (3, "99999999M"), (5, "99999999S")):
        peer.call(stream_id, grpc_timeout=timeout)
        peer.ask(stream_id, request(1, 2), end=True)
        assert peer.receive_end(stream_id).status == (OK, "")


def test_deadline_ends_a_call_whose_replies_the_peer_holds_back(served, peer):
    peer.opens_windows = False
    peer.socket.settimeout(2)
    peer.greet_server({Settings.INITIAL_WINDOW_SIZE: 0})
    peer.call(grpc_timeout="30m")
    peer.ask(1, request(1, 256))
    peer.receive(lambda: peer.stream(1).is_over, "the deadline to end the call")
    assert peer.stream(1).is_over


def test_withdraw_returns_during_a_call_and_ends_it_with_not_found(served, caller):
    caller.ask(1, request(1, 4))
    stream = caller.stream(1)
    caller.receive(stream.responses)
    served.exports.withdraw(MIGRATION_ID)
    caller.ask(1, request(1, 4))
    caller.receive_end()
    assert stream.status == (NOT_FOUND, "the migration's pages are no longer served")
    served.publish_again()


def test_withdraw_returns_while_peers_fetch_and_ends_their_calls(served):
    """Some are in the middle of a frame, which nothing can end but the connection's end."""
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(flood_caller(served)) for _ in range(4)]
        for each in peers:
            each.receive(lambda peer=each: peer.stream(1).data)
        served.exports.withdraw(MIGRATION_ID)
        served.publish_again()
        for each in peers:
            stream = each.stream(1)
            each.receive(lambda stream=stream: stream.is_over)
            assert each.is_closed or stream.reset_code == CANCEL or stream.status[0] == NOT_FOUND
            for response in stream.responses():
                content = response.data or bytes(response.page_count * PAGE)
                assert (
                    content == served.memory.run(response.first_page, min(response.page_count, PAGES))[: len(content)]
                )


@pytest.mark.parametrize("count", [1, 4, 200])
def test_withdraw_returns_after_calls_that_ended_by_themselves(served, peer, count):
    """No reader is left in the memory, whichever way it was sent, and whoever ended the call."""
    peer.greet_server()
    for stream_id, end in ((1, True), (3, False), (5, False)):
        peer.call(stream_id)
        peer.ask(stream_id, request(1, count), end=end)
        peer.receive(lambda i=stream_id: peer.stream(i).responses())
    peer.reset(3)
    peer.receive_pong()
    withdrawing = threading.Thread(target=served.exports.withdraw, args=(MIGRATION_ID,), daemon=True)
    withdrawing.start()
    withdrawing.join(10)
    assert not withdrawing.is_alive()
    served.publish_again()


def test_nothing_that_is_written_after_the_withdrawal_is_served(served, peer):
    """The guest may run again at the source, on the same memory."""
    peer.opens_windows = False
    peer.greet_server({Settings.INITIAL_WINDOW_SIZE: 0})
    peer.call()
    peer.ask(1, request(1, 4), end=True)
    peer.receive_pong()
    peer.receive_pong()
    served.exports.withdraw(MIGRATION_ID)
    before = os.pread(served.memory.fd, 4 * PAGE, PAGE)
    os.pwrite(served.memory.fd, b"\xee" * 4 * PAGE, PAGE)
    peer.opens_windows = True
    peer.send_frames(frames.WindowUpdateFrame(1, window_increment=1 << 20))
    stream = peer.receive_end()
    os.pwrite(served.memory.fd, before, PAGE)
    served.publish_again()
    assert b"\xee" * 100 not in stream.data


def test_server_that_closes_says_goaway_to_open_calls():
    served = ServedMemory(PAGES)
    with Peer.connect(served.endpoint) as peer:
        peer.greet_server()
        peer.call()
        peer.ask(1, request(1, 4))
        peer.receive(lambda: peer.stream(1).responses())
        peer.receive_pong()
        served.close()
        peer.receive_close()
        assert peer.goaway is not None, "the connection was closed without a GOAWAY"
        assert peer.goaway.error_code == NO_ERROR


def test_connection_beyond_the_64th_is_turned_away_and_the_others_stay(served, caplog):
    peers = [Peer.connect(served.endpoint) for _ in range(CONNECTIONS_MAX)]
    wait_until(lambda: served.server.counters().connections_now == CONNECTIONS_MAX, 10, "all to be accepted")
    with Peer.connect(served.endpoint) as one_too_many:
        one_too_many.receive_close()
        assert not one_too_many.is_greeted
    wait_logged(caplog, "turned a connection away: 64 are open")
    assert served.server.counters().connections_failed == 1
    for each in peers:
        each.greet_server()
        each.call()
        each.ask(1, request(1, 2), end=True)
        assert each.receive_end().status == (OK, "")
        each.close()


# ---- several calls, other families ----


def test_calls_of_one_connection_are_answered_apart(served, peer):
    peer.greet_server()
    ids = range(1, 2 * STREAMS_MAX, 2)
    for stream_id in ids:
        peer.call(stream_id)
        peer.ask(stream_id, request(stream_id, 128))
    for stream_id in reversed(ids):
        peer.ask(stream_id, request(stream_id + 500, 1, request_id=2), end=True)
    for stream_id in ids:
        asked = [(stream_id, 128), (stream_id + 500, 1)]
        stream = peer.receive_end(stream_id)
        assert stream.status == (OK, "")
        assert pages_of(stream.responses(), asked) == [served.memory.run(*each) for each in asked]


def test_unknown_frames_settings_and_priorities_are_ignored(served, peer):
    peer.greet_server({0x8: 1, 0xF000: 7})
    peer.send(frame_bytes(10, 0xFA, 0xFF, 0, bytes(10)) + frame_bytes(5, 2, 0, 1, b"\0\0\0\x05\xff"))
    peer.call(x_unknown="y")
    peer.ask(1, request(1, 3), end=True)
    stream = peer.receive_end()
    assert pages_of(stream.responses(), [(1, 3)]) == [served.memory.run(1, 3)]


def test_reset_after_the_end_is_nothing(served, caller):
    caller.ask(1, request(1, 3), end=True)
    assert caller.receive_end().status == (OK, "")
    caller.reset(1)
    caller.receive_pong()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_is_served_like_ipv4():
    served = ServedMemory(64, host="::1")
    try:
        assert b"".join(stock_fetch(served.endpoint, runs_of(64))) == served.memory.run(0, 64)
    finally:
        served.close()


def test_stock_client_is_told_of_compression_and_size_limits(served):
    """grpcio's own channel options do what the raw frames above did."""
    with grpc.insecure_channel(
        str(served.endpoint), options=[("grpc.enable_http_proxy", 0)], compression=grpc.Compression.Gzip
    ) as channel:
        call = channel.stream_stream(
            "/migrate.v1.PageService/FetchPages", lambda m: m, pb.FetchPagesResponse.FromString
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter([bytes(600)]), metadata=(("migration-id", "m"), ("authorization", "Bearer t")), timeout=10))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_closed_server_refuses_connections_and_closes_twice():
    served = ServedMemory(64)
    endpoint = served.endpoint
    served.server.close()
    with pytest.raises(ConnectionError):
        socket.create_connection((endpoint.host, endpoint.port))
    served.close()
