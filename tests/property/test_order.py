"""The orders of the background: each ends up at every page, once, and goes where the guest is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.native._native import ffi, lib
from migrate.native.pager import HOLD_MAX_US, SUGGESTIONS_MAX, Order

PAGES_MAX = 700


class Background:
    """The bitmaps of a pager, and an order over them."""

    def __init__(self, order, pages, present=()):
        self.pages = pages
        self.missing, self.requested = (ffi.new("struct mig_bitmap *") for _ in range(2))
        for bitmap in (self.missing, self.requested):
            assert lib.mig_bitmap_init(bitmap, pages) == 0
        lib.mig_bitmap_set_range(self.missing, 0, pages)
        for page in present:
            lib.mig_bitmap_clear_range(self.missing, page, 1)
        self.order = ffi.new("struct mig_order *", {"kind": order})
        self.now_ns = 0

    def close(self):
        for bitmap in (self.missing, self.requested):
            lib.mig_bitmap_deinit(bitmap)

    def fault(self, page):
        """As pager_faults.c does: a missing page that nobody asked for is asked for at once."""
        if self.is_set(self.missing, page) and not self.is_set(self.requested, page):
            lib.mig_bitmap_set_range(self.requested, page, 1)
            lib.mig_order_on_fault(self.order, page)

    def is_set(self, bitmap, page):
        return lib.mig_bitmap_next_set(bitmap, page) == page and page < self.pages

    def claim(self, max_pages):
        first = ffi.new("uint64_t *")
        count = lib.mig_order_next(self.order, self.missing, self.requested, max_pages, self.now_ns, first)
        run = list(range(first[0], first[0] + count))
        for page in run:
            assert self.is_set(self.missing, page), "a run has no page that is there"
            assert not self.is_set(self.requested, page), "a page is asked for once"
        lib.mig_bitmap_set_range(self.requested, first[0], count)
        return run

    def suggest(self, first, count=1):
        """As mig_pager_suggest does: False if there is no room."""
        return lib.mig_order_suggest(self.order, {"first_page": first, "count_pages": count})

    def hold(self, hold_us):
        lib.mig_order_hold(self.order, self.now_ns, hold_us)

    def give_back(self, first, count):
        lib.mig_bitmap_clear_range(self.requested, first, count)
        lib.mig_order_on_more(self.order, first)


@pytest.fixture
def background_of():
    made = []

    def make(*arguments, **more):
        made.append(Background(*arguments, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def step(data, background, action, asked, wanted, max_pages):
    """Do what anyone may do with an order; `asked` is the pages that are asked for."""
    if action == "fault":
        page = data.draw(st.integers(0, background.pages - 1))
        background.fault(page)
        asked |= {page} & wanted
    elif action == "give back" and asked:
        page = data.draw(st.sampled_from(sorted(asked)))
        background.give_back(page, 1)
        asked.discard(page)
    else:
        run = background.claim(max_pages)
        assert len(run) <= max_pages
        asked |= set(run)


@given(data=st.data(), order=st.sampled_from(Order), pages=st.integers(1, PAGES_MAX), max_pages=st.integers(1, 64))
def test_every_order_ends_up_at_every_page(data, order, pages, max_pages):
    present = data.draw(st.sets(st.integers(0, pages - 1), max_size=pages // 2))
    background = Background(order, pages, present)
    try:
        wanted = set(range(pages)) - present
        asked = set()
        for _ in range(4 * pages + 10):
            action = data.draw(st.sampled_from(["claim", "claim", "claim", "fault", "give back"]))
            step(data, background, action, asked, wanted, max_pages)
            if len(asked) == len(wanted):
                break
        while run := background.claim(max_pages):
            asked |= set(run)
        assert asked == wanted
    finally:
        background.close()


def test_precopy_is_ascending(background_of):
    background = background_of(Order.PRECOPY, 100)
    background.fault(50)
    assert [background.claim(32)[0] for _ in range(4)] == [0, 32, 51, 83]


def test_follow_goes_on_from_the_last_fault(background_of):
    background = background_of(Order.FOLLOW, 1000)
    assert background.claim(10)[0] == 0
    background.fault(500)
    assert background.claim(10) == list(range(501, 511))
    assert background.claim(10)[0] == 511
    background.fault(20)
    assert background.claim(10)[0] == 21


def test_follow_comes_round_to_what_it_left(background_of):
    background = background_of(Order.FOLLOW, 100)
    background.fault(90)
    runs = []
    while run := background.claim(16):
        runs.append(run[0])
    assert runs[:2] == [91, 0]


def test_bubble_grows_both_ways(background_of):
    background = background_of(Order.BUBBLE, 10_000)
    background.fault(5_000)
    runs = [background.claim(16) for _ in range(4)]
    assert runs[0] == list(range(5_001, 5_017))
    assert runs[1] == list(range(4_984, 5_000))
    assert runs[2][0] == 5_017
    assert runs[3] == list(range(4_968, 4_984))


def test_bubbles_take_turns(background_of):
    background = background_of(Order.BUBBLE, 40_000)
    background.fault(10_000)
    background.fault(30_000)
    near = [10_000 if abs(background.claim(16)[0] - 10_000) < 1_000 else 30_000 for _ in range(8)]
    assert near.count(10_000) == near.count(30_000) == 4


def test_a_bubble_with_nothing_in_reach_makes_room(background_of):
    background = background_of(Order.BUBBLE, 40_000, present=range(5_000, 40_000))
    background.fault(4_999)
    seen = set()
    while run := background.claim(64):
        seen |= set(run)
    assert seen == set(range(4_999))


def test_what_is_given_back_is_asked_for_again(background_of):
    for order in Order:
        background = background_of(order, 64)
        while background.claim(64):
            pass
        assert not background.claim(64)
        background.give_back(7, 2)
        assert background.claim(64) == [7, 8]


@given(data=st.data(), pages=st.integers(1, PAGES_MAX), max_pages=st.integers(1, 64))
def test_whatever_is_suggested_or_held_every_page_is_asked_for_once(data, pages, max_pages):
    """`claim` and `fault` see to it that no page is asked for twice."""
    present = data.draw(st.sets(st.integers(0, pages - 1), max_size=pages // 2))
    background = Background(Order.SUGGESTED, pages, present)
    try:
        wanted = set(range(pages)) - present
        asked = set()
        for _ in range(data.draw(st.integers(0, 100))):
            action = data.draw(st.sampled_from(["claim", "claim", "fault", "give back", "suggest", "hold", "wait"]))
            if action == "suggest":
                first = data.draw(st.integers(0, pages - 1))
                background.suggest(first, data.draw(st.integers(1, pages - first)))
            elif action == "hold":
                background.hold(data.draw(st.integers(0, 2_000_000)))
            elif action == "wait":
                background.now_ns += data.draw(st.integers(0, 1_500_000_000))
            else:
                step(data, background, action, asked, wanted, max_pages)
        background.now_ns += HOLD_MAX_US * 1000
        while run := background.claim(max_pages):
            asked |= set(run)
        assert asked == wanted
    finally:
        background.close()


def test_suggestions_come_first_and_in_their_order(background_of):
    background = background_of(Order.SUGGESTED, 100, present=[42])
    for first, count in ((60, 5), (40, 4), (90, 10)):
        assert background.suggest(first, count)
    assert [background.claim(8) for _ in range(3)] == [[*range(60, 65)], [40, 41], [43]]
    assert background.claim(8) == [*range(90, 98)]
    assert background.claim(8) == [98, 99]
    assert background.claim(64) == [*range(40)], "then all the rest, ascending"


def test_neighbours_are_one_run(background_of):
    background = background_of(Order.SUGGESTED, 100)
    for page in (50, 51, 52, 54):
        background.suggest(page)
    assert [background.claim(8) for _ in range(2)] == [[50, 51, 52], [54]]


def test_a_suggestion_of_nothing_missing_is_passed_over(background_of):
    background = background_of(Order.SUGGESTED, 200, present=range(100, 200))
    background.fault(7)
    for first, count in ((100, 100), (7, 1), (5, 4)):
        background.suggest(first, count)
    assert [background.claim(8) for _ in range(2)] == [[5, 6], [8]]


def test_the_queue_is_bounded(background_of):
    background = background_of(Order.SUGGESTED, 4 * SUGGESTIONS_MAX)
    taken = [background.suggest(2 * number) for number in range(SUGGESTIONS_MAX + 3)]
    assert taken == [True] * SUGGESTIONS_MAX + [False] * 3
    assert background.claim(1) == [0]
    assert background.suggest(1)


def test_what_was_not_suggested_waits_and_no_longer_than_a_second(background_of):
    background = background_of(Order.SUGGESTED, 100)
    background.hold(60_000_000)
    background.suggest(70, 2)
    assert background.claim(8) == [70, 71]
    background.now_ns = HOLD_MAX_US * 1000 - 1
    assert background.claim(8) == []
    background.now_ns += 1
    assert background.claim(8) == [*range(8)]


def test_a_hold_can_be_renewed_and_ended(background_of):
    background = background_of(Order.SUGGESTED, 100)
    background.hold(HOLD_MAX_US)
    background.now_ns = 900_000_000
    background.hold(HOLD_MAX_US)
    background.now_ns = 1_800_000_000
    assert background.claim(8) == []
    background.hold(0)
    assert background.claim(8) == [*range(8)]
