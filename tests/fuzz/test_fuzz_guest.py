"""Whatever is said to a guest process over its socket, it lives, and answers the next one."""

import contextlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import strategies as st

from migrate.errors import GuestBusyError, GuestGoneError, MigrateError
from migrate.guest import protocol
from migrate.guest.client import GuestClient
from migrate.guest.spawn import start_guest
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types
from tests.fuzz.fuzzing import FUZZ_S, fuzz
from tests.fuzz.messages import messages, mutated
from tests.harness.guests import KINDS, populated, spec_of, state_of, twin_of

pytestmark = [pytest.mark.kvm, pytest.mark.uffd, pytest.mark.timeout(180 + int(FUZZ_S))]

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


def without_shutdown(data):
    """Whether a packet does not ask for the end, which would be granted."""
    request = pb.GuestRequest()
    try:
        request.ParseFromString(data)
    except Exception:  # noqa: BLE001 - no message at all
        return True
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
                try:
                    socket.send_fds(connection, [data], [nothing.fileno()] if has_fd else [])
                    _, fds, _, _ = socket.recv_fds(connection, protocol.PACKET_MAX_BYTES, 16)
                except (BrokenPipeError, ConnectionResetError):
                    break  # a packet that is no message ends the conversation, and nothing else
                for fd in fds:
                    os.close(fd)
        client.statistics()

    fuzz(say, st.lists(st.tuples(packets, st.booleans()), min_size=1, max_size=6))
    assert client.statistics().first_error == ""


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_is_none_is_refused_and_changes_nothing(start, kind):
    source = populated(start, spec_of(kind, 1))
    source.pause()
    state, _ = source.save_state()
    good = pb.MachineState.FromString(state)
    twin = twin_of(start, source)

    def load(data):
        if data == state:
            return
        try:
            twin.load_state(data)
        except GuestGoneError:
            raise
        except GuestBusyError:
            return  # one of them was good enough to be taken: that is for its source to answer for
        except MigrateError:
            pass
        twin.statistics()

    fuzz(load, mutated(st.just(good)))
    assert state_of(twin) == types.GUEST_STATE_INCOMING
