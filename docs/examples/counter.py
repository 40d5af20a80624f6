"""A store of counters that moves to another host while it counts: `counter.py [SOCKET]` (docs/embedding.md).

Each counter has a page of its own, its value at both ends; a table behind the pages has all values once more. A page
that was lost, or is an old one, is found at the next touch. With COUNTER_STATUS=DIR, DIR/PID tells how it goes.
"""

import os
import struct
import sys
import threading
import time
from pathlib import Path

from migrate.guest.embed import Program

PAGE, COUNTERS, TABLE = 4096, 2048, 2048 * 4096
STATE = struct.Struct("<4Q")


class Store:
    """The memory holds the counters, and the state what else must not be lost."""

    def __init__(self):
        self.touches = self.total = self.errors = self.audits = 0
        self.gate = threading.Condition()
        self.program = Program(
            "counter-py",
            TABLE + COUNTERS * 8,
            pause=self.pause,
            resume=self.resume,
            save=lambda: STATE.pack(self.touches, self.total, self.errors, self.audits),
            load=self.load,
        )
        self.memory = self.program.memory
        # Whoever arrives waits for `resume`.
        self.is_paused, self.is_at_gate = self.program.is_incoming, True

    def pause(self):
        with self.gate:
            self.is_paused = True
            self.gate.wait_for(lambda: self.is_at_gate)

    def resume(self):
        with self.gate:
            self.is_paused = False
            self.gate.notify_all()

    def load(self, state):
        self.touches, self.total, self.errors, self.audits = STATE.unpack(state)

    def run(self):
        """Count for ever; nothing happens, and nothing is told to anybody, but between gate and gate."""
        while True:
            with self.gate:
                self.is_at_gate = True
                self.gate.notify_all()
                self.gate.wait_for(lambda: not self.is_paused)
                self.is_at_gate = False
            for _ in range(10):
                self.touch(self.touches * 1103 % COUNTERS)
            if self.touches % 1000 == 0:
                self.audit()
                self.report()
            time.sleep(0.005)

    def touch(self, index):
        value = self.check(index) + 1
        for offset in (index * PAGE, index * PAGE + PAGE - 8, TABLE + index * 8):
            struct.pack_into("<Q", self.memory, offset, value)
        self.touches += 1
        self.total += 1

    def check(self, index):
        (expected,) = struct.unpack_from("<Q", self.memory, TABLE + index * 8)
        for offset in (index * PAGE, index * PAGE + PAGE - 8):
            self.errors += struct.unpack_from("<Q", self.memory, offset)[0] != expected
        return expected

    def audit(self):
        self.errors += sum(self.check(index) for index in range(COUNTERS)) != self.total
        self.audits += 1

    def report(self):
        if directory := os.environ.get("COUNTER_STATUS"):
            path = Path(directory) / str(os.getpid())
            path.with_suffix(".new").write_text(f"{self.touches} {self.errors} {self.audits}\n")
            path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    store = Store()
    store.program.serve(sys.argv[1] if len(sys.argv) > 1 else None)
    store.run()
