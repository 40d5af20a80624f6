#include "pager.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "bitmap.h"
#include "digest.h"
#include "uffd.h"
#include "units.h"

enum { EVENT_BATCH = 64, RECORD_RING = 1 << 16, DIGEST_RUN_PAGES_MAX = 4096 };

/* A fault whose page has not come. */
struct waiter {
    uint64_t page;
    uint64_t event_ns;
    uint32_t thread_id;
};

struct mig_pager {
    int uffd;
    int stop_fd;
    uint64_t region_hva;
    pthread_t fault_thread;

    pthread_mutex_t mutex; /* guards all below; never held across an ioctl */
    pthread_cond_t changed;
    bool stopped;
    int error; /* what ended the fault thread: -errno, or 0 */
    struct mig_bitmap missing;
    struct mig_bitmap requested;
    struct mig_bitmap known_zero;
    uint64_t run_cursor;
    uint64_t *urgent; /* claimed by a fault, not yet taken by claim_urgent: a stack would starve, so a queue */
    uint64_t urgent_head, urgent_tail, urgent_capacity;
    struct waiter *waiters;
    uint64_t waiter_count, waiter_capacity;
    struct mig_fault_record *records;
    uint64_t record_head, record_tail;
    struct mig_pager_counters counters;
};

static uint64_t page_hva(const struct mig_pager *pager, uint64_t page)
{
    return pager->region_hva + mig_page_offset(page);
}

/* ---- under the mutex ---- */

static void record_fault(struct mig_pager *pager, const struct waiter *waiter, uint64_t placed_ns, uint32_t kind)
{
    if (pager->record_tail - pager->record_head == RECORD_RING) {
        pager->record_head++;
        pager->counters.lost_records++;
    }
    pager->records[pager->record_tail++ % RECORD_RING] = (struct mig_fault_record){
        .page = waiter->page,
        .event_ns = waiter->event_ns,
        .placed_ns = placed_ns,
        .thread_id = waiter->thread_id,
        .kind = kind,
    };
}

/* Closes the books on the waiters of [first, first + count). */
static void settle_waiters(struct mig_pager *pager, uint64_t first, uint64_t count, uint32_t kind)
{
    const uint64_t now_ns = pager->waiter_count ? mig_now_ns() : 0;

    for (uint64_t i = 0; i < pager->waiter_count;) {
        if (pager->waiters[i].page - first >= count) {
            i++;
            continue;
        }
        record_fault(pager, &pager->waiters[i], now_ns, kind);
        pager->waiters[i] = pager->waiters[--pager->waiter_count];
    }
}

static int add_waiter(struct mig_pager *pager, const struct waiter *waiter)
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

static int push_urgent(struct mig_pager *pager, uint64_t page)
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

/* Takes pages off the missing bitmap; returns how many were on it. */
static uint64_t no_longer_missing(struct mig_pager *pager, uint64_t first, uint64_t count)
{
    const uint64_t arrived = mig_bitmap_clear_range(&pager->missing, first, count);

    pager->counters.missing_pages -= arrived;
    pager->counters.duplicate_pages += count - arrived;
    if (!pager->counters.missing_pages)
        pthread_cond_broadcast(&pager->changed);
    return arrived;
}

static void fail(struct mig_pager *pager, int error)
{
    if (!pager->error)
        pager->error = error;
    pthread_cond_broadcast(&pager->changed);
}

/* What a waiting call must answer at once, 0 if it may wait. */
static int verdict(const struct mig_pager *pager)
{
    return pager->error ? pager->error : pager->stopped ? -ECANCELED : 0;
}

/* Waits for a change until deadline_ns, then returns false. */
static bool wait_for_change(struct mig_pager *pager, uint64_t deadline_ns)
{
    const struct timespec deadline = {
        .tv_sec = (time_t)(deadline_ns / 1000000000u),
        .tv_nsec = (long)(deadline_ns % 1000000000u),
    };
    return pthread_cond_timedwait(&pager->changed, &pager->mutex, &deadline) != ETIMEDOUT;
}

/* ---- the fault thread ---- */

enum fault_action { FAULT_WAITS, FAULT_PLACE_ZERO, FAULT_WAKE };

