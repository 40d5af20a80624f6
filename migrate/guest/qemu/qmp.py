"""QMP for threads: QEMU's own asyncio client (qemu.qmp), with an event loop of its own behind it."""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError

from migrate.errors import GuestBusyError, GuestGoneError, QemuError

COMMAND_S = 20.0
_CONNECT_S = 5.0
_FD_NAME = "migrate-state"
_VCPU_EVENTS = ("STOP", "RESUME")
_ENDS = {"completed", "failed", "cancelled"}

_T = TypeVar("_T")


class Qmp:
    """A connection to one QEMU's monitor. Thread-safe; commands are answered in their order.

    Every method raises GuestGoneError once QEMU is gone, and GuestBusyError if it does not answer in time.

    Args:
        address: Where it listens, or an end of a socket pair of which it has the other.

    Attributes:
        on_event: Called with the name of each event about the vCPUs, in a thread that must not ask QEMU anything.

    Raises:
        GuestGoneError: nobody listens there, or nobody who speaks QMP.
    """

    def __init__(self, address: Path | socket.socket) -> None:
        self.on_event: Callable[[str], None] = lambda _name: None
        self._client = QMPClient("migrate")
        self._events = EventListener(_VCPU_EVENTS)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        target = address if isinstance(address, socket.socket) else str(address)
        try:
            self._run(self._connect(target), _CONNECT_S, "the greeting")
        except (GuestGoneError, GuestBusyError) as error:
            self._stop_loop()
            where = f" at {address}" if isinstance(address, Path) else ""
            raise GuestGoneError(
                f"no QEMU answers{where}: {error.message}",
                remedy="a monitor has room for one client at a time: give QEMU one more (`-qmp unix:PATH,server=on`)",
            ) from error

    def call(self, command: str, **arguments: Any) -> Any:
        """Do a command; what it returns. A `_` in the name of an argument stands for `-`.

        Raises:
            QemuError: QEMU refused it, and says why.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._run(self._client.execute(command, named), COMMAND_S, command)

    def hand_over(self, fd: int) -> None:
        """Give QEMU a descriptor, for one `migrate`. The one that it has of before, if any, it closes."""
        self._run(self._hand_over(fd), COMMAND_S, "getfd")

    def migrate(self, command: str) -> None:
        """Do `migrate` or `migrate-incoming` by way of the file that was handed over, and wait for its end.

        Raises:
            QemuError: it failed; QEMU is as it was before, unless it is incoming: then it is fit for nothing.
        """
        self._run(self._migrate(command), COMMAND_S, command)

    def set_capabilities(self, wanted: dict[str, bool]) -> dict[str, bool]:
        """Set some of QEMU's migration capabilities; what they were before.

        Raises:
            QemuError: this QEMU does not know one of them.
        """
        before = {each["capability"]: each["state"] for each in self.call("query-migrate-capabilities")}
        if unknown := sorted(set(wanted) - set(before)):
            raise QemuError(
                f"this QEMU has no migration capability {unknown[0]}", remedy="use QEMU 4.0 or newer (docs/qemu.md)"
            )
        listed = [{"capability": name, "state": state} for name, state in wanted.items()]
        self.call("migrate-set-capabilities", capabilities=listed)
        return {name: before[name] for name in wanted}

    def close(self) -> None:
        """Let QEMU be. Idempotent."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(GuestGoneError, GuestBusyError):
            self._run(self._disconnect(), _CONNECT_S, "the goodbye")
        self._stop_loop()

    async def _connect(self, target: str | socket.socket) -> None:
        self._client.register_listener(self._events)
        await self._client.connect(target)
        self._follower = asyncio.create_task(self._follow())

    async def _disconnect(self) -> None:
        self._follower.cancel()
        await self._client.disconnect()

    async def _follow(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async for event in self._events:
                self.on_event(str(event["event"]))

    async def _hand_over(self, fd: int) -> None:
        self._client.send_fd_scm(fd)
        await self._client.execute("getfd", {"fdname": _FD_NAME})

    async def _migrate(self, command: str) -> None:
        listener = EventListener("MIGRATION")
        with self._client.listen(listener):
            await self._client.execute(command, {"uri": f"fd:{_FD_NAME}"})
            status = ""
            while status not in _ENDS:
                status = (await listener.get())["data"]["status"]  # type: ignore[index]
        if status != "completed":
            why = await self._client.execute("query-migrate")
            words = why.get("error-desc", "it does not say why") if isinstance(why, dict) else ""
            raise QemuError(f"QEMU's {command} {status}: {words}")

    def _run(self, work: Coroutine[Any, Any, _T], deadline_s: float, what: str) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(deadline_s)
        except concurrent.futures.TimeoutError as error:
            future.cancel()
            raise GuestBusyError(f"QEMU did not answer {what} in {deadline_s:.0f} s") from error
        except ExecuteError as error:
            raise QemuError(f"QEMU refused {what}: {error}") from error
        except (ExecInterruptedError, ConnectError, EOFError, OSError, QMPError) as error:
            raise GuestGoneError(f"QEMU hung up at {what}: {error}") from error

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CONNECT_S)
        self._loop.close()
