/*
 * The destination's data path: which pages are missing, which were asked for, who waits, and the placement step.
 *
 * Each page is in one of these states, and once the guest lives here it only moves down:
 *
 *     missing ──claim──▶ requested ──place──▶ present          (counted as precopy, urgent or background)
 *        ▲                   └──────zero────▶ known zero ──touch──▶ present   (counted as zero)
 *        └─────────────── invalidated, in precopy ◀──────────────────┘
 *
 * A fault on a missing page claims it for the urgent queue; a fault on a requested page only waits, because a page is
 * asked for once. A known zero page is placed when it is touched, so that sparse memory stays sparse; once no page is
 * missing the range is unregistered, and the rest of the holes read as zero by themselves.
 *
 * In precopy the guest still runs at the source. Pages are written straight into the memfd, whose mapping nobody
 * touches yet, and the source may say that some are stale: they are missing again, and their memory is freed at once,
 * so that a missing page is always a hole. A round of the dirty log has a number, the generation; a reply says in which
 * generation its bytes were read, and a page that was ever invalidated takes none from before the latest.
 *
 * A policy may name pages that are to come first (order.h, MIG_ORDER_SUGGESTED). It runs in a thread beside: faults are
 * noted for it, and nothing waits for what it says.
 *
 * All functions are thread-safe. None is called with, or takes, Python's GIL.
 */
#ifndef MIG_PAGER_H
#define MIG_PAGER_H

#include <stdbool.h>
#include <stdint.h>

#include "order.h"

enum mig_page_kind {
    MIG_KIND_ZERO = 0,
    MIG_KIND_URGENT = 1,
    MIG_KIND_BACKGROUND = 2,
    MIG_KIND_PRESENT = 3, /* of a fault: its page had arrived before the event was read */
};

struct mig_pager_counters {
    uint64_t total_pages;
    uint64_t missing_pages;  /* neither present nor known to be zero */
    uint64_t deferred_pages; /* of these, stale ones that are left until the guest is here */
    uint64_t zero_pages;
    uint64_t precopy_pages; /* came before the guest did, and are still good */
    uint64_t urgent_pages;
    uint64_t background_pages;
    uint64_t duplicate_pages; /* arrived again */
    uint64_t stale_pages;     /* arrived, but had been invalidated since they were read */
    uint64_t verified_pages;  /* data pages whose digest was compared before they were placed */
    uint64_t faults;          /* kernel events read */
    uint64_t lost_records;    /* fault records overwritten before anyone read them */
    uint64_t memory_digest;   /* sum of mig_digest_memory_term over the verified pages */
};

/* One fault, stage by stage, from the kernel's event to its page. CLOCK_MONOTONIC, nanoseconds. */
struct mig_fault_record {
    uint64_t page;
    uint64_t event_ns;   /* read from the userfaultfd */
    uint64_t taken_ns;   /* out of the urgent queue; 0 if somebody else had asked, or nobody had to */
    uint64_t sent_ns;    /* its request was written to the socket; 0 likewise */
    uint64_t read_ns;    /* a duration: what the source took to answer, if it says so */
    uint64_t replied_ns; /* the reply was complete; 0 if none was needed */
    uint64_t placed_ns;
    uint32_t thread_id;
    uint32_t kind; /* enum mig_page_kind: what brought the page */
};
_Static_assert(sizeof(struct mig_fault_record) == 64, "records travel as eight words (TracePart.faults)");

/* A fault on a missing page, as a policy hears of it. */
struct mig_fault_note {
    uint64_t page;
    uint64_t event_ns; /* CLOCK_MONOTONIC: read from the userfaultfd */
    uint32_t thread_id;
    uint32_t was_requested; /* somebody had asked for the page */
};
_Static_assert(sizeof(struct mig_fault_note) == 24, "Python reads notes as three words");

struct mig_pager;

/**
 * A pager for one armed region, all pages missing, of a guest that lives here or is about to.
 * Takes over `uffd`. Returns 0 or -errno.
 */
