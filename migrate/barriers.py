"""Named points of a migration at which a test may hold a daemon, to kill it there and nowhere else.

Without MIGRATE_BARRIERS in the environment, reaching one does nothing. With it, the name of a unix socket
(SOCK_SEQPACKET), each point is told there as `POINT MIGRATION_ID PID`, and the daemon goes on when it is answered, or
when the other end closes.
"""

import os
import socket
from contextlib import suppress
from enum import Enum

_ANSWER_MAX_BYTES = 16


class Point(Enum):
    """Every point, in the order in which a migration passes them; the side is the daemon that reaches it."""

    SOURCE_PREPARING = "source.preparing"
    DESTINATION_PREPARING = "destination.preparing"
    DESTINATION_BUILT = "destination.built"
    DESTINATION_PREPARED = "destination.prepared"
    SOURCE_PREPARED = "source.prepared"
    SOURCE_PRECOPY = "source.precopy"
    DESTINATION_INVALIDATED = "destination.invalidated"
    SOURCE_PAUSED = "source.paused"
    SOURCE_SWITCHING = "source.switching"
    DESTINATION_SWITCHING = "destination.switching"
    DESTINATION_LOADED = "destination.loaded"
    DESTINATION_MAY_RUN = "destination.may-run"
    DESTINATION_RUNNING = "destination.running"
    SOURCE_RUNNING = "source.running"
    DESTINATION_COMPLETE = "destination.complete"
    DESTINATION_DISARMED = "destination.disarmed"
    SOURCE_ENDING = "source.ending"
    SOURCE_ENDED = "source.ended"
    DESTINATION_ACKNOWLEDGED = "destination.acknowledged"
    DESTINATION_ENDED = "destination.ended"
    SOURCE_LEFT = "source.left"


def reach(point: Point, migration_id: str) -> None:
    """Say that a migration is at a point, and wait until it may go on."""
    path = os.environ.get("MIGRATE_BARRIERS")
    if path is None:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        connection.send(f"{point.value} {migration_id} {os.getpid()}".encode())
        connection.recv(_ANSWER_MAX_BYTES)
