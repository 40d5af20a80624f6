"""What all parts of the model share: one lock, the clock that steps set, who waits at which gate, and what went wrong.

Every thread of the sessions runs for real. Where one calls out of the code under test (a peer, a slow guest) it stops
at a gate, until the model's thread opens it; so the model decides the order of all that matters.
"""

import threading
import time
import weakref

from migrate.telemetry.clock import Clock

# A thread that is never let go on is a bug of the model, and must not hang the suite.
GATE_S = 50
SETTLE_S = 8
_LOOK_S = 0.0005


class ModelBrokenError(Exception):
    """A gate that nobody opened."""


class Gate:
    """One thread that waits to be let go on."""

    def __init__(self, name):
        self.name = name
        self.is_open = False


class World:
    """Shared state. `changed` guards it all."""

    def __init__(self):
        self.changed = threading.Condition()
        self.blocked = {}  # thread: the name of its gate
        self._awaited = {}  # thread: whether it need not wait any more
        self.gates = []  # of guests
        self._are_all_open = False
        self.violations = []
        self.now_us = 1_000_000
        self.clock = Clock(lambda: self.now_us)
        self._threads = weakref.WeakSet()

    def violate(self, words):
        """Note what must never be; the next check fails with it."""
        with self.changed:
            self.violations.append(words)

    def spawn(self, name, run):
        """A thread that is counted, and whose death of a bug is noted."""

        def guarded():
            try:
                run()
            except Exception as error:  # noqa: BLE001 - shown by the next check
                self.violate(f"{name} died: {error!r}")
            with self.changed:
                self.changed.notify_all()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.add(thread)
        thread.start()
        return thread

    def block(self, name, is_open):
        """Under `changed`: wait for a gate. Whoever opens it calls `unblock`."""
        self.blocked[threading.current_thread()] = name
        self.changed.notify_all()
        if not self.changed.wait_for(is_open, GATE_S):
            raise ModelBrokenError(f"nobody opened {name}")

    def unblock(self, thread):
        """Under `changed`: a thread goes on."""
        self.blocked.pop(thread, None)
        self.changed.notify_all()

    def await_thread(self, wait, is_over):
        """Wait for another thread of the sessions, by `wait`, until `is_over`."""
        thread = threading.current_thread()
        with self.changed:
            self._awaited[thread] = is_over
            self.changed.notify_all()
        try:
            wait()
        finally:
            with self.changed:
                del self._awaited[thread]

    def is_awaiting(self, thread):
        """Whether a thread has to wait for another one."""
        return thread in self._awaited and not self._awaited[thread]()

    def pass_gate(self, name):
        """Called by a guest's method: wait until the model lets it go on."""
        gate = Gate(name)
        with self.changed:
            if self._are_all_open:
                return
            self.gates.append((gate, threading.current_thread()))
            self.block(name, lambda: gate.is_open)

    def open_gate(self, index):
        """Let one guest's method go on."""
        with self.changed:
            gate, thread = self.gates.pop(index)
            gate.is_open = True
            self.unblock(thread)

    def open_all(self):
        """Let every guest's method go on, now and from now on."""
        with self.changed:
            self._are_all_open = True
            while self.gates:
                self.open_gate(0)

    def settle(self, unsettled):
        """Wait until `unsettled()`, what still moves, is empty."""
        deadline = time.monotonic() + SETTLE_S
        with self.changed:
            while moving := unsettled():
                assert time.monotonic() < deadline, f"still moving after {SETTLE_S} s: {moving}; {self.blocked}"
                self.changed.wait(_LOOK_S)

    def threads(self, name):
        """Those of a name."""
        return [thread for thread in list(self._threads) if thread.name == name]

    def join_all(self):
        """All threads that were spawned here have ended."""
        for thread in list(self._threads):
            thread.join(SETTLE_S)
            assert not thread.is_alive(), f"{thread.name} does not end"
