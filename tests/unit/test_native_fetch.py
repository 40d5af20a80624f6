"""The native fetch against sources that keep the rules, however they use them; its beginning and its end."""

import socket
import subprocess
import sys
import threading
import time
from concurrent import futures

import grpc
import pytest
from hyperframe import frame as frames

from migrate.config import Endpoint
from migrate.errors import ChannelError, GuestLostError
from migrate.pageserver.servicer import PageServicer
from migrate.v1 import page_service_pb2 as pb
from migrate.v1 import page_service_pb2_grpc as rpc
from tests.harness.destination import PAGES, check_recovers, failure_of
from tests.harness.fake_source import Once, common, hold_all, urgent_first, zero_reply
from tests.harness.h2_peer import PATH, Settings
from tests.harness.memory import ServedMemory
from tests.harness.ports import ReservedPort
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
RETRIED = {"CANCELLED", "UNAVAILABLE"}
CALM = 11


# ---- sources that keep the rules ----


def test_all_pages_come_from_an_honest_source(destination, memory, source):
    counters = check_recovers(destination, memory, source(on_request=urgent_first()).endpoint)
    assert counters.reconnects == 0
    assert counters.urgent_requests > 0
    assert counters.background_requests > 0


def test_metadata_is_what_the_protocol_says(destination, source):
    served = source()
    destination.start(served.endpoint, migration_id="some id", token="a+b/c=")  # noqa: S106
    destination.wait()
    for call in served.calls:
        headers = call.peer.stream(call.stream_id).blocks[0]
        assert headers["migration-id"] == "some id"
        assert headers["authorization"] == "Bearer a+b/c="
        assert headers[":path"] == PATH
        assert headers[":method"] == "POST"
        assert headers["te"] == "trailers"
        assert headers["content-type"] == "application/grpc"
        assert headers[":authority"] == str(served.endpoint)


def test_every_page_is_asked_for_once(destination, source):
    served = source()
    destination.start(served.endpoint)
    destination.wait()
    asked = sorted(
        page for each in served.requests for page in range(each.first_page, each.first_page + each.page_count)
    )
    assert asked == sorted(set(asked))
    assert all(each.region == 0 for each in served.requests)


@pytest.mark.parametrize("frame_bytes", [1, 7, 4096, 16384])
def test_replies_may_come_in_frames_of_any_size(destination, memory, source, frame_bytes):
    pages = 16 if frame_bytes == 1 else PAGES

    def answer(call, request):
        size = frame_bytes if request.first_page < pages else 16384
        call.answer(request, frame_bytes=size)
        return True

    check_recovers(destination, memory, source(on_request=answer).endpoint)


def test_replies_may_come_page_by_page(destination, memory, source):
    def answer(call, request):
        for response in call.answers(request):
            for page in range(response.first_page, response.first_page + response.page_count):
                one = pb.FetchPagesResponse(request_id=request.request_id, first_page=page, page_count=1)
                if response.WhichOneof("content") == "data":
                    one.data = memory.page(page)
                else:
                    one.zero.SetInParent()
                call.reply(one)
        return True

    check_recovers(destination, memory, source(on_request=answer).endpoint)


def test_data_that_is_all_zero_is_as_good_as_a_zero_run(destination, memory, source):
    def answer(call, request):
        data = memory.run(request.first_page, request.page_count)
        call.reply(pb.FetchPagesResponse(**common(request), data=data))
        return True

    check_recovers(destination, memory, source(on_request=answer).endpoint)


def test_zero_run_may_go_far_beyond_the_region(destination, memory, source):
    def answer(call, request):
        for response in call.answers(request):
            is_last = response.first_page + response.page_count == PAGES
            if is_last and response.WhichOneof("content") == "zero":
                response.page_count = 2**32 - 1
            call.reply(response)
        return True

    check_recovers(destination, memory, source(on_request=answer).endpoint)


def test_unknown_fields_frames_and_headers_are_ignored(destination, memory, source):
    def begin(call):
        call.peer.headers(call.stream_id, [(":status", "103"), ("link", "x")])
        call.peer.send(b"\0\0\x03\xfa\xff\0\0\0\0abc")
        call.is_answered = True
        call.peer.headers(
            call.stream_id, [(":status", "200"), ("content-type", "application/grpc+proto"), ("x-more", "y")]
        )
        return True

    def answer(call, request):
        for response in call.answers(request):
            call.peer.send_frames(
                frames.DataFrame(call.stream_id, b"", flags=["PADDED"], pad_length=200),
                frames.PingFrame(0, opaque_data=b"12345678"),
            )
            call.reply(b"\x7a\x02xy" + response.SerializeToString() + b"\xf8\x07\x01")
        return True

    check_recovers(destination, memory, source(on_call=begin, on_request=answer).endpoint)


