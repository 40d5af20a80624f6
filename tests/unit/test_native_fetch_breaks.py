"""The native fetch over connections that break or fall silent: every page comes right all the same."""

import itertools
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


@pytest.mark.thorough
def test_source_that_is_gone_for_good_is_a_channel_error_after_five_seconds(destination, memory, source):
    def leave(call, request):
        call.source.refuse_connections()
        for peer in call.source.peers:
            peer.socket.shutdown(2)

    served = source(on_request=Once(leave, lambda _, request: request.first_page > 0))
    destination.start(served.endpoint)
    began = time.monotonic()
    with pytest.raises(ChannelError, match="broke: ") as caught:
        destination.fetch.wait(20_000_000)
    assert 4.5 < time.monotonic() - began < 8
    assert str(served.endpoint) in caught.value.message
    # Page 0 is zero and was told so: the guest gets it even now.
    destination.touch(0)
    destination.check_touched(memory, 1)


@pytest.mark.thorough
@pytest.mark.parametrize("status", [1, 14])
def test_source_that_is_never_available_is_a_channel_error_after_five_seconds(destination, source, status):
    def begin(call):
        call.end(status, "not now")
        return True

    began = time.monotonic()
    error = failure_of(destination, source(on_call=begin).endpoint)
    assert type(error) is ChannelError
    assert "not now" in error.message
    assert 4.5 < time.monotonic() - began < 8


@pytest.mark.thorough
def test_source_that_falls_silent_is_left_after_five_seconds_and_found_again(destination, memory, source):
    """It neither answers nor says a word; the connection stays open."""
    silent = threading.Event()
    served = source(on_request=Once(lambda *_: silent.wait(20)))
    began = time.monotonic()
    try:
        assert check_recovers(destination, memory, served.endpoint).reconnects >= 1
        assert 4.5 < time.monotonic() - began < 9
    finally:
        silent.set()


@pytest.mark.thorough
def test_source_that_answers_pings_only_is_left_after_ten_seconds(destination, memory, source):
    stuck = []

    def answer(call, request):
        if call in stuck or not stuck:
            stuck.append(call)
            return True
        return False

    began = time.monotonic()
    assert check_recovers(destination, memory, source(on_request=answer).endpoint).reconnects >= 1
    assert 9 < time.monotonic() - began < 14


@pytest.mark.thorough
def test_idle_link_that_breaks_twice_long_apart_is_made_again_each_time(destination, memory, source):
    """Nobody faults, so nothing comes on the urgent link; that is no failure of it."""
    served = source(on_request=hold_all)
    destination.start(served.endpoint)
    wait_until(lambda: len(served.calls) == 2, 5, "both calls")
    urgent, background = (next(c.peer for c in served.calls if c.is_urgent is which) for which in (True, False))
    urgent.abort()
    wait_until(lambda: len(served.calls) == 3, 5, "the first new call")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 5.5, 10, "a time that is longer than a link may be lost")
    served.calls[2].peer.abort()
    wait_until(lambda: len(served.calls) == 4, 5, "the second new call")
    served.on_request = None
    background.abort()
    destination.wait()
    destination.check_all(memory)
