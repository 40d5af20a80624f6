"""What is written of a trace is what is read of it; anything else is refused."""

import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import TraceError
from migrate.native.pager import PageKind
from migrate.telemetry.trace_file import KINDS, SCHEMA, TraceRecorder, read_trace
from migrate.v1 import types_pb2 as types

ORIGIN_NS = 10**15
MIGRATION = {"migration_id": "m", "guest": "g", "total_us": 12}
TIMES = st.integers(1, 10**12)


def record(page, event, taken, sent, read, replied, placed, thread, kind):
    return struct.pack("<8Q", page, event, taken, sent, read, replied, placed, thread | kind << 32)


def fault(page=1, event=100, *, taken=110, sent=120, read=5, replied=130, placed=140, thread=7, kind=1):
    times = [ORIGIN_NS + at if at else 0 for at in (event, taken, sent, replied, placed)]
    return record(page, *times[:3], read, *times[3:], thread, kind)


def written(path, *parts, downtime=None):
    recorder = TraceRecorder()
    for part in parts:
        recorder.add(part)
    recorder.write(path, MIGRATION, downtime)
    return read_trace(path)


def first_part(**fields):
    return types.TracePart(origin_ns=ORIGIN_NS, vcpu_thread_ids=[7, 8], **fields)


@given(
    faults=st.lists(
        st.tuples(
            st.integers(0, 2**40),
            TIMES,
            *[st.just(0) | TIMES] * 2,
            st.integers(0, 10**9),
            st.just(0) | TIMES,
            TIMES,
            st.sampled_from([7, 8, 9]),
            st.integers(0, 3),
        ),
        max_size=20,
    )
)
def test_every_stage_of_every_fault_is_read_as_it_was(tmp_path_factory, faults):
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    raw = [
        record(
            page,
            *(at and at + ORIGIN_NS for at in (event, taken, sent)),
            read,
            replied and replied + ORIGIN_NS,
            placed + ORIGIN_NS,
            thread,
            kind,
        )
        for page, event, taken, sent, read, replied, placed, thread, kind in faults
    ]
    half = len(raw) // 2
    got = written(path, first_part(faults=b"".join(raw[:half])), types.TracePart(faults=b"".join(raw[half:]))).faults
    ordered = sorted(faults, key=lambda row: row[1])
    for index, name in enumerate(("page", "at_ns", "taken_ns", "sent_ns", "read_ns", "replied_ns", "placed_ns")):
        expected = [row[index] or (-1 if index in (2, 3, 4, 5) else 0) for row in ordered]
        assert getattr(got, name).tolist() == expected, name
    assert got.thread_id.tolist() == [row[7] for row in ordered]
    assert got.vcpu.tolist() == [{7: 0, 8: 1}.get(row[7], -1) for row in ordered]
    assert got.kind.tolist() == [row[8] for row in ordered]


def test_kinds_are_those_of_the_pager():
    assert [kind.name.lower() for kind in PageKind] == list(KINDS)


def test_everything_else_is_read_as_it_was(tmp_path):
    part = first_part(
        states=[types.TraceState(at_ns=ORIGIN_NS + 5, state=types.MIGRATION_STATE_POSTCOPY)],
        stalls=[types.StallCount(stall_us=15.5, count=4)],
        missing_at_switchover=zlib.compress(b"\x05"),
        zero_at_end=zlib.compress(b"\x80"),
        lost_faults=3,
    )
    counts = {"zero": 1, "precopy": 2, "urgent": 3, "background": 4, "duplicate": 5, "stale": 6}
    part.progress.add(
        at_ns=ORIGIN_NS + 9, pages=types.PageCounts(**counts), missing_pages=7, missing_map=b"\x00\xff", bytes_on_wire=8
    )
    downtime = types.DowntimeParts(pause_us=1, resume_us=2)
    trace = written(tmp_path / "t", part, types.TracePart(lost_faults=1, is_last=True), downtime=downtime)
    assert (trace.migration, trace.lost_faults) == (MIGRATION, 4)
    assert (trace.downtime_us["pause_us"], trace.downtime_us["load_us"], trace.downtime_us["resume_us"]) == (1, 0, 2)
    (progress,) = trace.progress
    assert (progress.at_ns, progress.pages, progress.missing_map) == (9, counts, b"\x00\xff")
    assert (progress.missing_pages, progress.bytes_on_wire) == (7, 8)
    assert (trace.states, trace.stalls) == ([(5, "postcopy")], [(15.5, 4)])
    assert np.flatnonzero(trace.missing_at_switchover).tolist() == [0, 2]
    assert np.flatnonzero(trace.zero_at_end).tolist() == [7]


