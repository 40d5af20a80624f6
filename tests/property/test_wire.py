"""The messages in C against protobuf's: what either writes the other reads equal, and C accepts nothing else."""

import struct

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from migrate.native._native import ffi, lib
from migrate.v1 import page_service_pb2 as pb
from tests.harness.guarded import GuardedBuffer

ROOM = GuardedBuffer(1 << 16)
CONTENTS = {
    None: lib.MIG_CONTENT_NONE,
    "data": lib.MIG_CONTENT_DATA,
    "zero": lib.MIG_CONTENT_ZERO,
    "compressed": lib.MIG_CONTENT_COMPRESSED,
}
VARINT, FIXED64, BYTES, GROUP_BEGIN, GROUP_END, FIXED32 = range(6)
FIELD_MAX = 2**29 - 1

uint32 = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 127, 128, 2**32 - 1])
uint64 = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 127, 128, 2**32, 2**63, 2**64 - 1])
requests = st.builds(pb.FetchPagesRequest, request_id=uint64, region=uint32, first_page=uint64, page_count=uint32)
contents = st.one_of(
    st.just({}),
    st.just({"zero": pb.ZeroPages()}),
    st.builds(lambda data: {"data": data}, st.binary(max_size=300)),
    st.builds(
        lambda compression, data: {"compressed": pb.Compressed(compression=compression, data=data)},
        st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 2]),
        st.binary(max_size=300),
    ),
)
responses = st.builds(
    lambda content, **fields: pb.FetchPagesResponse(**fields, **content),
    content=contents,
    request_id=uint64,
    region=uint32,
    first_page=uint64,
    page_count=uint32,
    generation=uint64,
    digest=uint64,
    read_ns=uint64,
)


# ---- what C reads ----


def values_of(message):
    """What both sides must agree on."""
    values = [message.request_id, message.region, message.first_page, message.page_count]
    if isinstance(message, pb.FetchPagesResponse):
        content = message.WhichOneof("content")
        values += [message.generation, message.digest, message.read_ns, content, *content_of(message)]
    return values


def content_of(message):
    """Compression and bytes of a response's content."""
    content = message.WhichOneof("content")
    if content == "compressed":
        return [message.compressed.compression, message.compressed.data]
    return [0, message.data if content == "data" else b""]


def c_values(kind, raw):
    """The same of what C reads; None if it refuses."""
    pointer = ROOM.hold(raw)
    if kind is pb.FetchPagesRequest:
        got = ffi.new("struct mig_fetch_request *")
        rc = lib.mig_wire_decode_request(pointer, len(raw), got)
    else:
        got = ffi.new("struct mig_fetch_response *")
        rc = lib.mig_wire_decode_response(pointer, len(raw), got)
    if rc < 0:
        return None
    values = [got.request_id, got.region, got.first_page, got.page_count]
    if kind is pb.FetchPagesResponse:
        content = {number: name for name, number in CONTENTS.items()}[got.content]
        assert content in {"data", "compressed"} or got.data_bytes == 0
        if got.data_bytes:
            assert pointer <= got.data < got.data + got.data_bytes <= pointer + len(raw)
        data = ffi.buffer(got.data, got.data_bytes)[:] if got.data_bytes else b""
        values += [got.generation, got.digest, got.read_ns, content, got.compression, data]
    return values


def protobuf_values(kind, raw):
    try:
        return values_of(kind.FromString(raw))
    except DecodeError:
        return None


def check_equal(kind, raw):
    expected = protobuf_values(kind, raw)
    assert expected is not None
    assert c_values(kind, raw) == expected


def check_no_more_is_accepted(kind, raw):
    """C may be stricter than protobuf where no encoder ever goes, never laxer."""
    got = c_values(kind, raw)
    if got is not None:
        assert got == protobuf_values(kind, raw)


# ---- what C writes ----


def c_encoded(message):
    header = ffi.new("uint8_t[]", lib.MIG_WIRE_HEADER_BYTES_MAX)
    fields = {name: getattr(message, name) for name in ("request_id", "region", "first_page", "page_count")}
    if isinstance(message, pb.FetchPagesRequest):
        length = lib.mig_wire_encode_request(ffi.new("struct mig_fetch_request *", fields), header)
        return ffi.buffer(header, length)[:]
    content = message.WhichOneof("content")
    fields |= {"generation": message.generation, "digest": message.digest, "read_ns": message.read_ns}
    compression, data = content_of(message)
    fields |= {"content": CONTENTS[content], "compression": compression, "data_bytes": len(data)}
    length = lib.mig_wire_encode_response(ffi.new("struct mig_fetch_response *", fields), header)
    return ffi.buffer(header, length)[:] + data


@given(message=requests | responses)
def test_what_c_writes_protobuf_reads_equal(message):
    encoded = c_encoded(message)
    flag, length = struct.unpack(">BI", encoded[:5])
    assert (flag, length) == (0, len(encoded) - 5)
    assert type(message).FromString(encoded[5:]) == message