static int on_fault(struct mig_pager *pager, const struct waiter *waiter, enum fault_action *ret)
{
    int rc = 0;

    pthread_mutex_lock(&pager->mutex);
    pager->counters.faults++;
    if (mig_bitmap_test(&pager->missing, waiter->page)) {
        *ret = FAULT_WAITS;
        rc = add_waiter(pager, waiter);
        if (rc == 0 && mig_bitmap_set_range(&pager->requested, waiter->page, 1)) {
            rc = push_urgent(pager, waiter->page);
            pthread_cond_broadcast(&pager->changed);
        }
    } else {
        *ret = mig_bitmap_test(&pager->known_zero, waiter->page) ? FAULT_PLACE_ZERO : FAULT_WAKE;
    }
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

static int settle_fault_now(struct mig_pager *pager, const struct waiter *waiter, enum fault_action action)
{
    uint64_t placed_bytes;
    const uint64_t hva = page_hva(pager, waiter->page);
    const int rc = action == FAULT_PLACE_ZERO ? mig_uffd_zeropage(pager->uffd, hva, MIG_PAGE_SIZE_BYTES, &placed_bytes)
                                              : mig_uffd_wake(pager->uffd, hva, MIG_PAGE_SIZE_BYTES);
    if (rc < 0 && rc != -ENOENT) /* ENOENT: the range was let go, which woke the waiter */
        return rc;
    pthread_mutex_lock(&pager->mutex);
    record_fault(pager, waiter, mig_now_ns(), action == FAULT_PLACE_ZERO ? MIG_KIND_ZERO : MIG_KIND_PRESENT);
    pthread_mutex_unlock(&pager->mutex);
    return 0;
}

/* Reads all events that wait. Returns 0 or -errno. */
static int read_faults(struct mig_pager *pager)
{
    struct uffd_msg events[EVENT_BATCH];
    const ssize_t got = read(pager->uffd, events, sizeof(events));
    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    const uint64_t now_ns = mig_now_ns();

    for (size_t i = 0; i < (size_t)got / sizeof(*events); i++) {
        if (events[i].event != UFFD_EVENT_PAGEFAULT)
            return -EPROTO; /* no other event was asked for */
        const struct waiter waiter = {
            .page = mig_offset_page(events[i].arg.pagefault.address - pager->region_hva),
            .event_ns = now_ns,
            .thread_id = events[i].arg.pagefault.feat.ptid,
        };
        enum fault_action action = FAULT_WAITS;
        int rc = waiter.page < pager->missing.bits ? on_fault(pager, &waiter, &action) : -ERANGE;
        if (rc == 0 && action != FAULT_WAITS)
            rc = settle_fault_now(pager, &waiter, action);
        if (rc < 0)
            return rc;
    }
    return 0;
}

static void *fault_thread(void *argument)
{
    struct mig_pager *pager = argument;
    struct pollfd fds[2] = {{.fd = pager->uffd, .events = POLLIN}, {.fd = pager->stop_fd, .events = POLLIN}};
    int rc = 0;

    pthread_setname_np(pthread_self(), "mig-fault");
    while (rc == 0) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            rc = -errno;
        else if (fds[1].revents)
            return NULL;
        else if (fds[0].revents & (POLLERR | POLLNVAL))
            rc = -EBADF;
        else if (fds[0].revents)
            rc = read_faults(pager);
    }
    pthread_mutex_lock(&pager->mutex);
    fail(pager, rc);
    pthread_mutex_unlock(&pager->mutex);
    return NULL;
}

/* ---- life ---- */

static int init_maps(struct mig_pager *pager, uint64_t pages)
{
    pager->records = malloc(RECORD_RING * sizeof(*pager->records));
    if (!pager->records || mig_bitmap_init(&pager->missing, pages) || mig_bitmap_init(&pager->requested, pages) ||
        mig_bitmap_init(&pager->known_zero, pages))
        return -ENOMEM;
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
    pthread_cond_destroy(&pager->changed);
    pthread_mutex_destroy(&pager->mutex);
    free(pager->urgent);
    free(pager->waiters);
    free(pager->records);
    free(pager);
}

