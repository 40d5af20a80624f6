/*
 * What the parts of the pager share: pager.c (state, claims), pager_faults.c (events), pager_place.c (placement),
 * pager_precopy.c (before the guest lives here), pager_recovery.c (after a daemon, a fetch or the source went away),
 * pager_policy.c (for a policy that runs beside).
 */
#ifndef MIG_PAGER_INTERNAL_H
#define MIG_PAGER_INTERNAL_H

#include <pthread.h>

#include "bitmap.h"
#include "pager.h"
#include "units.h"

enum { MIG_RECORD_RING = 1 << 16, MIG_NOTE_RING = 1 << 12 };

/* A fault whose page has not come. */
struct waiter {
    uint64_t page;
    uint64_t event_ns;
    uint64_t taken_ns;
    uint64_t sent_ns;
    uint64_t read_ns;
    uint32_t thread_id;
    bool is_asking; /* this fault's own request is on its way to the socket */
};

struct mig_pager {
    int uffd;
    int stop_fd;
    uint64_t region_hva;
    bool has_fault_thread;
    pthread_t fault_thread;

    /* Held while pages are written into the memfd, and taken before `mutex`: no write may cross an invalidation. */
    pthread_mutex_t precopy_mutex;
    int memfd; /* in precopy; not ours */
    bool verifies;

    pthread_mutex_t mutex; /* guards all below; never held across an ioctl */
    /* Two, for a fault must not wake whoever waits for the end. */
    pthread_cond_t faulted; /* the urgent queue has grown */
    pthread_cond_t settled; /* no page is missing */
    pthread_cond_t noted;   /* for a policy: a fault, or few suggestions are left */
    bool stopped;
    int error; /* what ended the reading of faults: -errno, or 0 */
    struct mig_bitmap missing;
    struct mig_bitmap requested;
    struct mig_bitmap known_zero;
    struct mig_bitmap invalidated; /* ever; without words before the first time */
    uint64_t generation;           /* of the latest invalidation */
    bool is_live;                  /* the guest lives here */
    bool is_lost;                  /* what is missing will never come */
    struct mig_bitmap deferred;    /* missing, and counted as requested so that nobody asks for them */
    struct mig_order order;
    struct mig_fault_note *notes; /* a ring, for a policy; NULL if there is none */
    uint64_t note_head, note_tail, lost_notes;
    bool wants_runs;  /* of the policy */
    uint64_t *urgent; /* claimed by a fault, not yet taken: a stack would starve, so a queue */
    uint64_t urgent_head, urgent_tail, urgent_capacity;
    struct waiter *waiters;
    uint64_t waiter_count, waiter_capacity;
    struct mig_fault_record *records;
    uint64_t record_head, record_tail;
    struct mig_pager_counters counters;
};

static inline uint64_t mig_page_hva(const struct mig_pager *pager, uint64_t page)
{
    return pager->region_hva + mig_page_offset(page);
}

/**
 * Under the mutex. The next pages of [page, end) that a reply of a generation may bring; what comes before them is
 * stale, and may be asked for again. Returns how many, 0 at the end; *page is where they begin.
 */
uint64_t mig_next_fresh(struct mig_pager *pager, uint64_t generation, uint64_t *page, uint64_t end);

/** Write a run into the memfd, unless the guest lives here meanwhile: then returns -EALREADY. Else 0 or -errno. */
int mig_precopy_data(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                     const void *data, const uint64_t *page_digests);

/** Counts pages that are present now, however they came to be. */
void mig_count_present(struct mig_pager *pager, uint64_t first, uint64_t count, enum mig_page_kind kind,
                       uint64_t replied_ns, const uint64_t *page_digests);

/** Waits for a condition until deadline_ns, then returns false. Under the mutex. */
bool mig_wait_until(struct mig_pager *pager, pthread_cond_t *condition, uint64_t deadline_ns);
/** What a waiting call must answer at once, 0 if it may wait. Under the mutex. */
int mig_verdict(const struct mig_pager *pager);

/** Faults can be read no longer: every waiting call returns the error. */
void mig_pager_fail(struct mig_pager *pager, int error);

/* ---- under the mutex ---- */

void mig_record_fault(struct mig_pager *pager, const struct waiter *waiter, uint64_t replied_ns, uint64_t placed_ns,
                      uint32_t kind);
/** Closes the books on the waiters of [first, first + count). */
void mig_settle_waiters(struct mig_pager *pager, uint64_t first, uint64_t count, uint64_t replied_ns, uint32_t kind);
int mig_add_waiter(struct mig_pager *pager, const struct waiter *waiter);
int mig_push_urgent(struct mig_pager *pager, uint64_t page);
/** Tells the policy, if there is one. */
void mig_note_fault(struct mig_pager *pager, const struct waiter *waiter, bool was_requested);
/** The order's next run; has the policy told once it has few left. */
uint32_t mig_next_run(struct mig_pager *pager, uint32_t max_pages, uint64_t *ret_first_page);
/** So many pages were taken off the missing bitmap; the last of what is counted of them. */
void mig_no_longer_missing(struct mig_pager *pager, uint64_t count);

#endif
