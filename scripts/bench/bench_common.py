"""What the benchmarks of this folder share: medians, tables, facts of the machine, links, processes."""

import contextlib
import json
import mmap
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.table import Table

import migrate

LINKS = ("loopback", "1gbit")
# The queue of the shaped link: a burst of 128 KiB holds two whole GSO packets of 64 KiB, so that none is cut; 20 ms of
# queue is more than a sender's own limits (TCP small queues) let it fill.
TBF_RATE, TBF_BURST, TBF_LATENCY = "1gbit", "128kb", "20ms"

_PACKAGES = {"qemu-system-x86_64": "qemu-system-x86", "ip": "iproute2", "tc": "iproute2"}
_PACKAGES |= {"gcc": "gcc", "ld": "binutils", "objcopy": "binutils", "nm": "binutils", "setpriv": "util-linux"}
_POLL_S = 0.01
_WARM_MORE_BYTES_MAX = 1 << 30
_COMMAND_S = 30
_GOODPUT_S = 1.5

T = TypeVar("T")


class BenchError(Exception):
    """A benchmark cannot run, or one of its runs failed; the message says why."""


# ---- figures ----


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every key that all runs have."""
    if not runs:
        return {}
    keys = [key for key in runs[0] if all(key in run for run in runs)]
    return {key: statistics.median(run[key] for run in runs) for key in keys}


def ratios(ours: Mapping[str, float], peer: Mapping[str, float]) -> dict[str, float]:
    """Ours divided by the peer's, for each key of both where the peer's is not zero."""
    return {key: value / peer[key] for key, value in ours.items() if peer.get(key)}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of a table: the key in a run, its heading, and what to divide the figure by before it is printed."""

    key: str
    heading: str
    divisor: float = 1
    decimals: int = 0

    def show(self, value: float) -> str:
        """The figure in the heading's unit."""
        return f"{value / self.divisor:,.{self.decimals}f}"


def print_ratio_table(
    title: str,
    metrics: Sequence[Metric],
    peer: tuple[str, Sequence[Mapping[str, float]]],
    ours: tuple[str, Sequence[Mapping[str, float]]],
) -> None:
    """Print medians, with the range of the runs in brackets, and the ratio of the medians, ours to the peer's."""
    table = Table(title=title, title_justify="left")
    table.add_column("median [least .. most]")
    for name, runs in (peer, ours):
        table.add_column(f"{name}, {len(runs)} runs", justify="right")
    table.add_column(f"{ours[0]} / {peer[0]}", justify="right")
    middle = [medians(runs) for _, runs in (peer, ours)]
    quotients = ratios(middle[1], middle[0])
    for metric in metrics:
        cells = [_spread(metric, runs) for _, runs in (peer, ours)]
        quotient = quotients.get(metric.key)
        table.add_row(metric.heading, *cells, "-" if quotient is None else f"{quotient:.2f}")
    # A fixed width, so that a table in a file looks like one on a terminal.
    Console(width=120).print(table)


def print_json_line(value: object) -> None:
    """The last line of a benchmark's output."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def interleave(
    contenders: Mapping[str, Callable[[], dict[str, float]]], runs: int
) -> Iterator[tuple[int, str, dict[str, float] | BenchError]]:
    """Run all contenders by turns, so that what the machine does meanwhile hits each alike.

    A run that fails is reported as its error, and the others go on.
    """
    for number in range(1, runs + 1):
        for name, contender in contenders.items():
            try:
                yield number, name, contender()
            except BenchError as error:
                yield number, name, error


def run_by_turns(
    contenders: Mapping[str, Callable[[], dict[str, float]]], runs: int, metrics: Sequence[Metric]
) -> tuple[dict[str, list[dict[str, float]]], list[dict[str, object]]]:
    """Interleave, with a line of progress for each run; the figures of the good ones by contender, and the failures."""
    good: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    failures: list[dict[str, object]] = []
    width = max(map(len, contenders))
    for number, name, outcome in interleave(contenders, runs):
        if isinstance(outcome, BenchError):
            say(f"{number} {name:{width}} FAILED: {outcome}")
            failures.append({"run": number, "contender": name, "error": str(outcome)})
            continue
        good[name].append(outcome)
        say(f"{number} {name:{width}} " + ", ".join(f"{m.heading} {m.show(outcome[m.key])}" for m in metrics))
    return good, failures


def ratios_of(runs: Mapping[str, Sequence[Mapping[str, float]]], ours: str, peer: str) -> dict[str, float]:
    """Ratios of the medians of two contenders."""
    return ratios(medians(runs[ours]), medians(runs[peer]))


def print_table(title: str, metrics: Sequence[Metric], runs: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print medians and ranges of several contenders, without ratios."""
    table = Table(title=title, title_justify="left")
    table.add_column("median [least .. most]")
    for name, of_one in runs.items():
        table.add_column(f"{name}, {len(of_one)} runs", justify="right")
    for metric in metrics:
        table.add_row(metric.heading, *(_spread(metric, of_one) for of_one in runs.values()))
    Console(width=120).print(table)


