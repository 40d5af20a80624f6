"""One migration between two daemons of ours, of a guest with the same workload as QEMU's."""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench_common import BenchError, Host, Link, process, run, wait_until, warm_memory

from migrate.authority import Authority
from migrate.tls import Role

NAME = "bench"
POPULATE_S = 120
_START_S, _MIGRATE_S = 20, 120
# The command, loaded, but for one line on stdin.
_WAITING_CLI = "import sys; from migrate.cli.main import run; print(flush=True); sys.stdin.readline(); run()"
# The guest populates a little more while it runs, its page tables for one.
_WARM_SLACK_BYTES = 64 << 20
_STALLS = ("mean", "p50", "p90", "p99", "p999", "max")

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GuestShape:
    """The guest that is moved: uniform touches at full speed, half of them writes, if nothing else is said.

    Attributes:
        memory_bytes: Its RAM.
        working_set_bytes: What it touches; 0 is all that the layout leaves.
        vcpus: How many.
        touches_before: Touches after population before it is moved.
        workload: Which pages it touches, as `guest create --workload` calls it.
        write_ratio: Share of touches that write.
        touch_rate_per_s: Touches of each vCPU; 0 is as many as it can.
    """

    memory_bytes: int
    working_set_bytes: int = 0
    vcpus: int = 1
    touches_before: int = 0
    workload: str = "uniform"
    write_ratio: float = 0.5
    touch_rate_per_s: int = 0

    @property
    def daemon_options(self) -> Sequence[str]:
        """It needs nothing."""
        return ()

    @property
    def options(self) -> list[str]:
        """For `migrate guest create`."""
        options = ["--kind", "kvm", "--memory", str(self.memory_bytes), "--vcpus", str(self.vcpus)]
        options += ["--workload", self.workload, "--write-ratio", str(self.write_ratio)]
        options += ["--working-set", str(self.working_set_bytes)] if self.working_set_bytes else []
        return [*options, "--touch-rate", str(self.touch_rate_per_s)] if self.touch_rate_per_s else options

    @contextlib.contextmanager
    def running(self, source: "Daemon") -> Iterator["RunningGuest"]:
        """Have it run as it shall run when it is moved."""
        source.run("guest", "create", NAME, *self.options)
        wait_until(
            lambda: source.json("guest", "show", NAME)["state"] == "running", POPULATE_S, "our guest to populate"
        )
        wait_until(
            lambda: source.json("guest", "stats", NAME)["touches"] >= self.touches_before,
            POPULATE_S,
            "our guest to run",
        )
        yield _RunningGuest(source.json("guest", "show", NAME)["resident_bytes"])


class RunningGuest(Protocol):
    """A guest at its source, about to be moved."""

    @property
    def populated_bytes(self) -> int:
        """How much memory it occupies."""

    def figures(self, report: Report, destination: "Daemon") -> dict[str, float]:
        """Its stalls since the switchover; it is at its destination now.

        Raises:
            BenchError: its memory is wrong.
        """


class AnyGuest(Protocol):
    """A guest that can be moved as often as one likes, each time from its boot."""

    @property
    def memory_bytes(self) -> int:
        """Its RAM."""

    @property
    def daemon_options(self) -> Sequence[str]:
        """What daemons are started with to have it."""

    def running(self, source: "Daemon") -> contextlib.AbstractContextManager[RunningGuest]:
        """Have it run as it shall run when it is moved."""


@dataclass(frozen=True, slots=True)
class _RunningGuest:
    populated_bytes: int

    def figures(self, report: Report, destination: "Daemon") -> dict[str, float]:
        """What it counted itself, by way of our report."""
        statistics = destination.json("guest", "stats", NAME, "--audit", deadline_s=_MIGRATE_S)
        if report["guest_errors"] or statistics["errors"] or statistics["touches"] <= report["guest_touches"]:
            raise BenchError(f"our guest, {report['guest_errors']} errors, at the destination: {statistics}")
        return stall_figures(report["guest_stall_us"]) | {"guest_errors": report["guest_errors"]}


def stall_figures(stalls: dict[str, Any]) -> dict[str, float]:
    """The figures of a distribution of stalls, as in our reports."""
    figures = {f"stall_{name}_us": float(stalls[name]) for name in _STALLS}
    return {**figures, "stalls": stalls["count"], "stalled_us": round(stalls["mean"] * stalls["count"], 1)}


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS directories of both daemons, and of whoever asks them."""

    host: Path
    operator: Path


def issue_tls(directory: Path, link: Link) -> Tls:
    """A CA of the benchmark's own; its host has the addresses of both."""
    authority = Authority.create(directory)
    addresses = sorted({link.source.address, link.destination.address})
    return Tls(authority.issue("host", Role.HOST, addresses), authority.issue("operator", Role.OPERATOR))


