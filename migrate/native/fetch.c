#include "fetch.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fetch_internal.h"
#include "units.h"

enum { URGENT_BATCH = 64, LINKS = 2 };
/* How often the urgent path is measured with a PING while no fault measures it. */
static const uint64_t PROBE_NS = 2000000;

/* ---- between the threads ---- */

void mig_fetch_wake(struct mig_fetch *fetch)
{
    eventfd_write(fetch->urgent.wake_fd, 1);
    eventfd_write(fetch->background.wake_fd, 1);
}

void mig_fetch_fail(struct mig_fetch *fetch, enum mig_fetch_reason reason, int error, const char *format, ...)
{
    va_list arguments;

    pthread_mutex_lock(&fetch->mutex);
    if (fetch->failure.reason == MIG_FETCH_FINE) {
        fetch->failure.reason = reason;
        fetch->failure.error = error;
        va_start(arguments, format);
        vsnprintf(fetch->failure.text, sizeof(fetch->failure.text), format, arguments);
        va_end(arguments);
    }
    pthread_cond_broadcast(&fetch->changed);
    pthread_mutex_unlock(&fetch->mutex);
    mig_fetch_wake(fetch);
}

bool mig_fetch_has_failed(struct mig_fetch *fetch)
{
    return __atomic_load_n(&fetch->failure.reason, __ATOMIC_ACQUIRE) != MIG_FETCH_FINE;
}

void mig_fetch_read_failure(struct mig_fetch *fetch, struct mig_fetch_failure *ret)
{
    pthread_mutex_lock(&fetch->mutex);
    *ret = fetch->failure;
    pthread_mutex_unlock(&fetch->mutex);
}

