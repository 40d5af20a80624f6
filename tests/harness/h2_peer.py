"""One end of an HTTP/2 connection, frame by frame: it keeps no rule unless told to.

hyperframe writes and reads frames, hpack the header blocks; everything else that HTTP/2 asks for is up to the test.
"""

import contextlib
import socket
import struct

import hpack
from hyperframe import frame as frames

from migrate.v1 import page_service_pb2 as pb

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATH = "/migrate.v1.PageService/FetchPages"
WINDOW_MAX = 2**31 - 1
Settings = frames.SettingsFrame
_DEADLINE_S = 10
_PREFIX_BYTES = 5
_FRAME_BYTES = 16384


def prefixed(message, flag=0):
    """A gRPC message with its prefix: bytes, or something that protobuf serialises."""
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack(">BI", flag, len(body)) + body


def request(first_page, page_count=1, region=0, request_id=1):
    return pb.FetchPagesRequest(request_id=request_id, region=region, first_page=first_page, page_count=page_count)


def frame_bytes(length, kind, flags=0, stream_id=0, body=b""):
    return struct.pack(">I", length)[1:] + bytes([kind, flags]) + struct.pack(">I", stream_id) + body


class PeerStream:
    """What came on one stream."""

    def __init__(self):
        self.blocks = []  # of headers, as dictionaries; the last one may be trailers
        self.data = bytearray()
        self.is_ended = False
        self.reset_code = None

    @property
    def headers(self):
        return {name: value for block in self.blocks for name, value in block.items()}

    @property
    def is_over(self):
        return self.is_ended or self.reset_code is not None

    @property
    def status(self):
        """(grpc-status, grpc-message) as they came, or None."""
        headers = self.headers
        return (int(headers["grpc-status"]), headers.get("grpc-message", "")) if "grpc-status" in headers else None

    def raw_messages(self):
        """Whole messages so far; the rest of the bytes stays for the next one."""
        found, at = [], 0
        while len(self.data) - at >= _PREFIX_BYTES:
            _, length = struct.unpack_from(">BI", self.data, at)
            if len(self.data) - at - _PREFIX_BYTES < length:
                break
            at += _PREFIX_BYTES + length
            found.append(bytes(self.data[at - length : at]))
        return found

    def responses(self):
        return [pb.FetchPagesResponse.FromString(raw) for raw in self.raw_messages()]


