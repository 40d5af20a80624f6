"""The native page server against peers that break HTTP/2's rules, or keep them and are slow; others are served."""

import contextlib
import re
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hyperframe import frame as frames

from migrate.native.pageserver import PageServerPatience
from tests.harness.h2_peer import PREFACE, WINDOW_MAX, Peer, Settings, frame_bytes, prefixed, request
from tests.harness.memory import PAGE, ServedMemory, pages_of, requests_for, stock_fetch
from tests.harness.page_server import PAGES, check_connection_ended, flood_caller, wait_logged
from tests.harness.waiting import wait_until

STREAMS_MAX = 16
PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
NS_PER_S = 1_000_000_000
USUAL = PageServerPatience.usual()
SHORT_S = 1
SHORT_NS = SHORT_S * NS_PER_S
OK = 0
NO_ERROR, PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR = 0, 1, 3, 5, 6
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 7, 8, 9


# ---- what is not HTTP/2 ----


@pytest.mark.parametrize(
    "sent",
    [
        b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n" + bytes(64),
        bytes(range(256)) * 8,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["wrong preface", "garbage", "HTTP/1.1"],
)
def test_who_does_not_speak_http2_is_sent_away(served, peer, caplog, sent):
    peer.send(sent)
    check_connection_ended(served, peer, caplog, PROTOCOL_ERROR, "magic")


def test_who_speaks_tls_to_a_plain_text_port_is_told_apart(served, peer, caplog):
    peer.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))
    check_connection_ended(served, peer, caplog, None, "TLS on a plain-text port")


def test_garbage_after_the_preface_ends_the_connection(served, peer, caplog):
    peer.send(PREFACE + b"\xff" * 512)
    check_connection_ended(served, peer, caplog, PROTOCOL_ERROR, "expected SETTINGS")


def test_who_closes_without_a_word_is_no_failure(served, peer):
    peer.close()
    wait_until(lambda: served.server.counters().connections_now == 0, 10, "the connection to end")
    assert served.server.counters().connections_failed == 0


def test_who_resets_tcp_in_the_middle_of_a_frame_costs_only_its_connection(served, caller):
    caller.send(prefixed(request(0))[:3])
    caller.abort()


@pytest.mark.parametrize("first_chunk", [1, 5, 23, 24, 30])
def test_bytes_may_come_in_any_portions(served, peer, first_chunk):
    class Recorder:
        sent = b""

        def sendall(self, data):
            self.sent += data

    real, peer.socket = peer.socket, Recorder()
    peer.greet_server()
    peer.call()
    peer.ask(1, *requests_for([(3, 4), (900, 1)]), end=True)
    sent, peer.socket = peer.socket.sent, real
    peer.send(sent[:first_chunk])
    for byte in sent[first_chunk:]:
        peer.send(bytes([byte]))
    stream = peer.receive_end()
    assert pages_of(stream.responses(), [(3, 4), (900, 1)]) == [served.memory.run(3, 4), served.memory.run(900, 1)]
    assert stream.status == (OK, "")


# ---- what breaks HTTP/2's rules ----


