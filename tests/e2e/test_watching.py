"""Watching a migration at both ends: the map of missing pages and the fault latencies of now, and only for who asks.

And what people see of it: in a tmux pane, with and without colour, resized, and after it.
"""

import re
from contextlib import closing

import pytest

from migrate.client import Client, pages_present
from migrate.v1 import types_pb2 as types
from tests.harness import cli
from tests.harness.documented import FENCE, ROOT, agrees
from tests.harness.operator import check_runs
from tests.harness.tmux import pane
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
MEMORY_MIB = 24
SLOW_BYTES_PER_S = 6 << 20
# Time to start a command, and to look at what it draws, on a machine that has other things to do.
VERY_SLOW_BYTES_PER_S = 3 << 20
at_leisure = pytest.mark.parametrize("moving", [VERY_SLOW_BYTES_PER_S], indirect=True, ids=["slow"])
LABELS = ["guest", "hosts", "phase", "time", "pages", "missing", "rate", "urgent"]
PICTURES = [
    body
    for name in ("quickstart", "operations")
    for language, body in FENCE.findall((ROOT / "docs" / f"{name}.md").read_text())
    if not language and "Ctrl-C detaches" in body
]
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:[349][1-7]|[34]8;[0-9;]+)m")


@pytest.fixture
def moving(source, destination, request):
    """A migration that takes some seconds."""
    name = "watched"
    source.create(name, kind="process", memory_mib=MEMORY_MIB, touch_rate_per_s=200)
    source.wait_populated(name)
    migration_id = source.start(
        destination, name, max_bandwidth_bytes_per_s=getattr(request, "param", SLOW_BYTES_PER_S)
    )
    wait_until(lambda: migration_id in [m.migration_id for m in destination.list()], 10, "the destination to prepare")
    yield migration_id
    source.wait_completed(migration_id)
    wait_until(lambda: not destination.guest(name).migration_id, 10, "the destination to let go")
    check_runs(destination, name)
    with Client(destination.address) as client:
        client.guests.delete(name)


def watch(daemon, migration_id):
    """Every answer to one who watches, to the end."""
    with Client(daemon.address) as client, closing(client.migrations.watch(migration_id, live=True)) as watched:
        return list(watched)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_the_map_of_missing_pages_empties(moving, source, destination, end):
    seen = watch(source if end == "source" else destination, moving)

    maps = [migration.live.missing_map for migration in seen if migration.HasField("live")]
    assert len(maps) > 5
    assert {len(shares) for shares in maps} == {256}
    missing = [sum(shares) for shares in maps]
    assert missing == sorted(missing, reverse=True)
    assert missing[0] > missing[-1]
    # What is not there yet according to the counts is missing in the map, up to what came between the two.
    middle = next(m for m in seen if m.HasField("live") and pages_present(m.pages) > m.pages.total // 2)
    share = 1 - pages_present(middle.pages) / middle.pages.total
    assert sum(middle.live.missing_map) / (255 * 256) == pytest.approx(share, abs=0.1)
    assert max(migration.live.fault_latency_us.count for migration in seen) > 0
    assert seen[-1].state == types.MIGRATION_STATE_COMPLETED


def test_who_does_not_ask_is_not_told(moving, source, destination):
    with Client(source.address) as here, Client(destination.address) as there:
        followed = list(here.migrations.follow(moving))
        listed = [*here.migrations.list(), *there.migrations.list(), here.migrations.get(moving)]

    assert not any(migration.HasField("live") for migration in [*followed, *listed])


def test_nothing_stays_of_what_was_watched(moving, source, destination):
    watch(source, moving)

    assert not source.migration(moving).HasField("live")
    assert not destination.migration(moving).HasField("live")


def test_list_with_peers_tells_both_ends(moving, source, destination):
    for asked in (source, destination):
        ends = [
            end
            for end in cli.json_of(cli.run("list", "--peers", "--json", daemon=asked))
            if end["migration_id"] == moving
        ]
        assert [(end["side"], end["daemon"]) for end in ends] == [
            ("source", source.address),
            ("destination", destination.address),
        ]
        assert {end["guest"] for end in ends} == {"watched"}


@pytest.mark.parametrize("end", ["source", "destination"])
def test_status_watch_ends_with_the_migration(moving, source, destination, end):
    watched = cli.run("status", moving, "--watch", daemon=source if end == "source" else destination)

    assert watched.exit_code == 0
    assert any(line.startswith("postcopy ") for line in watched.stderr.splitlines())
    assert watched.stderr.splitlines()[-1].startswith("completed 100%")
    assert "completed" in watched.stdout


# ---- on a terminal ----


def labels(lines):
    """The first column of what is drawn: whatever else stands there is one, too."""
    return [line[:9].strip() for line in lines if line[:9].strip()]


def wait_drawn(terminal, columns):
    """What is drawn once vCPUs wait for pages; lines that are there twice, or of before, would be labels."""

    def drawn():
        lines = terminal.lines()
        is_wide = max(map(len, lines), default=0) == columns
        return is_wide and any("p50" in line for line in lines) and labels(lines) == LABELS and lines

    return wait_until(drawn, 20, f"the view to be drawn, {columns} columns wide, with nothing else on the screen")


def likened(picture):
    """A drawing as of any other guest, in any mode."""
    text = re.sub(r"[█░▒▓·]{2,}", "MAP", picture).replace("✓ precopy  ", "")
    text = re.sub(r"(guest +)\w+ \(\w+", r"\1web (kvm", text)
    return re.sub(r", [\d,]+ stale", "", re.sub(r"\b0 (zero|precopy|urgent|background)", r"1 \1", text))


@pytest.mark.tmux
@at_leisure
@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1", "TERM": "screen"}], ids=["colour", "no-colour"])
def test_in_a_pane_of_80_columns_it_looks_as_in_the_documents(moving, source, tmp_path, env):
    with pane(tmp_path, **env) as terminal:
        terminal.type(f"migrate status --watch --daemon {source.address} {moving}")
        lines = wait_drawn(terminal, 80)
        escapes = terminal.escapes()
        terminal.wait_prompt()
        after = terminal.lines(with_history=True)

    assert bool(COLOUR.search(escapes)) == ("NO_COLOR" not in env)
    assert len([line for line in lines if re.fullmatch(r"(missing| {7})  [█░▒▓·]{71}", line)]) == 2
    assert len(PICTURES) == 2
    for picture in PICTURES:
        assert agrees(likened(picture), likened("\n".join(lines))), lines
    # Nothing of it is left, not even above.
    assert after[0].startswith("$ migrate status")
    assert after[1].startswith("guest          watched (process")
    assert "phase" not in labels(after)


@pytest.mark.tmux
@at_leisure
def test_a_pane_that_is_resized_has_no_pieces_of_before(moving, source, tmp_path):
    with pane(tmp_path, NO_COLOR="1") as terminal:
        terminal.type(f"migrate status --watch --daemon {source.address} {moving}")
        wait_drawn(terminal, 80)
        for columns, rows in ((60, 20), (100, 30), (50, 24), (80, 24)):
            terminal.resize(columns, rows)
            assert not any("…" in line for line in wait_drawn(terminal, columns))
        terminal.interrupt()
        terminal.wait_prompt()
        command, *said, _ = terminal.lines(with_history=True)
    assert command.startswith("$ migrate status")
    assert said[-2:] == [
        "migrate: detached; the migration goes on; look again with",
        f"  migrate status {moving} --watch --daemon {source.address}",
    ]
    assert "phase" not in labels(said)
