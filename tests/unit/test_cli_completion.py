"""What shells offer, as bash itself asks for it, against a fake daemon."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.cli import run
from tests.harness.fake_daemon import FakeDaemon, make_migration, serve

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
BASH = """
source "$0"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_migrate_completion migrate
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """What an operator's shell reads when it starts."""
    made = tmp_path_factory.mktemp("completion") / "migrate.bash"
    with made.open("wb") as stream:
        subprocess.run(
            ["migrate", "completion", "bash"], stdout=stream, timeout=50, env={**os.environ, "PATH": PATH}, check=True
        )
    return made


@pytest.fixture
def complete(script):
    return functools.partial(completions, script)


@pytest.fixture
def daemon():
    migrations = [make_migration(migration_id=f"m-{number}") for number in (1, 2)]
    with serve(FakeDaemon(migrations=migrations)) as running:
        yield running


def completions(script, *words, daemon=None, address=None):
    """What bash offers for the last word."""
    env = {
        **os.environ,
        "PATH": PATH,
        "MIGRATE_DAEMON": daemon.address if daemon else address or "127.0.0.1:1",
        "MIGRATE_TLS_DIR": "",
    }
    command = ["bash", "-c", BASH, str(script), "migrate", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=env, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_and_options(complete):
    assert complete("dra") == ["drain"]
    assert complete("guest", "re") == ["resume"]
    assert "--mode" in complete("start", "alpha", "--m")
    assert complete("start", "alpha", "--mode", "post") == ["postcopy"]
    assert complete("start", "alpha", "--order", "re") == ["recorded-set"]


def test_bash_completes_guests_of_the_daemon(complete, daemon):
    assert complete("guest", "show", "", daemon=daemon) == ["alpha", "beta"]
    assert complete("start", "al", daemon=daemon) == ["alpha"]
    assert complete("guest", "show", "--daemon", daemon.address, "b") == ["beta"]
    # That one is to be new.
    assert complete("guest", "create", "al", daemon=daemon) == []


def test_bash_completes_migrations_the_latest_first(complete, daemon):
    assert complete("status", "m", daemon=daemon) == ["m-2", "m-1"]
    assert complete("cancel", "m-1", daemon=daemon) == ["m-1"]


def test_bash_is_not_told_of_a_daemon_that_is_not_there(complete):
    assert complete("guest", "show", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(shell):
    result = run("completion", shell)

    assert result.exit_code == 0
    assert f"_MIGRATE_COMPLETE={shell}_complete" in result.stdout


def test_unknown_shell_is_a_usage_error():
    assert run("completion", "csh").exit_code == 2