@given(message=requests | responses)
def test_what_protobuf_writes_c_reads_equal(message):
    assert c_values(type(message), message.SerializeToString()) == values_of(message)


@pytest.mark.parametrize("content", CONTENTS)
def test_largest_header_fits(content):
    message = dict.fromkeys(("request_id", "first_page", "generation", "digest", "read_ns"), 2**64 - 1)
    message |= {"region": 2**32 - 1, "page_count": 2**32 - 1, "content": CONTENTS[content], "data_bytes": 2**32 - 1}
    message["compression"] = -1
    header = ffi.new("uint8_t[]", 256)
    length = lib.mig_wire_encode_response(ffi.new("struct mig_fetch_response *", message), header)
    assert length <= lib.MIG_WIRE_HEADER_BYTES_MAX


# ---- any valid encoding ----


def varint(value, padding=0):
    encoded = bytearray()
    while value >= 0x80 or padding:
        if value < 0x80:
            padding -= 1
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def tag(number, wire_type):
    return varint(number << 3 | wire_type)


@st.composite
def payloads(draw, number, wire_type, depth):
    """A field with its tag, of any wire type; groups hold fields."""
    begin = tag(number, wire_type)
    if wire_type == VARINT:
        value = draw(uint64)
        return begin + varint(value, draw(st.integers(0, 2)) if value < 2**49 else 0)
    if wire_type == FIXED64:
        return begin + draw(st.binary(min_size=8, max_size=8))
    if wire_type == FIXED32:
        return begin + draw(st.binary(min_size=4, max_size=4))
    if wire_type == BYTES:
        data = draw(st.binary(max_size=20))
        return begin + varint(len(data)) + data
    inner = draw(st.lists(fields_of(st.integers(1, FIELD_MAX), depth - 1), max_size=3))
    return begin + b"".join(inner) + tag(number, GROUP_END)


@st.composite
def fields_of(draw, numbers, depth=3):
    types = [VARINT, FIXED64, BYTES, FIXED32] + ([GROUP_BEGIN] if depth > 0 else [])
    return draw(payloads(draw(numbers), draw(st.sampled_from(types)), depth))


unknown_fields = fields_of(st.integers(10, FIELD_MAX))
# Their own numbers, with every wire type: mostly not the right one, and then they are unknown fields too. Numbers 7
# and 8 are messages: their bytes are one, or nothing is.
known_numbers_of_any_type = fields_of(st.integers(1, 9).filter(lambda number: number not in {7, 8}))


def message_fields(number, inner):
    return st.builds(lambda parts: sub_message(number, b"".join(parts)), inner)


def sub_message(number, inner):
    return tag(number, BYTES) + varint(len(inner)) + inner


zero_fields = message_fields(7, st.lists(unknown_fields, max_size=2))
compressed_members = st.one_of(
    fields_of(st.integers(1, FIELD_MAX)),
    st.builds(lambda value: tag(1, VARINT) + varint(value), uint64),
    st.builds(lambda data: sub_message(2, data), st.binary(max_size=30)),
)
compressed_fields = message_fields(8, st.lists(compressed_members, max_size=4))
any_field = st.one_of(
    unknown_fields,
    known_numbers_of_any_type,
    zero_fields,
    compressed_fields,
    fields_of(st.just(8)).filter(lambda raw: raw[0] != tag(8, BYTES)[0]),
    st.builds(lambda data: tag(6, BYTES) + varint(len(data)) + data, st.binary(max_size=30)),
    st.builds(lambda number, value: tag(number, VARINT) + varint(value), st.integers(1, 5), uint64),
    st.builds(lambda value: tag(9, FIXED64) + struct.pack("<Q", value), uint64),
)
kinds = st.sampled_from([pb.FetchPagesRequest, pb.FetchPagesResponse])


@given(kind=kinds, fields=st.lists(any_field, max_size=12))
def test_fields_in_any_order_repeated_and_unknown_ones_are_read_as_protobuf_reads_them(kind, fields):
    check_equal(kind, b"".join(fields))


@given(data=st.binary(max_size=20), order=st.permutations(["data", "zero", "compressed"]))
def test_last_content_counts(data, order):
    parts = {
        "data": sub_message(6, data),
        "zero": sub_message(7, b""),
        "compressed": sub_message(8, tag(1, VARINT) + b"\x02" + sub_message(2, data)),
    }
    raw = b"".join(parts[name] for name in order)
    check_equal(pb.FetchPagesResponse, raw)
    assert c_values(pb.FetchPagesResponse, raw)[7] == order[-1]


@given(contents=st.lists(zero_fields | compressed_fields | st.just(sub_message(6, b"x")), min_size=2, max_size=4))
def test_compressed_content_that_comes_in_parts_is_merged_as_protobuf_merges_it(contents):
    check_equal(pb.FetchPagesResponse, b"".join(contents))


