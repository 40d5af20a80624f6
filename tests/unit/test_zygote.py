"""A process that the zygote forks is like any other to whoever asked for it."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness.processes import is_alive
from tests.harness.zygote import ZYGOTE


@pytest.fixture
def ready():
    """Where a daemon says that it is ready, and the end that it writes to."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stream:
        yield stream, write_end


def migrate(words, env, ready, stderr):
    """A process, which alone has the end that it writes to."""
    try:
        return ZYGOTE.migrate(words, env, ready[1], stderr.fileno())
    finally:
        os.close(ready[1])


def test_it_has_its_own_words_variables_and_stderr(ready, tmp_path):
    with (tmp_path / "stderr").open("wb") as stderr:
        process = migrate(["list"], {"MIGRATE_DAEMON": "nowhere"}, ready, stderr)
        assert process.wait(20) == process.poll() == process.returncode == 2
    assert "No such option '--ready-fd'" in (tmp_path / "stderr").read_text()
    assert not is_alive(process.pid)
    assert ready[0].read() == "", "nobody else has that end of the pipe"


def test_a_daemon_serves_and_ends_as_it_is_told(ready, tmp_path):
    with (tmp_path / "stderr").open("wb") as stderr:
        process = migrate(["daemon", "--listen", "127.0.0.1:0"], dict(os.environ), ready, stderr)
    assert '"listen"' in ready[0].readline()
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(process.wait, 20)
        assert process.poll() is None, "while somebody waits"
        process.send_signal(15)
        assert waits.result() == process.poll() == 0


def test_a_daemon_that_is_killed_is_gone(ready, tmp_path):
    with (tmp_path / "stderr").open("wb") as stderr:
        process = migrate(["daemon", "--listen", "127.0.0.1:0"], dict(os.environ), ready, stderr)
    assert ready[0].readline()
    process.kill()
    assert process.wait(20) == -9
    assert not is_alive(process.pid)
    process.kill()
