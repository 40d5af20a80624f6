"""`migrate list` of several daemons: the ends of a migration stand together."""

import socket
from contextlib import ExitStack

import grpc
import pytest

from migrate.cli.listing import align
from migrate.errors import DaemonLostError
from migrate.v1 import types_pb2 as types
from tests.harness.cli import json_of, run
from tests.harness.fake_daemon import FakeDaemon, make_migration, serve

SOURCE, DESTINATION = types.MIGRATION_SIDE_SOURCE, types.MIGRATION_SIDE_DESTINATION
PAUSED, COMPLETED = types.MIGRATION_STATE_POSTCOPY_PAUSED, types.MIGRATION_STATE_COMPLETED


def closed_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def pair():
    """Two daemons, and two migrations between them: one each way."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(serve(FakeDaemon())) for _ in range(2))
        one.migrations = [
            make_migration(migration_id="m-1", side=SOURCE, peer=two.address),
            make_migration(PAUSED, migration_id="m-2", side=DESTINATION, guest="beta", peer=two.address),
        ]
        two.migrations = [
            make_migration(PAUSED, migration_id="m-2", side=SOURCE, guest="beta", peer=one.address),
            make_migration(migration_id="m-1", side=DESTINATION, peer=one.address),
            make_migration(migration_id="m-9", side=SOURCE, guest="other", peer="192.0.2.9:7400"),
        ]
        yield one, two


def rows(result):
    return [line.split() for line in result.stdout.splitlines()]


def test_list_of_both_ends_has_a_row_for_each(pair):
    one, two = pair

    result = run("list", "--daemon", one.address, "--daemon", two.address)

    assert result.exit_code == 0
    assert rows(result) == [
        ["MIGRATION", "GUEST", "SIDE", "DAEMON", "STATE", "HOLDER", "PAGES"],
        ["m-1", "alpha", "source", one.address, "completed", "destination", "100%"],
        ["destination", two.address, "completed", "destination", "100%"],
        ["m-2", "beta", "source", two.address, "postcopy_paused", "destination", "100%"],
        ["destination", one.address, "postcopy_paused", "destination", "100%"],
        ["m-9", "other", "source", two.address, "completed", "destination", "100%"],
        ["destination", "192.0.2.9:7400", "(not", "asked)"],
    ]


def test_list_with_peers_finds_the_other_ends(pair):
    one, two = pair

    result = run("list", "--peers", daemon=one)

    assert result.exit_code == 0
    assert [row[:3] for row in rows(result)[1:]] == [
        ["m-1", "alpha", "source"],
        ["destination", two.address, "completed"],
        ["m-2", "beta", "source"],
        ["destination", one.address, "postcopy_paused"],
    ]
    assert len(two.requests) == 1


def test_list_json_has_an_element_for_each_end(pair):
    one, two = pair

    ends = json_of(run("list", "--peers", "--json", daemon=one))

    assert [(end["migration_id"], end["side"], end["daemon"]) for end in ends] == [
        ("m-1", "source", one.address),
        ("m-1", "destination", two.address),
        ("m-2", "source", two.address),
        ("m-2", "destination", one.address),
    ]


def test_list_of_one_daemon_asks_nobody_else_and_is_as_it_was(pair):
    one, two = pair

    ends = json_of(run("list", "--json", daemon=one))

    assert [end["migration_id"] for end in ends] == ["m-1", "m-2"]
    assert "daemon" not in ends[0]
    assert two.requests == []


def test_list_says_of_a_peer_that_it_does_not_answer(pair):
    one, _two = pair
    gone = closed_address()
    for migration in one.migrations:
        migration.peer = gone

    result = run("list", "--peers", daemon=one)

    assert result.exit_code == 0
    assert ["destination", gone, "(no", "answer)"] in rows(result)
    assert f"no daemon answers at {gone}" in result.stderr


def test_list_of_a_named_daemon_that_does_not_answer_fails_after_the_others(pair):
    one, two = pair
    two.failure = (grpc.StatusCode.UNAVAILABLE, None)

    result = run("list", "--daemon", one.address, "--daemon", two.address)

    assert result.exit_code == 1
    assert ["destination", two.address, "(no", "answer)"] in rows(result)
    assert f"no daemon answers at {two.address}" in result.stderr


def test_list_takes_several_daemons_from_the_environment(pair):
    one, two = pair

    result = run("list", env={"MIGRATE_DAEMON": f"{one.address} {two.address}"})

    assert result.exit_code == 0
    assert [row[0] for row in rows(result)] == [
        "MIGRATION",
        "m-1",
        "destination",
        "m-2",
        "destination",
        "m-9",
        "destination",
    ]


def test_list_of_a_daemon_by_two_names_counts_once(pair):
    one, two = pair
    by_name = one.address.replace("127.0.0.1", "localhost")

    result = run("list", "--daemon", one.address, "--daemon", by_name, "--daemon", two.address)

    assert len(rows(result)) == 7


def test_list_fits_80_columns(pair, monkeypatch):
    one, two = pair
    for migration in (*one.migrations, *two.migrations):
        migration.state = types.MIGRATION_STATE_POSTCOPY_RECOVER
        migration.migration_id += "0123456789"
    monkeypatch.setattr("migrate.cli.render._PIPE_COLUMNS", 80)

    result = run("list", "--daemon", one.address, "--daemon", two.address)

    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert result.stdout.count("postcopy_recover") == 5
    assert result.stdout.count("100%") == 5


def test_an_end_that_nobody_told_of_says_why():
    found = {
        "a:1": [make_migration(COMPLETED, migration_id=peer, side=SOURCE, peer=peer) for peer in ("b:1", "c:1", "d:1")]
    }

    ends = align({**found, "b:1": []}, {"c:1": DaemonLostError("gone")})

    assert [pair[1].why_unknown for pair in ends] == ["not known there", "no answer", "not asked"]
    assert [pair[1].side for pair in ends] == [DESTINATION] * 3
