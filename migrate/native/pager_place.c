#include <errno.h>
#include <stdlib.h>

#include "digest.h"
#include "pager_internal.h"
#include "uffd.h"

enum { DIGEST_RUN_PAGES_MAX = 4096 };

static bool in_region(const struct mig_pager *pager, uint64_t first_page, uint64_t count_pages)
{
    return count_pages && first_page < pager->missing.bits && count_pages <= pager->missing.bits - first_page;
}

void mig_count_present(struct mig_pager *pager, uint64_t first, uint64_t count, enum mig_page_kind kind,
                       uint64_t replied_ns, const uint64_t *page_digests)
{
    pthread_mutex_lock(&pager->mutex);
    if (page_digests)
        for (uint64_t i = 0; i < count; i++)
            if (mig_bitmap_test(&pager->missing, first + i)) {
                pager->counters.verified_pages++;
                pager->counters.memory_digest += mig_digest_memory_term(first + i, page_digests[i]);
            }
    const uint64_t arrived = mig_bitmap_clear_range(&pager->missing, first, count);
    pager->counters.duplicate_pages += count - arrived;
    if (!pager->is_live)
        pager->counters.precopy_pages += arrived;
    else if (kind == MIG_KIND_URGENT)
        pager->counters.urgent_pages += arrived;
    else
        pager->counters.background_pages += arrived;
    mig_no_longer_missing(pager, arrived);
    mig_settle_waiters(pager, first, count, replied_ns, kind);
    pthread_mutex_unlock(&pager->mutex);
}

/* Computes the digests of a run's pages. Returns 0 or -errno; -EBADMSG if they are not the run's. */
static int check_digests(const void *data, uint64_t count_pages, uint64_t digest, uint64_t **ret)
{
    uint64_t *page_digests = malloc(count_pages * sizeof(*page_digests));

    if (!page_digests)
        return -ENOMEM;
    *ret = page_digests;
    for (uint64_t i = 0; i < count_pages; i++)
        page_digests[i] = mig_digest_page((const char *)data + mig_page_offset(i));
    return mig_digest_run(page_digests, count_pages) == digest ? 0 : -EBADMSG;
}

/* Places fresh pages into a guest that lives here. */
static int copy_pages(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages, const char *data,
                      enum mig_page_kind kind, uint64_t replied_ns, const uint64_t *page_digests)
{
    int rc = 0;

    for (uint64_t done = 0; rc >= 0 && done < count_pages;) {
        uint64_t placed_bytes;
        rc = mig_uffd_copy(pager->uffd, mig_page_hva(pager, first_page + done), data + mig_page_offset(done),
                           mig_page_offset(count_pages - done), &placed_bytes);
        /* MIG_PLACE_PRESENT stopped at a page that is there already: it counts too, and we go on behind it. */
        const uint64_t settled = mig_offset_page(placed_bytes) + (rc == MIG_PLACE_PRESENT);
        if (settled)
            mig_count_present(pager, first_page + done, settled, kind, replied_ns,
                              page_digests ? page_digests + done : NULL);
        done += settled;
    }
    return rc;
}

static int copy_fresh_pages(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                            const char *data, enum mig_page_kind kind, uint64_t replied_ns,
                            const uint64_t *page_digests)
{
    const uint64_t end = first_page + count_pages;
    int rc = 0;

    for (uint64_t page = first_page; rc >= 0 && page < end;) {
        pthread_mutex_lock(&pager->mutex);
        const uint64_t fresh = mig_next_fresh(pager, generation, &page, end);
        pthread_mutex_unlock(&pager->mutex);
        const uint64_t done = page - first_page;
        if (fresh)
            rc = copy_pages(pager, page, fresh, data + mig_page_offset(done), kind, replied_ns,
                            page_digests ? page_digests + done : NULL);
        page += fresh;
    }
    return rc;
}

int mig_pager_place_data(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                         const void *data, enum mig_page_kind kind, bool verify, uint64_t digest)
{
    const uint64_t replied_ns = mig_now_ns();
    uint64_t *page_digests = NULL;

    if (!in_region(pager, first_page, count_pages) || (verify && count_pages > DIGEST_RUN_PAGES_MAX))
        return -EINVAL;
    int rc = verify ? check_digests(data, count_pages, digest, &page_digests) : 0;
    if (rc == 0) {
        rc = mig_precopy_data(pager, generation, first_page, count_pages, data, page_digests);
        if (rc == -EALREADY)
            rc = copy_fresh_pages(pager, generation, first_page, count_pages, data, kind, replied_ns, page_digests);
    }
    free(page_digests);
    return rc < 0 ? rc : 0;
}

/* The next waiter's page in a range of zeros; false if there is none. */
static bool next_waiting_page(struct mig_pager *pager, uint64_t first, uint64_t count, uint64_t *ret_page)
{
    bool found = false;

    pthread_mutex_lock(&pager->mutex);
    for (uint64_t i = 0; !found && i < pager->waiter_count; i++) {
        *ret_page = pager->waiters[i].page;
        /* One that is missing still was told by a reply that is too old. */
        found = *ret_page - first < count && !mig_bitmap_test(&pager->missing, *ret_page);
    }
    pthread_mutex_unlock(&pager->mutex);
    return found;
}

/* Under the mutex. Missing pages of [first, end) are known to be zero from now on. */
static void note_zero(struct mig_pager *pager, uint64_t first, uint64_t end)
{
    /* Only what was missing is known to be zero now: the rest may hold data that the guest has written since. */
    for (uint64_t page = mig_bitmap_next_set(&pager->missing, first); page < end;) {
        const uint64_t clear = mig_bitmap_next_clear(&pager->missing, page);
        const uint64_t stop = clear < end ? clear : end;
        mig_bitmap_set_range(&pager->known_zero, page, stop - page);
        page = mig_bitmap_next_set(&pager->missing, stop);
    }
    /* A hole told beyond the request overlaps what others asked for; that is no page sent twice. */
    const uint64_t arrived = mig_bitmap_clear_range(&pager->missing, first, end - first);
    pager->counters.zero_pages += arrived;
    mig_no_longer_missing(pager, arrived);
}

int mig_pager_place_zero(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages)
{
    const uint64_t replied_ns = mig_now_ns(), end = first_page + count_pages;

    if (!in_region(pager, first_page, count_pages))
        return -EINVAL;
    pthread_mutex_lock(&pager->mutex);
    for (uint64_t page = first_page; page < end;) {
        const uint64_t fresh = mig_next_fresh(pager, generation, &page, end);
        if (fresh)
            note_zero(pager, page, page + fresh);
        page += fresh;
    }
    pthread_mutex_unlock(&pager->mutex);

    for (uint64_t page; next_waiting_page(pager, first_page, count_pages, &page);) {
        uint64_t placed_bytes;
        const int rc = mig_uffd_zeropage(pager->uffd, mig_page_hva(pager, page), MIG_PAGE_SIZE_BYTES, &placed_bytes);
        if (rc < 0 && rc != -ENOENT)
            return rc;
        pthread_mutex_lock(&pager->mutex);
        mig_settle_waiters(pager, page, 1, replied_ns, MIG_KIND_ZERO);
        pthread_mutex_unlock(&pager->mutex);
    }
    return 0;
}
