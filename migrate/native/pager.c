#include "pager.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "pager_internal.h"

/* ---- under the mutex ---- */

void mig_record_fault(struct mig_pager *pager, const struct waiter *waiter, uint64_t replied_ns, uint64_t placed_ns,
                      uint32_t kind)
{
    if (pager->record_tail - pager->record_head == MIG_RECORD_RING) {
        pager->record_head++;
        pager->counters.lost_records++;
    }
    pager->records[pager->record_tail++ % MIG_RECORD_RING] = (struct mig_fault_record){
        .page = waiter->page,
        .event_ns = waiter->event_ns,
        .taken_ns = waiter->taken_ns,
        .sent_ns = waiter->sent_ns,
        .read_ns = waiter->read_ns,
        .replied_ns = replied_ns,
        .placed_ns = placed_ns,
        .thread_id = waiter->thread_id,
        .kind = kind,
    };
}

void mig_settle_waiters(struct mig_pager *pager, uint64_t first, uint64_t count, uint64_t replied_ns, uint32_t kind)
{
    const uint64_t now_ns = pager->waiter_count ? mig_now_ns() : 0;

    for (uint64_t i = 0; i < pager->waiter_count;) {
        if (pager->waiters[i].page - first >= count) {
            i++;
            continue;
        }
        mig_record_fault(pager, &pager->waiters[i], replied_ns, now_ns, kind);
        pager->waiters[i] = pager->waiters[--pager->waiter_count];
    }
}

