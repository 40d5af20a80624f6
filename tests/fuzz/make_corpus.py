"""Writes the seeds of the fuzz targets to corpus/: a few good conversations, and one of each kind of break.

Run it from the top of the tree after a change: python -m tests.fuzz.make_corpus
What fuzzing found lies beside the seeds, named found-…, and stays.
"""

import struct
from pathlib import Path

import hpack
from hyperframe import frame as frames

from migrate.v1 import page_service_pb2 as pb
from tests.fuzz.tls_seeds import certificate_seeds, tls_seeds
from tests.harness.h2_peer import PATH, PREFACE, prefixed
from tests.harness.zstd import compressed, frame, rle

CORPUS = Path(__file__).parent / "corpus"
# The first byte of a server's or a client's input; see fuzz_page_call.c.
RAW, GREETED, CALLED, SCRIPT = (bytes([mode]) for mode in range(4))
CALLED_COMPRESSING, SCRIPT_COMPRESSING = b"\x06", b"\x07"


def request(first_page, page_count, request_id=1, region=0):
    return pb.FetchPagesRequest(request_id=request_id, region=region, first_page=first_page, page_count=page_count)


def data_response(request_id, first_page, page_count):
    return pb.FetchPagesResponse(
        request_id=request_id, first_page=first_page, page_count=page_count, digest=7, data=bytes(4096 * page_count)
    )


def zero_response(request_id, first_page, page_count):
    return pb.FetchPagesResponse(
        request_id=request_id, first_page=first_page, page_count=page_count, zero=pb.ZeroPages()
    )


def compressed_response(request_id, first_page, page_count, data):
    content = pb.Compressed(compression=2, data=data)
    return pb.FetchPagesResponse(
        request_id=request_id, first_page=first_page, page_count=page_count, compressed=content
    )


def wire_seeds():
    group = b"\xa3\x01\x08\x05\xa4\x01"
    full = pb.FetchPagesResponse(
        request_id=2**64 - 1,
        region=2**32 - 1,
        first_page=2**64 - 1,
        page_count=2**32 - 1,
        generation=2**64 - 1,
        digest=2**64 - 1,
        data=b"page",
    )
    return {
        "request": request(300, 64, request_id=1 << 40).SerializeToString(),
        "data": full.SerializeToString(),
        "zero": zero_response(1, 2, 3).SerializeToString(),
        "unknown": group + b"\x7a\x02xy" + b"\x35\0\0\0\0" + request(1, 1).SerializeToString() + b"\x3a\x02\x08\x01",
        "compressed": compressed_response(1, 2, 3, b"frame").SerializeToString(),
        "parts": b"\x42\x02\x08\x02\x42\x03\x12\x01x\x3a\x00\x42\x03\x12\x01y",
        "both": b"\x32\x01x\x3a\x00\x32\x00",
    }


def serialized(*made):
    return b"".join(each.serialize() for each in made)


def call_block():
    return hpack.Encoder().encode(
        [
            *((":method", "POST"), (":scheme", "http"), (":path", PATH), (":authority", "x")),
            *(("content-type", "application/grpc"), ("te", "trailers"), ("grpc-timeout", "10S")),
            *(("migration-id", "m"), ("authorization", "Bearer t")),
        ]
    )


