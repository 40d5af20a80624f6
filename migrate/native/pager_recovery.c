/* When something went away: the daemon that served faults, the fetch that asked for pages, or the source for good. */
#include <errno.h>
#include <unistd.h>

#include "pager_internal.h"
#include "uffd.h"

/* ---- after another daemon ---- */

/* Counts the extents of the file that lie within the region. */
static int count_extents(struct mig_pager *pager, int memfd)
{
    const off_t end = (off_t)mig_page_offset(pager->missing.bits);

    for (off_t data = 0, hole; data < end; data = hole) {
        data = lseek(memfd, data, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno; /* ENXIO: nothing but a hole up to the end */
        if (data >= end)
            break;
        hole = lseek(memfd, data, SEEK_HOLE);
        if (hole < 0)
            return -errno;
        const uint64_t first = mig_offset_page((uint64_t)data);
        const uint64_t stop = mig_offset_page((uint64_t)(hole < end ? hole : end));
        mig_count_present(pager, first, stop - first, MIG_KIND_BACKGROUND, 0, NULL);
    }
    return 0;
}

int mig_pager_find_present(struct mig_pager *pager, int memfd, uint64_t *ret_pages)
{
    const uint64_t before = pager->counters.missing_pages;
    const int rc = count_extents(pager, memfd);

    *ret_pages = before - pager->counters.missing_pages;
    return rc < 0 ? rc : mig_uffd_wake(pager->uffd, pager->region_hva, mig_page_offset(pager->missing.bits));
}

/* ---- after another fetch ---- */

int mig_pager_ask_again(struct mig_pager *pager)
{
    int rc = 0;

    pthread_mutex_lock(&pager->mutex);
    for (uint64_t word = 0; word * 64 < pager->requested.bits; word++)
        pager->requested.words[word] = pager->deferred.words ? pager->deferred.words[word] : 0;
    mig_order_on_more(&pager->order, 0);
    /* Whatever is in the queue has a waiter. */
    pager->urgent_head = pager->urgent_tail;
    for (uint64_t i = 0; rc == 0 && i < pager->waiter_count; i++) {
        struct waiter *waiter = &pager->waiters[i];
        waiter->is_asking = false;
        if (mig_bitmap_test(&pager->missing, waiter->page) && mig_bitmap_set_range(&pager->requested, waiter->page, 1))
            rc = mig_push_urgent(pager, waiter->page);
    }
    pthread_cond_broadcast(&pager->faulted);
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

/* ---- after the source ---- */

/* Poisons the pages of [first, stop) but those that are there. */
static int poison_range(struct mig_pager *pager, uint64_t first, uint64_t stop, uint64_t *poisoned_pages)
{
    int rc = 0;

    for (uint64_t page = first; rc >= 0 && page < stop;) {
        uint64_t poisoned_bytes;
        rc = mig_uffd_poison(pager->uffd, mig_page_hva(pager, page), mig_page_offset(stop - page), &poisoned_bytes);
        *poisoned_pages += mig_offset_page(poisoned_bytes);
        page += mig_offset_page(poisoned_bytes) + (rc == MIG_PLACE_PRESENT);
    }
    return rc < 0 ? rc : 0;
}

int mig_pager_poison_missing(struct mig_pager *pager, uint64_t *ret_pages)
{
    int rc = 0;

    *ret_pages = 0;
    /* From now on a fault on a missing page is only woken, until the poison is there. */
    pthread_mutex_lock(&pager->mutex);
    pager->is_lost = true;
    pthread_mutex_unlock(&pager->mutex);
    for (uint64_t page = 0; rc == 0;) {
        pthread_mutex_lock(&pager->mutex);
        const uint64_t first = mig_bitmap_next_set(&pager->missing, page);
        const uint64_t stop = mig_bitmap_next_clear(&pager->missing, first);
        pthread_mutex_unlock(&pager->mutex);
        if (first == pager->missing.bits)
            break;
        rc = poison_range(pager, first, stop, ret_pages);
        page = stop;
    }
    pthread_mutex_lock(&pager->mutex);
    if (rc < 0) {
        pager->is_lost = false;
    } else {
        pager->waiter_count = 0;
        pager->urgent_head = pager->urgent_tail;
    }
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}
