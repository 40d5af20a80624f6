"""A native page server under test: what it is expected to have said, and a peer that does not read."""

import re

from tests.harness.h2_peer import WINDOW_MAX, Peer, Settings
from tests.harness.memory import requests_for
from tests.harness.waiting import wait_until

PAGES = 1024
_WIDE = {Settings.INITIAL_WINDOW_SIZE: WINDOW_MAX}


def wait_logged(caplog, *patterns):
    for pattern in patterns:
        wait_until(lambda p=pattern: re.search(p, caplog.text), 10, f"a log line like {pattern!r}; got {caplog.text}")


def check_connection_ended(served, peer, caplog, code, pattern):
    """The server said why, closed, counted, and told the log."""
    peer.receive_close()
    if code is not None:
        assert peer.goaway is not None
        assert peer.goaway.error_code == code
    wait_until(lambda: served.server.counters().connections_failed == 1, 10, "the failure to be counted")
    wait_logged(caplog, r"ended the connection of 127\.0\.0\.1 port \d+: .*" + pattern)


def flood_caller(served):
    """A peer with open windows and a small buffer, that asked for more than all buffers hold and reads nothing."""
    peer = Peer.connect(served.endpoint, receive_buffer_bytes=4096)
    peer.opens_windows = False
    peer.greet_server(_WIDE, WINDOW_MAX - 65535)
    peer.call()
    peer.ask(1, *requests_for([(first, 256) for first in (0, 256, 512)] * 16))
    return peer
