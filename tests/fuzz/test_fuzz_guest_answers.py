"""Whatever a guest process answers, its daemon understands it or raises an error of ours, and keeps no descriptor."""

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest
from hypothesis import strategies as st

from migrate.daemon.guests import GuestRegistry
from migrate.errors import MigrateError
from migrate.guest.client import GuestClient
from migrate.guest.spawn import refusal_of
from migrate.v1 import guest_protocol_pb2 as pb
from migrate.v1 import types_pb2 as types
from tests.fuzz.fuzzing import LIMIT_S, fuzz
from tests.fuzz.messages import messages, mutated
from tests.harness.guests import spec_of

pytestmark = pytest.mark.timeout(LIMIT_S)

WAIT_S = 20


def closed(fds):
    assert fds
    for fd in fds:
        os.close(fd)


CALLS = {
    "describe": lambda client: closed(client.describe()[3]),
    "arm": lambda client: closed([client.arm()[0]]),
    "start_dirty_log": lambda client: closed([client.start_dirty_log()]),
    "load_state": lambda client: client.load_state(b"state"),
    "audit": lambda client: client.audit(1),
    "pause": GuestClient.pause,
    "resume": GuestClient.resume,
    "save_state": GuestClient.save_state,
    "sync_dirty_log": GuestClient.sync_dirty_log,
    "stop_dirty_log": GuestClient.stop_dirty_log,
    "disarm": GuestClient.disarm,
    "statistics": GuestClient.statistics,
    "shutdown": GuestClient.shutdown,
}
NAMES = ["attach", *CALLS]


class Liar:
    """A guest process that has its answers ready, whatever it is asked; after the last one, it hangs up."""

    def __init__(self, path):
        self.path = path
        self._answers = []
        self._threads = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._acceptor = threading.Thread(target=self._accept, name="liar")
        self._acceptor.start()

    def tell(self, answers):
        self._answers = list(answers)

    def settle(self):
        """Wait until nobody is connected any more."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(WAIT_S)
        self._listener.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(WAIT_S)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError), Path(os.devnull).open() as nothing:
            while connection.recv(1 << 16) and self._answers:
                data, count = self._answers.pop(0)
                socket.send_fds(connection, [data], [nothing.fileno()] * count)


@pytest.fixture
def liar(tmp_path):
    made = Liar(tmp_path / "g.sock")
    yield made
    made.close()


def packets(name):
    """An answer, mostly to what was asked, and how many descriptors come with it."""
    field = pb.GuestResponse.DESCRIPTOR.fields_by_name[name]
    expected = messages(field.message_type._concrete_class).map(lambda part: pb.GuestResponse(**{name: part}))
    data = [
        answers.map(lambda answer: answer.SerializeToString()) for answers in (expected, messages(pb.GuestResponse))
    ]
    return st.tuples(st.one_of(*data, mutated(expected)), st.sampled_from([0, 1, 1, 1, 2, 16, 17]))


def said(**parts):
    return pb.GuestResponse(**parts).SerializeToString()


def own_fds():
    return len(os.listdir("/proc/self/fd"))


def test_answers_are_understood_or_refused(liar):
    def ask(conversation):
        liar.tell(packet for _, packet in conversation)
        fds = own_fds()
        with contextlib.suppress(MigrateError):
            client = GuestClient(liar.path, attach=True)
            try:
                for name, _ in conversation[1:]:
                    with contextlib.suppress(MigrateError):
                        CALLS[name](client)
            finally:
                client.close()
        liar.settle()
        assert own_fds() == fds

    first = packets("attach").map(lambda packet: ("attach", packet))
    rest = st.sampled_from(list(CALLS)).flatmap(lambda name: packets(name).map(lambda packet: (name, packet)))
    conversations = st.tuples(first, st.lists(rest, min_size=1, max_size=6)).map(lambda drawn: [drawn[0], *drawn[1]])
    hello = ("attach", (said(attach=pb.AttachResponse(instance="i")), 0))
    error = said(error=types.ErrorInfo(type="GuestBusyError"))
    fuzz(
        ask,
        conversations,
        found=[
            [hello, ("pause", (error, 1))],
            [hello, ("audit", (error, 1))],
            [hello, ("describe", (said(describe=pb.DescribeResponse()), 0))],
            [hello, ("arm", (said(arm=pb.ArmResponse()), 1))],
            [("attach", (error, 0))],
        ],
    )


def test_guests_of_a_daemon_before_are_adopted_or_left_alone(liar):
    def adopt(told):
        liar.tell(told)
        fds = own_fds()
        guests = GuestRegistry(liar.path.parent)
        guests.adopt()
        adopted = guests.all()
        with contextlib.suppress(MigrateError):
            guests.list()
        assert [guest.spec.name for guest in adopted] in ([], ["g"])
        for guest in adopted:  # its process is ours, and shall live
            guest.client.close()
            guest.process.leave()
        liar.settle()
        assert liar.path.exists() or not adopted
        assert own_fds() == fds
        if not liar.path.exists():
            os.link(liar.keep, liar.path)

    liar.keep = liar.path.with_suffix(".kept")
    os.link(liar.path, liar.keep)
    hello = (said(attach=pb.AttachResponse(instance="i")), 0)
    description = types.GuestDescription(spec=spec_of(types.GUEST_KIND_PROCESS))
    honest = (said(describe=pb.DescribeResponse(description=description)), 1)
    description.spec.name = "other"
    other = (said(describe=pb.DescribeResponse(description=description)), 1)
    told = st.tuples(packets("attach"), packets("describe"), packets("describe"))
    fuzz(adopt, told, found=[(hello, honest, honest), (hello, other), (hello, (b"\xff", 1))])


def test_last_words_of_a_process_that_did_not_start_are_an_error(tmp_path):
    def hear(word):
        error = refusal_of(word)
        assert isinstance(error, MigrateError)

    fuzz(hear, mutated(messages(pb.GuestResponse)), found=[b"", b"\x7a\x20"])
