/*
 * In which order the background asks: one small interface over the bitmap of missing pages.
 *
 *     precopy   ascending, once around
 *     follow    ascending from the last fault on: a guest that walks through its memory finds it there
 *     bubble    outward from the last few faults, both ways, by turns (Hines, Deshpande, Gopalan 2009)
 *
 * All end up at every page: where an order has nothing of its own, the next page around is taken.
 */
#ifndef MIG_ORDER_H
#define MIG_ORDER_H

#include "bitmap.h"

enum mig_order_kind { MIG_ORDER_PRECOPY, MIG_ORDER_FOLLOW, MIG_ORDER_BUBBLE };

enum { MIG_ORDER_PIVOTS = 8 };

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
};

/** A fault asks for this page: where the guest is now. */
void mig_order_on_fault(struct mig_order *order, uint64_t page);

/** Pages may be asked for that could not be before. */
void mig_order_on_more(struct mig_order *order, uint64_t first_page);

/**
 * The next run to ask for: pages that are missing and not requested, without gaps, at most max_pages.
 * Returns its length, 0 if there is none. The caller marks it as requested.
 */
uint32_t mig_order_next(struct mig_order *order, const struct mig_bitmap *missing, const struct mig_bitmap *requested,
                        uint32_t max_pages, uint64_t *ret_first_page);

#endif
