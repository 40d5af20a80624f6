/*
 * In which order the background asks: one small interface over the bitmap of missing pages.
 *
 *     precopy   ascending, once around
 *     follow    ascending from the last fault on: a guest that walks through its memory finds it there
 *     bubble    outward from the last few faults, both ways, by turns (Hines, Deshpande, Gopalan 2009)
 *     suggested what a policy beside us names, in its order; what it has not named waits if it says so, for a second
 *               at most, unless it says so again
 *
 * All end up at every page: where an order has nothing of its own, the next page around is taken.
 */
#ifndef MIG_ORDER_H
#define MIG_ORDER_H

#include "bitmap.h"

enum mig_order_kind { MIG_ORDER_PRECOPY, MIG_ORDER_FOLLOW, MIG_ORDER_BUBBLE, MIG_ORDER_SUGGESTED };

enum { MIG_ORDER_PIVOTS = 8, MIG_ORDER_SUGGESTIONS = 1024, MIG_ORDER_HOLD_US_MAX = 1000000 };

struct mig_page_run {
    uint64_t first_page, count_pages;
};

/* A bubble: [low, high) has been asked for. */
struct mig_bubble {
    uint64_t low, high;
};

struct mig_order {
    enum mig_order_kind kind;
    uint64_t cursor;   /* the search around begins here */
    bool is_exhausted; /* nothing is left to ask for, until something is given back */
    uint32_t pivots;   /* of `bubbles`, in use */
    uint32_t next;     /* whose turn it is, or which is replaced */
    bool grows_down;   /* the turn's direction */
    struct mig_bubble bubbles[MIG_ORDER_PIVOTS];
    uint32_t suggestion_head, suggestion_tail;
    uint64_t hold_until_ns; /* until then, only what was suggested */
    struct mig_page_run suggestions[MIG_ORDER_SUGGESTIONS];
};

/** A fault asks for this page: where the guest is now. */
void mig_order_on_fault(struct mig_order *order, uint64_t page);

/** Pages may be asked for that could not be before. */
void mig_order_on_more(struct mig_order *order, uint64_t first_page);

/** Of kind suggested: these pages come next, after those suggested before. False if there is no room. */
bool mig_order_suggest(struct mig_order *order, struct mig_page_run run);

/** Of kind suggested: pages that nobody has suggested wait so long from now on; 0 ends that. */
void mig_order_hold(struct mig_order *order, uint64_t now_ns, uint64_t hold_us);

/** How many runs have been suggested and not been used up. */
static inline uint32_t mig_order_suggested(const struct mig_order *order)
{
    return order->suggestion_tail - order->suggestion_head;
}

/** How long pages wait that nobody has suggested; 0 if they do not. */
static inline uint64_t mig_order_held_ns(const struct mig_order *order, uint64_t now_ns)
{
    return order->hold_until_ns > now_ns ? order->hold_until_ns - now_ns : 0;
}

/**
 * The next run to ask for: pages that are missing and not requested, without gaps, at most max_pages.
 * Returns its length, 0 if there is none, or none before a hold ends. The caller marks it as requested.
 */
uint32_t mig_order_next(struct mig_order *order, const struct mig_bitmap *missing, const struct mig_bitmap *requested,
                        uint32_t max_pages, uint64_t now_ns, uint64_t *ret_first_page);

#endif
