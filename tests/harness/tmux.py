"""A shell in a tmux pane: what people see of a command, and what is left of it after a resize."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from tests.harness.waiting import wait_until


class Pane:
    """One pane with a shell, of a tmux server of its own.

    Args:
        socket: Where that server listens.
        env: Variables of the shell.
        columns: Its width.
        rows: Its height.
    """

    def __init__(self, socket, env, columns, rows):
        self._tmux = ["tmux", "-u", "-S", str(socket), "-f", "/dev/null"]
        # The prompt is told apart from what commands print by standing alone.
        variables = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PS1": "$ ", **env}
        words = [f"{name}={value}" for name, value in variables.items()]
        shell = ["env", "-i", *words, "bash", "--norc", "--noprofile"]
        size = ["-x", str(columns), "-y", str(rows)]
        self._call("set-option", "-g", "status", "off", ";", "new-session", "-d", *size, *shell)

    def type(self, line):
        """A line, and Enter."""
        self._call("send-keys", "-l", line)
        self._call("send-keys", "Enter")

    def wait_prompt(self):
        """Until the shell waits for a line."""
        wait_until(lambda: self.lines()[-1:] == ["$"], 30, "the command to end")

    def interrupt(self):
        """Ctrl-C."""
        self._call("send-keys", "C-c")

    def resize(self, columns, rows):
        """Give it another size, as one who splits the window does."""
        self._call("resize-window", "-x", str(columns), "-y", str(rows))

    def lines(self, *, with_history=False):
        """What can be seen, without the empty lines."""
        history = ["-S", "-"] if with_history else []
        return [line for line in self._call("capture-pane", "-p", *history).splitlines() if line.strip()]

    def escapes(self):
        """What can be seen, with its colours as escape sequences."""
        return self._call("capture-pane", "-p", "-e")

    def close(self):
        """End the shell and what runs in it."""
        self._call("kill-server")

    def _call(self, *words):
        done = subprocess.run([*self._tmux, *words], capture_output=True, encoding="utf-8", check=False, timeout=20)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout


@contextmanager
def pane(directory, *, columns=80, rows=24, **env):
    """A pane whose server's socket is in a directory."""
    opened = Pane(directory / "tmux", {"TERM": "tmux-256color", "LANG": "C.UTF-8", **env}, columns, rows)
    try:
        opened.wait_prompt()
        yield opened
    finally:
        opened.close()