class Daemon:
    """A `migrate daemon` in a namespace, asked through the command line in that namespace."""

    def __init__(self, host: Host, address: str, pid: int, tls: Tls | None) -> None:
        self._host = host
        self.address = address
        self.pid = pid
        self._how = ["--daemon", address] + ([] if tls is None else ["--tls-dir", str(tls.operator)])

    def cpu_s(self) -> float:
        """Processor time so far, of all threads: proc_pid_stat(5)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self, field: str) -> int:
        """A field of proc_pid_status(5): VmHWM, RssAnon, ..."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
        raise BenchError(f"/proc/{self.pid}/status has no {field}")

    def run(self, *words: str, deadline_s: float = 30, qemu_options: Sequence[str] = ()) -> str:
        """Run a command of ours against this daemon."""
        command = [*self._host.inside, sys.executable, "-m", "migrate", *words, *self._how]
        command += ["--", *qemu_options] if qemu_options else []
        return run(command, deadline_s)

    @contextlib.contextmanager
    def ready_to_run(self, *words: str) -> Iterator[Callable[[float], dict[str, Any]]]:
        """A command of ours that is loaded, and runs when the function that this yields is called (with a deadline, s).

        What a migration costs must not depend on how long Python takes to start: memory that was warmed for it cools.
        """
        command = [*self._host.inside, sys.executable, "-c", _WAITING_CLI, *words, *self._how, "--json"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as waiting:

            def go(deadline_s: float) -> dict[str, Any]:
                try:
                    output, complaints = waiting.communicate("go\n", deadline_s)
                except subprocess.TimeoutExpired as error:
                    raise BenchError(f"migrate {' '.join(words)}: {error}") from error
                if not output.strip():
                    raise BenchError(f"migrate {' '.join(words)}: {complaints.strip()[-500:]}")
                report: dict[str, Any] = json.loads(output.splitlines()[-1])
                return report

            try:
                if not (waiting.stdout and waiting.stdout.readline()):
                    raise BenchError("the command does not start")
                yield go
            finally:
                waiting.kill()

    def json(self, *words: str, deadline_s: float = 30) -> dict[str, Any]:
        """The same, with the JSON that it ends with."""
        answer: dict[str, Any] = json.loads(self.run(*words, "--json", deadline_s=deadline_s).splitlines()[-1])
        return answer


def migrate_with_ours(
    guest: AnyGuest,
    options: Sequence[str],
    link: Link,
    directory: Path,
    *,
    mode: str = "postcopy",
    tls: Tls | None = None,
) -> dict[str, float]:
    """Move a guest once; the figures of qemu_peer.migrate_with_qemu, and what it cost the daemons.

    Raises:
        BenchError: it failed, or the guest's memory was wrong afterwards.
    """
    with contextlib.ExitStack() as stack:
        terms = (tls, guest.daemon_options)
        source = stack.enter_context(_daemon(link.source, directory / "source.log", *terms))
        running = stack.enter_context(guest.running(source))
        destination = stack.enter_context(_daemon(link.destination, directory / "destination.log", *terms))
        daemons = {"source": source, "destination": destination}
        # It follows the migration, which costs some processor time; that is how people run it, so it counts.
        words = ["start", NAME, "--to", destination.address, "--mode", mode, *options]
        start = stack.enter_context(source.ready_to_run(*words))
        before_s = {name: daemon.cpu_s() for name, daemon in daemons.items()}
        warm_memory(min(guest.memory_bytes, running.populated_bytes + _WARM_SLACK_BYTES))
        report = start(_MIGRATE_S)
        if report["state"] != "completed":
            raise BenchError(f"our migration: {report['state']}")
        cpu_s = {f"{name}_cpu_s": daemon.cpu_s() - before_s[name] for name, daemon in daemons.items()}
        memory_kib = {
            f"{name}_{field}_kib": daemon.memory_kib(field)
            for name, daemon in daemons.items()
            for field in ("VmHWM", "RssAnon")
        }
        guest_figures = running.figures(report, destination)
    figures = {**memory_kib, **cpu_s, "daemons_cpu_s": sum(cpu_s.values()), **guest_figures}
    return figures | _figures(report) | _page_figures(report, running.populated_bytes)


def _figures(report: Report) -> dict[str, float]:
    latencies = report["fault_latency_us"]
    return {
        **{f"fault_{name}_us": float(latencies[name]) for name in ("p50", "p99")},
        "downtime_us": report["downtime_us"],
        "precopy_us": report["precopy_us"],
        # postcopy_us begins where downtime_us ends, and ends with END, which says that every page is there.
        "total_us": report["downtime_us"] + report["postcopy_us"],
        # From the operator's request, setup and precopy included.
        "whole_us": report["total_us"],
    }


def _page_figures(report: Report, populated_bytes: int) -> dict[str, float]:
    pages, populated_pages = report["pages"], populated_bytes // report["page_size_bytes"]
    sent_pages = report["bytes_on_wire"] / report["page_size_bytes"]
    return {
        **{f"{kind}_pages": count for kind, count in pages.items()},
        "bytes_on_wire": report["bytes_on_wire"],
        "populated_pages": populated_pages,
        "sent_pages": sent_pages,
        "sent_to_populated": sent_pages / populated_pages,
    }


@contextlib.contextmanager
def _daemon(host: Host, log: Path, tls: Tls | None, options: Sequence[str]) -> Iterator[Daemon]:
    ready, ready_far = os.pipe()
    command = [*host.inside, sys.executable, "-m", "migrate", "daemon", "--listen", f"{host.address}:0"]
    command += [*options, *(["--insecure"] if tls is None else ["--tls-dir", str(tls.host)])]
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(os.fdopen(ready))
        try:
            started = stack.enter_context(
                process([*command, "--ready-fd", str(ready_far)], pass_fds=[ready_far], log=log)
            )
        finally:
            os.close(ready_far)
        line = stream.readline() if select.select([ready], [], [], _START_S)[0] else ""
        if not line:
            raise BenchError(f"a daemon of ours does not start: {log.read_text(errors='replace').strip()[-500:]}")
        # setpriv and `ip netns exec` become what they start, so the process is the daemon.
        yield Daemon(host, json.loads(line)["listen"], started.pid, tls)
