"""The native fetch over connections that break or fall silent: every page comes right all the same."""

import itertools
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from hyperframe import frame as frames

from migrate.errors import ChannelError
from tests.harness.destination import check_recovers, failure_of
from tests.harness.fake_source import (
    Once,
    hold_all,
    is_background,
    is_urgent,
    urgent_first,
)
from tests.harness.h2_peer import prefixed
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.uffd
NO_ERROR, INTERNAL_ERROR, REFUSED_STREAM = 0, 2, 7


# ---- connections that break: everything comes all the same ----


def cut_reply(then):
    """Sends a part of an honest reply, then does something to the connection."""

    def answer(call, request):
        call.headers()
        reply = prefixed(call.answers(request)[-1])
        call.peer.send_frames(frames.DataFrame(call.stream_id, reply[: min(len(reply), 8000) // 2]))
        then(call)

    return answer


def goaway(call, last_stream_id, code=NO_ERROR, data=b""):
    call.peer.send_frames(frames.GoAwayFrame(0, last_stream_id=last_stream_id, error_code=code, additional_data=data))


BREAKS = {
    "TCP reset": lambda call: call.peer.abort(),
    "TCP end": lambda call: call.peer.socket.shutdown(2),
    "RST_STREAM": lambda call: call.peer.reset(call.stream_id, REFUSED_STREAM),
    "GOAWAY that disowns the call": lambda call: (goaway(call, 0), call.peer.socket.shutdown(2)),
    "GOAWAY with an error": lambda call: (goaway(call, 1, INTERNAL_ERROR, b"why"), call.peer.socket.shutdown(2)),
    "broken HTTP/2": lambda call: call.peer.send(b"\xff" * 64),
    "half a frame": lambda call: (call.peer.send(b"\0\0\x40\0\0"), call.peer.socket.shutdown(2)),
    "status UNAVAILABLE": lambda call: call.end(14, "later"),
}


@pytest.mark.parametrize("which", ["urgent", "background", "every other"])
@pytest.mark.parametrize("name", BREAKS)
def test_connection_that_breaks_in_a_reply_is_made_again_and_nothing_is_lost(destination, memory, source, name, which):
    act = cut_reply(BREAKS[name])
    if which == "every other":
        count = itertools.count()

        def behaviour(call, request):
            if next(count) % 4 != 3:
                return False
            act(call, request)
            return True
    else:
        behaviour = Once(act, is_background if which == "background" else is_urgent)
    counters = check_recovers(destination, memory, source(on_request=urgent_first(behaviour)).endpoint)
    assert counters.reconnects >= 1


def test_graceful_goaway_lets_what_is_asked_be_answered_then_the_client_comes_back(destination, memory, source):
    """Nothing that was asked for before the GOAWAY is asked for again."""

    def leave(call, request):
        goaway(call, 2**31 - 1)
        call.answer(request)

    served = source(on_request=Once(leave, is_background))
    counters = check_recovers(destination, memory, served.endpoint)
    assert counters.reconnects >= 1
    asked = [page for each in served.requests for page in range(each.first_page, each.first_page + each.page_count)]
    assert len(asked) == len(set(asked))


def test_goaway_of_an_idle_link_costs_nothing(destination, memory, source):
    """The urgent link hears it though nobody touches anything."""
    held = threading.Event()

    def hold(call, request):
        held.wait(10)
        return False

    leave = Once(lambda call: (call.headers(), goaway(call, 2**31 - 1)), lambda call: call.is_urgent)
    served = source(on_call=leave, on_request=hold)
    destination.start(served.endpoint)
    wait_until(lambda: destination.fetch.counters().reconnects >= 1, 10, "the client to come back")
    held.set()
    destination.wait()
    destination.check_all(memory)


def test_fault_that_was_asked_for_on_a_broken_connection_is_asked_for_again(destination, memory, source):
    """The background is held, so that only the urgent link can bring the page."""
    broken = Once(lambda call, _: call.peer.abort(), is_urgent)
    served = source(on_request=lambda *each: broken(*each) or is_background(*each))
    destination.start(served.endpoint, max_bandwidth_bytes_per_s=1)
    destination.touch(200)
    destination.check_touched(memory, 1)
    assert broken.done.is_set()
    assert destination.fetch.counters().reconnects == 1


@pytest.mark.alone
def test_source_that_is_gone_for_good_is_a_channel_error_after_half_the_peer_timeout(destination, memory, source):
    def leave(call, request):
        call.source.refuse_connections()
        for peer in call.source.peers:
            peer.socket.shutdown(2)

    served = source(on_request=Once(leave, lambda _, request: request.first_page > 0))
    destination.start(served.endpoint, peer_timeout_us=2_000_000)
    began = time.monotonic()
    with pytest.raises(ChannelError, match="broke: ") as caught:
        destination.fetch.wait(20_000_000)
    assert 0.95 < time.monotonic() - began < 2
    assert str(served.endpoint) in caught.value.message
    # Page 0 is zero and was told so: the guest gets it even now.
    destination.touch(0)
    destination.check_touched(memory, 1)


@pytest.mark.alone
@pytest.mark.parametrize("status", [1, 14])
def test_source_that_is_never_available_is_a_channel_error_after_half_the_peer_timeout(destination, source, status):
    def begin(call):
        call.end(status, "not now")
        return True

    began = time.monotonic()
    error = failure_of(destination, source(on_call=begin).endpoint, peer_timeout_us=2_000_000)
    assert type(error) is ChannelError
    assert "not now" in error.message
    assert 0.95 < time.monotonic() - began < 2


@pytest.mark.alone
@pytest.mark.parametrize(
    ("terms", "seconds"),
    [({"peer_timeout_us": 2_000_000}, 1.0), pytest.param({}, 2.5, marks=pytest.mark.thorough)],
    ids=["2 s", "default"],
)
def test_source_that_falls_silent_is_left_after_half_the_peer_timeout_and_found_again(
    destination, memory, source, terms, seconds
):
    """It neither answers nor says a word; the connection stays open."""
    silent = threading.Event()
    served = source(on_request=Once(lambda *_: silent.wait(20)))
    began = time.monotonic()
    try:
        assert check_recovers(destination, memory, served.endpoint, **terms).reconnects >= 1
        assert seconds * 0.95 < time.monotonic() - began < seconds * 2
    finally:
        silent.set()


@pytest.mark.alone
def test_source_that_is_silent_for_good_is_known_to_be_lost_within_the_peer_timeout(destination, source):
    """Connections are taken, and nobody ever speaks on them."""
    silent = threading.Event()

    def keep_silent(call, request):
        silent.wait(20)
        return True

    served = source(on_connection=lambda _, number: number > 1 and silent.wait(20), on_request=keep_silent)
    began = time.monotonic()
    try:
        error = failure_of(destination, served.endpoint, peer_timeout_us=1_000_000)
        assert 0.95 < time.monotonic() - began < 1.5
    finally:
        silent.set()
    assert type(error) is ChannelError
    assert re.search(r"broke: the source has been silent for 0\.5 s$", error.message)


_FETCHES = """
import sys
from migrate.config import Endpoint
from tests.harness.destination import Destination

destination = Destination(256)
destination.start(Endpoint("127.0.0.1", int(sys.argv[1])), peer_timeout_us=1_000_000)
destination.wait()
print(destination.fetch.counters().reconnects)
destination.close()
"""


def test_fetch_that_stood_still_itself_does_not_take_its_source_for_silent(source):
    """Its process was stopped for longer than a source may be silent; the answer waits in the socket."""
    asked, stopped = threading.Event(), threading.Event()

    def answer_the_stopped(call, _):
        asked.set()
        stopped.wait(10)
        return False

    endpoint = source(on_request=answer_the_stopped).endpoint
    with subprocess.Popen([sys.executable, "-c", _FETCHES, str(endpoint.port)], stdout=subprocess.PIPE) as fetching:
        assert asked.wait(10)
        fetching.send_signal(signal.SIGSTOP)
        stopped.set()
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > 0.8, 10, "a time that is longer than a source may be silent")
        fetching.send_signal(signal.SIGCONT)
        reconnects, _ = fetching.communicate(timeout=20)
    assert (fetching.returncode, reconnects.strip()) == (0, b"0")


@pytest.mark.alone
def test_source_that_answers_pings_only_is_left_after_twice_the_peer_timeout(destination, memory, source):
    stuck = []

    def answer(call, request):
        if call in stuck or not stuck:
            stuck.append(call)
            return True
        return False

    began = time.monotonic()
    terms = {"peer_timeout_us": 1_000_000}
    assert check_recovers(destination, memory, source(on_request=answer).endpoint, **terms).reconnects >= 1
    assert 1.9 < time.monotonic() - began < 4


def test_idle_link_that_breaks_twice_long_apart_is_made_again_each_time(destination, memory, source):
    """Nobody faults, so nothing comes on the urgent link; that is no failure of it."""
    served = source(on_request=hold_all)
    destination.start(served.endpoint, peer_timeout_us=2_000_000)
    wait_until(lambda: len(served.calls) == 2, 5, "both calls")
    urgent, background = (next(c.peer for c in served.calls if c.is_urgent is which) for which in (True, False))
    urgent.abort()
    wait_until(lambda: len(served.calls) == 3, 5, "the first new call")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 1.2, 10, "a time that is longer than a link may be lost")
    served.calls[2].peer.abort()
    wait_until(lambda: len(served.calls) == 4, 5, "the second new call")
    served.on_request = None
    background.abort()
    destination.wait()
    destination.check_all(memory)