@pytest.mark.parametrize("window", [0, 1, 100])
def test_source_that_takes_requests_byte_by_byte_is_waited_for(destination, memory, source, window):
    def begin(call):
        call.peer.send_frames(frames.WindowUpdateFrame(call.stream_id, window_increment=1))

    check_recovers(destination, memory, source(on_call=begin, settings={Settings.INITIAL_WINDOW_SIZE: window}).endpoint)


def test_verified_pages_are_counted(destination):
    served = ServedMemory(PAGES)
    try:
        memory_digest = served.source.take_digests()
        destination.start(served.endpoint, verify=True)
        destination.wait()
        destination.check_all(served.memory)
        counters = destination.pager.counters()
        assert counters.memory_digest == memory_digest
        assert counters.verified_pages == counters.urgent_pages + counters.background_pages
    finally:
        served.close()


# ---- connecting, stopping, closing ----


def test_nobody_listens_is_a_channel_error(destination, source):
    served = source()
    served.refuse_connections()
    with pytest.raises(ChannelError, match=r"no page service answers at 127\.0\.0\.1:.*Connection refused"):
        destination.made(served.endpoint).connect(5_000_000)


def test_host_that_is_no_address_is_a_channel_error(destination):
    with pytest.raises(ChannelError):
        destination.made(Endpoint("no address", 1)).connect(5_000_000)


def speak_http1(peer, _number):
    peer.receive_some()
    peer.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    peer.socket.shutdown(2)
    return True


def test_http1_server_is_a_channel_error(destination, source):
    with pytest.raises(ChannelError, match="no page service answers"):
        destination.made(source(on_connection=speak_http1).endpoint).connect(5_000_000)


@pytest.mark.parametrize("sent", [b"", b"\0\0\0\4\0\0\0\0\0"], ids=["not a word", "SETTINGS, but no PING"])
def test_server_that_does_not_answer_is_a_channel_error_after_the_timeout(destination, source, sent):
    def keep_silent(peer, _number):
        peer.acknowledges = False
        peer.send(sent)
        peer.receive_close()
        return True

    began = time.monotonic()
    with pytest.raises(ChannelError, match="no page service answers"):
        destination.made(source(on_connection=keep_silent).endpoint).connect(300_000)
    assert 0.25 < time.monotonic() - began < 2


def test_server_that_says_goaway_at_once_is_a_channel_error(destination, source):
    def leave(peer, _number):
        peer.greet()
        peer.send_frames(frames.GoAwayFrame(0, last_stream_id=0, error_code=CALM, additional_data=b"too many"))
        peer.socket.shutdown(1)
        peer.receive_close()
        return True

    with pytest.raises(ChannelError, match="too many"):
        destination.made(source(on_connection=leave).endpoint).connect(5_000_000)


def refuse(_):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return Endpoint("127.0.0.1", listener.getsockname()[1])


def be_silent(source):
    return source(on_connection=lambda peer, _: peer.receive_close() or True).endpoint


def greet_one_connection_of_two(source):
    return source(on_connection=lambda peer, number: number % 2 and (peer.receive_close() or True)).endpoint


# In a process of its own, whose descriptors are those of the fetch alone.
_FAILING_CONNECTS = """
import os, sys
from migrate.errors import ChannelError
from migrate.native.fetcher import NativeFetch

def fail():
    fetch = NativeFetch("127.0.0.1", int(sys.argv[1]), "m", "t")
    try:
        fetch.connect(20_000)
    except ChannelError:
        fetch.close()
    else:
        sys.exit("it connected")

fail()
before = os.listdir("/proc/self/fd")
for _ in range(50):
    fail()
print(len(os.listdir("/proc/self/fd")) - len(before))
"""