/* The background thread may take an epoch's round trips between the two steps: one sample is counted in the next. */
void mig_fetch_note_rtt(struct mig_fetch *fetch, uint64_t rtt_ns)
{
    uint64_t smallest = __atomic_load_n(&fetch->rtts.smallest_ns, __ATOMIC_RELAXED);
    while (rtt_ns < smallest && !__atomic_compare_exchange_n(&fetch->rtts.smallest_ns, &smallest, rtt_ns, false,
                                                             __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
    __atomic_fetch_add(&fetch->rtts.count, 1, __ATOMIC_RELAXED);
}

static bool is_stopping(struct mig_fetch *fetch)
{
    return __atomic_load_n(&fetch->stopping, __ATOMIC_ACQUIRE);
}

static void note_done(struct mig_fetch *fetch)
{
    pthread_mutex_lock(&fetch->mutex);
    fetch->done_links++;
    pthread_cond_broadcast(&fetch->changed);
    pthread_mutex_unlock(&fetch->mutex);
    mig_fetch_wake(fetch);
}

/* ---- one wait ---- */

enum { ON_WAKE, ON_SOCKET, ON_FAULT, POLLED };

/* Waits until there is something to do. Returns whether the socket is readable; *ret_fault likewise. */
static bool wait_for_work(struct mig_link *link, int uffd, uint64_t timeout_ns, bool *ret_fault)
{
    const short socket_events = (short)(link->wants_to_write ? POLLIN | POLLOUT : POLLIN);
    struct pollfd fds[POLLED] = {
        [ON_WAKE] = {.fd = link->wake_fd, .events = POLLIN},
        [ON_SOCKET] = {.fd = link->h2 ? mig_h2_fd(link->h2) : -1, .events = socket_events},
        [ON_FAULT] = {.fd = uffd, .events = POLLIN},
    };
    const bool has_unseen = link->h2 && mig_h2_has_unseen(link->h2);
    const uint64_t wait_ns = has_unseen ? 0 : timeout_ns;
    const struct timespec timeout = {
        .tv_sec = (time_t)(wait_ns / 1000000000u),
        .tv_nsec = (long)(wait_ns % 1000000000u),
    };
    eventfd_t woken;

    if (ppoll(fds, POLLED, wait_ns == UINT64_MAX ? NULL : &timeout, NULL) < 0)
        return has_unseen;
    if (fds[ON_WAKE].revents)
        eventfd_read(link->wake_fd, &woken);
    *ret_fault = fds[ON_FAULT].revents;
    return has_unseen || fds[ON_SOCKET].revents & ~POLLOUT;
}

/* Once no page is missing, ends the call; the other thread learns it too. */
static void end_if_complete(struct mig_link *link, uint64_t now_ns)
{
    if (!mig_pager_is_complete(link->fetch->pager))
        return;
    if (link->state == MIG_LINK_DOWN) {
        link->state = MIG_LINK_DONE;
    } else if (link->state == MIG_LINK_CALLING) {
        mig_link_end(link);
        mig_link_step(link, false, now_ns);
        mig_fetch_wake(link->fetch);
    }
}

/* ---- the urgent thread ---- */

/* Asks for all pages that faults claimed. Returns whether there were any. */
static bool ask_urgent(struct mig_fetch *fetch, uint64_t now_ns)
{
    uint64_t pages[URGENT_BATCH];
    struct mig_link *link = &fetch->urgent;
    bool has_asked = false;

    while (link->state == MIG_LINK_CALLING) {
        const uint32_t taken = mig_pager_take_urgent(fetch->pager, pages, URGENT_BATCH);
        for (uint32_t i = 0; i < taken; i++) {
            if (mig_link_ask(link, pages[i], 1, now_ns)) {
                fetch->counters.urgent_requests++;
                has_asked = true;
            } else {
                /* No room now: the page goes back into the queue. */
                mig_pager_give_back(fetch->pager, pages[i], 1);
                mig_fetch_wake(fetch);
            }
        }
        if (taken < URGENT_BATCH)
            break;
    }
    return has_asked;
}

/* Reads faults, whatever the state of the link. Returns false when they can be read no more. */
static bool serve_faults(struct mig_fetch *fetch)
{
    const int rc = mig_pager_read_faults(fetch->pager);
    if (rc == 0)
        return true;
    if (rc == -ESRCH || rc == -ENOENT)
        mig_fetch_fail(fetch, MIG_FETCH_GUEST, rc, "the guest process at the destination is gone");
    else
        mig_fetch_fail(fetch, MIG_FETCH_LOCAL, rc, "read page faults");
    return false;
}

static void *urgent_thread(void *argument)
{
    struct mig_fetch *fetch = argument;
    struct mig_link *link = &fetch->urgent;
    bool can_fault = true, is_done = false;

    pthread_setname_np(pthread_self(), "mig-urgent");
    mig_link_call(link, mig_now_ns());
    mig_link_step(link, false, mig_now_ns());
    while (!is_stopping(fetch)) {
        const bool probes = __atomic_load_n(&fetch->is_background_busy, __ATOMIC_RELAXED) && link->h2;
        const uint64_t patience_ns = mig_link_patience_ns(link, mig_now_ns());
        bool has_fault = false;
        const bool is_readable = wait_for_work(link, can_fault ? mig_pager_uffd(fetch->pager) : -1,
                                               probes ? mig_smaller(PROBE_NS, patience_ns) : patience_ns, &has_fault);
        const uint64_t now_ns = mig_now_ns();

        if (has_fault)
            can_fault = serve_faults(fetch);
        else if (probes && !is_readable && !link->order.count)
            mig_h2_ping(link->h2);
        const bool has_asked = ask_urgent(fetch, now_ns);
        mig_link_step(link, false, now_ns); /* requests leave before replies are looked at */
        if (has_asked)
            mig_pager_note_sent(fetch->pager, mig_now_ns());
        if (is_readable)
            mig_link_step(link, true, now_ns);
        end_if_complete(link, now_ns);
        if (link->state == MIG_LINK_DONE && !is_done) {
            is_done = true;
            note_done(fetch);
        }
    }
    return NULL;
}

/* ---- the background thread ---- */

/* Fills the window. Returns how long to wait for the cap or a policy's hold, 0 if neither is what holds us. */
static uint64_t ask_background(struct mig_fetch *fetch, uint64_t now_ns, uint64_t *cap_free_ns)
{
    struct mig_link *link = &fetch->background;

    if (now_ns < *cap_free_ns)
        return *cap_free_ns - now_ns;
    if (mig_page_offset(link->order.open_pages) > fetch->window.kept_bytes)
        return 0;
    while (link->state == MIG_LINK_CALLING && mig_page_offset(link->order.open_pages) < fetch->window.bytes) {
        uint64_t first_page, queued_bytes;
        if (mig_h2_queued(link->stream, &queued_bytes) == MIG_H2_QUEUE_MAX)
            break;
        const uint32_t count_pages = mig_pager_claim_run(fetch->pager, fetch->window.run_pages, &first_page);
        if (!count_pages)
            return mig_pager_held_ns(fetch->pager);
        if (!mig_link_ask(link, first_page, count_pages, now_ns)) {
            mig_pager_give_back(fetch->pager, first_page, count_pages);
            break;
        }
        fetch->counters.background_requests++;
        const uint64_t delay_us = mig_cap_delay_us(&fetch->cap, now_ns / 1000, mig_page_offset(count_pages));
        if (delay_us) {
            *cap_free_ns = now_ns + delay_us * 1000;
            return delay_us * 1000;
        }
    }
    return 0;
}

static void tick(struct mig_fetch *fetch, uint64_t now_ns)
{
    struct mig_window *window = &fetch->window;

    if (!mig_window_is_due(window, now_ns, __atomic_load_n(&fetch->rtts.count, __ATOMIC_RELAXED)))
        return;
    const struct mig_rtts rtts = {
        .count = __atomic_exchange_n(&fetch->rtts.count, 0, __ATOMIC_RELAXED),
        .smallest_ns = __atomic_exchange_n(&fetch->rtts.smallest_ns, UINT64_MAX, __ATOMIC_RELAXED),
    };
    if (rtts.smallest_ns == UINT64_MAX && rtts.count)
        return; /* its smallest came between the two steps of the other thread */
    mig_window_tick(window, now_ns, rtts);
    fetch->counters.window_bytes = window->bytes;
    fetch->counters.run_pages = window->run_pages;
    fetch->counters.rate_bytes_per_s = window->rate_bytes_per_s;
    fetch->counters.base_rtt_ns = window->base_rtt_ns;
    fetch->counters.queue_ns = window->queue_ns;
}

static void *background_thread(void *argument)
{
    struct mig_fetch *fetch = argument;
    struct mig_link *link = &fetch->background;
    uint64_t cap_free_ns = 0;

    pthread_setname_np(pthread_self(), "mig-background");
    mig_window_init(&fetch->window, mig_now_ns(), fetch->greeting_rtt_ns);
    mig_link_call(link, mig_now_ns());
    while (!is_stopping(fetch) && link->state != MIG_LINK_DONE && link->state != MIG_LINK_FAILED) {
        const uint64_t now_ns = mig_now_ns();
        tick(fetch, now_ns);
        const uint64_t held_ns = ask_background(fetch, now_ns, &cap_free_ns);
        mig_link_step(link, false, now_ns); /* writes */
        end_if_complete(link, now_ns);
        const bool is_busy = link->order.count != 0;
        if (is_busy && !__atomic_exchange_n(&fetch->is_background_busy, true, __ATOMIC_RELAXED))
            eventfd_write(fetch->urgent.wake_fd, 1); /* to measure its path from now on */
        else if (!is_busy)
            __atomic_store_n(&fetch->is_background_busy, false, __ATOMIC_RELAXED);
        if (link->state == MIG_LINK_DONE || link->state == MIG_LINK_FAILED)
            break;
        bool has_fault;
        const uint64_t patience_ns = mig_link_patience_ns(link, now_ns);
        if ((link->h2 && mig_h2_has_more(link->h2)) ||
            wait_for_work(link, -1, held_ns ? mig_smaller(held_ns, patience_ns) : patience_ns, &has_fault))
            mig_link_step(link, true, mig_now_ns());
    }
    __atomic_store_n(&fetch->is_background_busy, false, __ATOMIC_RELAXED);
    if (link->state == MIG_LINK_DONE)
        note_done(fetch);
    return NULL;
}

/* ---- life ---- */

static char *join(const char *a, const char *b)
{
    char *joined = malloc(strlen(a) + strlen(b) + 1);
    if (joined)
        strcpy(stpcpy(joined, a), b);
    return joined;
}

static char *authority_of(const char *host, uint16_t port)
{
    char text[128];
    snprintf(text, sizeof(text), strchr(host, ':') ? "[%s]:%u" : "%s:%u", host, port);
    return strdup(text);
}

int mig_fetch_create(const struct mig_fetch_terms *terms, struct mig_fetch **ret)
{
    struct mig_fetch *fetch = calloc(1, sizeof(*fetch));
    pthread_condattr_t attributes;

    if (!fetch)
        return -ENOMEM;
    fetch->urgent = (struct mig_link){.fetch = fetch, .kind = MIG_KIND_URGENT, .wake_fd = -1};
    fetch->background = (struct mig_link){.fetch = fetch, .kind = MIG_KIND_BACKGROUND, .wake_fd = -1};
    fetch->port = terms->port;
    fetch->verify = terms->verify;
    fetch->compression = terms->compression;
    fetch->patience = mig_patience_of(terms->peer_timeout_us);
    mig_backoff_init(&fetch->urgent.backoff);
    mig_backoff_init(&fetch->background.backoff);
    fetch->cap.bytes_per_s = terms->max_bandwidth_bytes_per_s;
    fetch->rtts.smallest_ns = UINT64_MAX;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&fetch->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&fetch->mutex, NULL);
    fetch->host = strdup(terms->host);
    fetch->migration_id = strdup(terms->migration_id);
    fetch->authorization = join("Bearer ", terms->token);
    fetch->authority = authority_of(terms->host, terms->port);
    fetch->server_name = strdup(terms->server_name ? terms->server_name : terms->host);
    fetch->tls = mig_tls_get(terms->tls);
    fetch->urgent.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    fetch->background.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!fetch->host || !fetch->migration_id || !fetch->authorization || !fetch->authority || !fetch->server_name ||
        fetch->urgent.wake_fd < 0 || fetch->background.wake_fd < 0) {
        mig_fetch_destroy(fetch);
        return -ENOMEM;
    }
    *ret = fetch;
    return 0;
}

