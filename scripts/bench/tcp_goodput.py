"""One TCP connection at full speed: what a link carries. bench_common.py runs both ends inside its namespaces.

tcp_goodput.py receive ADDRESS                 prints its port, then what it received, as JSON
tcp_goodput.py send ADDRESS PORT SECONDS
"""

import json
import socket
import sys
import time

_DEADLINE_S = 20
_CHUNK_BYTES = 1 << 18
_NAME_BYTES = 16


def receive(address: str) -> None:
    """Take one connection and time it from its first byte to its last."""
    with socket.create_server((address, 0)) as server:
        server.settimeout(_DEADLINE_S)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(_DEADLINE_S)
        buffer = bytearray(_CHUNK_BYTES)
        connection.recv_into(buffer)
        # The first bytes are not counted: the time before them is not either.
        begin_s = last_s = time.monotonic()
        received = 0
        while count := connection.recv_into(buffer):
            received += count
            last_s = time.monotonic()
        name = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, _NAME_BYTES)
    mbit_per_s = received * 8 / (last_s - begin_s) / 1e6
    congestion_control = name.rstrip(b"\0").decode()
    print(
        json.dumps({"goodput_mbit_per_s": round(mbit_per_s, 1), "congestion_control": congestion_control}), flush=True
    )


def send(address: str, port: int, duration_s: float) -> None:
    """Send for some time."""
    with socket.create_connection((address, port), _DEADLINE_S) as connection:
        data = bytes(_CHUNK_BYTES)
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            connection.sendall(data)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
