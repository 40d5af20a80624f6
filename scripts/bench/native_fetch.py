"""The project's native data path, for scripts/bench/limit: the same two roles, spoken to in the same way.

native_fetch.py serve --memfd FD --pages N --token T [--tls-dir DIR]
native_fetch.py fetch --uffd FD --hva H --pages N --port P --token T [--tls-dir DIR]
"""

import argparse
import json
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from migrate.native.pager import FaultBatch
    from migrate.native.tls import NativeTls

HOST = "127.0.0.1"
MIGRATION_ID = "limit"
_DEADLINE_S = 120
_CONNECT_US = 5_000_000
# Longer than a gigabyte takes, shorter than it takes to fill the ring of fault records.
_DRAIN_EVERY_US = 500_000


class Stages:
    """What the stages of urgent faults took: to the request on the wire, to the reply, to the placed page."""

    def __init__(self) -> None:
        self._stages_ns: list[tuple[int, int, int]] = []

    def add(self, records: "FaultBatch") -> None:
        """Take in what the pager recorded."""
        self._stages_ns += [
            (r.sent_ns - r.event_ns, r.replied_ns - r.sent_ns, r.placed_ns - r.replied_ns) for r in records if r.sent_ns
        ]

    def medians_us(self) -> dict[str, float]:
        """The median of each stage, in microseconds."""
        names = ("event_to_sent_us", "sent_to_replied_us", "replied_to_placed_us")
        columns = zip(*self._stages_ns, strict=True)
        return {name: statistics.median(column) / 1000 for name, column in zip(names, columns, strict=False)}


def load_tls(directory: Path | None) -> "NativeTls | None":
    """The files of a TLS directory; None is plain text."""
    from migrate.native.tls import NativeTls  # noqa: PLC0415

    return None if directory is None else NativeTls(*(directory / name for name in ("ca.pem", "cert.pem", "key.pem")))


def serve(memfd: int, pages: int, token: str, tls: "NativeTls | None") -> None:
    """Serve the pages of a memfd until SIGTERM."""
    from migrate.config import Endpoint  # noqa: PLC0415
    from migrate.native.exports import Exports  # noqa: PLC0415
    from migrate.native.page_source import PageSource  # noqa: PLC0415
    from migrate.native.pageserver import PageServer  # noqa: PLC0415

    # Blocked before any thread starts, so that it waits for us.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    exports = Exports()
    server = PageServer(Endpoint(HOST, 0), exports, tls)
    exports.publish(MIGRATION_ID, token, PageSource(memfd, pages))
    print(server.endpoint.port, flush=True)
    signal.sigtimedwait([signal.SIGTERM], _DEADLINE_S)
    exports.withdraw(MIGRATION_ID)
    server.close()


def fetch(uffd: int, region_hva: int, pages: int, port: int, token: str, tls: "NativeTls | None") -> None:
    """Fetch all pages of an armed region, and print what it took."""
    from migrate.native.fetcher import NativeFetch  # noqa: PLC0415
    from migrate.native.pager import Pager  # noqa: PLC0415
    from migrate.telemetry.faults import FaultLatencies  # noqa: PLC0415
    from migrate.units import pages_to_bytes  # noqa: PLC0415

    pager = Pager(uffd, region_hva, pages)
    native = NativeFetch(HOST, port, MIGRATION_ID, token, tls=tls, server_name=HOST)
    native.connect(_CONNECT_US)
    latencies, stages = FaultLatencies(), Stages()
    begin_s, begin_cpu_s = time.monotonic(), time.process_time()
    native.start(pager)
    print("started", flush=True)
    while not pager.wait_done(_DRAIN_EVERY_US):
        native.wait(0)  # raises what made pages stop coming
        drained = pager.drain_records()
        latencies.add(drained)
        stages.add(drained)
    elapsed_s, cpu_s = time.monotonic() - begin_s, time.process_time() - begin_cpu_s
    drained = pager.drain_records()
    latencies.add(drained)
    stages.add(drained)
    at_the_end = native.counters()
    native.close()
    counters = pager.counters()
    if counters.lost_records:
        raise SystemExit(f"{counters.lost_records} fault records were lost")
    distribution = latencies.distribution()
    placed_bytes = pages_to_bytes(counters.total_pages - counters.missing_pages)
    figures = {f"{name}_us": getattr(distribution, name) for name in ("mean", "p50", "p90", "p99", "p999", "max")}
    figures |= {"faults": latencies.count, "placed_bytes": placed_bytes}
    figures |= {"background_bytes": pages_to_bytes(counters.background_pages), "seconds": elapsed_s}
    figures |= {"gb_per_s": placed_bytes / elapsed_s / 1e9, "cpu_s": cpu_s}
    figures |= stages.medians_us()
    figures |= {name: getattr(at_the_end, name) for name in ("background_requests", "window_bytes", "run_pages")}
    print(json.dumps(figures), flush=True)
    pager.close()


def main() -> None:
    """Take one of the two roles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("serve", "fetch"))
    for option in ("--memfd", "--uffd", "--hva", "--pages", "--port"):
        parser.add_argument(option, type=int, default=0)
    parser.add_argument("--token", required=True)
    parser.add_argument("--tls-dir", type=Path)
    given = parser.parse_args()
    signal.alarm(_DEADLINE_S)
    tls = load_tls(given.tls_dir)
    if given.role == "serve":
        serve(given.memfd, given.pages, given.token, tls)
    else:
        fetch(given.uffd, given.hva, given.pages, given.port, given.token, tls)


if __name__ == "__main__":
    main()
