"""Watching a migration: rates, the map, the drawing at 80 columns without colour, lines elsewhere, Ctrl-C."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from migrate.cli.pace import Pace
from migrate.cli.progress import JsonReporter, PlainReporter, progress_reporter
from migrate.cli.view import MigrationView, heat_map
from migrate.client import state_word
from migrate.v1 import types_pb2 as types
from tests.harness.cli import json_of, run
from tests.harness.fake_daemon import FakeDaemon, make_migration, serve

S = 1_000_000
LIVE = types.LiveFigures(
    missing_map=bytes(64) + bytes([100] * 64) + bytes([255] * 128),
    fault_latency_us=types.Distribution(count=431, mean=100, p50=85, p90=500, p99=1200, p999=4000, max=4000),
)
PAGES = {"total": 262_144, "zero": 131_072, "precopy": 0, "urgent": 1_072, "background": 20_000}
DEADLINE_S = 20
CSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def moving(state=types.MIGRATION_STATE_POSTCOPY, *, total_us=S, wire_bytes=0, live=LIVE, pages=(), **fields):
    counts = types.PageCounts(**{**PAGES, **dict(pages)})
    return make_migration(state, total_us=total_us, bytes_on_wire=wire_bytes, live=live, pages=counts, **fields)


def drawn(*migrations, width=80, ascii_only=False, color=False):
    """What stands on the terminal after some migrations were shown."""
    view = MigrationView("192.0.2.1:7400", "Ctrl-C detaches")
    for migration in migrations:
        view.show(migration)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii" if ascii_only else "utf-8")
    Console(file=out, width=width, no_color=not color, force_terminal=True, color_system="256").print(view)
    out.flush()
    return out.buffer.getvalue().decode(out.encoding)


def plain(text):
    return CSI.sub("", text).splitlines()


# ---- rates ----


def test_pace_is_that_of_the_last_two_seconds():
    pace = Pace()
    for second in range(10):
        speed = 1000 if second < 5 else 3000
        arrived = 1000 * second if second < 5 else 4000 + 3000 * (second - 4)
        pages = {"zero": 0, "urgent": 0, "background": arrived, "total": 22_000 + arrived // 10**6}
        pace.add(moving(total_us=second * S, wire_bytes=arrived * 4096, pages=pages))
        assert second in {0, 5, 6} or pace.pages_per_s == speed
    assert pace.wire_bytes_per_s == 3000 * 4096
    assert pace.left_us == pytest.approx(1 * S)  # 22 000 less 19 000 of them


def test_pace_of_what_stands_still_is_not_known():
    pace = Pace()
    assert (pace.pages_per_s, pace.wire_bytes_per_s) == (0, 0)
    for second in range(4):
        pace.add(moving(total_us=second * S))
    assert (pace.pages_per_s, pace.left_us) == (0, None)


def test_pace_begins_anew_with_another_attempt():
    pace = Pace()
    pace.add(moving(total_us=S, wire_bytes=1 << 30))
    pace.add(moving(total_us=2 * S, wire_bytes=0, pages={"background": 0}))
    pace.add(moving(total_us=3 * S, wire_bytes=1000, pages={"background": 10}))
    assert (pace.pages_per_s, pace.wire_bytes_per_s) == (10, 1000)


def test_pace_of_pages_that_become_stale_is_never_negative():
    pace = Pace()
    pace.add(moving(total_us=S))
    pace.add(moving(total_us=2 * S, wire_bytes=10, pages={"background": 0}))
    assert (pace.pages_per_s, pace.left_us) == (0, None)


# ---- the map ----


def test_heat_map_of_as_many_parts_as_cells():
    assert heat_map(bytes([0, 1, 254, 255]), 2, 2) == [[0, 1], [254, 255]]


def test_heat_map_says_none_or_all_only_if_it_is_so():
    shares = bytes([0, 0, 0, 1, 255, 254, 255, 255])
    assert heat_map(shares, 4, 1) == [[0, 1, 254, 255]]


@pytest.mark.parametrize("parts", [1, 3, 100, 256])
def test_heat_map_fills_any_width(parts):
    for columns in (1, 71, 200):
        rows = heat_map(bytes([255] * parts), columns, 2)
        assert [len(row) for row in rows] == [columns, columns]
        assert {share for row in rows for share in row} == {255}


def test_heat_map_of_nothing_is_empty():
    assert heat_map(b"", 71, 2) == [[], []]


# ---- the drawing ----


def test_view_fits_80_columns_without_colour():
    text = drawn(moving(total_us=S), moving(total_us=3 * S, wire_bytes=24 << 20, pages={"background": 28_000}))
    lines = plain(text)

    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m|38;5", text)
    assert max(len(line) for line in lines) <= 80
    assert lines[0] == "guest    alpha (kvm, 1.0 GiB), migration m-1"
    assert lines[1] == "hosts    192.0.2.1:7400 → 192.0.2.2:7400"
    assert lines[2].rstrip() == "phase    ✓ setup  ✓ switchover  ▸ postcopy  · completed"
    assert lines[3] == "time     3.0 s, about 26 s left, downtime 4.2 ms"
    assert lines[4] == "pages    " + "█" * 19 + "░" * 13 + " 61%, 102,000 of 262,144 missing"
    assert lines[5] == "         131,072 zero, 0 precopy, 1,072 urgent, 28,000 background"
    assert lines[6] == "missing  " + "·" * 36 + "▒" * 35
    assert lines[7] == "         " + "█" * 71
    assert lines[9] == "rate     12.0 MiB/s on the wire, 4,000 pages/s"
    assert lines[10] == "urgent   p50 85 µs  p99 1.2 ms  max 4.0 ms  (431 in the last second)"
    assert lines[11] == "         Ctrl-C detaches"


def test_view_with_colour_says_the_same():
    migration = moving()

    assert plain(drawn(migration, color=True)) == plain(drawn(migration))
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", drawn(migration, color=True))


def test_view_of_a_terminal_that_has_only_ascii():
    lines = plain(drawn(moving(), ascii_only=True))

    assert lines[1] == "hosts    192.0.2.1:7400 -> 192.0.2.2:7400"
    assert lines[2].rstrip() == "phase    + setup  + switchover  > postcopy  - completed"
    assert lines[6] == "missing  " + "." * 36 + "+" * 35
    assert "p50 85 us" in lines[10]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_view_fits_any_width_and_leaves_nothing_out(width, ascii_only):
    error = types.ErrorInfo(type="ChannelError", message="the source does not answer " * 3)
    pages = {"background": 28_000, "stale": 12_345}
    migration = moving(
        types.MIGRATION_STATE_POSTCOPY_PAUSED,
        error=error,
        holder=types.GUEST_HOLDER_SPLIT,
        mode=types.MIGRATION_MODE_HYBRID,
        pages=pages,
    )

    lines = plain(drawn(migration, width=width, ascii_only=ascii_only))

    assert max(len(line) for line in lines) <= width
    rows = [line for line in lines if re.fullmatch(r"(missing| {7})  [·░▒▓█.:+%#]+", line)]
    assert [len(row) for row in rows] == [width, width]
    words = " ".join(line[9:] for line in lines if line not in rows).split()
    wide = " ".join(line[9:] for line in plain(drawn(migration, width=300, ascii_only=ascii_only))).split()
    assert [word for word in words if word[0] not in "█#"] == [
        word for word in wide if not re.match(r"[█#]|.{200}", word)
    ]
    bar = next(word for word in words if word[0] in "█#" and len(word) > 1)
    assert 8 <= len(bar) <= 32


def test_view_breaks_a_line_between_facts():
    lines = [line.rstrip() for line in plain(drawn(moving(mode=types.MIGRATION_MODE_HYBRID), width=60))]

    assert lines[2:4] == ["phase    ✓ setup  ✓ precopy  ✓ switchover  ▸ postcopy", " " * 9 + "· completed"]
    assert lines[5] == "pages    ██████████░░░░░░░░ 58%, 110,000 of 262,144 missing"
    assert lines[6:8] == ["         131,072 zero, 0 precopy, 1,072 urgent,", "         20,000 background"]


@pytest.mark.parametrize(
    ("side", "hosts"), [(1, "192.0.2.1:7400 → 192.0.2.2:7400"), (2, "192.0.2.2:7400 → 192.0.2.1:7400")]
)
def test_view_says_who_is_where_at_either_end(side, hosts):
    assert plain(drawn(moving(side=side)))[1].rstrip() == f"hosts    {hosts}"


@pytest.mark.parametrize("state", [state for state in types.MigrationState.values() if state])
@pytest.mark.parametrize("mode", [types.MIGRATION_MODE_POSTCOPY, types.MIGRATION_MODE_HYBRID])
def test_view_names_every_state(state, mode):
    lines = plain(drawn(moving(state, mode=mode)))

    assert state_word(state) in lines[2]
    assert ("precopy" in lines[2]) or mode == types.MIGRATION_MODE_POSTCOPY or "setup" not in lines[2]
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_view_without_a_map_says_so():
    """Of an older daemon, or before the destination has pages."""
    lines = plain(drawn(moving(live=None)))

    assert [line.rstrip() for line in lines[6:8]] == ["missing  not known", "         · none  ░ ▒ ▓ some  █ all"]
    assert "none in the last second" in "\n".join(lines)


@pytest.mark.parametrize(("seconds", "said"), [(1, "1.0 s"), (2, "2.0 s, left unknown: no pages come")])
def test_view_gives_pages_two_seconds_to_come(seconds, said):
    migrations = [moving(total_us=second * S, downtime_us=0) for second in range(seconds + 1)]

    assert plain(drawn(*migrations))[3].rstrip() == f"time     {said}"


def test_view_keeps_the_last_map_and_clears_it_at_the_end():
    rest = types.PageCounts(total=10, background=10)

    assert "█" * 71 in plain(drawn(moving(), moving(live=None)))[7]
    assert plain(drawn(moving(), make_migration(pages=rest)))[6] == "missing  " + "·" * 71


def test_view_of_names_that_look_like_markup():
    assert plain(drawn(moving(guest="[red]x[/red]")))[0].startswith("guest    [red]x[/red] (")


# ---- lines elsewhere ----


def test_plain_lines_where_there_is_no_terminal(capsys):
    with progress_reporter() as reporter:
        assert isinstance(reporter, PlainReporter)
        assert not reporter.wants_live
        for background in (0, 1000, 70_000, 71_000):
            reporter.show(moving(pages={"background": background}))

    assert capsys.readouterr().err.splitlines() == ["postcopy 50%, 1,072 urgent", "postcopy 77%, 1,072 urgent"]


def test_a_quarter_that_pages_go_back_to_is_told_once(capsys):
    reporter = PlainReporter()
    for done in (0, 249, 250, 249, 250, 499, 500, 999, 1000):
        reporter.report("precopy", done, 1000)
    reporter.report("switchover", 999, 1000)

    said = ["precopy 0%", "precopy 25%", "precopy 50%", "precopy 99%", "precopy 100%", "switchover 99%"]
    assert capsys.readouterr().err.splitlines() == said


def test_json_lines_come_at_each_change_of_state_and_once_a_second(capsys):
    now_s = [0.0]
    reporter = JsonReporter(lambda: now_s[0])
    for at_s, state in ((0.0, 4), (0.5, 4), (0.6, 5), (1.5, 5), (1.7, 5), (1.8, 7)):
        now_s[0] = at_s
        reporter.show(moving(types.MigrationState.ValueType(state)))

    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.fixture
def daemon():
    paused = make_migration(types.MIGRATION_STATE_POSTCOPY_PAUSED)
    watched = [make_migration(types.MIGRATION_STATE_POSTCOPY), paused, make_migration()]
    with serve(FakeDaemon(watched=watched)) as running:
        yield running


def test_status_watch_goes_on_through_pauses_and_ends_with_what_is(daemon):
    result = run("status", "m-1", "--watch", daemon=daemon)

    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["postcopy", "postcopy_paused", "completed"]
    assert "completed" in result.stdout
    assert [type(request).__name__ for request in daemon.requests] == ["GetMigrationRequest", "WatchMigrationRequest"]
    assert not daemon.requests[1].live


def test_status_watch_json_is_a_line_each(daemon):
    result = run("status", "--watch", "--json", daemon=daemon)

    states = [
        json_of(type("R", (), {"exception": None, "stdout": line}))["state"] for line in result.stdout.splitlines()
    ]
    assert states == ["postcopy", "postcopy_paused", "completed"]
    assert result.stderr == ""


@pytest.mark.parametrize(("options", "more"), [((), ""), (("--daemon",), " --daemon {}")], ids=["default", "named"])
def test_ctrl_c_says_how_to_look_again(daemon, monkeypatch, options, more):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(PlainReporter, "show", interrupt)
    named = (*options, daemon.address) if options else ()

    result = run("status", "m-1", "--watch", *named, daemon=None if options else daemon)

    assert result.exit_code == 130
    assert result.stderr == (
        f"migrate: detached; the migration goes on; look again with\n  migrate status m-1 --watch{more}\n".format(
            daemon.address
        )
    )


# ---- a terminal ----


class Endless(FakeDaemon):
    """A migration that goes on until somebody leaves."""

    def __init__(self):
        super().__init__()
        self.left = threading.Event()

    def WatchMigration(self, request, context):
        self.requests.append(request)
        context.add_callback(self.left.set)
        yield from super().WatchMigration(request, context)
        self.left.wait(DEADLINE_S)


def read_until(descriptor, words):
    """What a terminal is told, until it has some words; without escapes."""
    told, end_s = b"", time.monotonic() + DEADLINE_S
    while words not in CSI.sub("", told.decode(errors="ignore")):
        assert select.select([descriptor], [], [], max(0, end_s - time.monotonic()))[0], told
        told += os.read(descriptor, 65536)
    return CSI.sub("", told.decode(errors="replace"))


@pytest.mark.parametrize("command", [("start", "alpha", "--to", "192.0.2.2:7400"), ("status", "m-1", "--watch")])
def test_on_a_terminal_it_is_drawn_and_ctrl_c_detaches(command):
    fake = Endless()
    fake.watched = [moving()]
    with serve(fake) as daemon:
        terminal, end = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "80", "PYTHONUTF8": "1"}
        command = [sys.executable, "-m", "migrate", *command, "--daemon", daemon.address]
        process = subprocess.Popen(command, stderr=end, stdout=subprocess.PIPE, env=env)
        os.close(end)
        try:
            told = read_until(terminal, "Ctrl-C detaches; the migration goes on")
            assert "p50 85 µs  p99 1.2 ms" in told
            assert "▒" * 35 in told
            assert fake.requests[-1].live
            process.send_signal(signal.SIGINT)
            read_until(terminal, "detached; the migration goes on")
            assert process.wait(DEADLINE_S) == 130
            assert process.stdout.read() == b""
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            os.close(terminal)
        assert fake.left.wait(DEADLINE_S)