# ---- the machine ----


def tool(name: str) -> str:
    """The path of a program.

    Raises:
        BenchError: it is not installed; the message names the Debian package.
    """
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if found is None:
        raise BenchError(f"{name} is missing: apt-get install {_PACKAGES.get(name, name)}")
    return found


def require(*names: str) -> None:
    """Check that programs are installed, and that we are root.

    Raises:
        BenchError: names all that is missing at once.
    """
    missing = []
    for name in names:
        try:
            tool(name)
        except BenchError as error:
            missing.append(str(error))
    if os.geteuid() != 0:
        missing.append("network namespaces and KVM need root")
    if missing:
        raise BenchError("; ".join(missing))


def machine_facts() -> dict[str, object]:
    """What a reader of the figures must know of the machine and of the tree."""
    facts: dict[str, object] = {
        "kernel": platform.release(),
        "cpu": _first_field("/proc/cpuinfo", "model name"),
        "cpus": os.cpu_count(),
        "memory": _first_field("/proc/meminfo", "MemTotal"),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "command": sys.argv,
    }
    tree = Path(migrate.__file__).resolve().parent
    with contextlib.suppress(BenchError):
        facts["revision"] = run([tool("git"), "-C", str(tree), "describe", "--always", "--dirty"]).strip()
    return facts


def warm_memory(guest_bytes: int) -> None:
    """Use and free memory for a guest and more, so that what is allocated next, within a second or so, comes from it.

    In a virtual machine, memory that was free for some seconds may have gone back to the host (free page reporting),
    and the first touch of each page then costs ten times as much. Memory for the guest alone is not enough: the
    allocator takes some of it elsewhere.
    """
    size_bytes = guest_bytes + min(guest_bytes, _WARM_MORE_BYTES_MAX)
    mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


# ---- processes ----


