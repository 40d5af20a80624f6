"""Traces that were never recorded: made-up faults whose figures agree with one another, written by the recorder."""

import zlib

import numpy as np

from migrate.telemetry.histogram import distribution_of
from migrate.telemetry.trace_file import KINDS, TraceRecorder, read_trace
from migrate.v1 import types_pb2 as types

MS = 1_000_000
THREADS = (4001, 4002)
PARTS_US = {"pause_us": 310, "last_round_us": 9_120, "save_us": 640, "transfer_us": 4_830, "load_us": 21_700}
PARTS_US |= {"last_pages_us": 0, "resume_us": 900}
STATES_MS = (("PRECOPY", 5), ("SWITCHOVER", 900), ("POSTCOPY", 940), ("COMPLETED", 3_000))
PAGES = 1 << 18


def make_faults(count, seed, begin_ms, end_ms):
    """Rows of TracePart.faults: fewer and fewer, most of them in a hot part of RAM, behind a sweep upwards."""
    random = np.random.default_rng(seed)
    at_share = np.sort(random.beta(1, 3, count))
    at_ns = (begin_ms + at_share * (end_ms - begin_ms)) * MS
    hot = random.random(count) < 0.6
    page = np.where(hot, PAGES * 0.55 + random.normal(0, PAGES * 0.05, count), random.random(count) * PAGES)
    page = np.clip(page, 0, PAGES - 1)
    swept = page < at_share * PAGES
    drawn = random.random(count)
    kind = np.where(drawn < 0.05, 0, np.where(swept, np.where(drawn < 0.3, 3, 2), np.where(drawn < 0.12, 2, 1)))
    taken = at_ns + random.lognormal(7.5, 0.6, count)
    sent = taken + random.lognormal(8.3, 0.4, count)
    read = random.lognormal(8.8, 0.5, count)
    replied = sent + read + random.lognormal(11, 0.5, count)
    urgent = kind == KINDS.index("urgent")
    waited = np.isin(kind, (KINDS.index("urgent"), KINDS.index("background")))
    placed = np.where(waited, replied, at_ns) + random.lognormal(8.6, 0.3, count)
    thread = np.array(THREADS)[random.integers(0, 2, count)]
    columns = [
        page,
        at_ns,
        np.where(urgent, taken, 0),
        np.where(urgent, sent, 0),
        np.where(urgent, read, 0),
        np.where(waited, replied, 0),
        placed,
    ]
    rows = np.array([column.astype(np.int64) for column in columns]).T
    return np.column_stack([rows, thread + (kind.astype(np.int64) << 32)])


def numbers(message):
    """As `migrate start --json` writes them."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


def make_progress(part, count, states_ms=STATES_MS):
    """Precopy until the vCPUs come, with a sixth of the pages written again; then the background upwards."""
    end_ms = states_ms[-1][1]
    live_ms = next((at_ms for name, at_ms in states_ms if name == "POSTCOPY"), end_ms)
    for at_ms in range(0, end_ms + 1, 25):
        before, after = min(1.0, at_ms / live_ms), max(0.0, (at_ms - live_ms) / max(1, end_ms - live_ms))
        cells = np.arange(256) / 256
        dirty = 0.16 + 0.5 * np.exp(-(((cells - 0.55) / 0.08) ** 2))
        missing = np.where(cells < before, np.where(at_ms < live_ms, dirty * before, 0), 1)
        if at_ms >= live_ms:
            missing = np.where(cells < after, 0, dirty)
        missing_pages = int(missing.mean() * PAGES)
        sample = part.progress.add(
            at_ns=at_ms * MS, missing_pages=missing_pages, bytes_on_wire=int((before + after / 6) * PAGES * 4_160)
        )
        sample.missing_map = bytes(np.ceil(missing * 255).astype(int).tolist())
        sample.pages.zero, sample.pages.precopy = int(9_000 * before), int(before * PAGES * 0.8)
        sample.pages.urgent = int(count * min(1.0, 1.6 * after) / 2)
        sample.pages.background = int(after * PAGES / 6)


def write_trace(path, *, faults=20_000, seed=1, states_ms=STATES_MS, stalls=True, parts=True, progress=True, **changes):
    """Write a trace of so many faults; `changes` go into its JSON, or are lost_faults and is_last of its last piece."""
    live_ms = next((at_ms for name, at_ms in states_ms if name == "POSTCOPY"), 0)
    rows = make_faults(faults, seed, live_ms, max(live_ms + 1, states_ms[-1][1] - 50) if states_ms else 1)
    part = types.TracePart(vcpu_thread_ids=THREADS, is_last=changes.pop("is_last", True))
    part.lost_faults = changes.pop("lost_faults", 0)
    part.faults = rows.astype("<u8").tobytes()
    for name, at_ms in states_ms:
        part.states.add(at_ns=at_ms * MS, state=types.MigrationState.Value(f"MIGRATION_STATE_{name}"))
    if progress:
        make_progress(part, faults, states_ms)
    part.missing_at_switchover = zlib.compress(bytes([0x11]) * (PAGES // 8))
    kinds = rows[:, 7] >> 32
    latencies_us = ((rows[:, 6] - rows[:, 1]) / 1000)[kinds != KINDS.index("present")]
    felt_us = np.round((latencies_us + 9) / 1.03125, 1) if stalls else np.array([])
    felt_us = np.sort(felt_us[felt_us >= 15])
    buckets_us, counts = np.unique(1.03 ** np.floor(np.log(felt_us) / np.log(1.03)), return_counts=True)
    for stall_us, count in zip(buckets_us, counts, strict=True):
        part.stalls.add(stall_us=max(15.0, stall_us), count=int(count))
    bucketed = [stall.stall_us for stall in part.stalls for _ in range(stall.count)]
    urgent = int((kinds == KINDS.index("urgent")).sum())
    migration = {
        "migration_id": "4f1c9a7e2b60",
        "guest": "web",
        "guest_kind": "kvm",
        "mode": "hybrid",
        "state": "completed",
        "order": "precopy",
        "transport": "native-grpc",
        "memory_bytes": PAGES * 4096,
        "page_size_bytes": 4096,
        "vcpus": 2,
        "downtime_us": sum(PARTS_US.values()),
        "precopy_us": 895_000,
        "postcopy_us": 2_060_000,
        "total_us": 3_001_000,
        "bytes_on_wire": 1_143_225_344,
        "pages": {
            "total": PAGES,
            "zero": 9_000,
            "precopy": PAGES - 9_000 - 43_690 - urgent,
            "urgent": urgent,
            "background": 43_690,
            "duplicate": 3,
            "stale": 12,
        },
        "fault_latency_us": numbers(distribution_of(latencies_us.tolist())),
        "guest_stall_us": numbers(distribution_of(bucketed)),
        "guest_touches": 41_234_567,
        "guest_errors": 0,
        "verified_pages": 0,
    }
    recorder = TraceRecorder()
    recorder.add(part)
    recorder.write(path, migration | changes, types.DowntimeParts(**PARTS_US) if parts else None)
    return read_trace(path)