BROKEN_FRAMES = {
    "oversized frame": (frame_bytes(16385, 0, 0, 1, bytes(16385)), FRAME_SIZE_ERROR),
    "oversized unknown frame": (frame_bytes(1 << 20, 0xFA, 0, 0, bytes(64)), FRAME_SIZE_ERROR),
    "DATA on stream 0": (frame_bytes(4, 0, 0, 0, bytes(4)), PROTOCOL_ERROR),
    "DATA on an idle stream": (frame_bytes(4, 0, 0, 9, bytes(4)), PROTOCOL_ERROR),
    "HEADERS on an even stream": (frame_bytes(1, 1, 4, 2, b"\x83"), PROTOCOL_ERROR),
    "bad HPACK": (frame_bytes(4, 1, 4, 3, b"\xff\xff\xff\xff"), COMPRESSION_ERROR),
    "HPACK index of nothing": (frame_bytes(2, 1, 4, 3, b"\xff\x7f"), COMPRESSION_ERROR),
    "padding longer than the frame": (frame_bytes(3, 0, 8, 1, b"\xff\x00\x00"), PROTOCOL_ERROR),
    "CONTINUATION of nothing": (frame_bytes(1, 9, 4, 1, b"\x83"), PROTOCOL_ERROR),
    "another frame before CONTINUATION": (
        frame_bytes(1, 1, 0, 3, b"\x83") + frame_bytes(8, 6, 0, 0, bytes(8)),
        PROTOCOL_ERROR,
    ),
    "PING of seven bytes": (frame_bytes(7, 6, 0, 0, bytes(7)), FRAME_SIZE_ERROR),
    "SETTINGS of five bytes": (frame_bytes(5, 4, 0, 0, bytes(5)), FRAME_SIZE_ERROR),
    "SETTINGS with a frame size of nothing": (
        frame_bytes(6, 4, 0, 0, struct.pack(">HI", Settings.MAX_FRAME_SIZE, 0)),
        PROTOCOL_ERROR,
    ),
    "SETTINGS with a window of 2^31": (
        frame_bytes(6, 4, 0, 0, struct.pack(">HI", Settings.INITIAL_WINDOW_SIZE, 2**31)),
        FLOW_CONTROL_ERROR,
    ),
    "PUSH_PROMISE from a client": (frame_bytes(5, 5, 4, 1, b"\0\0\0\2\x83"), PROTOCOL_ERROR),
    "RST_STREAM of an idle stream": (frame_bytes(4, 3, 0, 99, bytes(4)), PROTOCOL_ERROR),
    "WINDOW_UPDATE of nothing": (frame_bytes(4, 8, 0, 0, bytes(4)), PROTOCOL_ERROR),
    "connection window beyond 2^31": (frame_bytes(4, 8, 0, 0, struct.pack(">I", 2**31 - 1)), FLOW_CONTROL_ERROR),
}


@pytest.mark.parametrize("name", BROKEN_FRAMES)
def test_frame_that_breaks_http2_ends_the_connection_with_its_error(served, caller, caplog, name):
    sent, code = BROKEN_FRAMES[name]
    caller.send(sent)
    check_connection_ended(served, caller, caplog, code, "")


def test_window_of_a_stream_beyond_2_31_ends_that_call_alone(served, caller):
    caller.send_frames(frames.WindowUpdateFrame(1, window_increment=WINDOW_MAX))
    assert caller.receive_end().reset_code == FLOW_CONTROL_ERROR
    caller.call(3)
    caller.ask(3, request(1, 2), end=True)
    assert caller.receive_end(3).status == (OK, "")


@pytest.mark.parametrize("name", ["PING", "SETTINGS"])
def test_flood_of_frames_that_want_an_answer_ends_the_connection(served, caplog, name):
    ping = frames.PingFrame(0, opaque_data=bytes(8))
    flood = (ping if name == "PING" else Settings(0)).serialize() * 20_000
    with Peer.connect(served.endpoint, receive_buffer_bytes=4096) as peer:
        peer.greet_server()
        sender = threading.Thread(target=send_quietly, args=(peer, flood * 10))
        sender.start()
        wait_until(lambda: served.server.counters().connections_failed == 1, 20, "the flood to be ended")
        sender.join()
    wait_logged(caplog, "ended the connection of .*: ")


def send_quietly(peer, data):
    with contextlib.suppress(OSError):
        peer.send(data)