int mig_pager_create(int uffd, uint64_t region_hva, uint64_t pages, struct mig_pager **ret)
{
    struct mig_pager *pager = calloc(1, sizeof(*pager));
    if (!pager)
        return -ENOMEM;
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&pager->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&pager->mutex, NULL);
    pager->uffd = uffd;
    pager->region_hva = region_hva;
    pager->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    int rc = pager->stop_fd < 0 ? -errno : init_maps(pager, pages);
    if (rc == 0)
        rc = -pthread_create(&pager->fault_thread, NULL, fault_thread, pager);
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
    pthread_cond_broadcast(&pager->changed);
    pthread_mutex_unlock(&pager->mutex);
    eventfd_write(pager->stop_fd, 1);
}

void mig_pager_destroy(struct mig_pager *pager)
{
    if (!pager)
        return;
    mig_pager_stop(pager);
    pthread_join(pager->fault_thread, NULL);
    close(pager->uffd);
    free_pager(pager);
}

/* ---- what to ask for ---- */

int mig_pager_claim_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages, uint64_t timeout_us)
{
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;
    int rc;

    pthread_mutex_lock(&pager->mutex);
    while (!(rc = verdict(pager)) && pager->urgent_head == pager->urgent_tail) {
        if (!pager->counters.missing_pages)
            rc = -ECANCELED;
        if (rc || !wait_for_change(pager, deadline_ns))
            break;
    }
    while (rc >= 0 && (uint32_t)rc < max_pages && pager->urgent_head != pager->urgent_tail) {
        pages[rc] = pager->urgent[pager->urgent_head++ % pager->urgent_capacity];
        /* A hole that was told whole may have settled it meanwhile. */
        rc += mig_bitmap_test(&pager->missing, pages[rc]);
    }
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

uint32_t mig_pager_claim_run(struct mig_pager *pager, uint32_t max_pages, uint64_t *ret_first_page)
{
    uint32_t count = 0;

    pthread_mutex_lock(&pager->mutex);
    const uint64_t bits = pager->missing.bits;
    uint64_t page = mig_bitmap_next_set(&pager->missing, pager->run_cursor);
    /* The cursor only moves on: all pages before it are claimed, so one pass finds every page. */
    while (page < bits && mig_bitmap_test(&pager->requested, page))
        page = mig_bitmap_next_set(&pager->missing, mig_bitmap_next_clear(&pager->requested, page));
    *ret_first_page = page;
    if (page < bits) {
        uint64_t end = mig_bitmap_next_clear(&pager->missing, page);
        const uint64_t asked = mig_bitmap_next_set(&pager->requested, page);
        end = asked < end ? asked : end;
        count = (uint32_t)(end - page < max_pages ? end - page : max_pages);
        mig_bitmap_set_range(&pager->requested, page, count);
    }
    pager->run_cursor = page + count;
    pthread_mutex_unlock(&pager->mutex);
    return count;
}

/* ---- placement ---- */

static bool in_region(const struct mig_pager *pager, uint64_t first_page, uint64_t count_pages)
{
    return count_pages && first_page < pager->missing.bits && count_pages <= pager->missing.bits - first_page;
}

/* Counts pages that are present now, however they came to be. */
static void count_present(struct mig_pager *pager, uint64_t first, uint64_t count, enum mig_page_kind kind,
                          const uint64_t *page_digests)
{
    pthread_mutex_lock(&pager->mutex);
    if (page_digests)
        for (uint64_t i = 0; i < count; i++)
            if (mig_bitmap_test(&pager->missing, first + i)) {
                pager->counters.verified_pages++;
                pager->counters.memory_digest += mig_digest_memory_term(first + i, page_digests[i]);
            }
    const uint64_t arrived = no_longer_missing(pager, first, count);
    if (kind == MIG_KIND_URGENT)
        pager->counters.urgent_pages += arrived;
    else
        pager->counters.background_pages += arrived;
    settle_waiters(pager, first, count, kind);
    pthread_mutex_unlock(&pager->mutex);
}

int mig_pager_place_data(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages, const void *data,
                         enum mig_page_kind kind, bool verify, uint64_t digest)
{
    uint64_t *page_digests = NULL;
    int rc = 0;

    if (!in_region(pager, first_page, count_pages) || (verify && count_pages > DIGEST_RUN_PAGES_MAX))
        return -EINVAL;
    if (verify) {
        page_digests = malloc(count_pages * sizeof(*page_digests));
        if (!page_digests)
            return -ENOMEM;
        for (uint64_t i = 0; i < count_pages; i++)
            page_digests[i] = mig_digest_page((const char *)data + mig_page_offset(i));
        if (mig_digest_run(page_digests, count_pages) != digest)
            rc = -EBADMSG;
    }
    for (uint64_t done = 0; rc >= 0 && done < count_pages;) {
        uint64_t placed_bytes;
        rc = mig_uffd_copy(pager->uffd, page_hva(pager, first_page + done), (const char *)data + mig_page_offset(done),
                           mig_page_offset(count_pages - done), &placed_bytes);
        /* MIG_PLACE_PRESENT stopped at a page that is there already: it counts too, and we go on behind it. */
        const uint64_t settled = mig_offset_page(placed_bytes) + (rc == MIG_PLACE_PRESENT);
        if (settled)
            count_present(pager, first_page + done, settled, kind, page_digests ? page_digests + done : NULL);
        done += settled;
    }
    free(page_digests);
    return rc < 0 ? rc : 0;
}

/* The next waiter's page in a range, with its books closed; false if there is none. */
static bool next_waiting_page(struct mig_pager *pager, uint64_t first, uint64_t count, uint64_t *ret_page)
{
    bool found = false;

    pthread_mutex_lock(&pager->mutex);
    for (uint64_t i = 0; !found && i < pager->waiter_count; i++) {
        found = pager->waiters[i].page - first < count;
        *ret_page = pager->waiters[i].page;
    }
    pthread_mutex_unlock(&pager->mutex);
    return found;
}

int mig_pager_place_zero(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages)
{
    if (!in_region(pager, first_page, count_pages))
        return -EINVAL;
    pthread_mutex_lock(&pager->mutex);
    /* Only what was missing is known to be zero now: the rest may hold data that the guest has written since. */
    for (uint64_t page = mig_bitmap_next_set(&pager->missing, first_page); page < first_page + count_pages;) {
        const uint64_t clear = mig_bitmap_next_clear(&pager->missing, page);
        const uint64_t end = clear < first_page + count_pages ? clear : first_page + count_pages;
        mig_bitmap_set_range(&pager->known_zero, page, end - page);
        page = mig_bitmap_next_set(&pager->missing, end);
    }
    const uint64_t duplicates_before = pager->counters.duplicate_pages;
    pager->counters.zero_pages += no_longer_missing(pager, first_page, count_pages);
    /* A hole told beyond the request overlaps what others asked for; that is no page sent twice. */
    pager->counters.duplicate_pages = duplicates_before;
    pthread_mutex_unlock(&pager->mutex);

    for (uint64_t page; next_waiting_page(pager, first_page, count_pages, &page);) {
        uint64_t placed_bytes;
        const int rc = mig_uffd_zeropage(pager->uffd, page_hva(pager, page), MIG_PAGE_SIZE_BYTES, &placed_bytes);
        if (rc < 0 && rc != -ENOENT)
            return rc;
        pthread_mutex_lock(&pager->mutex);
        settle_waiters(pager, page, 1, MIG_KIND_ZERO);
        pthread_mutex_unlock(&pager->mutex);
    }
    return 0;
}

/* ---- what came of it ---- */

int mig_pager_wait_done(struct mig_pager *pager, uint64_t timeout_us)
{
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;
    int rc;

    pthread_mutex_lock(&pager->mutex);
    while (!(rc = verdict(pager)) && pager->counters.missing_pages && wait_for_change(pager, deadline_ns))
        ;
    if (!rc)
        rc = pager->counters.missing_pages == 0;
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

void mig_pager_read_counters(struct mig_pager *pager, struct mig_pager_counters *ret)
{
    pthread_mutex_lock(&pager->mutex);
    *ret = pager->counters;
    pthread_mutex_unlock(&pager->mutex);
}

uint32_t mig_pager_drain_records(struct mig_pager *pager, struct mig_fault_record *records, uint32_t max_records)
{
    uint32_t count = 0;

    pthread_mutex_lock(&pager->mutex);
    while (count < max_records && pager->record_head != pager->record_tail)
        records[count++] = pager->records[pager->record_head++ % RECORD_RING];
    pthread_mutex_unlock(&pager->mutex);
    return count;
}