int mig_pager_create(int uffd, uint64_t region_hva, uint64_t pages, enum mig_order_kind order, struct mig_pager **ret);

/** Ends the fault thread, closes the userfaultfd, frees. No other call may be under way. */
void mig_pager_destroy(struct mig_pager *pager);

/** Make every waiting call return -ECANCELED from now on, and end the fault thread. Idempotent. */
void mig_pager_stop(struct mig_pager *pager);

/* ---- precopy: while the guest lives at the source ---- */

/**
 * Until mig_pager_go_live, write pages into `memfd`, which stays the caller's: the region's memory, empty.
 * With `verify`, the digests of pages that are invalidated leave the sum.
 */
void mig_pager_begin_precopy(struct mig_pager *pager, int memfd, bool verify);

/**
 * Pages of [first_page, first_page + count_pages) whose bit is set in `stale` (first_page's is the lowest of the first
 * byte) were written since they were read, if that was before `generation`: they are missing again.
 *
 * With `defer` they are neither asked for nor taken until the guest lives here, whatever generation a reply is of: its
 * later writes may go unnoticed. Without it, all that was deferred may be asked for again.
 *
 * Returns 0 or -errno: -EINVAL outside the region, -EPROTO if the generation is older than one before, or the guest
 * lives here already.
 */
int mig_pager_invalidate(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                         const uint8_t *stale, bool defer);

/** The guest is about to run here: pages are placed from now on, and no more can be invalidated. */
void mig_pager_go_live(struct mig_pager *pager);

/** Whether the guest lives here and misses nothing: then the page calls end. */
bool mig_pager_is_complete(const struct mig_pager *pager);

/* ---- faults: either a thread of the pager's reads them, or whoever polls its userfaultfd ---- */

/** Start a thread that reads faults, if there is none yet. Returns 0 or -errno. */
int mig_pager_start_fault_thread(struct mig_pager *pager);

/** The userfaultfd, non-blocking. */
int mig_pager_uffd(const struct mig_pager *pager);

/** Read all faults that wait: claim missing pages, place known zeros. Returns 0 or -errno. For one thread alone. */
int mig_pager_read_faults(struct mig_pager *pager);

/**
 * Wait for faults on pages that nobody has asked for; the caller asks for them.
 * Returns how many pages were written to `pages`, 0 after the timeout, -ECANCELED once stopped or done, or the error
 * that ended the fault thread.
 */
int mig_pager_claim_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages, uint64_t timeout_us);

/** The same without waiting: returns how many pages were written. */
uint32_t mig_pager_take_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages);

/** The requests for all urgent pages taken so far are on the wire: note the time in the records of their faults. */
void mig_pager_note_sent(struct mig_pager *pager, uint64_t sent_ns);

/** The source took so long to answer for [first_page, first_page + count_pages), which is about to be placed. */
void mig_pager_note_read(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages, uint64_t read_ns);

/** A request will not be answered: those of its pages that are missing must be asked for again, by whoever comes. */
int mig_pager_give_back(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages);

/** Claim the next run, by the pager's order, of missing pages that nobody has asked for: its length, 0 for none. */
uint32_t mig_pager_claim_run(struct mig_pager *pager, uint32_t max_pages, uint64_t *ret_first_page);

/* ---- a policy: of order MIG_ORDER_SUGGESTED alone; pager_policy.c ---- */

/**
 * Wait for faults on missing pages, or until few suggestions are left. The latest few thousand are kept, and *ret_lost
 * is how many were dropped to make room since the last call. *ret_queued is how many suggested runs are left.
 * Returns how many were written to `notes`, -ECANCELED once stopped or done, or the fault thread's error.
 */
int mig_pager_wait_faults(struct mig_pager *pager, struct mig_fault_note *notes, uint32_t max_notes,
                          uint64_t timeout_us, uint64_t *ret_lost, uint32_t *ret_queued);