@pytest.mark.parametrize("code", [CANCEL, NO_ERROR, STREAM_CLOSED])
def test_rapid_reset_ends_the_connection(served, peer, caplog, code):
    peer.greet_server()
    sent = b""
    for stream_id in range(1, 6001, 2):
        block = peer.encoder.encode(
            [
                *((":method", "POST"), (":scheme", "http"), (":path", "/migrate.v1.PageService/FetchPages")),
                *((":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers")),
                *(("migration-id", "m"), ("authorization", "Bearer t")),
            ]
        )
        sent += frames.HeadersFrame(stream_id, block, flags=["END_HEADERS"]).serialize()
        sent += frames.RstStreamFrame(stream_id, error_code=code).serialize()
    send_quietly(peer, sent)
    check_connection_ended(served, peer, caplog, None, "")
    assert served.server.counters().calls < 1500


def begin_all_calls(peer):
    """As many calls as the server takes; their streams."""
    ids = range(1, 2 * STREAMS_MAX, 2)
    for stream_id in ids:
        peer.call(stream_id)
    return ids


def test_call_over_the_limit_is_refused_and_the_others_are_served(served, peer):
    peer.acknowledges = False  # nobody who has not heard of the limit can be blamed
    peer.greet_server()
    ids = begin_all_calls(peer)
    over = 2 * STREAMS_MAX + 1
    peer.call(over)
    assert peer.receive_end(over).reset_code == REFUSED_STREAM
    for stream_id in ids:
        peer.ask(stream_id, request(stream_id, 2), end=True)
        stream = peer.receive_end(stream_id)
        assert pages_of(stream.responses(), [(stream_id, 2)]) == [served.memory.run(stream_id, 2)]


def test_call_over_a_limit_that_was_acknowledged_ends_the_connection(served, peer, caplog):
    peer.greet_server()
    peer.receive(lambda: peer.is_greeted)
    assert peer.settings[Settings.MAX_CONCURRENT_STREAMS] == STREAMS_MAX
    peer.receive_pong()
    begin_all_calls(peer)
    peer.call(2 * STREAMS_MAX + 1)
    check_connection_ended(served, peer, caplog, PROTOCOL_ERROR, "PROTOCOL_ERROR")


# ---- peers that are slow, or do not read ----


def test_zero_window_holds_the_replies_and_opening_it_lets_them_go(served, peer):
    peer.opens_windows = False
    peer.greet_server({Settings.INITIAL_WINDOW_SIZE: 0})
    peer.call()
    asked = [(0, 256), (256, 256), (900, 100)]
    peer.ask(1, *requests_for(asked), end=True)
    peer.receive_pong()
    peer.receive_pong()
    assert not peer.stream(1).data
    peer.send_frames(frames.WindowUpdateFrame(1, window_increment=10))
    peer.receive(lambda: len(peer.stream(1).data) == 10)
    peer.receive_pong()
    assert len(peer.stream(1).data) == 10
    peer.opens_windows = True
    peer.send_frames(frames.WindowUpdateFrame(1, window_increment=100_000))
    stream = peer.receive_end()
    assert pages_of(stream.responses(), asked) == [served.memory.run(*each) for each in asked]
    assert stream.status == (OK, "")


def test_window_of_one_byte_at_a_time_gets_whole_messages(served, peer):
    peer.opens_windows = False
    peer.greet_server({Settings.INITIAL_WINDOW_SIZE: 0})
    peer.call()
    peer.ask(1, request(1, 1), end=True)
    stream = peer.stream(1)
    for _ in range(300):
        peer.send_frames(frames.WindowUpdateFrame(1, window_increment=1))
    peer.receive(lambda: len(stream.data) == 300)
    peer.send_frames(frames.WindowUpdateFrame(1, window_increment=PAGE))
    peer.receive_end()
    assert pages_of(stream.responses(), [(1, 1)]) == [served.memory.run(1, 1)]


