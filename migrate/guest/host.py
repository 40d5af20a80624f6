"""The guest process: one guest behind the guest protocol, which outlives its daemon."""

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from migrate.error_info import error_info
from migrate.errors import GuestBusyError, GuestGoneError, MigrateError, NativeError, RemoteProtocolError
from migrate.guest import protocol
from migrate.guest.coredumps import forbid_core_dumps
from migrate.guest.dirty_log import OwnScan
from migrate.guest.port import Guest
from migrate.guest.spawn import directory_of
from migrate.guest.spec import is_program
from migrate.guest.workload import WorkloadGuest
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types


def answer(guest: Guest, request: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    """Do what a request asks; the response, and the descriptors that go with it.

    Raises:
        MigrateError: it could not be done; the guest is as it was.
    """
    kind = request.WhichOneof("request")
    if kind in _CHANGES:
        _CHANGES[kind](guest, request)
        response = pb.GuestResponse()
        getattr(response, kind).SetInParent()
        return response, []
    if kind in _READS:
        return _READS[kind](guest, request)
    raise RemoteProtocolError("a request of the guest protocol that this version does not know")


def _describe(guest: Guest, _: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    described = pb.DescribeResponse(
        description=guest.describe(),
        state=guest.state,
        pid=os.getpid(),
        is_armed=guest.is_armed,
        has_dirty_log=not guest.no_dirty_log,
        no_dirty_log_reason=guest.no_dirty_log,
        vcpu_thread_ids=guest.vcpu_thread_ids(),
    )
    return pb.GuestResponse(describe=described), [guest.memfd]


def _save_state(guest: Guest, _: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    state, touches = guest.save_state()
    return pb.GuestResponse(save_state=pb.SaveStateResponse(state=state, touches=touches)), []


def _arm(guest: Guest, _: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    fd, hva = guest.arm()
    return pb.GuestResponse(arm=pb.ArmResponse(region_hva=[hva])), [fd]


def _start_dirty_log(guest: Guest, _: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    return pb.GuestResponse(start_dirty_log=pb.StartDirtyLogResponse()), [guest.start_dirty_log()]


def _sync_dirty_log(guest: Guest, request: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    dirty_pages = guest.sync_dirty_log(keep=request.sync_dirty_log.keep)
    return pb.GuestResponse(sync_dirty_log=pb.SyncDirtyLogResponse(dirty_pages=dirty_pages)), []


def _statistics(guest: Guest, request: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    statistics = guest.statistics(with_stalls=request.statistics.with_stalls)
    answer = pb.StatisticsResponse(statistics=statistics, state=guest.state)
    return pb.GuestResponse(statistics=answer), []


def _audit(guest: Guest, request: pb.GuestRequest) -> tuple[pb.GuestResponse, list[int]]:
    return pb.GuestResponse(audit=pb.AuditResponse(statistics=guest.audit(request.audit.deadline_us))), []


_CHANGES: dict[str, Callable[[Guest, pb.GuestRequest], None]] = {
    "pause": lambda guest, _: guest.pause(),
    "resume": lambda guest, _: guest.resume(),
    "load_state": lambda guest, request: guest.load_state(request.load_state.state),
    "disarm": lambda guest, _: guest.disarm(),
    "stop_dirty_log": lambda guest, _: guest.stop_dirty_log(),
    # Before the answer: whoever hears that kills this process, and what was taken over would outlive it.
    "shutdown": lambda guest, _: guest.end(),
}
_READS: dict[str, Callable[[Guest, pb.GuestRequest], tuple[pb.GuestResponse, list[int]]]] = {
    "describe": _describe,
    "save_state": _save_state,
    "arm": _arm,
    "statistics": _statistics,
    "audit": _audit,
    "start_dirty_log": _start_dirty_log,
    "sync_dirty_log": _sync_dirty_log,
}
# These change nothing, or nothing that matters to whoever comes after.
_LOOKS = frozenset({"describe", "statistics", "audit"})


class Turns:
    """Who may change the guest: the connection that attached last, and those made since.

    A daemon that was killed may have sent a request that nobody has read yet. Once its successor has attached, that
    request must not be done any more; and one that is being done is over before the successor is answered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest = 0
        self._attached = 0

    def enter(self) -> int:
        """A connection was made; its number."""
        with self._lock:
            self._latest += 1
            return self._latest

    def attach(self, number: int) -> None:
        """Connections before this one may change nothing from now on."""
        with self._lock:
            self._attached = max(self._attached, number)

    @contextlib.contextmanager
    def changing(self, number: int) -> Iterator[None]:
        """A scope in which a connection changes the guest.

        Raises:
            GuestBusyError: another daemon has attached since it was made.
        """
        with self._lock:
            if number < self._attached:
                raise GuestBusyError("another daemon has taken over the guest")
            yield


def serve_connection(
    guest: Guest, connection: socket.socket, turns: Turns, number: int, leave: Callable[[], None]
) -> None:
    """Answer one daemon until it closes, or sends what is no message."""
    with connection, contextlib.suppress(GuestGoneError, RemoteProtocolError):
        while True:
            request, unasked = protocol.receive(connection, pb.GuestRequest())
            for fd in unasked:
                os.close(fd)
            try:
                response, fds = _answer_in_turn(guest, request, turns, number)
            except MigrateError as error:
                response, fds = pb.GuestResponse(error=error_info(error)), []
            protocol.send(connection, response, fds)
            if request.HasField("shutdown"):
                leave()


def _answer_in_turn(
    guest: Guest, request: pb.GuestRequest, turns: Turns, number: int
) -> tuple[pb.GuestResponse, list[int]]:
    kind = request.WhichOneof("request")
    if kind == "attach":
        turns.attach(number)
        return pb.GuestResponse(attach=pb.AttachResponse(instance=guest.instance)), []
    if kind in _LOOKS:
        return answer(guest, request)
    with turns.changing(number):
        return answer(guest, request)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        with protocol.short_path(path) as short:
            listener.bind(short)
    finally:
        os.umask(mask)
    listener.listen()
    return listener


def _make_guest(
    description: types.GuestDescription, arguments: argparse.Namespace, scan: OwnScan, leave: Callable[[], None]
) -> Guest:
    # The other kinds load what this one does not need, before its vCPUs may run.
    if description.spec.kind == types.GUEST_KIND_QEMU:
        from migrate.guest.qemu.guest import QemuGuest  # noqa: PLC0415

        return QemuGuest(description, directory_of(arguments.socket), scan, on_end=leave)
    if is_program(description.spec):
        from migrate.guest.program.guest import ProgramGuest  # noqa: PLC0415

        return ProgramGuest(description, arguments.program, scan, on_end=leave)
    return WorkloadGuest(description, scan)


def main() -> None:
    """Run one guest until it is shut down or killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--program", type=Path)
    born = parser.add_mutually_exclusive_group(required=True)
    born.add_argument("--spec", type=bytes.fromhex)
    born.add_argument("--description", type=bytes.fromhex)
    arguments = parser.parse_args()

    guest: Guest | None = None

    def leave(*_: object) -> None:
        # vCPU threads may wait in the kernel for ever: the process ends without asking them.
        if guest is not None:
            guest.end()
        arguments.socket.unlink(missing_ok=True)
        os._exit(0)

    scan = OwnScan.open()
    forbid_core_dumps()
    with os.fdopen(arguments.ready_fd, "wb", buffering=0) as ready:
        try:
            if arguments.spec is not None:
                description = types.GuestDescription(spec=types.GuestSpec.FromString(arguments.spec))
            else:
                description = types.GuestDescription.FromString(arguments.description)
            guest = _make_guest(description, arguments, scan, leave)
            listener = _listen(arguments.socket)
        except (MigrateError, OSError) as error:
            known = error if isinstance(error, MigrateError) else NativeError("start the guest", error.errno or 0)
            ready.write(pb.GuestResponse(error=error_info(known)).SerializeToString())
            sys.exit(1)
        signal.signal(signal.SIGTERM, leave)
        try:
            ready.write(b"\0")
        except BrokenPipeError:
            leave()  # the daemon that started us is gone, and its successor knows nothing of us
    turns = Turns()
    while True:
        connection, _ = listener.accept()
        protocol.make_room(connection)
        # Numbered here, in their order: a thread of an older one might begin later.
        arguments_of = (guest, connection, turns, turns.enter(), leave)
        threading.Thread(target=serve_connection, args=arguments_of, daemon=True).start()


if __name__ == "__main__":
    main()