int mig_fetch_connect(struct mig_fetch *fetch, uint64_t timeout_us)
{
    struct mig_link *links[LINKS] = {&fetch->urgent, &fetch->background};
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;

    for (int i = 0; i < LINKS; i++) {
        int rc = mig_link_open(links[i], deadline_ns);
        if (rc == 0)
            rc = mig_link_greet(links[i], deadline_ns);
        if (rc < 0) {
            const enum mig_fetch_reason reason = links[i]->is_refused ? MIG_FETCH_TLS : MIG_FETCH_LINK;
            mig_fetch_fail(fetch, reason, rc, "no page service answers at %s: %s", fetch->authority, links[i]->trouble);
            return reason;
        }
    }
    fetch->greeting_rtt_ns = fetch->rtts.count ? fetch->rtts.smallest_ns : 0;
    fetch->rtts = (struct mig_rtts){.smallest_ns = UINT64_MAX};
    return MIG_FETCH_FINE;
}

int mig_fetch_start(struct mig_fetch *fetch, struct mig_pager *pager)
{
    fetch->pager = pager;
    int rc = -pthread_create(&fetch->urgent_thread, NULL, urgent_thread, fetch);
    if (rc < 0)
        return rc;
    fetch->threads = 1;
    rc = -pthread_create(&fetch->background_thread, NULL, background_thread, fetch);
    fetch->threads += rc == 0;
    return rc;
}

