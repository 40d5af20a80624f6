/*
 * How much the background asks for, and when. Pure: the clock comes in as an argument.
 *
 * The link must stay full, and an urgent page must not queue behind the background. Both are kept by the receiver,
 * which measures them where they matter: the delivery rate of the background, and the round trip of urgent requests,
 * whose smallest value of all is the path without a queue, and whose smallest value of late tells how much stands in
 * the queue now. The background's bytes in flight follow: the excess over a small target is taken out at once, what is
 * missing to it is put in.
 *
 * Round trips are also long because a CPU was busy. That shows less in the smallest of many, and what shows all the
 * same does not answer when bytes are taken out: such a wait is booked as foreign, and does not count until it fades.
 */
#ifndef MIG_PACING_H
#define MIG_PACING_H

#include <stdbool.h>
#include <stdint.h>

/* ---- the window: receiver-driven bytes in flight ---- */

enum { MIG_WINDOW_EPOCHS = 16 };

struct mig_window {
    uint64_t bytes;      /* may be in flight */
    uint64_t kept_bytes; /* ask for more only when no more than this is: a request that leaves alone wakes the source */
    uint32_t run_pages;  /* to ask for at a time */

    uint64_t base_rtt_ns;      /* smallest urgent round trip of all; 0 before the first */
    uint64_t queue_ns;         /* how much longer the smallest one of the last epoch was, foreign waits left out */
    uint64_t foreign_ns;       /* what waits though we took bytes out */
    uint64_t expected_drop_ns; /* by how much the queue should be shorter now */
    uint64_t rate_bytes_per_s; /* delivered in the best of the last epochs */
    uint64_t recent_rates[MIG_WINDOW_EPOCHS];
    uint64_t epoch_begin_ns, epoch_bytes;
    uint32_t epochs;
    bool is_starting; /* no queue has been seen yet: the window doubles */
};

/* An epoch's urgent round trips: how many, and the smallest (UINT64_MAX if there was none). */
struct mig_rtts {
    uint64_t count;
    uint64_t smallest_ns;
};

/** base_rtt_ns: the round trip before the background begins, 0 if it is not known. */
void mig_window_init(struct mig_window *window, uint64_t now_ns, uint64_t base_rtt_ns);

/** Background bytes arrived. */
void mig_window_on_delivery(struct mig_window *window, uint64_t bytes);

/** Whether an epoch is over: enough time, and enough round trips or patience with their lack. */
bool mig_window_is_due(const struct mig_window *window, uint64_t now_ns, uint64_t rtt_count);

/** The epoch is over: take in what was measured. */
void mig_window_tick(struct mig_window *window, uint64_t now_ns, struct mig_rtts rtts);

/* ---- the cap: --max-bandwidth ---- */

/* Spreads bytes over time; what was not used in the last 20 ms is lost, so no burst follows a pause. */
struct mig_cap {
    uint64_t bytes_per_s; /* 0 is none */
    uint64_t free_at_us;
};

/** Microseconds to wait before count_bytes may be asked for; counts them as asked for. */
uint64_t mig_cap_delay_us(struct mig_cap *cap, uint64_t now_us, uint64_t count_bytes);

#endif
