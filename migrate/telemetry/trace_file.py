"""A trace as a file: every fault of one migration stage by stage, and the background beside it (docs/traces.md).

One Parquet table of events; the column `event` says which of the others a row fills. pyarrow and numpy come with the
extra `trace`, and nothing else in this package needs them.
"""

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from google.protobuf.message import Message

from migrate.client.words import state_word
from migrate.errors import TraceError
from migrate.files import replace_file
from migrate.telemetry.totals import PAGE_KINDS
from migrate.v1 import types_pb2 as types

FORMAT = 1
"""Goes up when a reader of the one before would be misled."""

KINDS = ("zero", "urgent", "background", "present")
"""What brought the page of a fault, by its number in TracePart.faults. The wire's: a trace is read where C is not."""

_URGENT, _BACKGROUND, _PRESENT = (KINDS.index(kind) for kind in ("urgent", "background", "present"))
_RECORD_WORDS = 8
_RECORD_BYTES = _RECORD_WORDS * 8
_NUMBER_MAX = 2**62
_STATES = frozenset(types.MigrationState.values())
# A terabyte of RAM has so many pages.
_BITMAP_BYTES_MAX = 32 << 20
_WORD = pa.dictionary(pa.int8(), pa.string())
_METADATA = "migrate."

SCHEMA = pa.schema(
    [
        pa.field("event", _WORD, nullable=False),
        pa.field("at_ns", pa.int64(), nullable=False),
        # of a fault
        pa.field("page", pa.int64()),
        pa.field("vcpu", pa.int16()),
        pa.field("thread_id", pa.int32()),
        pa.field("kind", _WORD),
        pa.field("taken_ns", pa.int64()),
        pa.field("sent_ns", pa.int64()),
        pa.field("read_ns", pa.int64()),
        pa.field("replied_ns", pa.int64()),
        pa.field("placed_ns", pa.int64()),
        # of progress
        *(pa.field(f"{name}_pages", pa.int64()) for name in PAGE_KINDS),
        pa.field("missing_pages", pa.int64()),
        pa.field("bytes_on_wire", pa.int64()),
        pa.field("missing_map", pa.binary()),
        # of a state
        pa.field("state", _WORD),
        # of a bucket of the guest's stalls
        pa.field("stall_us", pa.float64()),
        pa.field("count", pa.int64()),
        # of a set of pages
        pa.field("bitmap", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class Faults:
    """All faults, in the order of their events: one array each, of one length. Times are nanoseconds, -1 for none.

    Attributes:
        at_ns: The kernel's event was read.
        page: The missing page.
        vcpu: Who touched it; -1 if that was no vCPU, or is not known.
        thread_id: The same as a thread of the guest process.
        kind: Index into KINDS.
        taken_ns: The urgent queue gave it to the thread that asks; -1 if nobody asked for its sake.
        sent_ns: Its request was written to the socket.
        read_ns: How long the source took to read it, from the whole request to the answer.
        replied_ns: Its reply was complete.
        placed_ns: The page was there.
    """

    at_ns: np.ndarray
    page: np.ndarray
    vcpu: np.ndarray
    thread_id: np.ndarray
    kind: np.ndarray
    taken_ns: np.ndarray
    sent_ns: np.ndarray
    read_ns: np.ndarray
    replied_ns: np.ndarray
    placed_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.at_ns)

    @property
    def latency_ns(self) -> np.ndarray:
        """Kernel event read to page placed."""
        return np.asarray(self.placed_ns - self.at_ns)

    @property
    def is_urgent(self) -> np.ndarray:
        """Whether each page was asked for because of the fault."""
        return np.asarray(self.kind == _URGENT)

    @property
    def is_network_fault(self) -> np.ndarray:
        """Whether each page came from the source, asked for because of the fault or before it."""
        return np.asarray(self.is_urgent | (self.kind == _BACKGROUND))

    @property
    def is_present(self) -> np.ndarray:
        """Whether each page had come before the event was read, so that nobody waited."""
        return np.asarray(self.kind == _PRESENT)

    @property
    def has_stages(self) -> np.ndarray:
        """Which faults are urgent, and were taken, asked for and answered."""
        return self.is_urgent & (self.taken_ns >= 0) & (self.sent_ns >= 0) & (self.replied_ns >= 0)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the pages were at one time; `pages` has a number for each of PAGE_KINDS."""

    at_ns: int
    pages: Mapping[str, int]
    missing_pages: int
    bytes_on_wire: int
    missing_map: bytes


@dataclass(frozen=True, slots=True)
class Trace:
    """One migration, as its destination saw it. Times are its CLOCK_MONOTONIC, from Prepare on.

    Attributes:
        migration: What `migrate start --json` printed.
        downtime_us: Where the downtime went, part by part, in their order; empty if it is not known.
        lost_faults: How many were not kept.
        is_whole: Whether the last piece of it came.
        faults: All that were kept.
        progress: Ascending.
        states: When the destination came to each, as (at_ns, state).
        stalls: The guest's own histogram since the switchover, ascending, as (stall_us, count).
        missing_at_switchover: Whether each page was missing when the vCPUs came; None if that is not known.
        zero_at_end: Whether the source had told each page to be zero by the end; None if that is not known.
    """

    migration: Mapping[str, Any]
    downtime_us: Mapping[str, int]
    lost_faults: int
    is_whole: bool
    faults: Faults
    progress: Sequence[Progress]
    states: Sequence[tuple[int, str]]
    stalls: Sequence[tuple[float, int]]
    missing_at_switchover: np.ndarray | None
    zero_at_end: np.ndarray | None


@dataclass
class TraceRecorder:
    """Gathers the parts of a trace in the order in which they come, and writes them down."""

    is_whole: bool = False
    _faults: list[bytes] = field(default_factory=list)
    _progress: list[types.TraceProgress] = field(default_factory=list)
    _states: list[types.TraceState] = field(default_factory=list)
    _stalls: list[types.StallCount] = field(default_factory=list)
    _vcpus: dict[int, int] = field(default_factory=dict)
    _bitmaps: dict[str, bytes] = field(default_factory=dict)
    _lost_faults: int = 0
    _origin_ns: int = 0

    def add(self, part: types.TracePart) -> None:
        """Take in the next part. It comes from another host: what makes no sense in it is left out."""
        self._faults.append(part.faults[: len(part.faults) // _RECORD_BYTES * _RECORD_BYTES])
        self._progress.extend(filter(_makes_sense, part.progress))
        self._states.extend(step for step in part.states if _makes_sense(step) and step.state in _STATES)
        self._stalls.extend(filter(_makes_sense, part.stalls))
        if part.vcpu_thread_ids:
            # A thread that runs several vCPUs by turns does not tell which one it was.
            threads = Counter(part.vcpu_thread_ids)
            self._vcpus = {thread: vcpu for vcpu, thread in enumerate(part.vcpu_thread_ids) if threads[thread] == 1}
        for name in ("missing_at_switchover", "zero_at_end"):
            if bitmap := getattr(part, name):
                self._bitmaps[name] = bitmap
        self._lost_faults += part.lost_faults
        self._origin_ns = self._origin_ns or min(part.origin_ns, _NUMBER_MAX)
        self.is_whole |= part.is_last

    def write(self, path: Path, migration: Mapping[str, Any], downtime: types.DowntimeParts | None) -> None:
        """Write all of it to a file, over one that is there.

        Args:
            path: The file.
            migration: What `migrate start --json` prints of it.
            downtime: Where the downtime went, if that is known.

        Raises:
            OSError: it cannot be written; what was there before still is.
        """
        parts = (
            {} if downtime is None else {part.name: getattr(downtime, part.name) for part in downtime.DESCRIPTOR.fields}
        )
        notes = {
            "format": FORMAT,
            "migration": migration,
            "downtime_us": parts,
            "lost_faults": self._lost_faults,
            "is_whole": self.is_whole,
        }
        schema = SCHEMA.with_metadata({_METADATA + name: json.dumps(value) for name, value in notes.items()})
        tables = [self._fault_table(), *map(_table, self._rows())]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(tables).cast(schema), sink, compression="zstd")
        replace_file(path, sink.getvalue().to_pybytes(), mode=0o644)

    def _fault_table(self) -> pa.Table:
        raw = np.frombuffer(b"".join(self._faults), dtype="<u8").reshape(-1, _RECORD_WORDS)
        makes_sense = (raw[:, :-1] < _NUMBER_MAX).all(axis=1) & (raw[:, -1] >> np.uint64(32) < len(KINDS))
        words = raw[makes_sense].astype(np.int64)
        words = words[np.argsort(words[:, 1], kind="stable")]
        page, *_, last = words.T
        at_ns, taken_ns, sent_ns, replied_ns, placed_ns = (
            np.where(words[:, column] > 0, words[:, column] - self._origin_ns, 0) for column in (1, 2, 3, 5, 6)
        )
        read_ns = words[:, 4]
        thread_id = last & 0xFFFFFFFF
        vcpu = np.array([self._vcpus.get(int(thread), -1) for thread in thread_id], dtype=np.int16)
        columns: dict[str, Any] = {
            "event": _words("fault", len(words)),
            "at_ns": at_ns,
            "page": page,
            "vcpu": pa.array(vcpu, mask=vcpu < 0),
            "thread_id": thread_id.astype(np.int32),
            "kind": pa.DictionaryArray.from_arrays(pa.array((last >> 32).astype(np.int8)), list(KINDS)),
            "placed_ns": placed_ns,
        }
        for name, times in (("taken", taken_ns), ("sent", sent_ns), ("read", read_ns), ("replied", replied_ns)):
            columns[f"{name}_ns"] = pa.array(times, mask=times == 0)
        return _filled(columns, len(words))

    def _rows(self) -> list[list[dict[str, Any]]]:
        states = [(step.at_ns - self._origin_ns, step.state) for step in self._states]
        last_ns = states[-1][0] if states else 0
        live_ns = next((at_ns for at_ns, state in states if state == types.MIGRATION_STATE_POSTCOPY), last_ns)
        progress = [
            {
                "event": "progress",
                "at_ns": sample.at_ns - self._origin_ns,
                **{f"{name}_pages": getattr(sample.pages, name) for name in PAGE_KINDS},
                "missing_pages": sample.missing_pages,
                "bytes_on_wire": sample.bytes_on_wire,
                "missing_map": sample.missing_map,
            }
            for sample in self._progress
        ]
        steps = [{"event": "state", "at_ns": at_ns, "state": state_word(state)} for at_ns, state in states]
        stalls = [
            {"event": "stalls", "at_ns": last_ns, "stall_us": stall.stall_us, "count": stall.count}
            for stall in self._stalls
        ]
        times_ns = {"missing_at_switchover": live_ns, "zero_at_end": last_ns}
        bitmaps = [
            {"event": name, "at_ns": times_ns[name], "bitmap": bitmap}
            for name, compressed in self._bitmaps.items()
            if (bitmap := _decompressed(compressed))
        ]
        return [progress, steps, stalls, bitmaps]


def _makes_sense(message: Message) -> bool:
    """Whether every number in it is one that arithmetic can be done with."""
    return all(
        _makes_sense(value) if isinstance(value, Message) else isinstance(value, bytes) or value < _NUMBER_MAX
        for _, value in message.ListFields()
    )


def _decompressed(compressed: bytes) -> bytes:
    """Empty if it is nothing that a destination would send."""
    stream = zlib.decompressobj()
    try:
        bitmap = stream.decompress(compressed, _BITMAP_BYTES_MAX)
    except zlib.error:
        return b""
    return bitmap if stream.eof else b""


def read_trace(path: Path) -> Trace:
    """Read what TraceRecorder.write wrote.

    Raises:
        TraceError: it is no trace, or one of a later version.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"{path} cannot be read as a trace: {error}") from error
    notes = {
        key.decode().removeprefix(_METADATA): value
        for key, value in (table.schema.metadata or {}).items()
        if key.decode().startswith(_METADATA)
    }
    try:
        version = json.loads(notes["format"])
        if version > FORMAT:
            raise TraceError(
                f"{path} is a trace of format {version}; this version reads up to {FORMAT}",
                remedy="use a newer version",
            )
        events = table["event"].cast(pa.string()).to_numpy()
        return Trace(
            migration=json.loads(notes["migration"]),
            downtime_us=json.loads(notes["downtime_us"]),
            lost_faults=json.loads(notes["lost_faults"]),
            is_whole=json.loads(notes["is_whole"]),
            faults=_read_faults(table.filter(events == "fault")),
            progress=[_read_progress(row) for row in table.filter(events == "progress").to_pylist()],
            states=[(row["at_ns"], row["state"]) for row in table.filter(events == "state").to_pylist()],
            stalls=[(row["stall_us"], row["count"]) for row in table.filter(events == "stalls").to_pylist()],
            missing_at_switchover=_read_bitmap(table, events, "missing_at_switchover"),
            zero_at_end=_read_bitmap(table, events, "zero_at_end"),
        )
    except (KeyError, ValueError) as error:
        raise TraceError(f"{path} is no trace of ours: {error!r}") from error


def _read_faults(table: pa.Table) -> Faults:
    def column(name: str) -> np.ndarray:
        return np.asarray(table[name].fill_null(-1), dtype=np.int64)

    names = [name for name in Faults.__dataclass_fields__ if name != "kind"]
    words = table["kind"].cast(pa.string()).to_pylist()
    kind = np.array([KINDS.index(word) for word in words], dtype=np.int64)
    return Faults(kind=kind, **{name: column(name) for name in names})


def _read_progress(row: Mapping[str, Any]) -> Progress:
    return Progress(
        row["at_ns"],
        {name: row[f"{name}_pages"] for name in PAGE_KINDS},
        row["missing_pages"],
        row["bytes_on_wire"],
        row["missing_map"] or b"",
    )


def _read_bitmap(table: pa.Table, events: np.ndarray, name: str) -> np.ndarray | None:
    rows = table.filter(events == name)
    if not rows.num_rows:
        return None
    return np.unpackbits(np.frombuffer(rows["bitmap"][0].as_py(), dtype=np.uint8), bitorder="little").astype(bool)


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    names = {name for row in rows for name in row}
    plain = pa.schema([f.with_type(pa.string()) if f.type == _WORD else f for f in SCHEMA if f.name in names])
    table = pa.Table.from_pylist(list(rows), schema=plain)
    return _filled({name: table[name].combine_chunks() for name in plain.names}, len(rows))


def _filled(columns: Mapping[str, Any], rows: int) -> pa.Table:
    """A table with all of SCHEMA, nothing in what is not given."""
    return pa.Table.from_arrays([_encoded(columns, f, rows) for f in SCHEMA], schema=SCHEMA)


def _encoded(columns: Mapping[str, Any], column: pa.Field, rows: int) -> Any:
    if column.name not in columns:
        return pa.nulls(rows, column.type)
    values = columns[column.name]
    values = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
    if column.type == _WORD and values.type == pa.string():
        values = values.dictionary_encode()
    return values.cast(column.type)


def _words(word: str, rows: int) -> Any:
    return pa.array([word] * rows, type=pa.string())
