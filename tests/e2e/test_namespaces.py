"""Two hosts on one machine: network namespaces joined by a veth pair."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.harness.waiting import wait_until

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.root]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """One network namespace with a daemon in it."""

    def __init__(self, namespace, address):
        self.inside = ["ip", "netns", "exec", namespace]
        ready_read, ready_write = os.pipe()
        command = [*self.inside, sys.executable, "-m", "migrate", "daemon", "--listen", f"{address}:7400", "--insecure"]
        self.process = subprocess.Popen([*command, "--ready-fd", str(ready_write)], pass_fds=[ready_write])
        os.close(ready_write)
        with os.fdopen(ready_read) as stream:
            self.address = json.loads(stream.readline())["listen"]

    def migrate(self, *words):
        """Run the command line inside this host; return its last line of output."""
        done = subprocess.run(
            [*self.inside, sys.executable, "-m", "migrate", *words, "--daemon", self.address],
            check=False,
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert done.returncode == 0, done.stderr
        return (done.stdout.splitlines() or [""])[-1]

    def json(self, *words):
        return json.loads(self.migrate(*words, "--json"))

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0


@pytest.fixture
def namespaces():
    names = [f"migrate-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_guest_moves_between_two_namespaces(namespaces):
    source, destination = (Host(name, f"10.99.0.{number}") for number, name in enumerate(namespaces, 1))
    try:
        source.migrate("guest", "create", "g", "--memory", "64MiB", "--vcpus", "2")
        wait_until(lambda: source.json("guest", "show", "g")["state"] == "running", 20, "the guest to populate")
        # Slow enough that the vCPUs run long before the background is through.
        slowly = ["--mode", "postcopy", "--max-bandwidth", "100MB"]
        moved = source.json("start", "g", "--to", destination.address, *slowly)
        assert moved["state"] == "completed"
        assert moved["pages"]["urgent"] > 0
        assert moved["guest_errors"] == 0
        statistics = destination.json("guest", "stats", "g", "--audit")
        assert statistics["errors"] == 0
        assert statistics["touches"] > moved["guest_touches"]
    finally:
        source.close()
        destination.close()
