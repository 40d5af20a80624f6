/* Precopy: the guest lives at the source, and what arrived here may become stale. */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#include "digest.h"
#include "pager_internal.h"

void mig_pager_begin_precopy(struct mig_pager *pager, int memfd, bool verify)
{
    pthread_mutex_lock(&pager->mutex);
    pager->memfd = memfd;
    pager->verifies = verify;
    __atomic_store_n(&pager->is_live, false, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&pager->mutex);
}

/* Under the mutex. What was deferred may be asked for. */
static void undefer(struct mig_pager *pager)
{
    if (!pager->counters.deferred_pages)
        return;
    for (uint64_t word = 0; word * 64 < pager->deferred.bits; word++) {
        pager->requested.words[word] &= ~pager->deferred.words[word];
        pager->deferred.words[word] = 0;
    }
    pager->counters.deferred_pages = 0;
    mig_order_on_more(&pager->order, 0);
}

void mig_pager_go_live(struct mig_pager *pager)
{
    pthread_mutex_lock(&pager->precopy_mutex); /* no write is under way */
    pthread_mutex_lock(&pager->mutex);
    undefer(pager);
    __atomic_store_n(&pager->is_live, true, __ATOMIC_RELEASE);
    pager->memfd = -1;
    pthread_cond_broadcast(&pager->faulted);
    pthread_mutex_unlock(&pager->mutex);
    pthread_mutex_unlock(&pager->precopy_mutex);
}

/* ---- what a reply may bring ---- */

uint64_t mig_next_fresh(struct mig_pager *pager, uint64_t generation, uint64_t *page, uint64_t end)
{
    const bool is_old = generation < pager->generation && pager->invalidated.words;
    const struct mig_bitmap *stale = is_old ? &pager->invalidated : &pager->deferred;
    const uint64_t first = *page;

    if (!is_old && !pager->counters.deferred_pages)
        return end - first;
    const uint64_t fresh = mig_bitmap_next_clear(stale, first);
    *page = fresh < end ? fresh : end;
    pager->counters.stale_pages += *page - first;
    for (uint64_t dropped = first; dropped < *page; dropped++)
        if (!pager->counters.deferred_pages || !mig_bitmap_test(&pager->deferred, dropped))
            mig_bitmap_clear_range(&pager->requested, dropped, 1);
    if (*page > first)
        mig_order_on_more(&pager->order, first);
    const uint64_t next = mig_bitmap_next_set(stale, *page);
    return (next < end ? next : end) - *page;
}

static int write_pages(int memfd, uint64_t first_page, uint64_t count_pages, const char *data)
{
    uint64_t done_bytes = 0;

    while (done_bytes < mig_page_offset(count_pages)) {
        const ssize_t written = pwrite(memfd, data + done_bytes, mig_page_offset(count_pages) - done_bytes,
                                       (off_t)(mig_page_offset(first_page) + done_bytes));
        if (written < 0 && errno == EINTR)
            continue;
        if (written <= 0)
            return written < 0 ? -errno : -EIO;
        done_bytes += (uint64_t)written;
    }
    return 0;
}

int mig_precopy_data(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                     const void *data, const uint64_t *page_digests)
{
    const uint64_t end = first_page + count_pages;
    int rc = 0;

    if (__atomic_load_n(&pager->is_live, __ATOMIC_ACQUIRE))
        return -EALREADY;
    pthread_mutex_lock(&pager->precopy_mutex);
    if (pager->is_live)
        rc = -EALREADY;
    for (uint64_t page = first_page; rc == 0 && page < end;) {
        pthread_mutex_lock(&pager->mutex);
        uint64_t fresh = mig_next_fresh(pager, generation, &page, end);
        /* A page that is there already, known to be zero perhaps, stays as it is: that came from a later read. */
        const uint64_t missing = mig_bitmap_next_set(&pager->missing, page);
        const uint64_t skipped = missing - page < fresh ? missing - page : fresh;
        const uint64_t present = mig_bitmap_next_clear(&pager->missing, page + skipped);
        pager->counters.duplicate_pages += skipped;
        pthread_mutex_unlock(&pager->mutex);
        page += skipped;
        fresh -= skipped;
        fresh = present - page < fresh ? present - page : fresh;
        const uint64_t done = page - first_page;
        if (fresh)
            rc = write_pages(pager->memfd, page, fresh, (const char *)data + mig_page_offset(done));
        if (rc == 0 && fresh)
            mig_count_present(pager, page, fresh, MIG_KIND_BACKGROUND, 0, page_digests ? page_digests + done : NULL);
        page += fresh;
    }
    pthread_mutex_unlock(&pager->precopy_mutex);
    return rc;
}

