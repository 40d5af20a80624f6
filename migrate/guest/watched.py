"""A process beside the guest process, ours or somebody's: noticed when it ends, ended when it must."""

import os
import select
import signal
import threading
from collections.abc import Callable

from migrate.errors import GuestGoneError

_END_S = 10.0


class Watched:
    """A process whose end is noticed, and that can be ended. Thread-safe.

    Args:
        pid: The process.
        on_end: Called once, in a thread of ours, when it has ended.
        what: What it is, in words.

    Raises:
        GuestGoneError: there is no such process.
    """

    def __init__(self, pid: int, on_end: Callable[[], None], what: str) -> None:
        self.pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise GuestGoneError(f"{what} (process {pid}) is gone") from error
        self._on_end = on_end
        threading.Thread(target=self._wait, name="watch", daemon=True).start()

    def kill(self) -> None:
        """End it, and wait until it is gone. Idempotent."""
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.has_ended(_END_S)

    def has_ended(self, within_s: float = 0) -> bool:
        """Whether it is gone, now or within a time."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(within_s * 1000))

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll()
        self._on_end()
