"""The Python API with real daemons, and the examples of docs/python.md as they stand there."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

# ruff: noqa: ASYNC110 - a daemon tells of no event for these
from migrate.client import AsyncClient, Client, guest_state_word, pages_present, state_word
from migrate.errors import GuestBusyError, NotFoundError
from tests.harness.waiting import wait_until

EXAMPLES = re.findall(
    r"```python\n(.*?)```", (Path(__file__).resolve().parents[2] / "docs" / "python.md").read_text(), re.DOTALL
)
TERMS = {"mode": "postcopy", "verify": True}


@pytest.mark.uffd
def test_a_guest_lives_moves_and_dies_by_the_blocking_client(source, destination):
    with Client(source.address) as here, Client(destination.address) as there:
        made = here.guests.create("sync", kind="process", memory_bytes=16 << 20)
        assert (made.spec.memory_bytes, made.spec.vcpus) == (16 << 20, 1)
        wait_until(lambda: guest_state_word(here.guests.get("sync").state) == "running", 30, "the guest to run")
        here.guests.pause("sync")
        assert guest_state_word(here.guests.get("sync").state) == "paused"
        here.guests.resume("sync")

        migration_id = here.migrations.start("sync", destination.address, **TERMS)
        with pytest.raises(GuestBusyError):
            here.migrations.start("sync", destination.address)
        followed = list(here.migrations.follow(migration_id))
        assert state_word(followed[-1].state) == "completed"
        assert pages_present(followed[-1].pages) == followed[-1].pages.total == 4096
        assert migration_id in [migration.migration_id for migration in there.migrations.list()]
        wait_until(lambda: not there.guests.get("sync").migration_id, 10, "the destination to let the guest go")

        assert there.guests.audit("sync").errors == 0
        assert there.guests.statistics("sync").audits == 1
        there.guests.delete("sync")
        with pytest.raises(NotFoundError):
            there.guests.get("sync")
        with pytest.raises(NotFoundError):
            here.migrations.get("never")


@pytest.mark.uffd
def test_a_guest_lives_moves_and_dies_by_the_async_client(source, destination):
    async def live():
        async with AsyncClient(source.address) as here, AsyncClient(destination.address) as there:
            await here.guests.create("async", kind="process", memory_bytes=16 << 20)
            async with asyncio.timeout(30):
                while guest_state_word((await here.guests.get("async")).state) != "running":
                    await asyncio.sleep(0.02)
            migration_id = await here.migrations.start("async", destination.address, **TERMS)
            with pytest.raises(GuestBusyError):
                await here.migrations.start("async", destination.address)
            migration = await here.migrations.wait(migration_id)
            assert state_word(migration.state) == "completed"
            assert pages_present(migration.pages) == migration.pages.total == 4096
            async with asyncio.timeout(10):
                while (await there.guests.get("async")).migration_id:
                    await asyncio.sleep(0.02)
            touches = [s.touches async for s in take(there.guests.watch_statistics("async", interval_us=20_000), 3)]
            assert touches == sorted(touches)
            assert (await there.guests.audit("async")).errors == 0
            await there.guests.delete("async")
            with pytest.raises(NotFoundError):
                await there.guests.get("async")

    asyncio.run(live())


async def take(items, count):
    """The first so many of a stream, which is closed then."""
    async for item in items:
        yield item
        count -= 1
        if not count:
            break
    await items.aclose()


def run_example(number, tmp_path, *arguments):
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.uffd
def test_the_example_of_the_document_moves_a_guest(source, destination, tmp_path):
    source.create("example", kind="process", memory_mib=16)
    source.wait_populated("example")

    done = run_example(0, tmp_path, "example", source.address, destination.address)

    assert (done.returncode, done.stderr) == (0, "")
    assert "completed: 0 pages are missing" in done.stdout
    assert destination.guest("example").spec.name == "example"


def test_the_example_of_the_document_says_what_failed(source, destination, tmp_path):
    done = run_example(0, tmp_path, "nobody", source.address, destination.address)

    assert done.returncode == 1
    assert done.stderr.startswith("NotFoundError: ")


@pytest.mark.uffd
def test_the_async_example_of_the_document_moves_two(source, destination, tmp_path):
    done = run_example(1, tmp_path, source.address, destination.address)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["one: completed", "two: completed"]