/**
 * These runs are asked for next, after those suggested before; of each, what is missing then and was not asked for.
 * All other pages wait for hold_us, a second at most, from now on. Whoever fetches must be woken afterwards.
 * Those that find no room in the queue of MIG_ORDER_SUGGESTIONS are dropped.
 * Returns 0, or -EINVAL if a run does not lie within the region: then nothing was changed.
 */
int mig_pager_suggest(struct mig_pager *pager, const struct mig_page_run *runs, uint32_t count, uint64_t hold_us);

/** How long mig_pager_claim_run keeps back what no policy has named; 0 if it does not. */
uint64_t mig_pager_held_ns(struct mig_pager *pager);

/** The pages that are missing. Read like the counters, without a lock. */
const struct mig_bitmap *mig_pager_missing(const struct mig_pager *pager);

/**
 * Place a run of data that was read in a generation. With `verify`, its digest is compared before any page is placed.
 * Returns 0 or -errno: -EBADMSG on a wrong digest, -EINVAL outside the region, -ESRCH if the guest is gone.
 */
int mig_pager_place_data(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                         const void *data, enum mig_page_kind kind, bool verify, uint64_t digest);

/** Learn that a run was zero in a generation; pages that somebody waits for are placed. Returns 0 or -errno. */
int mig_pager_place_zero(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages);

/* ---- when something went away ---- */

/**
 * Before a fresh pager is started, for a guest whose last daemon died: the pages that `memfd` has are not missing.
 *
 * Each counts as a background page; what brought it is not known any more. A hole is missing, though it may have been
 * known to be zero: it is asked for again. Then every waiter is woken, so that faults whose events the dead daemon had
 * read come again. *ret_pages is how many pages were found. Returns 0 or -errno.
 */
int mig_pager_find_present(struct mig_pager *pager, int memfd, uint64_t *ret_pages);

/**
 * A new fetch takes the place of one that failed and has been stopped: what was asked for and has not come may be
 * asked for again, and each page that a fault waits for is queued again, once. Returns 0 or -errno.
 */
int mig_pager_ask_again(struct mig_pager *pager);

/**
 * No fetch runs, and none will: whoever touches a page that is missing gets a memory error (SIGBUS), never a zero page
 * made up for it. Waiters are woken into it, without a record. The missing pages stay counted as missing, and known
 * zeros are placed as before, until the pager is stopped. *ret_pages is how many pages were poisoned.
 * Returns 0 or -errno: -EINVAL where the kernel has no UFFDIO_POISON (before Linux 6.6).
 */
int mig_pager_poison_missing(struct mig_pager *pager, uint64_t *ret_pages);

/* ---- how far it is ---- */

/** Wait until no page is missing but those that are deferred. Returns 1 when so, 0 after the timeout, -ECANCELED, or
 * the fault thread's error. */
int mig_pager_wait_done(struct mig_pager *pager, uint64_t timeout_us);

/** Read at any time, without a lock: each field is right by itself, and all together once no page is missing. */
const struct mig_pager_counters *mig_pager_counters(const struct mig_pager *pager);

/**
 * Cut the region into `cells` equal parts, which must not be more than its pages, and write for each the share of its
 * pages that is missing: 0 for none, 255 for all, and in proportion between. Read like the counters, without a lock.
 */
void mig_pager_missing_map(const struct mig_pager *pager, uint32_t cells, uint8_t *ret_shares);

/**
 * A bit for each page, lowest bit first, into `ret` ((pages + 7) / 8 bytes): those that are missing, or, with
 * `known_zero`, those that the source has told to be zero.
 */
void mig_pager_copy_map(struct mig_pager *pager, bool known_zero, uint8_t *ret);

/** Move out up to max_records fault records, oldest first. Returns how many. */
uint32_t mig_pager_drain_records(struct mig_pager *pager, struct mig_fault_record *records, uint32_t max_records);

#endif