/* ---- invalidation ---- */

static bool is_stale(const uint8_t *stale, uint64_t index)
{
    return stale[index / 8] >> (index % 8) & 1;
}

/* Under the mutex. One page is missing again. Returns whether it occupied memory. */
static bool lose_page(struct mig_pager *pager, uint64_t page, bool defer)
{
    bool was_data = false;

    mig_bitmap_set_range(&pager->invalidated, page, 1);
    if (defer) {
        mig_bitmap_set_range(&pager->requested, page, 1);
        pager->counters.deferred_pages += mig_bitmap_set_range(&pager->deferred, page, 1);
    } else {
        mig_bitmap_clear_range(&pager->requested, page, 1);
    }
    if (mig_bitmap_set_range(&pager->missing, page, 1)) {
        pager->counters.missing_pages++;
        was_data = !mig_bitmap_clear_range(&pager->known_zero, page, 1);
        if (was_data)
            pager->counters.precopy_pages--;
        else
            pager->counters.zero_pages--;
    }
    return was_data;
}

/* A page's part in the sum of digests goes with it. */
static int forget_digest(struct mig_pager *pager, uint64_t page)
{
    char data[MIG_PAGE_SIZE_BYTES];
    const ssize_t got = pread(pager->memfd, data, sizeof(data), (off_t)mig_page_offset(page));

    if (got != (ssize_t)sizeof(data))
        return got < 0 ? -errno : -EIO;
    pager->counters.memory_digest -= mig_digest_memory_term(page, mig_digest_page(data));
    pager->counters.verified_pages--;
    return 0;
}

/* Frees the memory of [first, end): all of it is missing. */
static int punch(const struct mig_pager *pager, uint64_t first, uint64_t end)
{
    if (first == end)
        return 0;
    return fallocate(pager->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)mig_page_offset(first),
                     (off_t)mig_page_offset(end - first)) < 0
               ? -errno
               : 0;
}

/* Under the precopy mutex. */
static int invalidate(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages, const uint8_t *stale,
                      bool defer)
{
    uint64_t punch_first = 0, punch_end = 0;
    int rc = 0;

    for (uint64_t i = 0; rc == 0 && i < count_pages; i++) {
        if (i % 8 == 0 && !stale[i / 8]) {
            i += 7;
            continue;
        }
        if (!is_stale(stale, i))
            continue;
        const uint64_t page = first_page + i;
        pthread_mutex_lock(&pager->mutex);
        const bool was_data = lose_page(pager, page, defer);
        /* Pages that are missing are holes: a range may go on across them, and costs as much as a page. */
        const uint64_t reach = mig_bitmap_next_clear(&pager->missing, punch_end);
        pthread_mutex_unlock(&pager->mutex);
        if (!was_data)
            continue;
        if (pager->verifies)
            rc = forget_digest(pager, page);
        if (punch_first == punch_end || page > reach) {
            rc = rc < 0 ? rc : punch(pager, punch_first, punch_end);
            punch_first = page;
        }
        punch_end = page + 1;
    }
    return rc < 0 ? rc : punch(pager, punch_first, punch_end);
}

int mig_pager_invalidate(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                         const uint8_t *stale, bool defer)
{
    int rc = 0;

    if (first_page > pager->missing.bits || count_pages > pager->missing.bits - first_page)
        return -EINVAL;
    pthread_mutex_lock(&pager->precopy_mutex);
    pthread_mutex_lock(&pager->mutex);
    if (pager->is_live || generation < pager->generation)
        rc = -EPROTO;
    if (rc == 0 && !pager->invalidated.words)
        rc = mig_bitmap_init(&pager->invalidated, pager->missing.bits);
    if (rc == 0 && !pager->deferred.words)
        rc = mig_bitmap_init(&pager->deferred, pager->missing.bits);
    if (rc == 0) {
        pager->generation = generation;
        if (!defer)
            undefer(pager);
    }
    pthread_mutex_unlock(&pager->mutex);
    if (rc == 0)
        rc = invalidate(pager, first_page, count_pages, stale, defer);
    pthread_mutex_lock(&pager->mutex);
    mig_order_on_more(&pager->order, first_page);
    if (pager->counters.missing_pages == pager->counters.deferred_pages)
        pthread_cond_broadcast(&pager->settled); /* nothing is left that may come before the guest */
    pthread_mutex_unlock(&pager->mutex);
    pthread_mutex_unlock(&pager->precopy_mutex);
    return rc;
}
