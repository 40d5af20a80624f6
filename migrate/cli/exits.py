"""Exit codes, which scripts rely on. 2 is click's, for usage."""

import signal

EXIT_FAILED = 1
EXIT_PAUSED = 3
# What a shell reports of a command that a signal ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
