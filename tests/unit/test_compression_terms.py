"""What is asked for, answered and agreed on of compression: the rules, and a source with any destination."""

import os

import pytest

from migrate.config import PROTOCOL_VERSION, Endpoint
from migrate.errors import ChannelError, ConfigError, GuestHolder
from migrate.native.compression import Compression
from migrate.native.exports import Exports
from migrate.session.rules import check_compression, choose_compression
from migrate.session.source import SourceSession
from migrate.telemetry.clock import Clock
from migrate.v1 import daemon_state_pb2 as saved
from migrate.v1 import migration_service_pb2 as operator
from migrate.v1 import transfer_service_pb2 as transfer
from migrate.v1 import types_pb2 as types

ASKED = {"nothing": 0, "none": types.PAGE_COMPRESSION_NONE, "zstd": types.PAGE_COMPRESSION_ZSTD, "newer": 9}
NATIVE, GRPCIO, ANY = types.PAGE_TRANSPORT_NATIVE_GRPC, types.PAGE_TRANSPORT_GRPCIO, types.PAGE_TRANSPORT_UNSPECIFIED
MEMORY_BYTES = 1 << 20


# ---- rules ----


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("transport", [NATIVE, GRPCIO])
def test_only_zstd_over_the_native_transport_is_chosen(asked, transport):
    is_zstd = asked == "zstd" and transport == NATIVE
    chosen = types.PAGE_COMPRESSION_ZSTD if is_zstd else types.PAGE_COMPRESSION_NONE
    assert choose_compression(ASKED[asked], transport) == chosen


@pytest.mark.parametrize("asked", ["nothing", "none"])
@pytest.mark.parametrize("transport", [ANY, NATIVE, GRPCIO])
def test_no_compression_goes_with_every_transport(asked, transport):
    check_compression(ASKED[asked], transport)


@pytest.mark.parametrize("transport", [ANY, NATIVE])
def test_zstd_goes_with_the_native_transport(transport):
    check_compression(ASKED["zstd"], transport)


def test_zstd_with_grpcio_is_a_config_error_with_a_remedy():
    with pytest.raises(ConfigError) as caught:
        check_compression(ASKED["zstd"], GRPCIO)
    assert "--transport native" in caught.value.remedy
    assert "--compress none" in caught.value.remedy


def test_unknown_compression_is_a_config_error():
    with pytest.raises(ConfigError, match="zstd"):
        check_compression(ASKED["newer"], NATIVE)


# ---- a source and what the destination answers ----


class Guest:
    """Stands still; what the session does not need here fails the test."""

    def describe(self):
        memfd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(memfd, MEMORY_BYTES)
        description = types.GuestDescription(
            spec=types.GuestSpec(name="g", kind=types.GUEST_KIND_PROCESS, memory_bytes=MEMORY_BYTES, vcpus=1),
            regions=[types.RamRegion(size_bytes=MEMORY_BYTES)],
        )
        return description, types.GUEST_STATE_RUNNING, 1, [memfd]

    def pause(self):
        pass

    def resume(self):
        pass

    def save_state(self):
        return b"", 0


class Destination:
    """Answers Prepare, and refuses the guest at the switchover."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = None

    def prepare(self, request):
        self.asked = request.compression
        return transfer.PrepareResponse(protocol_version=PROTOCOL_VERSION, **self.answer)

    def switch_over(self, request):
        raise ChannelError("enough was seen", holder=GuestHolder.SOURCE)

    def abort(self, migration_id, reason, attempt):
        pass

    def close(self):
        pass


class Journal:
    """Nothing has to outlive this test."""

    def save(self, migration):
        pass


class SpiedExports(Exports):
    """Notes on which terms memories are published."""

    def __init__(self):
        super().__init__()
        self.published = []

    def publish(self, migration_id, token, source, compression=Compression.NONE, peer_name="", **more):
        self.published.append(compression)
        super().publish(migration_id, token, source, compression, peer_name, **more)


ZSTD = types.PAGE_COMPRESSION_ZSTD
NONE = types.PAGE_COMPRESSION_NONE
ANSWERS = {
    "agreed": (ZSTD, {"transport": NATIVE, "compression": ZSTD}, ZSTD),
    "declined": (ZSTD, {"transport": NATIVE, "compression": NONE}, NONE),
    "destination of before": (ZSTD, {"transport": NATIVE}, NONE),
    "destination without the native transport": (ZSTD, {"transport": GRPCIO}, NONE),
    "destination that mixes what does not mix": (ZSTD, {"transport": GRPCIO, "compression": ZSTD}, NONE),
    "destination that answers something newer": (ZSTD, {"transport": NATIVE, "compression": 9}, NONE),
    "not asked for": (NONE, {"transport": NATIVE, "compression": ZSTD}, NONE),
    "not spoken of": (0, {"transport": NATIVE}, NONE),
    "operator of before": (0, {"transport": NATIVE, "compression": NONE}, NONE),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_source_compresses_only_what_was_asked_for_and_agreed_on(name):
    asked, answer, agreed = ANSWERS[name]
    destination, exports = Destination(answer), SpiedExports()
    request = operator.StartMigrationRequest(guest="g", to="192.0.2.2:7400", order="precopy", compression=asked)
    entry = saved.SavedMigration(
        migration_id="m",
        source=saved.SavedSource(request=request, token="t", to=request.to),  # noqa: S106
    )
    session = SourceSession(
        entry,
        types.GUEST_KIND_PROCESS,
        Guest(),
        lambda *_: destination,
        exports,
        page_endpoint=Endpoint("127.0.0.1", 1),
        control_endpoint=Endpoint("127.0.0.1", 2),
        clock=Clock(),
        on_guest_left=lambda: None,
        on_guest_stays=lambda: None,
        on_guest_spent=lambda: None,
        journal=Journal(),
    )
    session.run()
    assert session.record.snapshot().error.message == "enough was seen"
    assert destination.asked == asked
    assert exports.published == [agreed]
    assert session.record.snapshot().compression == agreed
