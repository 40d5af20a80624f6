"""What an operator does, through the command line, and what must be true afterwards."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

from migrate.v1 import guest_service_pb2 as guest
from tests.harness import cli
from tests.harness.waiting import wait_until


def ask(daemon, *words, exit_code=0):
    """Run a command against a daemon, and check how it ended."""
    result = cli.run(*words, daemon=daemon)
    assert result.exit_code == exit_code, (result.stdout, result.stderr)
    return result


def start(source, destination, name, *options, exit_code=0):
    """`migrate start`, followed to its end; the report."""
    words = ("start", name, "--to", destination.address, *options, "--json")
    return cli.json_of(ask(source, *words, exit_code=exit_code))


@contextlib.contextmanager
def following(source, destination, name, *options):
    """`migrate start`, followed in a thread; the future of its result."""
    with ThreadPoolExecutor(1) as pool:
        words = ("start", name, "--to", destination.address, *options, "--json")
        yield pool.submit(cli.run, *words, daemon=source)


def start_detached(source, destination, name, *options):
    """`migrate start --detach`; the migration's id."""
    words = ("start", name, "--to", destination.address, *options, "--detach", "--json")
    return cli.json_of(ask(source, *words))["migration_id"]


def status(daemon, migration_id):
    """`migrate status`, which knows more than the report."""
    return cli.json_of(ask(daemon, "status", migration_id, "--json"))


def is_free(daemon, name):
    """Whether no migration holds a guest, which may be gone."""
    return all(listed.migration_id == "" for listed in daemon.list_guests() if listed.spec.name == name)


def delete_everywhere(name, *daemons):
    """No daemon has a guest of that name any more."""
    for daemon in daemons:
        wait_until(lambda daemon=daemon: is_free(daemon, name), 10, f"{name} to be free")
        if name in daemon.guest_names():
            daemon.guests.DeleteGuest(guest.DeleteGuestRequest(name=name), timeout=30)


def check_moved(source, destination, name, report):
    """The guest is at the destination alone, runs there, and every page is as it left it."""
    assert (report["state"], report["guest_errors"]) == ("completed", 0)
    pages = report["pages"]
    assert pages["total"] == report["memory_bytes"] // report["page_size_bytes"]
    assert pages["zero"] + pages["precopy"] + pages["urgent"] + pages["background"] == pages["total"]
    assert 0 < report["downtime_us"] < report["total_us"]
    # END is acknowledged first; then each side lets go.
    wait_until(lambda: name not in source.guest_names(), 10, "the source to let the guest go")
    wait_until(lambda: is_free(destination, name), 10, "the destination to let the guest be moved again")
    check_runs(destination, name)


def check_runs(daemon, name):
    """The guest touches pages, and an audit finds all of them as they should be."""
    before = daemon.statistics(name).touches
    wait_until(lambda: daemon.statistics(name).touches > before, 20, "the guest to touch more pages")
    audited = cli.json_of(ask(daemon, "guest", "stats", name, "--audit", "--json"))
    assert (audited["errors"], audited["first_error"]) == (0, None)
    assert audited["audits"] >= 1
