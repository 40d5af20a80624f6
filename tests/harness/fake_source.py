"""A PageService on bare frames: honest, until a test has it do something else."""

import contextlib
import itertools
import socket
import threading

from migrate.config import Endpoint
from migrate.v1 import page_service_pb2 as pb
from tests.harness.h2_peer import Peer, Settings, prefixed
from tests.harness.memory import PAGE

_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
_FRAME_BYTES_MIN = 16384


class FakeCall:
    """One call that came."""

    def __init__(self, source, peer, stream_id):
        self.source, self.peer, self.stream_id = source, peer, stream_id
        self.requests = []
        self.is_answered = False

    @property
    def is_urgent(self):
        """Which of the client's two links it came on: the background offers larger frames."""
        return self.peer.settings.get(Settings.MAX_FRAME_SIZE, _FRAME_BYTES_MIN) == _FRAME_BYTES_MIN

    def headers(self):
        if not self.is_answered:
            self.is_answered = True
            self.peer.headers(self.stream_id, _HEADERS)

    def reply(self, message, flag=0, **options):
        """Send a message: bytes, or a FetchPagesResponse."""
        self.headers()
        self.peer.data(self.stream_id, prefixed(message, flag), **options)

    def answers(self, request):
        """What an honest source answers: runs of data and zero pages, up to the end of the request."""
        memory = self.source.memory
        pages = range(request.first_page, request.first_page + request.page_count)
        made = []
        for is_zero, run in itertools.groupby(pages, key=lambda page: not any(memory.page(page))):
            numbers = list(run)
            response = pb.FetchPagesResponse(
                request_id=request.request_id, first_page=numbers[0], page_count=len(numbers)
            )
            if is_zero:
                response.zero.SetInParent()
            else:
                response.data = memory.run(numbers[0], len(numbers))
                response.digest = self.source.digest(numbers[0], len(numbers))
            made.append(response)
        return made

    def answer(self, request, **options):
        for response in self.answers(request):
            self.reply(response, **options)

    def end(self, status=0, message=None):
        """Trailers; without any reply before, Trailers-Only."""
        fields = [] if self.is_answered else list(_HEADERS)
        fields.append(("grpc-status", str(status)))
        if message is not None:
            fields.append(("grpc-message", message))
        self.is_answered = True
        self.peer.headers(self.stream_id, fields, end=True)


class FakeSource:
    """Listens, and serves each connection in a thread.

    Args:
        memory: A Memory.
        on_connection: Called with the Peer and its number before anything is sent; true if it has done all.
        on_call: Called with the FakeCall; true if it has done what there is to do.
        on_request: Called with the FakeCall and the request; true if it has done what there is to do.
        on_end: Called with the FakeCall when the client half-closed; likewise.
        settings: HTTP/2 settings to greet with.
        digest: Called with first page and count; the digest of a data run.
        context: Speaks TLS so; what came of handshakes that failed is in `refusals`.
    """

    def __init__(
        self,
        memory,
        *,
        on_connection=None,
        on_call=None,
        on_request=None,
        on_end=None,
        settings=None,
        digest=lambda first, count: 0,
        context=None,
    ):
        self.memory, self.digest = memory, digest
        self.settings = settings
        self.context = context
        self.refusals = []
        self.on_connection, self.on_call, self.on_request, self.on_end = on_connection, on_call, on_request, on_end
        self.calls = []
        self.peers = []
        self.errors = []
        self._threads = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("127.0.0.1", self._listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    @property
    def requests(self):
        return [request for call in list(self.calls) for request in call.requests]

    def refuse_connections(self):
        """From now on nobody listens, though connections that are there stay."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()

    def close(self):
        with contextlib.suppress(OSError):
            self.refuse_connections()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for peer in self.peers:
            peer.close()
        assert self.errors == []

    def _accept(self):
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            try:
                peer = Peer(self._secured(connected))
            except OSError as error:
                self.refusals.append(error)
                continue
            peer.socket.settimeout(None)
            thread = threading.Thread(target=self._serve, args=(peer, len(self.peers)))
            self.peers.append(peer)
            self._threads.append(thread)
            thread.start()

    def _secured(self, connected):
        return connected if self.context is None else self.context.wrap_socket(connected, server_side=True)

    def _serve(self, peer, number):
        try:
            if not (self.on_connection and self.on_connection(peer, number)):
                peer.greet(self.settings)
                self._serve_calls(peer)
        except OSError:
            pass  # the client left, or the test broke the connection
        except Exception as error:  # noqa: BLE001 - shown by close, in the test's thread
            self.errors.append(error)

    def _serve_calls(self, peer):
        calls, ended = {}, set()
        while not peer.is_closed:
            peer.receive_some()
            for stream_id, stream in list(peer.streams.items()):
                if stream_id not in calls and stream.blocks:
                    calls[stream_id] = call = FakeCall(self, peer, stream_id)
                    self.calls.append(call)
                    if not (self.on_call and self.on_call(call)):
                        call.headers()
                self._serve_requests(calls[stream_id], stream)
                if stream.is_ended and stream_id not in ended:
                    ended.add(stream_id)
                    if not (self.on_end and self.on_end(calls[stream_id])):
                        calls[stream_id].end()

    def _serve_requests(self, call, stream):
        for raw in stream.raw_messages():
            del stream.data[: len(prefixed(raw))]
            request = pb.FetchPagesRequest.FromString(raw)
            call.requests.append(request)
            assert 0 < request.page_count * PAGE <= 1 << 20
            if not stream.is_over or stream.is_ended:
                self._serve_request(call, request)

    def _serve_request(self, call, request):
        if not (self.on_request and self.on_request(call, request)):
            call.answer(request)


# ---- behaviours ----


class Once:
    """A behaviour that happens the first time that it is called with something it is meant for."""

    def __init__(self, act, wanted=lambda *_: True):
        self._act, self._wanted, self.done = act, wanted, threading.Event()

    def __call__(self, *arguments):
        if self.done.is_set() or not self._wanted(*arguments):
            return False
        self.done.set()
        self._act(*arguments)
        return True


def is_background(call, _request):
    return not call.is_urgent


def is_urgent(call, _request):
    return call.is_urgent


def urgent_first(behaviour=lambda *_: False):
    """A behaviour, with the background held until something urgent was asked for: so there is something urgent."""
    asked = threading.Event()

    def serve(call, request):
        if call.is_urgent:
            asked.set()
        else:
            asked.wait(10)
        return behaviour(call, request)

    return serve


def hold_all(*_):
    return True


# ---- replies that a test makes up ----


def common(request, **other):
    fields = {"request_id": request.request_id, "first_page": request.first_page, "page_count": request.page_count}
    return fields | other


def data_reply(request, *, data=None, **other):
    fields = common(request, **other)
    return pb.FetchPagesResponse(**fields, data=bytes(request.page_count * PAGE) if data is None else data)


def zero_reply(request, **other):
    return pb.FetchPagesResponse(**common(request, **other), zero=pb.ZeroPages())