class Peer:
    """Reads into `streams`, `goaway` and `settings`; acknowledges and opens windows while the flags say so."""

    def __init__(self, connected):
        self.socket = connected
        self.socket.settimeout(_DEADLINE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder, self.decoder = hpack.Encoder(), hpack.Decoder()
        self.streams = {}
        self.goaway = None
        self.settings = {}
        self.pings = 0
        self.pongs = 0
        self.is_closed = False
        self.acknowledges = True
        self.opens_windows = True
        self.is_greeted = False
        self._buffer = bytearray()
        self._block = b""

    @classmethod
    def connect(cls, endpoint, receive_buffer_bytes=None, context=None):
        made = socket.socket()
        if receive_buffer_bytes:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        made.settimeout(_DEADLINE_S)
        made.connect((endpoint.host, endpoint.port))
        return cls(made if context is None else context.wrap_socket(made))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.socket.close()

    def abort(self):
        """Close with a TCP reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # ---- out ----

    def send(self, data):
        self.socket.sendall(data)

    def send_frames(self, *to_send):
        self.send(b"".join(each.serialize() for each in to_send))

    def greet_server(self, settings=None, connection_window=0):
        """Preface, SETTINGS and what is added to the connection's window."""
        self.send(PREFACE)
        self.greet(settings, connection_window)

    def greet(self, settings=None, connection_window=0):
        self.send_frames(Settings(0, settings=settings or {}))
        if connection_window:
            self.send_frames(frames.WindowUpdateFrame(0, window_increment=connection_window))

    def headers(self, stream_id, fields, *, end=False):
        flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
        block = self.encoder.encode(fields, huffman=False)
        self.send_frames(frames.HeadersFrame(stream_id, block, flags=flags))

    def data(self, stream_id, data, *, end=False, frame_bytes=_FRAME_BYTES):
        parts = [data[at : at + frame_bytes] for at in range(0, len(data), frame_bytes)] or [b""]
        flags = [[]] * (len(parts) - 1) + [["END_STREAM"] if end else []]
        self.send_frames(*(frames.DataFrame(stream_id, part, flags=f) for part, f in zip(parts, flags, strict=True)))

    def call(self, stream_id=1, *, end=False, token="t", migration_id="m", path=PATH, without=(), **extra):  # noqa: S107
        """Begin a call. Further fields come as keywords, with _ for -."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "content-type": "application/grpc",
            "te": "trailers",
            "migration-id": migration_id,
            "authorization": f"Bearer {token}",
        }
        fields |= {(":" if name == "method" else "") + name.replace("_", "-"): value for name, value in extra.items()}
        self.headers(stream_id, [(name, value) for name, value in fields.items() if name not in without], end=end)

    def ask(self, stream_id, *requests, end=False):
        self.data(stream_id, b"".join(map(prefixed, requests)), end=end)

    def reset(self, stream_id, code=0x8):
        self.send_frames(frames.RstStreamFrame(stream_id, error_code=code))

    # ---- in ----

    def stream(self, stream_id):
        return self.streams.setdefault(stream_id, PeerStream())

    def receive(self, until, what="frames"):
        """Take in frames until a predicate holds or the connection is closed; returns whether it holds."""
        while not until():
            if self.is_closed:
                return False
            self.receive_some(what)
        return True

    def receive_some(self, what="frames"):
        """Wait for bytes, or the end, and take in what they complete."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        except TimeoutError:
            raise AssertionError(f"waited in vain for {what}") from None
        self.is_closed = not data
        self._buffer += data
        self._take_frames()

    def receive_end(self, stream_id=1):
        """Take in frames until a stream is over; returns it."""
        stream = self.stream(stream_id)
        self.receive(lambda: stream.is_over, f"the end of stream {stream_id}")
        assert stream.is_over, f"the connection was closed; GOAWAY: {self.goaway}"
        return stream

    def receive_close(self):
        """Take in frames until the other side closes."""
        self.receive(lambda: False, "the end of the connection")

    def receive_pong(self):
        """Send a PING and wait for its answer: the other side has then seen all that was sent before."""
        before = self.pongs
        self.send_frames(frames.PingFrame(0, opaque_data=b"12345678"))
        assert self.receive(lambda: self.pongs > before, "a PING's answer"), f"closed; GOAWAY: {self.goaway}"

    def _take_frames(self):
        while len(self._buffer) >= 9:
            if self._buffer.startswith(PREFACE):
                del self._buffer[: len(PREFACE)]
                continue
            taken, length = frames.Frame.parse_frame_header(memoryview(bytes(self._buffer[:9])))
            if len(self._buffer) < 9 + length:
                return
            taken.parse_body(memoryview(bytes(self._buffer[9 : 9 + length])))
            del self._buffer[: 9 + length]
            self._take(taken, length)

    def _take(self, taken, length):
        stream_id = taken.stream_id
        if isinstance(taken, (frames.HeadersFrame, frames.ContinuationFrame)):
            self._block += taken.data
            if "END_STREAM" in taken.flags:
                self.stream(stream_id).is_ended = True
            if "END_HEADERS" in taken.flags:
                self.stream(stream_id).blocks.append(dict(self.decoder.decode(self._block)))
                self._block = b""
        elif isinstance(taken, frames.DataFrame):
            stream = self.stream(stream_id)
            stream.data += taken.data
            stream.is_ended |= "END_STREAM" in taken.flags
            if self.opens_windows and length:
                self._reply(*(frames.WindowUpdateFrame(i, window_increment=length) for i in (0, stream_id)))
        elif isinstance(taken, frames.RstStreamFrame):
            self.stream(stream_id).reset_code = taken.error_code
        elif isinstance(taken, frames.GoAwayFrame):
            self.goaway = taken
        elif isinstance(taken, Settings) and "ACK" not in taken.flags:
            self.is_greeted = True
            self.settings |= taken.settings
            if self.acknowledges:
                self._reply(Settings(0, flags=["ACK"]))
        elif isinstance(taken, frames.PingFrame):
            self.pongs += "ACK" in taken.flags
            self.pings += "ACK" not in taken.flags
            if self.acknowledges and "ACK" not in taken.flags:
                self._reply(frames.PingFrame(0, opaque_data=taken.opaque_data, flags=["ACK"]))

    def _reply(self, *to_send):
        # Who does not listen any more may still have said something worth reading.
        with contextlib.suppress(ConnectionError):
            self.send_frames(*to_send)


def caller_without_a_window(endpoint):
    """A peer with fifteen calls, whose answers it does not let out."""
    peer = Peer.connect(endpoint)
    peer.opens_windows = False
    peer.greet_server({Settings.INITIAL_WINDOW_SIZE: 0})
    for stream_id in range(1, 31, 2):
        peer.call(stream_id, path="/migrate.v1.GuestService/ListGuests")
        peer.data(stream_id, bytes(5), end=True)
    return peer