int mig_fetch_wait(struct mig_fetch *fetch, uint64_t timeout_us)
{
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;
    const struct timespec deadline = {
        .tv_sec = (time_t)(deadline_ns / 1000000000u),
        .tv_nsec = (long)(deadline_ns % 1000000000u),
    };
    int rc = 0;

    pthread_mutex_lock(&fetch->mutex);
    while (fetch->done_links < LINKS && !is_stopping(fetch) && !mig_fetch_has_failed(fetch) && rc != ETIMEDOUT)
        rc = pthread_cond_timedwait(&fetch->changed, &fetch->mutex, &deadline);
    rc = mig_fetch_has_failed(fetch) ? -EIO : fetch->done_links == LINKS ? 1 : is_stopping(fetch) ? -ECANCELED : 0;
    pthread_mutex_unlock(&fetch->mutex);
    return rc;
}

void mig_fetch_stop(struct mig_fetch *fetch)
{
    pthread_mutex_lock(&fetch->mutex);
    __atomic_store_n(&fetch->stopping, true, __ATOMIC_RELEASE);
    const unsigned threads = fetch->threads;
    fetch->threads = 0;
    pthread_cond_broadcast(&fetch->changed);
    pthread_mutex_unlock(&fetch->mutex);
    mig_fetch_wake(fetch);
    if (threads >= 1)
        pthread_join(fetch->urgent_thread, NULL);
    if (threads >= 2)
        pthread_join(fetch->background_thread, NULL);
}

void mig_fetch_destroy(struct mig_fetch *fetch)
{
    if (!fetch)
        return;
    mig_fetch_stop(fetch);
    for (int i = 0; i < LINKS; i++) {
        struct mig_link *link = i ? &fetch->background : &fetch->urgent;
        mig_link_close(link);
        mig_reply_order_deinit(&link->order);
        mig_decompressor_destroy(link->decompressor);
        if (link->wake_fd >= 0)
            close(link->wake_fd);
    }
    pthread_cond_destroy(&fetch->changed);
    pthread_mutex_destroy(&fetch->mutex);
    free(fetch->host);
    free(fetch->migration_id);
    free(fetch->authorization);
    free(fetch->authority);
    free(fetch->server_name);
    mig_tls_put(fetch->tls);
    free(fetch);
}

const struct mig_fetch_counters *mig_fetch_counters(const struct mig_fetch *fetch)
{
    return &fetch->counters;
}