int mig_add_waiter(struct mig_pager *pager, const struct waiter *waiter)
{
    if (pager->waiter_count == pager->waiter_capacity) {
        const uint64_t capacity = pager->waiter_capacity ? pager->waiter_capacity * 2 : 64;
        struct waiter *grown = realloc(pager->waiters, capacity * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        pager->waiters = grown;
        pager->waiter_capacity = capacity;
    }
    pager->waiters[pager->waiter_count++] = *waiter;
    return 0;
}

int mig_push_urgent(struct mig_pager *pager, uint64_t page)
{
    const uint64_t used = pager->urgent_tail - pager->urgent_head;

    if (used == pager->urgent_capacity) {
        const uint64_t capacity = used ? used * 2 : 64;
        uint64_t *grown = malloc(capacity * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        for (uint64_t i = 0; i < used; i++)
            grown[i] = pager->urgent[(pager->urgent_head + i) % used];
        free(pager->urgent);
        pager->urgent = grown;
        pager->urgent_capacity = capacity;
        pager->urgent_head = 0;
        pager->urgent_tail = used;
    }
    pager->urgent[pager->urgent_tail++ % pager->urgent_capacity] = page;
    return 0;
}

static void wake_all(struct mig_pager *pager)
{
    pthread_cond_broadcast(&pager->faulted);
    pthread_cond_broadcast(&pager->settled);
    pthread_cond_broadcast(&pager->noted);
}

void mig_no_longer_missing(struct mig_pager *pager, uint64_t count)
{
    /* A release, so that whoever sees the end without the mutex sees all that led to it. */
    if (__atomic_sub_fetch(&pager->counters.missing_pages, count, __ATOMIC_RELEASE) == pager->counters.deferred_pages)
        wake_all(pager);
}

void mig_pager_fail(struct mig_pager *pager, int error)
{
    pthread_mutex_lock(&pager->mutex);
    if (!pager->error)
        pager->error = error;
    wake_all(pager);
    pthread_mutex_unlock(&pager->mutex);
}

int mig_verdict(const struct mig_pager *pager)
{
    return pager->error ? pager->error : pager->stopped ? -ECANCELED : 0;
}

bool mig_wait_until(struct mig_pager *pager, pthread_cond_t *condition, uint64_t deadline_ns)
{
    const struct timespec deadline = {
        .tv_sec = (time_t)(deadline_ns / 1000000000u),
        .tv_nsec = (long)(deadline_ns % 1000000000u),
    };
    return pthread_cond_timedwait(condition, &pager->mutex, &deadline) != ETIMEDOUT;
}

/* ---- life ---- */

static int init_maps(struct mig_pager *pager, uint64_t pages)
{
    pager->records = malloc(MIG_RECORD_RING * sizeof(*pager->records));
    if (!pager->records || mig_bitmap_init(&pager->missing, pages) || mig_bitmap_init(&pager->requested, pages) ||
        mig_bitmap_init(&pager->known_zero, pages))
        return -ENOMEM;
    if (pager->order.kind == MIG_ORDER_SUGGESTED) {
        pager->notes = malloc(MIG_NOTE_RING * sizeof(*pager->notes));
        if (!pager->notes)
            return -ENOMEM;
    }
    pager->counters.total_pages = pages;
    pager->counters.missing_pages = mig_bitmap_set_range(&pager->missing, 0, pages);
    return 0;
}

static void free_pager(struct mig_pager *pager)
{
    if (pager->stop_fd >= 0)
        close(pager->stop_fd);
    mig_bitmap_deinit(&pager->missing);
    mig_bitmap_deinit(&pager->requested);
    mig_bitmap_deinit(&pager->known_zero);
    mig_bitmap_deinit(&pager->invalidated);
    mig_bitmap_deinit(&pager->deferred);
    pthread_cond_destroy(&pager->faulted);
    pthread_cond_destroy(&pager->settled);
    pthread_cond_destroy(&pager->noted);
    pthread_mutex_destroy(&pager->mutex);
    pthread_mutex_destroy(&pager->precopy_mutex);
    free(pager->urgent);
    free(pager->waiters);
    free(pager->records);
    free(pager->notes);
    free(pager);
}

int mig_pager_create(int uffd, uint64_t region_hva, uint64_t pages, enum mig_order_kind order, struct mig_pager **ret)
{
    struct mig_pager *pager = calloc(1, sizeof(*pager));
    if (!pager)
        return -ENOMEM;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&pager->faulted, &attributes);
    pthread_cond_init(&pager->settled, &attributes);
    pthread_cond_init(&pager->noted, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&pager->mutex, NULL);
    pthread_mutex_init(&pager->precopy_mutex, NULL);
    pager->is_live = true;
    pager->memfd = -1;
    pager->order.kind = order;
    pager->uffd = uffd;
    pager->region_hva = region_hva;
    pager->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    int rc = pager->stop_fd < 0 ? -errno : init_maps(pager, pages);
    if (rc < 0) {
        free_pager(pager);
        return rc;
    }
    *ret = pager;
    return 0;
}

void mig_pager_stop(struct mig_pager *pager)
{
    pthread_mutex_lock(&pager->mutex);
    pager->stopped = true;
    wake_all(pager);
    pthread_mutex_unlock(&pager->mutex);
    eventfd_write(pager->stop_fd, 1);
}

int mig_pager_uffd(const struct mig_pager *pager)
{
    return pager->uffd;
}

void mig_pager_destroy(struct mig_pager *pager)
{
    if (!pager)
        return;
    mig_pager_stop(pager);
    if (pager->has_fault_thread)
        pthread_join(pager->fault_thread, NULL);
    close(pager->uffd);
    free_pager(pager);
}

/* ---- what to ask for ---- */

/* Under the mutex. */
static uint32_t take_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages)
{
    uint32_t taken = 0;

    while (taken < max_pages && pager->urgent_head != pager->urgent_tail) {
        pages[taken] = pager->urgent[pager->urgent_head++ % pager->urgent_capacity];
        /* A hole that was told whole may have settled it meanwhile. */
        taken += mig_bitmap_test(&pager->missing, pages[taken]);
    }
    const uint64_t now_ns = taken ? mig_now_ns() : 0;
    for (uint64_t i = 0; taken && i < pager->waiter_count; i++)
        for (uint32_t j = 0; j < taken; j++)
            if (pager->waiters[i].page == pages[j]) {
                pager->waiters[i].is_asking = true;
                pager->waiters[i].taken_ns = now_ns;
            }
    return taken;
}

int mig_pager_claim_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages, uint64_t timeout_us)
{
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;
    int rc;

    pthread_mutex_lock(&pager->mutex);
    while (!(rc = mig_verdict(pager)) && pager->urgent_head == pager->urgent_tail) {
        if (mig_pager_is_complete(pager))
            rc = -ECANCELED;
        if (rc || !mig_wait_until(pager, &pager->faulted, deadline_ns))
            break;
    }
    if (rc >= 0)
        rc = (int)take_urgent(pager, pages, max_pages);
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

uint32_t mig_pager_take_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages)
{
    pthread_mutex_lock(&pager->mutex);
    const uint32_t taken = take_urgent(pager, pages, max_pages);
    pthread_mutex_unlock(&pager->mutex);
    return taken;
}

