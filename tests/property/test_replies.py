"""ReplyOrder: every honest conversation passes, every kind of lie is caught."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import RemoteProtocolError
from migrate.native.replies import ReplyOrder

requests = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 256)), min_size=1, max_size=20)


def cut(draw, first, count):
    """Cut one request into ascending runs without gaps."""
    page, end = first, first + count
    while page < end:
        size = draw(st.integers(1, end - page))
        yield page, size
        page += size


@given(asked=requests, data=st.data())
def test_honest_server_passes(asked, data):
    order = ReplyOrder()
    ids = [order.ask(first, count) for first, count in asked]
    assert order.open_requests == len(asked)
    for request_id, (first, count) in zip(ids, asked, strict=True):
        runs = list(cut(data.draw, first, count))
        for index, (page, size) in enumerate(runs):
            last = index == len(runs) - 1
            is_zero = data.draw(st.booleans())
            beyond = data.draw(st.integers(0, 1000)) if last and is_zero else 0
            assert order.answer(request_id, page, size + beyond, is_zero=is_zero) == last
    assert order.open_requests == 0


@given(asked=requests, data=st.data())
def test_first_lie_is_caught(asked, data):
    order = ReplyOrder()
    ids = [order.ask(first, count) for first, count in asked]
    (first, count), request_id = asked[0], ids[0]
    lies = {
        "id": (data.draw(st.integers(0, 2**64 - 1).filter(lambda i: i != request_id)), first, 1, False),
        "gap": (request_id, first + data.draw(st.integers(1, 500)), 1, False),
        "back": (request_id, (first - data.draw(st.integers(1, 500))) % 2**64, 1, True),
        "empty": (request_id, first, 0, True),
        "long": (request_id, first, count + data.draw(st.integers(1, 500)), False),
    }
    lie = lies[data.draw(st.sampled_from(sorted(lies)))]
    with pytest.raises(RemoteProtocolError):
        order.answer(lie[0], lie[1], lie[2], is_zero=lie[3])


def test_unasked_reply_is_caught():
    order = ReplyOrder()
    with pytest.raises(RemoteProtocolError):
        order.answer(1, 0, 1, is_zero=True)
    request_id = order.ask(0, 1)
    assert order.answer(request_id, 0, 1, is_zero=False)
    with pytest.raises(RemoteProtocolError):
        order.answer(request_id, 0, 1, is_zero=False)
