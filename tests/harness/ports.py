"""Ports for daemons that are started again where they were.

A port of the kernel's choice may be given to the next connection, or to the next `:0`, while its daemon is dead. These
lie below those that the kernel chooses from, as an operator's would.
"""

import os
import socket
from pathlib import Path

_LOWEST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class ReservedPort:
    """A port of loopback that no other test gets before close(), of whatever process.

    Attributes:
        number: The port.
    """

    def __init__(self):
        beyond = int(_RANGE.read_text().split()[0])
        # Processes begin at different places, so that they seldom meet.
        first = os.getpid() * 61 % (beyond - _LOWEST)
        for number in (*range(_LOWEST + first, beyond), *range(_LOWEST, _LOWEST + first)):
            # A name that ends with its socket, in a place that only tests of this kind use.
            self._claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                self._claim.bind(f"\0migrate-test-port-{number}")
                _check_free(number)
            except OSError:
                self._claim.close()
            else:
                self.number = number
                return
        raise AssertionError(f"no port from {_LOWEST} to {beyond} is free")

    def close(self):
        """Give it back. Idempotent."""
        self._claim.close()


def _check_free(number):
    """Raises OSError if something listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", number))
        probe.listen(1)
