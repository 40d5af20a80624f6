/* Holds a page server to its word: replies come in request order, in ascending runs, without gaps, none unasked for. */
#ifndef MIG_REPLY_ORDER_H
#define MIG_REPLY_ORDER_H

#include <stdbool.h>
#include <stdint.h>

/* A request that is not fully answered. */
struct mig_asked {
    uint64_t request_id;
    uint64_t next_page; /* the first one without an answer */
    uint64_t end_page;
    uint64_t asked_ns;
    uint64_t count_pages;
};

/* The open requests of one stream, oldest first. Not thread-safe. */
struct mig_reply_order {
    struct mig_asked *asked; /* a ring */
    uint64_t head, count, capacity;
    uint64_t open_pages; /* of all requests, answered parts included */
    uint64_t last_request_id;
    char flaw[160]; /* what was wrong with the reply that was refused */
};

void mig_reply_order_deinit(struct mig_reply_order *order);

/** Note a request that is about to be sent; returns its id, 0 without memory. A zeroed order is an empty one. */
uint64_t mig_reply_order_ask(struct mig_reply_order *order, uint64_t first_page, uint64_t count_pages, uint64_t now_ns);

/**
 * Check a reply. Returns 1 if it completes its request, which goes to *ret_done; 0 if more is to come; -EBADMSG if
 * nobody asked for it, or not now: then `flaw` says why.
 */
int mig_reply_order_answer(struct mig_reply_order *order, uint64_t request_id, uint64_t first_page,
                           uint64_t count_pages, bool is_zero, struct mig_asked *ret_done);

/** Take the oldest request out, answered or not. False if there is none. */
bool mig_reply_order_take(struct mig_reply_order *order, struct mig_asked *ret);

#endif
