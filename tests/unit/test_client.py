"""The Python API against a fake daemon: both clients ask for the same things, and fail in the same ways."""

import asyncio
import inspect
import socket

import grpc
import pytest

from migrate import client as api
from migrate.client import AsyncClient, Client, aio, state_word, sync
from migrate.errors import (
    CallFailedError,
    ConfigError,
    DaemonLostError,
    GuestBusyError,
    GuestHolder,
    NotFoundError,
    PostcopyPausedError,
)
from migrate.v1 import guest_service_pb2, migration_service_pb2, types_pb2
from tests.harness.fake_daemon import FakeDaemon, make_migration, serve

G, M = guest_service_pb2, migration_service_pb2
RUNNING, PAUSED = types_pb2.MIGRATION_STATE_POSTCOPY, types_pb2.MIGRATION_STATE_POSTCOPY_PAUSED

# Service, method, arguments, what is asked of the daemon.
CALLS = [
    ("guests", "list", (), G.ListGuestsRequest()),
    ("guests", "get", ("alpha",), G.GetGuestRequest(name="alpha")),
    ("guests", "pause", ("alpha",), G.PauseGuestRequest(name="alpha")),
    ("guests", "resume", ("alpha",), G.ResumeGuestRequest(name="alpha")),
    ("guests", "delete", ("alpha",), G.DeleteGuestRequest(name="alpha")),
    ("guests", "audit", ("alpha",), G.AuditGuestRequest(name="alpha")),
    ("guests", "statistics", ("alpha",), G.WatchGuestStatisticsRequest(name="alpha")),
    (
        "guests",
        "attach",
        ("beta", "/run/qmp"),
        G.CreateGuestRequest(
            spec=types_pb2.GuestSpec(
                name="beta", kind=types_pb2.GUEST_KIND_QEMU, qemu=types_pb2.QemuSpec(qmp_socket="/run/qmp")
            )
        ),
    ),
    ("migrations", "list", (), M.ListMigrationsRequest()),
    ("migrations", "get", ("m-1",), M.GetMigrationRequest(migration_id="m-1")),
    ("migrations", "switchover", ("m-1",), M.StartSwitchoverRequest(migration_id="m-1")),
    ("migrations", "cancel", ("m-1",), M.CancelMigrationRequest(migration_id="m-1")),
    ("migrations", "recover", ("m-1",), M.RecoverMigrationRequest(migration_id="m-1")),
    ("migrations", "recover", ("m-1", "h:1"), M.RecoverMigrationRequest(migration_id="m-1", to="h:1")),
]


class Blocking:
    """Makes one call with the client that blocks."""

    def call(self, address, service, method, *arguments, **terms):
        with Client(address) as client:
            return getattr(getattr(client, service), method)(*arguments, **terms)

    def iterate(self, address, service, method, *arguments, **terms):
        with Client(address) as client:
            return list(getattr(getattr(client, service), method)(*arguments, **terms))


class Aio:
    """The same with the one for asyncio."""

    def call(self, address, service, method, *arguments, **terms):
        async def called():
            async with AsyncClient(address) as client:
                return await getattr(getattr(client, service), method)(*arguments, **terms)

        return asyncio.run(called())

    def iterate(self, address, service, method, *arguments, **terms):
        async def iterated():
            async with AsyncClient(address) as client:
                return [item async for item in getattr(getattr(client, service), method)(*arguments, **terms)]

        return asyncio.run(iterated())


@pytest.fixture(params=[Blocking, Aio], ids=["sync", "async"])
def client(request):
    return request.param()


@pytest.fixture
def daemon():
    with serve(FakeDaemon()) as running:
        yield running


def public_methods(cls):
    return {name: method for name, method in vars(cls).items() if callable(method) and not name.startswith("_")}


@pytest.mark.parametrize("names", [("Guests", "AsyncGuests"), ("Migrations", "AsyncMigrations")])
def test_both_clients_have_the_same_methods(names):
    blocking, asynchronous = public_methods(getattr(sync, names[0])), public_methods(getattr(aio, names[1]))

    assert {name: inspect.signature(method).parameters for name, method in blocking.items()} == {
        name: inspect.signature(method).parameters for name, method in asynchronous.items()
    }
    assert [name for name, method in blocking.items() if not inspect.getdoc(method)] == []


def test_all_that_is_offered_exists():
    assert all(hasattr(api, name) for name in api.__all__)


@pytest.mark.parametrize(("service", "method", "arguments", "request_"), CALLS, ids=lambda value: str(value)[:20])
def test_calls_ask_for_what_they_say(client, daemon, service, method, arguments, request_):
    client.call(daemon.address, service, method, *arguments)

    assert daemon.requests == [request_]


def test_answers_are_the_messages_of_the_daemon(client, daemon):
    assert [guest.spec.name for guest in client.call(daemon.address, "guests", "list")] == ["alpha", "beta"]
    assert client.call(daemon.address, "guests", "get", "gamma").spec.name == "gamma"
    assert client.call(daemon.address, "guests", "pause", "gamma") is None
    assert client.call(daemon.address, "guests", "statistics", "gamma").touches == 100
    assert client.call(daemon.address, "migrations", "list") == daemon.migrations
    assert client.call(daemon.address, "migrations", "start", "alpha", "h:1") == "m-1"
    assert state_word(client.call(daemon.address, "migrations", "get", "m-1").state) == "completed"