@pytest.mark.parametrize("behaviour", [refuse, be_silent, greet_one_connection_of_two])
def test_connects_that_fail_leave_no_descriptor(source, behaviour):
    endpoint = behaviour(source)
    ran = subprocess.run(
        [sys.executable, "-c", _FAILING_CONNECTS, str(endpoint.port)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "0"), ran.stderr


def test_fresh_fetch_works_after_one_that_could_not_connect(destination, memory, source):
    refused = destination.made(refuse(source))
    with pytest.raises(ChannelError):
        refused.connect(5_000_000)
    refused.close()
    check_recovers(destination, memory, source().endpoint)


def test_close_without_start_and_without_connect(destination, source):
    destination.made(Endpoint("127.0.0.1", 1)).close()
    fetch = destination.made(source().endpoint)
    fetch.connect(5_000_000)
    fetch.stop()
    fetch.close()
    fetch.close()


@pytest.mark.parametrize("answers", [hold_all, None], ids=["held", "answered"])
def test_stop_ends_a_fetch_at_once_and_whoever_waits_for_it(destination, source, answers):
    fetch = destination.start(source(on_request=answers).endpoint)
    outcome = []
    waiter = threading.Thread(target=lambda: outcome.append(fetch.wait(30_000_000)))
    waiter.start()
    began = time.monotonic()
    fetch.stop()
    fetch.stop()
    waiter.join(5)
    assert outcome == [True]
    assert time.monotonic() - began < 2


def test_stop_while_the_source_takes_nothing(destination, source):
    def take_nothing(peer, number):
        peer.greet({Settings.INITIAL_WINDOW_SIZE: 0})
        peer.receive_close()
        return True

    destination.start(source(on_connection=take_nothing).endpoint)
    destination.touch(1, 2, 3)
    wait_until(lambda: destination.pager.counters().faults == 3, 5, "the faults")
    assert not destination.fetch.wait(50_000)
    began = time.monotonic()
    destination.fetch.stop()
    assert time.monotonic() - began < 2


def test_stop_while_the_link_is_down(destination, source):
    served = source(on_request=Once(lambda call, _: (call.source.refuse_connections(), call.peer.abort())))
    destination.start(served.endpoint)
    wait_until(lambda: any(peer.socket.fileno() < 0 for peer in served.peers), 5, "the connection to break")
    began = time.monotonic()
    destination.fetch.stop()
    assert time.monotonic() - began < 2


def test_guest_that_dies_is_a_guest_lost_error(destination, source):
    dead = threading.Event()
    served = source(on_request=lambda *_: dead.wait(10) and False)
    destination.start(served.endpoint)
    destination.toucher.process.kill()
    destination.toucher.process.wait()
    dead.set()
    with pytest.raises(GuestLostError):
        destination.fetch.wait(10_000_000)


def test_cap_holds_the_background_but_not_the_faults(destination, memory, source):
    served = source()
    destination.start(served.endpoint, max_bandwidth_bytes_per_s=200_000)
    destination.touch(200)
    destination.check_touched(memory, 1)
    assert destination.pager.counters().missing_pages > 0
    assert not destination.fetch.wait(0)


# ---- stock servers ----


class Aborting(rpc.PageServiceServicer):
    """Aborts with a status; after `replies` honest zero replies."""

    def __init__(self, code, text, replies=0):
        self.code, self.text, self.replies = code, text, replies

    def FetchPages(self, request_iterator, context):
        for _, request in zip(range(self.replies), request_iterator, strict=False):
            yield zero_reply(request)
        context.abort(self.code, self.text)


@pytest.fixture
def stock():
    """Starts stock servers with a servicer; the address of each."""
    servers = []

    def start(servicer, port=0):
        server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        rpc.add_PageServiceServicer_to_server(servicer, server)
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        servers.append(server)
        return server, Endpoint("127.0.0.1", bound)

    yield start
    for server in servers:
        server.stop(0).wait()


@pytest.mark.parametrize(
    "code", [c for c in grpc.StatusCode if c.value[0] and c.name not in RETRIED], ids=lambda code: code.name
)
def test_status_of_a_stock_server_reaches_the_error(destination, stock, code):
    _, endpoint = stock(Aborting(code, "50 % of ümläuts\n", replies=code.value[0] % 2))
    error = failure_of(destination, endpoint)
    assert type(error) is ChannelError
    assert error.message.endswith(f"{code.name}: 50 % of ümläuts\n")


def test_stock_server_that_is_stopped_and_started_again_loses_nothing(destination, stock):
    """The graceful end of grpcio: GOAWAY, what is under way is cancelled, then nobody listens for a moment."""
    served, port = ServedMemory(PAGES), ReservedPort()
    try:
        server, endpoint = stock(PageServicer(served.exports), port.number)
        destination.start(endpoint, max_bandwidth_bytes_per_s=2_000_000)
        wait_until(lambda: destination.pager.counters().missing_pages < PAGES, 10, "the first pages")
        server.stop(0).wait()
        stock(PageServicer(served.exports), endpoint.port)
        destination.touch(250, 100, 5)
        destination.wait()
        destination.check_touched(served.memory, 3)
        destination.check_all(served.memory)
        assert destination.fetch.counters().reconnects >= 1
    finally:
        served.close()
        port.close()
