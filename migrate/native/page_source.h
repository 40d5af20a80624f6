/* The source's side of the page call: read pages of a memfd, and tell data from holes and zeros. */
#ifndef MIG_PAGE_SOURCE_H
#define MIG_PAGE_SOURCE_H

#include <stdbool.h>
#include <stdint.h>

/* The most that one request may ask for. */
enum { MIG_REQUEST_PAGES_MAX = 256 };

/* A run of pages that are all data or all zero. */
struct mig_run {
    uint64_t first_page;
    uint64_t count_pages;
    uint64_t digest; /* of a data run, if digests were taken; else 0 */
    bool is_zero;
};

/* Pages in a memfd. Reading is safe from several threads. */
struct mig_page_source;

/** Serve `pages` pages of a memfd, which stays the caller's. Returns 0 or -errno. */
int mig_page_source_create(int memfd, uint64_t pages, struct mig_page_source **ret);
void mig_page_source_destroy(struct mig_page_source *source);
uint64_t mig_page_source_pages(const struct mig_page_source *source);

/**
 * Serve a digest with every run of data, computed of the very bytes that are sent: the guest may run meanwhile.
 * Before anything is read.
 */
void mig_page_source_digest_replies(struct mig_page_source *source);

/**
 * Whether pages must be copied to be sent: their digest goes with them and the guest may run, or the file may shrink,
 * which would end us with SIGBUS at the next look through the mapping.
 */
bool mig_page_source_must_copy(const struct mig_page_source *source);

/**
 * Take the digest of every page now, and serve these from then on: a page that changes later no longer matches.
 * The guest must stand still.
 *
 * *ret_memory_digest is the sum of mig_digest_memory_term over the pages that are not zero. Returns 0 or -errno.
 */
int mig_page_source_take_digests(struct mig_page_source *source, uint64_t *ret_memory_digest);

/**
 * Read a run of pages as data and zero runs, ascending, without gaps.
 *
 * Data lands in `buffer` (count_pages pages) at its page's place; holes are never read. The last run, if it is a hole,
 * goes on as far as the hole does, beyond the request. `runs` has room for count_pages runs.
 *
 * Returns the number of runs, or -errno; -EINVAL if the request does not lie within the source.
 */
int mig_page_source_read(struct mig_page_source *source, uint64_t first_page, uint32_t count_pages, void *buffer,
                         struct mig_run *runs);

/* What one reader has looked at through the mapping, and not let go yet. Zeroed at first. */
struct mig_scan {
    uint64_t first_page;
    uint64_t count_pages;
};

/**
 * Tell data from zeros in a run, as mig_page_source_read does, but read only as much as that takes: what is data is
 * left to be sent from mig_page_source_memfd.
 */
int mig_page_source_scan(struct mig_page_source *source, struct mig_scan *scan, uint64_t first_page,
                         uint32_t count_pages, struct mig_run *runs);

/** Unmap what was looked at, so that it does not count as our memory. */
void mig_page_source_end_scan(struct mig_page_source *source, struct mig_scan *scan);

int mig_page_source_memfd(const struct mig_page_source *source);

#endif