def server_seeds():
    headers = frames.HeadersFrame(1, call_block(), flags=["END_HEADERS"])
    asked = b"".join(map(prefixed, (request(0, 40, 1), request(3, 1, 2), request(20, 3, 3))))
    asking = frames.DataFrame(1, asked, flags=["END_STREAM"])
    settings = frames.SettingsFrame(0, settings={frames.SettingsFrame.INITIAL_WINDOW_SIZE: 1000})
    window = frames.WindowUpdateFrame(1, window_increment=1 << 20)
    ping = frames.PingFrame(0, opaque_data=b"12345678")
    padded = frames.DataFrame(1, prefixed(request(0, 2)), flags=["PADDED"], pad_length=9)
    reset = frames.RstStreamFrame(1, error_code=8)
    bad = frames.DataFrame(1, prefixed(request(60, 60)) + prefixed(b"\xff", flag=1))
    # Scripts: see play. A call, a request of 40 pages, a window, a reset; the next stream.
    ask = b"\x02\x01\x00\x00\x28"
    return {
        "call": RAW + PREFACE + serialized(settings, headers, asking, window, ping),
        "greeted": GREETED + serialized(headers, padded, asking),
        "called": CALLED + serialized(asking),
        "compressing": CALLED_COMPRESSING + serialized(asking, window),
        "reset": CALLED + serialized(window, padded, reset),
        "refused": CALLED + serialized(bad),
        "http1": RAW + b"GET / HTTP/1.1\r\n\r\n",
        "script": SCRIPT + ask * 3 + b"\x02\x02\x00\x03\x01" + b"\x06\xff\x00\x01\x00\x00",
        "unread": SCRIPT
        + b"\x0b"
        + b"\x08\x04\xff\x7f\xff\xff\xff"
        + ask * 8
        + b"\x05\x08\x00\x01\x01"
        + ask
        + b"\x0b",
        "late": SCRIPT + b"\x08\x04\x64" + ask * 3 + b"\x8a" + ask + b"\x00\x01\x01" + ask + b"\x8a",
        "heldcompressed": SCRIPT_COMPRESSING + b"\x08\x04\x00" + ask * 2 + b"\x06\x02" * 3 + b"\x05\x08",
        "deaf": SCRIPT + ask * 2 + b"\x8b" + ask,
        "held": SCRIPT + b"\x08\x04\x00" + ask + b"\x06\x02" * 3 + b"\x00\x01\x01" + b"\x82\x01\x00\x00\x02",
    }


def client_seeds():
    encoder = hpack.Encoder()
    headers = frames.HeadersFrame(
        1, encoder.encode([(":status", "200"), ("content-type", "application/grpc")]), flags=["END_HEADERS"]
    )
    replies = prefixed(data_response(1, 0, 1)) + prefixed(zero_response(1, 1, 3)) + prefixed(zero_response(2, 1, 4))
    data = [frames.DataFrame(1, replies[at : at + 1500]) for at in range(0, len(replies), 1500)]
    trailers = frames.HeadersFrame(
        1,
        encoder.encode([("grpc-status", "5"), ("grpc-message", "no%20more %")]),
        flags=["END_HEADERS", "END_STREAM"],
    )
    settings = frames.SettingsFrame(0, settings={frames.SettingsFrame.INITIAL_WINDOW_SIZE: 10})
    window = frames.WindowUpdateFrame(1, window_increment=1000)
    goaway = frames.GoAwayFrame(0, last_stream_id=1, additional_data=b"bye")
    short = compressed_response(1, 0, 4, frame(rle(b"x", 4096), claims_bytes=16384))
    dense = compressed_response(1, 0, 4, compressed(bytes(range(256)) * 64))
    lie = frames.DataFrame(1, prefixed(zero_response(9, 9, 9)))
    big = frames.DataFrame(1, struct.pack(">BI", 0, 1 << 30))
    honest_zero, honest_page = b"\x02\x03\x04", b"\x02\x35"
    return {
        "call": RAW + serialized(settings, headers, *data, window, goaway, trailers),
        "called": CALLED + serialized(*data, trailers),
        "compressed": CALLED + serialized(frames.DataFrame(1, prefixed(dense)), trailers),
        "short": CALLED + serialized(frames.DataFrame(1, prefixed(short))),
        "lie": CALLED + serialized(lie),
        "big": CALLED + serialized(big),
        "http1": RAW + b"HTTP/1.1 400 Bad Request\r\n\r\n",
        "script": SCRIPT + honest_zero * 3 + honest_page * 4 + b"\x0d",
        "goaway": SCRIPT + honest_zero + b"\x0c\x01\x00" + honest_zero * 2 + b"\x8d",
        "reset": SCRIPT + honest_page + b"\x05\x07",
    }


def main():
    targets = {
        "wire": wire_seeds(),
        "server": server_seeds(),
        "client": client_seeds(),
        "tls": tls_seeds(),
        "certificate": certificate_seeds(),
    }
    for target, seeds in targets.items():
        directory = CORPUS / target
        directory.mkdir(parents=True, exist_ok=True)
        for old in directory.iterdir():
            if not old.name.startswith("found-"):
                old.unlink()
        for name, seed in seeds.items():
            (directory / name).write_bytes(seed)


if __name__ == "__main__":
    main()