def test_trace_of_nothing_is_a_trace(tmp_path):
    trace = written(tmp_path / "t")
    assert (len(trace.faults), trace.progress, trace.downtime_us) == (0, [], {})
    assert trace.missing_at_switchover is None


def test_a_thread_that_runs_two_vcpus_is_neither(tmp_path):
    part = types.TracePart(origin_ns=ORIGIN_NS, vcpu_thread_ids=[7, 7, 8], faults=fault(thread=7) + fault(thread=8))
    assert written(tmp_path / "t", part).faults.vcpu.tolist() == [-1, 2]


def test_columns_are_those_that_the_document_names(tmp_path):
    written(tmp_path / "t", first_part(faults=fault()))
    assert pq.read_schema(tmp_path / "t").names == SCHEMA.names


parts = st.builds(
    types.TracePart,
    faults=st.binary(max_size=200) | st.integers(0, 2**64 - 1).map(lambda word: word.to_bytes(8, "little") * 8),
    progress=st.lists(
        st.builds(types.TraceProgress, at_ns=st.integers(0, 2**64 - 1), missing_map=st.binary()), max_size=3
    ),
    states=st.lists(st.builds(types.TraceState, at_ns=st.integers(0, 2**64 - 1), state=st.integers(0, 99)), max_size=3),
    stalls=st.lists(st.builds(types.StallCount, stall_us=st.floats(), count=st.integers(0, 2**64 - 1)), max_size=3),
    vcpu_thread_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    missing_at_switchover=st.binary(max_size=40),
    lost_faults=st.integers(0, 2**64 - 1),
    origin_ns=st.integers(0, 2**64 - 1),
)


@settings(max_examples=30)
@given(hostile=st.lists(parts, max_size=2))
def test_whatever_a_destination_hands_over_can_be_written_and_read(tmp_path_factory, hostile):
    written(tmp_path_factory.mktemp("trace") / "t", *hostile)


def test_a_bitmap_that_grows_without_end_is_left_out(tmp_path):
    part = first_part(zero_at_end=zlib.compress(bytes(64 << 20)), faults=fault())
    trace = written(tmp_path / "t", part)
    assert trace.zero_at_end is None
    assert len(trace.faults) == 1


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "t"
    written(path, first_part(faults=fault()))
    before = path.read_bytes()
    with pytest.raises(OSError, match="No such file"):
        TraceRecorder().write(tmp_path / "missing" / "t", MIGRATION, None)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]


def other_parquet(path, **notes):
    table = pa.table(
        {"event": ["fault"]}, metadata={f"migrate.{name}": json.dumps(value) for name, value in notes.items()}
    )
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "cannot be read as a trace"),
        (lambda path: path.write_bytes(b"PAR1 or not"), "cannot be read as a trace"),
        (other_parquet, "no trace of ours"),
        (lambda path: other_parquet(path, format=99), "format 99"),
        (lambda path: other_parquet(path, format=1, migration={}, downtime_us={}, lost_faults=0), "no trace of ours"),
    ],
    ids=["missing", "garbage", "other table", "later format", "other columns"],
)
def test_what_is_no_trace_is_refused(tmp_path, make, words):
    make(tmp_path / "t")
    with pytest.raises(TraceError, match=words):
        read_trace(tmp_path / "t")