def run(command: Sequence[str], deadline_s: float = _COMMAND_S) -> str:
    """Run a command to its end and return its output.

    Raises:
        BenchError: it failed, or took too long.
    """
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=deadline_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def process(command: Sequence[str], *, pass_fds: Sequence[int] = (), log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs meanwhile, its output in a file; ended at the end, and with this script if that is killed.

    A session of its own keeps an interrupt at the terminal from it: it ends when we say so, in order.
    """
    with log.open("wb") as stream:
        started = subprocess.Popen(
            [tool("setpriv"), "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        end(started)


def end(started: subprocess.Popen[bytes], grace_s: float = 15) -> None:
    """Ask a process to end; kill it if it does not."""
    if started.poll() is None:
        started.terminate()
    try:
        started.wait(grace_s)
    except subprocess.TimeoutExpired:
        started.kill()
        started.wait()


def wait_until(probe: Callable[[], T | None], deadline_s: float, what: str) -> T:
    """Poll until a probe answers something true.

    Raises:
        BenchError: it did not in time.
    """
    deadline = time.monotonic() + deadline_s
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise BenchError(f"waited {deadline_s:g} s in vain for {what}")
        time.sleep(_POLL_S)
    return found


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM takes the way of an interrupt: everything is cleaned up. Nothing interrupts the clean-up."""
    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signals.append(signal.SIGINT)

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- links ----


@dataclass(frozen=True, slots=True)
class Host:
    """One end of a link: a network namespace and its address."""

    namespace: str
    address: str

    @property
    def inside(self) -> list[str]:
        """What to put before a command that shall run here."""
        return [tool("ip"), "netns", "exec", self.namespace]


@dataclass(frozen=True, slots=True)
class Link:
    """Two hosts that reach each other, for as long as its context lasts. On loopback both are one."""

    name: str
    description: str
    source: Host
    destination: Host


@contextlib.contextmanager
def open_link(name: str, congestion_control: str) -> Iterator[Link]:
    """Make one of LINKS in network namespaces of its own; the host's settings stay as they are."""
    with contextlib.ExitStack() as stack:
        if name == "loopback":
            host = Host(_namespace(stack, "l"), "127.0.0.1")
            route = ["local", host.address, "dev", "lo", "table", "local", "proto", "kernel", "scope", "host"]
            _set_congestion_control(host, [*route, "src", host.address], congestion_control)
            yield Link(name, f"lo in one network namespace, {congestion_control}", host, host)
            return
        hosts = [Host(_namespace(stack, side), f"10.99.0.{number}") for number, side in enumerate("ab", 1)]
        _join(*hosts)
        for host in hosts:
            route = ["10.99.0.0/24", "dev", "veth0", "proto", "kernel", "scope", "link", "src", host.address]
            _set_congestion_control(host, route, congestion_control)
        shape = f"veth, tbf rate {TBF_RATE} burst {TBF_BURST} latency {TBF_LATENCY} at both ends, {congestion_control}"
        yield Link(name, shape, *hosts)


def measure_line(link: Link, directory: Path) -> dict[str, object]:
    """What one TCP connection from source to destination carries, payload only, and its congestion control."""
    script = str(Path(__file__).with_name("tcp_goodput.py"))
    address = link.destination.address
    log = directory / "goodput.log"
    with process([*link.destination.inside, sys.executable, script, "receive", address], log=log) as receiver:
        port = wait_until(lambda: log.read_text().split("\n")[0], _COMMAND_S, "the receiver's port")
        run([*link.source.inside, sys.executable, script, "send", address, port, str(_GOODPUT_S)])
        try:
            receiver.wait(_COMMAND_S)
        except subprocess.TimeoutExpired as error:
            raise BenchError("the goodput check does not end") from error
    measured: dict[str, object] = json.loads(log.read_text().split("\n")[1])
    return measured


def _namespace(stack: contextlib.ExitStack, side: str) -> str:
    ip = tool("ip")
    name = f"bench-{os.getpid()}-{side}"
    stack.callback(subprocess.run, [ip, "netns", "del", name], check=False, capture_output=True)
    run([ip, "netns", "add", name])
    run([ip, "-n", name, "link", "set", "lo", "up"])
    return name


def _set_congestion_control(host: Host, route: Sequence[str], congestion_control: str) -> None:
    # By route, for a namespace's sysctl takes only what the whole machine allows to everyone (here: not cubic).
    run([tool("ip"), "-n", host.namespace, "route", "change", *route, "congctl", congestion_control])


def _join(first: Host, second: Host) -> None:
    ip = tool("ip")
    pair = ["type", "veth", "peer", "name", "veth0", "netns", second.namespace]
    run([ip, "link", "add", "veth0", "netns", first.namespace, *pair])
    for host in (first, second):
        run([ip, "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "veth0"])
        run([ip, "-n", host.namespace, "link", "set", "veth0", "up"])
        shape = ["tbf", "rate", TBF_RATE, "burst", TBF_BURST, "latency", TBF_LATENCY]
        run([tool("tc"), "-n", host.namespace, "qdisc", "add", "dev", "veth0", "root", *shape])


def _spread(metric: Metric, runs: Sequence[Mapping[str, float]]) -> str:
    values = [run[metric.key] for run in runs if metric.key in run]
    if not values:
        return "-"
    return f"{metric.show(statistics.median(values))} [{metric.show(min(values))} .. {metric.show(max(values))}]"


def _first_field(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""