def test_window_that_shrinks_below_zero_is_waited_for(served, peer):
    peer.opens_windows = False
    peer.greet_server()
    peer.call()
    peer.ask(1, request(1, 200), end=True)
    stream = peer.stream(1)
    peer.receive(lambda: len(stream.data) == 65535)
    peer.send_frames(Settings(0, settings={Settings.INITIAL_WINDOW_SIZE: 0}))
    peer.send_frames(frames.WindowUpdateFrame(0, window_increment=1 << 24))
    peer.receive_pong()
    assert len(stream.data) == 65535
    peer.send_frames(frames.WindowUpdateFrame(1, window_increment=65535 + 1000))
    peer.receive(lambda: len(stream.data) == 66535)
    peer.opens_windows = True
    peer.send_frames(frames.WindowUpdateFrame(1, window_increment=1 << 20))
    peer.receive_end()
    assert pages_of(stream.responses(), [(1, 200)]) == [served.memory.run(1, 200)]


def test_peer_that_never_reads_holds_up_nobody_and_costs_little(served):
    with flood_caller(served):
        assert stock_fetch(served.endpoint, [(1, 4)]) == [served.memory.run(1, 4)]


@pytest.mark.parametrize("patience", [replace(USUAL, stuck_ns=SHORT_NS)])
def test_peer_that_never_reads_is_given_up(served, caplog):
    began_s = time.monotonic()
    with flood_caller(served):
        wait_until(lambda: served.server.counters().connections_failed == 1, 20, "the peer to be given up")
    assert time.monotonic() - began_s >= SHORT_S
    wait_logged(caplog, "it takes no more of what it asked for")


def test_server_closes_at_once_though_a_peer_does_not_read():
    served = ServedMemory(PAGES)
    with flood_caller(served):
        closer = threading.Thread(target=served.close)
        closer.start()
        closer.join(5)
        assert not closer.is_alive()


def test_reset_in_the_middle_of_a_big_reply_leaves_memory_alone(served):
    """What was handed to the kernel only in part still lies in the stream's buffer when the stream is gone."""
    peer = flood_caller(served)
    with peer:
        for stream_id in range(3, 41, 2):
            peer.reset(stream_id - 2)
            peer.call(stream_id)
            peer.ask(stream_id, *requests_for([(256, 256), (100, 17), (0, 256)]), end=stream_id == 39)
        last = peer.receive_end(39)
        asked = [(256, 256), (100, 17), (0, 256)]
        assert last.status == (OK, "")
        assert pages_of(last.responses(), asked) == [served.memory.run(*each) for each in asked]
        for response in peer.stream(1).responses():
            if response.WhichOneof("content") == "data":
                assert response.data == served.memory.run(response.first_page, response.page_count)


@pytest.mark.parametrize("patience", [replace(USUAL, idle_ns=SHORT_NS)])
def test_headers_that_never_end_do_not_hold_a_place_for_ever(served, caplog):
    """Nobody has proved anything yet, and there are 64 places."""
    began_s = time.monotonic()
    with Peer.connect(served.endpoint) as peer:
        peer.acknowledges = False
        peer.greet_server()
        peer.send_frames(frames.HeadersFrame(1, b"\x83"))
        peer.receive_close()
    assert time.monotonic() - began_s >= SHORT_S
    wait_logged(caplog, "it has not called for too long")


def test_usual_patience_is_that_of_the_document():
    """A minute without a call, and so on."""
    _, page_port = PROTOCOL.read_text().split("native ends of the page port")
    said = dict(re.findall(r"^\| ([^|]+) \| (\d+) s \|", page_port, re.MULTILINE))
    assert {what: int(value) * NS_PER_S for what, value in said.items()} == {
        "a TLS handshake": USUAL.handshake_ns,
        "a connection without a call": USUAL.idle_ns,
        "a peer that takes nothing of what it asked for": USUAL.stuck_ns,
    }


def test_peer_that_vanishes_in_the_middle_of_a_big_reply_is_forgotten(served):
    for _ in range(10):
        flood_caller(served).abort()
    wait_until(lambda: served.server.counters().connections_now == 0, 10, "every connection to end")