void mig_pager_note_sent(struct mig_pager *pager, uint64_t sent_ns)
{
    pthread_mutex_lock(&pager->mutex);
    for (uint64_t i = 0; i < pager->waiter_count; i++) {
        struct waiter *waiter = &pager->waiters[i];
        if (waiter->is_asking) {
            waiter->is_asking = false;
            waiter->sent_ns = sent_ns;
        }
    }
    pthread_mutex_unlock(&pager->mutex);
}

void mig_pager_note_read(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages, uint64_t read_ns)
{
    pthread_mutex_lock(&pager->mutex);
    for (uint64_t i = 0; i < pager->waiter_count; i++)
        if (pager->waiters[i].page - first_page < count_pages)
            pager->waiters[i].read_ns = read_ns;
    pthread_mutex_unlock(&pager->mutex);
}

int mig_pager_give_back(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages)
{
    int rc = 0;

    pthread_mutex_lock(&pager->mutex);
    mig_bitmap_clear_range(&pager->requested, first_page, count_pages);
    mig_order_on_more(&pager->order, first_page);
    /* A page that a fault waits for stays claimed, by the urgent queue. */
    for (uint64_t i = 0; rc == 0 && i < pager->waiter_count; i++) {
        const uint64_t page = pager->waiters[i].page;
        if (page - first_page < count_pages && mig_bitmap_test(&pager->missing, page) &&
            mig_bitmap_set_range(&pager->requested, page, 1))
            rc = mig_push_urgent(pager, page);
    }
    pthread_cond_broadcast(&pager->faulted);
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

uint32_t mig_pager_claim_run(struct mig_pager *pager, uint32_t max_pages, uint64_t *ret_first_page)
{
    *ret_first_page = 0;
    pthread_mutex_lock(&pager->mutex);
    const uint32_t count = mig_next_run(pager, max_pages, ret_first_page);
    mig_bitmap_set_range(&pager->requested, *ret_first_page, count);
    pthread_mutex_unlock(&pager->mutex);
    return count;
}

/* ---- what came of it ---- */

int mig_pager_wait_done(struct mig_pager *pager, uint64_t timeout_us)
{
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;
    int rc;

    pthread_mutex_lock(&pager->mutex);
    const struct mig_pager_counters *counters = &pager->counters;
    while (!(rc = mig_verdict(pager)) && counters->missing_pages != counters->deferred_pages &&
           mig_wait_until(pager, &pager->settled, deadline_ns))
        ;
    if (!rc)
        rc = counters->missing_pages == counters->deferred_pages;
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

bool mig_pager_is_complete(const struct mig_pager *pager)
{
    return __atomic_load_n(&pager->is_live, __ATOMIC_ACQUIRE) &&
           !__atomic_load_n(&pager->counters.missing_pages, __ATOMIC_ACQUIRE);
}

void mig_pager_missing_map(const struct mig_pager *pager, uint32_t cells, uint8_t *ret_shares)
{
    for (uint64_t cell = 0; cell < cells; cell++) {
        const uint64_t first = cell * pager->missing.bits / cells;
        const uint64_t count = (cell + 1) * pager->missing.bits / cells - first;
        const uint64_t missing = mig_bitmap_count(&pager->missing, first, count);
        ret_shares[cell] = !missing ? 0 : missing == count ? 255 : (uint8_t)(1 + missing * 253 / count);
    }
}

const struct mig_pager_counters *mig_pager_counters(const struct mig_pager *pager)
{
    return &pager->counters;
}

void mig_pager_copy_map(struct mig_pager *pager, bool known_zero, uint8_t *ret)
{
    pthread_mutex_lock(&pager->mutex);
    const struct mig_bitmap *map = known_zero ? &pager->known_zero : &pager->missing;
    memcpy(ret, map->words, (map->bits + 7) / 8); /* bit i of a little-endian word is bit i % 8 of its byte i / 8 */
    pthread_mutex_unlock(&pager->mutex);
}

uint32_t mig_pager_drain_records(struct mig_pager *pager, struct mig_fault_record *records, uint32_t max_records)
{
    uint32_t count = 0;

    pthread_mutex_lock(&pager->mutex);
    while (count < max_records && pager->record_head != pager->record_tail)
        records[count++] = pager->records[pager->record_head++ % MIG_RECORD_RING];
    pthread_mutex_unlock(&pager->mutex);
    return count;
}
