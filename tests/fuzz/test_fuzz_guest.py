"""Whatever is said to a guest process over its socket, it lives, and answers the next one."""

import contextlib
import os
import socket
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from migrate.errors import GuestBusyError, GuestGoneError, KvmError, MigrateError
from migrate.guest import protocol
from migrate.guest.client import GuestClient
from migrate.guest.spawn import start_guest
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types
from tests.fuzz.fuzzing import LIMIT_S, fuzz
from tests.fuzz.messages import messages, mutated
from tests.harness.guests import KINDS, populated, read_ram, spec_of, state_of, twin_of, write_ram

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(LIMIT_S)]

ANSWER_S = 20
WORD_NAMES = [field.name for field in pb.GuestRequest.DESCRIPTOR.fields if field.name != "shutdown"]


@pytest.fixture
def start(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(start_from, name="guest"):
            path = tmp_path / f"{name}.sock"
            process = start_guest(start_from, path)
            stack.callback(process.kill)
            client = GuestClient(path)
            stack.callback(client.close)
            return process, client

        yield make


def request_of(name, message):
    request = pb.GuestRequest()
    getattr(request, name).CopyFrom(message)
    if name == "audit":
        request.audit.deadline_us %= 1000
    return request


requests = st.sampled_from(WORD_NAMES).flatmap(
    lambda name: messages(pb.GuestRequest.DESCRIPTOR.fields_by_name[name].message_type._concrete_class).map(
        lambda message: request_of(name, message)
    )
)


def is_request(data):
    try:
        pb.GuestRequest.FromString(data)
    except DecodeError:
        return False
    return True


def without_shutdown(data):
    """Whether a packet does not ask for the end, which would be granted."""
    request = pb.GuestRequest.FromString(data) if is_request(data) else pb.GuestRequest()
    return not request.HasField("shutdown") and not request.audit.deadline_us > 1000


packets = (requests.map(lambda request: request.SerializeToString()) | mutated(requests)).filter(without_shutdown)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_twin", [False, True], ids=["running", "incoming"])
def test_guest_survives_every_packet(start, tmp_path, kind, is_twin):
    _, client = start(spec_of(kind, 1))
    path = tmp_path / "guest.sock"
    if is_twin:
        twin = twin_of(lambda *_: start(client.look().description, "twin"), client)
        path, client = tmp_path / "twin.sock", twin

    def say(conversation):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with connection, Path(os.devnull).open() as nothing:
            connection.settimeout(ANSWER_S)
            protocol.make_room(connection)
            connection.connect(str(path))
            for data, has_fd in conversation:
                if not data:
                    continue
                socket.send_fds(connection, [data], [nothing.fileno()] if has_fd else [])
                answer, fds, _, _ = socket.recv_fds(connection, protocol.PACKET_MAX_BYTES, 16)
                for fd in fds:
                    os.close(fd)
                # A packet that is no message ends the conversation, and nothing else.
                assert bool(answer) == is_request(data)
                if not answer:
                    break
        client.statistics()

    fuzz(say, st.lists(st.tuples(packets, st.booleans()), min_size=1, max_size=6), shares=4)
    assert client.statistics().first_error == ""


class Twins:
    """A guest process that waits for a guest, and another one whenever that has become a guest."""

    def __init__(self, start, source):
        self._start = start
        self._description = source.look().description
        self._ram = read_ram(source)
        self._process = self._client = None

    def waiting(self):
        if self._client is None:
            self._process, self._client = self._start(self._description, "twin")
            write_ram(self._client, self._ram)
        return self._client

    def replace(self):
        self._client.close()
        self._process.kill()
        self._client = None


def bent(good):
    """States that look like one: each part is as long as it should be, and has other bytes."""

    @st.composite
    def build(draw):
        state = pb.MachineState()
        state.CopyFrom(good)
        for _ in range(draw(st.integers(1, 3))):
            parts = [item for vcpu in state.vcpus for item in vcpu.items]
            part = draw(st.sampled_from(parts)) if parts and draw(st.integers(0, 3)) else None
            data = bytearray(state.mailbox if part is None else part.data)
            # Most of xsave, and of the table of MSRs, is empty.
            used_bytes = min(len(data), max(64, len(bytes(data).rstrip(b"\0"))))
            at = draw(st.integers(0, (used_bytes - 1) // 8)) * 8
            number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))
            width = min(draw(st.sampled_from([1, 4, 8])), len(data) - at)
            data[at : at + width] = number.to_bytes(8, "little")[:width]
            if part is None:
                state.mailbox = bytes(data)
            else:
                part.data = bytes(data)
        return state.SerializeToString()

    return build()


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_refused_and_changes_nothing_or_runs_in_a_guest_that_answers(start, kind):
    source = populated(start, spec_of(kind, 2))
    source.pause()
    good = pb.MachineState.FromString(source.save_state()[0])
    twins = Twins(start, source)

    def load(data):
        twin = twins.waiting()
        try:
            twin.load_state(data)
        except GuestGoneError:
            raise
        except MigrateError:
            assert twin.statistics().first_error == ""
            assert state_of(twin) == types.GUEST_STATE_INCOMING
            return
        # It was good enough to be taken: that is for its source to answer for, and the guest's own business.
        twin.resume()
        for _ in range(3):
            twin.statistics()
        for ask in (lambda: twin.audit(1000), twin.pause, twin.save_state, twin.resume):
            with contextlib.suppress(GuestBusyError, KvmError):
                ask()
        twin.look()
        twins.replace()

    def load_or_replace(data):
        try:
            load(data)
        except BaseException:
            twins.replace()
            raise

    fuzz(load_or_replace, mutated(st.just(good)) | bent(good), shares=len(KINDS))