@pytest.mark.parametrize("kind", [pb.FetchPagesRequest, pb.FetchPagesResponse])
@pytest.mark.parametrize("depth", [1, 2, 50, 98, 99, 100, 101, 102, 10_000])
def test_nested_groups_are_skipped_as_deep_as_protobuf_goes(kind, depth):
    raw = tag(20, GROUP_BEGIN) * depth + tag(20, GROUP_END) * depth + tag(1, VARINT) + b"\x05"
    check_no_more_is_accepted(kind, raw)
    if depth <= 50:
        check_equal(kind, raw)


@pytest.mark.parametrize(
    "depth",
    [1, 50, 98, 99, 100, 101, 10_000],
)
@pytest.mark.parametrize("number", [7, 8])
def test_nested_groups_in_contents_are_skipped_as_deep_as_protobuf_goes(depth, number):
    inner = tag(20, GROUP_BEGIN) * depth + tag(20, GROUP_END) * depth
    check_no_more_is_accepted(pb.FetchPagesResponse, sub_message(number, inner))


# ---- what is no message ----

BROKEN = {
    "field 0": b"\x00\x01",
    "wire type 6": b"\x0e\x01",
    "wire type 7": b"\x0f\x01",
    "end of a group that never began": tag(20, GROUP_END),
    "group that never ends": tag(20, GROUP_BEGIN),
    "group that another one ends": tag(20, GROUP_BEGIN) + tag(21, GROUP_END),
    "groups that overlap": tag(20, GROUP_BEGIN) + tag(21, GROUP_BEGIN) + tag(20, GROUP_END) + tag(21, GROUP_END),
    "varint of eleven bytes": tag(1, VARINT) + b"\x80" * 10 + b"\x01",
    "varint without an end": tag(1, VARINT) + b"\x80",
    "tag without an end": b"\x88",
    "length without bytes": tag(6, BYTES) + b"\x01",
    "length of 2^64-1": tag(6, BYTES) + varint(2**64 - 1),
    "length of 2^63": tag(6, BYTES) + varint(2**63) + bytes(100),
    "length of 2^31": tag(6, BYTES) + varint(2**31) + bytes(100),
    "unknown length of 2^64-1": tag(30, BYTES) + varint(2**64 - 1),
    "seven bytes of eight": tag(9, FIXED64) + bytes(7),
    "three bytes of four": tag(30, FIXED32) + bytes(3),
    "zero pages that are no message": tag(7, BYTES) + b"\x01\xff",
    "zero pages with a group's end": tag(7, BYTES) + b"\x02" + tag(20, GROUP_END),
    "compressed pages that are no message": tag(8, BYTES) + b"\x01\xff",
    "compressed pages with a group's end": tag(8, BYTES) + b"\x02" + tag(20, GROUP_END),
    "compressed pages that are cut off": tag(8, BYTES) + b"\x02" + tag(2, BYTES) + b"\x01x",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_message_is_refused(name):
    raw = BROKEN[name]
    assert protobuf_values(pb.FetchPagesResponse, raw) is None
    assert c_values(pb.FetchPagesResponse, raw) is None
    if not name.startswith(("zero pages", "compressed pages")):
        assert c_values(pb.FetchPagesRequest, raw) is None


@given(kind=kinds, fields=st.lists(any_field, min_size=1, max_size=6), data=st.data())
def test_cut_message_is_accepted_only_where_protobuf_does(kind, fields, data):
    raw = b"".join(fields)
    check_no_more_is_accepted(kind, raw[: data.draw(st.integers(0, len(raw) - 1))])


@given(kind=kinds, fields=st.lists(any_field, max_size=6), data=st.data())
def test_message_with_changed_bytes_is_accepted_only_where_protobuf_does(kind, fields, data):
    raw = bytearray(b"".join(fields) + b"\x08\x01")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    check_no_more_is_accepted(kind, bytes(raw))


@given(kind=kinds, raw=st.binary(max_size=64))
@example(kind=pb.FetchPagesRequest, raw=b"")
def test_random_bytes_are_accepted_only_where_protobuf_does(kind, raw):
    check_no_more_is_accepted(kind, raw)


def test_field_0_in_a_group_is_refused():
    """Stricter than protobuf, which takes it."""
    assert c_values(pb.FetchPagesRequest, tag(20, GROUP_BEGIN) + b"\x00\x01" + tag(20, GROUP_END)) is None


@pytest.mark.parametrize("number", [1, 9, 30])
@pytest.mark.parametrize(
    "padding",
    [0, 1, 2, 5, 6, 8],
)
def test_tags_in_more_bytes_than_they_need_are_accepted_only_where_protobuf_does(number, padding):
    raw = varint(number << 3, padding) + b"\x05"
    check_no_more_is_accepted(pb.FetchPagesResponse, raw)
    if len(raw) <= 5:
        check_equal(pb.FetchPagesResponse, raw)
