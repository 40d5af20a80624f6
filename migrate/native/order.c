#include "order.h"

#include "units.h"

/* A bubble ends where this much further on nothing is left to ask for. */
enum { REACH_PAGES = 4096 };

/* The run that begins at a page that may be asked for, within [page, end). */
static uint32_t run_at(const struct mig_bitmap *missing, const struct mig_bitmap *requested, uint64_t page,
                       uint64_t end)
{
    end = mig_smaller(end, mig_bitmap_next_clear(missing, page));
    return (uint32_t)(mig_smaller(end, mig_bitmap_next_set(requested, page)) - page);
}

void mig_order_on_fault(struct mig_order *order, uint64_t page)
{
    if (order->kind == MIG_ORDER_FOLLOW) {
        order->cursor = page + 1;
    } else if (order->kind == MIG_ORDER_BUBBLE) {
        for (uint32_t i = 0; i < order->pivots; i++)
            if (page + REACH_PAGES >= order->bubbles[i].low && page < order->bubbles[i].high + REACH_PAGES)
                return; /* it will get there */
        const bool is_full = order->pivots == MIG_ORDER_PIVOTS;
        order->next = is_full ? (order->next + 1) % MIG_ORDER_PIVOTS : order->pivots++;
        order->bubbles[order->next] = (struct mig_bubble){page, page + 1};
    }
}

void mig_order_on_more(struct mig_order *order, uint64_t first_page)
{
    order->is_exhausted = false;
    if ((order->kind == MIG_ORDER_PRECOPY || order->kind == MIG_ORDER_SUGGESTED) && first_page < order->cursor)
        order->cursor = first_page;
}

static uint32_t next_above(struct mig_bubble *bubble, const struct mig_bitmap *missing,
                           const struct mig_bitmap *requested, uint32_t max_pages, uint64_t *ret_first_page)
{
    const uint64_t page = mig_bitmap_next_set_without(missing, requested, bubble->high);

    if (page >= mig_smaller(missing->bits, bubble->high + REACH_PAGES))
        return 0;
    const uint32_t count = run_at(missing, requested, page, page + max_pages);
    bubble->high = page + count;
    *ret_first_page = page;
    return count;
}

/* The run nearest below, in steps of a run's length. */
static uint32_t next_below(struct mig_bubble *bubble, const struct mig_bitmap *missing,
                           const struct mig_bitmap *requested, uint32_t max_pages, uint64_t *ret_first_page)
{
    const uint64_t stop = bubble->low > REACH_PAGES ? bubble->low - REACH_PAGES : 0;

    while (bubble->low > stop) {
        const uint64_t from = bubble->low > max_pages ? bubble->low - max_pages : 0;
        const uint64_t page = mig_bitmap_next_set_without(missing, requested, from);
        if (page < bubble->low) {
            const uint32_t count = run_at(missing, requested, page, bubble->low);
            /* What lies above the run, if a gap cut it short, is looked at again. */
            bubble->low = page + count < bubble->low &&
                                  mig_bitmap_next_set_without(missing, requested, page + count) < bubble->low
                              ? bubble->low
                              : from;
            *ret_first_page = page;
            return count;
        }
        bubble->low = from;
    }
    return 0;
}

static uint32_t next_of_bubbles(struct mig_order *order, const struct mig_bitmap *missing,
                                const struct mig_bitmap *requested, uint32_t max_pages, uint64_t *ret_first_page)
{
    while (order->pivots) {
        order->next %= order->pivots;
        struct mig_bubble *bubble = &order->bubbles[order->next];
        for (int direction = 0; direction < 2; direction++) {
            const uint32_t count = order->grows_down
                                       ? next_below(bubble, missing, requested, max_pages, ret_first_page)
                                       : next_above(bubble, missing, requested, max_pages, ret_first_page);
            order->next += order->grows_down; /* up, then down, then the next one's turn */
            order->grows_down = !order->grows_down;
            if (count)
                return count;
        }
        /* It has nothing within reach. Both directions are done, so `next` has moved on by one. */
        *bubble = order->bubbles[--order->pivots];
    }
    return 0;
}

bool mig_order_suggest(struct mig_order *order, struct mig_page_run run)
{
    struct mig_page_run *last = &order->suggestions[(order->suggestion_tail - 1) % MIG_ORDER_SUGGESTIONS];

    if (mig_order_suggested(order) && last->first_page + last->count_pages == run.first_page) {
        last->count_pages += run.count_pages; /* one request, if it fits */
        return true;
    }
    if (mig_order_suggested(order) == MIG_ORDER_SUGGESTIONS)
        return false;
    order->suggestions[order->suggestion_tail++ % MIG_ORDER_SUGGESTIONS] = run;
    return true;
}

void mig_order_hold(struct mig_order *order, uint64_t now_ns, uint64_t hold_us)
{
    order->hold_until_ns = hold_us ? now_ns + mig_smaller(hold_us, MIG_ORDER_HOLD_US_MAX) * 1000 : 0;
}

static uint32_t next_of_suggestions(struct mig_order *order, const struct mig_bitmap *missing,
                                    const struct mig_bitmap *requested, uint32_t max_pages, uint64_t *ret_first_page)
{
    for (; mig_order_suggested(order); order->suggestion_head++) {
        struct mig_page_run *run = &order->suggestions[order->suggestion_head % MIG_ORDER_SUGGESTIONS];
        const uint64_t end = run->first_page + run->count_pages;
        /* A search that ends with the run: the queue is long, the region longer, and faults wait for the mutex. */
        const struct mig_bitmap within = {missing->words, mig_smaller(end, missing->bits)};
        const uint64_t page = mig_bitmap_next_set_without(&within, requested, run->first_page);
        if (page >= within.bits)
            continue;
        const uint32_t count = run_at(&within, requested, page, mig_smaller(within.bits, page + max_pages));
        *run = (struct mig_page_run){page + count, end - page - count};
        order->suggestion_head += !run->count_pages;
        *ret_first_page = page;
        return count;
    }
    return 0;
}

uint32_t mig_order_next(struct mig_order *order, const struct mig_bitmap *missing, const struct mig_bitmap *requested,
                        uint32_t max_pages, uint64_t now_ns, uint64_t *ret_first_page)
{
    if (order->is_exhausted)
        return 0;
    uint32_t count = next_of_bubbles(order, missing, requested, max_pages, ret_first_page);
    if (!count)
        count = next_of_suggestions(order, missing, requested, max_pages, ret_first_page);
    if (count || mig_order_held_ns(order, now_ns))
        return count;
    uint64_t page = mig_bitmap_next_set_without(missing, requested, order->cursor);
    if (page == missing->bits)
        page = mig_bitmap_next_set_without(missing, requested, 0);
    order->is_exhausted = page == missing->bits;
    if (order->is_exhausted)
        return 0;
    count = run_at(missing, requested, page, page + max_pages);
    *ret_first_page = page;
    order->cursor = page + count;
    return count;
}
