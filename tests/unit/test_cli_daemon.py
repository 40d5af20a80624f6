"""`migrate daemon`: which addresses it accepts, and what it hands on."""

import subprocess
import sys
from pathlib import Path

import pytest

import migrate.daemon.main
from migrate.config import DaemonConfig
from tests.harness.cli import run


@pytest.fixture
def started(monkeypatch):
    """Configurations that daemons were started with, none of which ran."""
    configurations = []
    monkeypatch.setattr(migrate.daemon.main, "run_daemon", configurations.append)
    return configurations


def test_a_daemon_starts_without_what_it_may_never_need():
    """Guests may be waiting for it."""
    heavy = ("cryptography", "importlib.metadata", "prometheus_client", "rich", "numpy")
    script = f"import sys, migrate.cli.daemon, migrate.daemon.main; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True)

    assert done.stdout == "[]\n"


def test_daemon_defaults(started):
    assert run("daemon").exit_code == 0

    assert started == [DaemonConfig(listen="127.0.0.1:7400", page_listen=None, state_dir=None, ready_fd=None)]


def test_daemon_passes_everything_on(started, tmp_path):
    options = ["--listen", "[::1]:0", "--page-listen", "localhost:0", "--state-dir", str(tmp_path), "--ready-fd", "7"]
    options += ["--advertise", "host.example:7400", "--advertise-pages", "[2001:db8::1]:7401"]
    options += ["--metrics-listen", "127.0.0.1:0", "--log-format", "json"]

    assert run("daemon", *options).exit_code == 0

    assert started == [
        DaemonConfig(
            listen="[::1]:0",
            page_listen="localhost:0",
            state_dir=Path(tmp_path),
            advertise="host.example:7400",
            advertise_pages="[2001:db8::1]:7401",
            ready_fd=7,
            metrics_listen="127.0.0.1:0",
            log_format="json",
        )
    ]


@pytest.mark.parametrize("option", ["--listen", "--page-listen"])
@pytest.mark.parametrize("address", ["0.0.0.0:7400", "[::]:7400", "192.0.2.1:7400", "host.example:7400"])
def test_daemon_refuses_open_networks_and_says_why(started, option, address):
    result = run("daemon", option, address)

    assert result.exit_code == 2
    assert "is not loopback" in result.stderr
    assert "--tls-dir" in result.stderr
    assert "--insecure" in result.stderr
    assert not started


def test_daemon_insecure_listens_anywhere(started):
    assert run("daemon", "--listen", "0.0.0.0:7400", "--insecure").exit_code == 0

    assert started[0].listen == "0.0.0.0:7400"


def test_daemon_with_tls_listens_anywhere(started, tmp_path):
    assert run("daemon", "--listen", "0.0.0.0:7400", "--tls-dir", str(tmp_path)).exit_code == 0

    assert started[0].tls_dir == tmp_path


def test_daemon_serves_metrics_on_loopback_alone_with_tls_too(started, tmp_path):
    for options in ([], ["--tls-dir", str(tmp_path)]):
        result = run("daemon", "--metrics-listen", "0.0.0.0:7402", *options)
        assert result.exit_code == 2
        assert "plain HTTP" in result.stderr
    assert not started

    assert run("daemon", "--metrics-listen", "0.0.0.0:7402", "--insecure").exit_code == 0
    assert started[0].metrics_listen == "0.0.0.0:7402"


def test_daemon_is_either_secure_or_not(started, tmp_path):
    assert run("daemon", "--insecure", "--tls-dir", str(tmp_path)).exit_code == 2
    assert not started


def test_daemon_bad_address_is_a_usage_error(started):
    for option in ("--listen", "--page-listen", "--advertise", "--advertise-pages", "--metrics-listen"):
        assert run("daemon", option, "7400").exit_code == 2
    assert not started
