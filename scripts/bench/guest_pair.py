"""A paused guest and its armed twin, for benchmarks that bring their own data path, and the processes of that path."""

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench_common import BenchError, end, tool, wait_until

from migrate.guest.client import GuestClient
from migrate.guest.spawn import start_guest
from migrate.v1 import types_pb2 as types

_POPULATE_S = 60
_CPUCLOCK_SCHED = 2


@dataclass(frozen=True, slots=True)
class Pair:
    """Two guest processes: the source stands, and the twin lacks all its pages. The descriptors end with the pair."""

    memfd: int
    uffd: int
    region_hva: int
    twin: GuestClient
    state: bytes

    def start_twin(self) -> None:
        """The switchover."""
        self.twin.load_state(self.state)
        self.twin.resume()


@contextlib.contextmanager
def open_pair(spec: types.GuestSpec, directory: Path) -> Iterator[Pair]:
    """Start a guest, let it fill its memory, pause it, and start its twin. All is gone at the end."""
    with contextlib.ExitStack() as stack:
        source = _start(stack, spec, directory / "source.sock")
        wait_until(lambda: _is_populated(source), _POPULATE_S, "the guest to fill its memory")
        source.pause()
        state, _ = source.save_state()
        description, _, _, (memfd,) = source.describe()
        stack.callback(os.close, memfd)
        twin = _start(stack, description, directory / "twin.sock")
        uffd, (region_hva,) = twin.arm()
        stack.callback(os.close, uffd)
        yield Pair(memfd, uffd, region_hva, twin, state)


class Role:
    """One process of a data path: it inherits one descriptor and speaks in lines.

    Args:
        command: What to run. It is killed with this script.
        inherited_fd: The descriptor that it may use.
    """

    def __init__(self, command: Sequence[str], inherited_fd: int) -> None:
        self._name = " ".join(command[:3])
        self._process = subprocess.Popen(
            [tool("setpriv"), "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            pass_fds=[inherited_fd],
            start_new_session=True,
        )
        self._text = b""

    @property
    def cpu_s(self) -> float:
        """CPU time of all its threads so far."""
        # clock_getcpuclockid(3), which Python lacks: a process's clock is named by the complement of its id.
        return time.clock_gettime(~self._process.pid << 3 | _CPUCLOCK_SCHED)

    def read_line(self, deadline_s: float) -> str:
        """The next line that it prints.

        Raises:
            BenchError: it does not in time, or has ended.
        """
        deadline = time.monotonic() + deadline_s
        output = self._process.stdout
        assert output is not None  # noqa: S101
        while b"\n" not in self._text:
            ready, _, _ = select.select([output], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise BenchError(f"{self._name} said nothing for {deadline_s:g} s")
            data = os.read(output.fileno(), 1 << 16)
            if not data:
                raise BenchError(f"{self._name} ended with {self._process.wait(deadline_s)}")
            self._text += data
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def end(self) -> None:
        """End it. Idempotent."""
        end(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()


def _start(
    stack: contextlib.ExitStack, start_from: types.GuestSpec | types.GuestDescription, socket_path: Path
) -> GuestClient:
    process = start_guest(start_from, socket_path)
    stack.callback(process.kill)
    client = GuestClient(socket_path)
    stack.callback(client.close)
    return client


def _is_populated(guest: GuestClient) -> bool:
    return guest.look().state == types.GUEST_STATE_RUNNING
