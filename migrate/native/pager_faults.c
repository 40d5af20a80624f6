#include <errno.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <unistd.h>

#include "pager_internal.h"
#include "uffd.h"

enum { EVENT_BATCH = 64 };

enum fault_action { FAULT_WAITS, FAULT_PLACE_ZERO, FAULT_WAKE, FAULT_LOST };

/* Under the mutex. Unless somebody has asked for the page, it is urgent. */
static int claim_fault(struct mig_pager *pager, const struct waiter *waiter)
{
    const bool was_requested = !mig_bitmap_set_range(&pager->requested, waiter->page, 1);

    mig_note_fault(pager, waiter, was_requested);
    if (was_requested)
        return 0;
    mig_order_on_fault(&pager->order, waiter->page);
    pthread_cond_broadcast(&pager->faulted);
    return mig_push_urgent(pager, waiter->page);
}

static int on_fault(struct mig_pager *pager, const struct waiter *waiter, enum fault_action *ret)
{
    int rc = 0;

    pthread_mutex_lock(&pager->mutex);
    pager->counters.faults++;
    if (mig_bitmap_test(&pager->missing, waiter->page) && pager->is_lost) {
        *ret = FAULT_LOST; /* it meets the poison when it faults again */
    } else if (mig_bitmap_test(&pager->missing, waiter->page)) {
        *ret = FAULT_WAITS;
        rc = mig_add_waiter(pager, waiter);
        if (rc == 0)
            rc = claim_fault(pager, waiter);
    } else {
        *ret = mig_bitmap_test(&pager->known_zero, waiter->page) ? FAULT_PLACE_ZERO : FAULT_WAKE;
    }
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

static int settle_fault_now(struct mig_pager *pager, const struct waiter *waiter, enum fault_action action)
{
    uint64_t placed_bytes;
    const uint64_t hva = mig_page_hva(pager, waiter->page);
    const int rc = action == FAULT_PLACE_ZERO ? mig_uffd_zeropage(pager->uffd, hva, MIG_PAGE_SIZE_BYTES, &placed_bytes)
                                              : mig_uffd_wake(pager->uffd, hva, MIG_PAGE_SIZE_BYTES);
    if (rc < 0 && rc != -ENOENT) /* ENOENT: the range was let go, which woke the waiter */
        return rc;
    if (action == FAULT_LOST)
        return 0;
    pthread_mutex_lock(&pager->mutex);
    mig_record_fault(pager, waiter, 0, mig_now_ns(), action == FAULT_PLACE_ZERO ? MIG_KIND_ZERO : MIG_KIND_PRESENT);
    pthread_mutex_unlock(&pager->mutex);
    return 0;
}

int mig_pager_read_faults(struct mig_pager *pager)
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
            rc = mig_pager_read_faults(pager);
    }
    mig_pager_fail(pager, rc);
    return NULL;
}

int mig_pager_start_fault_thread(struct mig_pager *pager)
{
    if (pager->has_fault_thread)
        return 0;
    const int rc = -pthread_create(&pager->fault_thread, NULL, fault_thread, pager);
    pager->has_fault_thread = rc == 0;
    return rc;
}