def test_terms_are_words_and_units(client, daemon):
    client.call(
        daemon.address,
        *("guests", "create", "alpha"),
        kind="process",
        memory_bytes=64 << 20,
        workload="zipf",
        write_ratio=0.25,
    )
    client.call(
        daemon.address,
        *("migrations", "start", "alpha", "h:1"),
        mode="postcopy",
        order="follow",
        transport="grpcio",
        compression="zstd",
        max_bandwidth_bytes_per_s=1_000_000,
        on_deadline="poison",
    )

    spec, start = daemon.requests[0].spec, daemon.requests[1]
    assert (spec.name, spec.kind, spec.memory_bytes, spec.vcpus) == ("alpha", types_pb2.GUEST_KIND_PROCESS, 64 << 20, 1)
    assert (spec.workload.distribution, spec.workload.write_ratio, spec.workload.seed) == (2, 0.25, 1)
    assert (start.guest, start.to, start.mode) == ("alpha", "h:1", types_pb2.MIGRATION_MODE_POSTCOPY)
    assert (start.order, start.transport) == ("follow", types_pb2.PAGE_TRANSPORT_GRPCIO)
    assert start.compression == types_pb2.PAGE_COMPRESSION_ZSTD
    assert (start.max_bandwidth_bytes_per_s, start.on_deadline) == (1_000_000, types_pb2.DEADLINE_ACTION_POISON)


def test_a_word_that_means_nothing_is_refused_before_the_call(client, daemon):
    with pytest.raises(ConfigError, match="mode 'telepathy' is not one of postcopy, hybrid, precopy"):
        client.call(daemon.address, "migrations", "start", "alpha", "h:1", mode="telepathy")
    assert daemon.requests == []


@pytest.mark.parametrize("cls", [NotFoundError, GuestBusyError, PostcopyPausedError])
def test_errors_are_those_of_the_daemon(client, daemon, cls):
    info = types_pb2.ErrorInfo(
        type=cls.__name__, message="no", holder=types_pb2.GUEST_HOLDER_SPLIT, remedy="wait a little"
    )
    daemon.failure = (grpc.StatusCode.FAILED_PRECONDITION, info)

    for ask in (
        lambda: client.call(daemon.address, "guests", "get", "alpha"),
        lambda: client.iterate(daemon.address, "migrations", "watch", "m-1"),
        lambda: client.iterate(daemon.address, "migrations", "follow", "m-1"),
    ):
        with pytest.raises(cls) as caught:
            ask()
        assert (caught.value.message, caught.value.holder, caught.value.remedy) == (
            "no",
            GuestHolder.SPLIT,
            "wait a little",
        )


@pytest.mark.parametrize(
    ("status", "cls", "words"),
    [
        (grpc.StatusCode.UNAVAILABLE, DaemonLostError, "no daemon answers"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DaemonLostError, "did not answer in time"),
        (grpc.StatusCode.UNIMPLEMENTED, CallFailedError, "does not offer this call"),
        (grpc.StatusCode.INTERNAL, CallFailedError, "INTERNAL: canned"),
    ],
)
def test_errors_without_words_of_a_daemon(client, daemon, status, cls, words):
    daemon.failure = (status, None)

    with pytest.raises(cls, match=words):
        client.call(daemon.address, "guests", "list")


def test_nobody_listens(client):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(DaemonLostError, match=f"no daemon answers at {address}"):
        client.call(address, "guests", "list")


def test_a_tls_dir_that_is_none_is_refused(client, tmp_path):
    with pytest.raises(ConfigError):
        Client("127.0.0.1:1", tmp_path)


def test_watch_is_the_stream(client, daemon):
    daemon.watched = [make_migration(RUNNING), make_migration(PAUSED), make_migration()]

    assert client.iterate(daemon.address, "migrations", "watch", "m-1") == daemon.watched


@pytest.mark.parametrize(("through_pauses", "states"), [(False, [RUNNING, PAUSED]), (True, [RUNNING, PAUSED, 7])])
def test_follow_ends_when_it_has_settled(client, daemon, through_pauses, states):
    daemon.watched = [make_migration(RUNNING), make_migration(PAUSED), make_migration()]

    followed = client.iterate(daemon.address, "migrations", "follow", "m-1", through_pauses=through_pauses)
    last = client.call(daemon.address, "migrations", "wait", "m-1", through_pauses=through_pauses)

    assert [migration.state for migration in followed] == states
    assert last.state == states[-1]


def test_follow_outlives_a_daemon(client, monkeypatch):
    class Restarted(FakeDaemon):
        lives = 0

        def WatchMigration(self, request, context):
            self.lives += 1
            self.watched = [make_migration(RUNNING if self.lives < 3 else types_pb2.MIGRATION_STATE_COMPLETED)]
            self.watch_failure = (grpc.StatusCode.UNAVAILABLE, None) if self.lives == 1 else None
            yield from super().WatchMigration(request, context)

    with serve(Restarted()) as daemon:
        followed = client.iterate(daemon.address, "migrations", "follow", "m-1")

    assert [migration.state for migration in followed] == [RUNNING, RUNNING, 7]


def test_follow_gives_up(client, daemon):
    daemon.failure = (grpc.StatusCode.UNAVAILABLE, None)

    with pytest.raises(DaemonLostError, match="what became of migration m-1 is not known here"):
        client.iterate(daemon.address, "migrations", "follow", "m-1", away_s=0.1)
