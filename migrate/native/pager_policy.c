/* A policy runs beside the pager: it hears of faults, and names pages. Nothing here waits for it. */
#include <errno.h>

#include "pager_internal.h"

/* The policy is asked for more when its queue falls below this, and once more when it has run dry. */
enum { FEW_SUGGESTIONS = MIG_ORDER_SUGGESTIONS / 8 };

/* ---- under the mutex ---- */

void mig_note_fault(struct mig_pager *pager, const struct waiter *waiter, bool was_requested)
{
    if (!pager->notes)
        return;
    if (pager->note_tail - pager->note_head == MIG_NOTE_RING) {
        pager->note_head++;
        pager->lost_notes++;
    }
    pager->notes[pager->note_tail++ % MIG_NOTE_RING] = (struct mig_fault_note){
        .page = waiter->page,
        .event_ns = waiter->event_ns,
        .thread_id = waiter->thread_id,
        .was_requested = was_requested,
    };
    pthread_cond_signal(&pager->noted);
}

uint32_t mig_next_run(struct mig_pager *pager, uint32_t max_pages, uint64_t *ret_first_page)
{
    struct mig_order *order = &pager->order;
    const uint32_t before = mig_order_suggested(order);
    const uint32_t count = mig_order_next(order, &pager->missing, &pager->requested, max_pages,
                                          order->hold_until_ns ? mig_now_ns() : 0, ret_first_page);
    const uint32_t after = mig_order_suggested(order);

    if (after < before && (!after || (before >= FEW_SUGGESTIONS && after < FEW_SUGGESTIONS))) {
        pager->wants_runs = true;
        pthread_cond_signal(&pager->noted);
    }
    return count;
}

/* ---- for the policy's thread ---- */

int mig_pager_wait_faults(struct mig_pager *pager, struct mig_fault_note *notes, uint32_t max_notes,
                          uint64_t timeout_us, uint64_t *ret_lost, uint32_t *ret_queued)
{
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;
    int rc;

    pthread_mutex_lock(&pager->mutex);
    while (!(rc = mig_verdict(pager)) && pager->note_head == pager->note_tail && !pager->wants_runs) {
        if (mig_pager_is_complete(pager))
            rc = -ECANCELED;
        if (rc || !mig_wait_until(pager, &pager->noted, deadline_ns))
            break;
    }
    if (rc >= 0) {
        while ((uint32_t)rc < max_notes && pager->note_head != pager->note_tail)
            notes[rc++] = pager->notes[pager->note_head++ % MIG_NOTE_RING];
        pager->wants_runs = false;
        *ret_lost = pager->lost_notes;
        pager->lost_notes = 0;
        *ret_queued = mig_order_suggested(&pager->order);
    }
    pthread_mutex_unlock(&pager->mutex);
    return rc;
}

int mig_pager_suggest(struct mig_pager *pager, const struct mig_page_run *runs, uint32_t count, uint64_t hold_us)
{
    const uint64_t pages = pager->missing.bits;

    if (pager->order.kind != MIG_ORDER_SUGGESTED)
        return -EINVAL;
    for (uint32_t i = 0; i < count; i++)
        if (!runs[i].count_pages || runs[i].first_page >= pages || runs[i].count_pages > pages - runs[i].first_page)
            return -EINVAL;
    pthread_mutex_lock(&pager->mutex);
    for (uint32_t i = 0; i < count && mig_order_suggest(&pager->order, runs[i]); i++)
        ;
    mig_order_hold(&pager->order, mig_now_ns(), hold_us);
    pthread_mutex_unlock(&pager->mutex);
    return 0;
}

uint64_t mig_pager_held_ns(struct mig_pager *pager)
{
    pthread_mutex_lock(&pager->mutex);
    const uint64_t held_ns = pager->order.hold_until_ns ? mig_order_held_ns(&pager->order, mig_now_ns()) : 0;
    pthread_mutex_unlock(&pager->mutex);
    return held_ns;
}

const struct mig_bitmap *mig_pager_missing(const struct mig_pager *pager)
{
    return &pager->missing;
}
