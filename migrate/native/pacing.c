#include "pacing.h"

#include "units.h"

enum {
    RTTS_TO_START = 2,
    RTTS_ENOUGH = 16, /* the smallest of so many is not the CPUs' doing, mostly */
    FOREIGN_FADES = 16,
    SHRINKS_BY = 4, /* at most so large a part of the window at a time: what is foreign shows in between */
    GROWS_BY = 8,
    RUN_PAGES_MIN = 8,   /* below this, what a message costs is more than what its pages do */
    RUN_PAGES_MAX = 64,  /* UFFDIO_COPY reaches its plateau at 64 KiB, the wire at 256 KiB */
    RUNS_PER_WINDOW = 4, /* so that one is on its way while another is placed */
    BURST_US = 20000,
};
static const uint64_t SECOND_NS = 1000000000u;
static const uint64_t WINDOW_BYTES_FIRST = 64 << 10, WINDOW_BYTES_MIN = 16 << 10;
/* Without a long path, more in flight than this only delays faults on pages that are on their way. */
static const uint64_t WINDOW_BYTES_ENOUGH = 2 << 20, WINDOW_BYTES_MAX = 16 << 20;
/* What keeps the source at work while a request wakes it. */
static const uint64_t KEPT_BYTES_ENOUGH = 768 << 10;
static const uint64_t QUEUE_TARGET_NS = 200000;
static const uint64_t EPOCH_NS_MIN = 4000000, EPOCH_NS_PATIENT = 40000000;

static uint64_t larger(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* Bytes that a rate delivers in a time; both are below 2^40. */
static uint64_t delivered_in(uint64_t rate_bytes_per_s, uint64_t duration_ns)
{
    return (uint64_t)((unsigned __int128)rate_bytes_per_s * duration_ns / SECOND_NS);
}

static void resize(struct mig_window *window, uint64_t bytes)
{
    /* A path of two round trips' worth of bytes lets the window double as long as that pays. */
    const uint64_t path_bytes = 2 * delivered_in(window->rate_bytes_per_s, window->base_rtt_ns);
    const uint64_t most = mig_smaller(WINDOW_BYTES_MAX, larger(WINDOW_BYTES_ENOUGH, path_bytes));

    window->bytes = larger(WINDOW_BYTES_MIN, mig_smaller(bytes, most));
    window->kept_bytes = mig_smaller(window->bytes / 4 * 3, larger(KEPT_BYTES_ENOUGH, path_bytes));
    const uint64_t run_pages = mig_offset_page(window->bytes / RUNS_PER_WINDOW);
    window->run_pages = (uint32_t)larger(RUN_PAGES_MIN, mig_smaller(run_pages, RUN_PAGES_MAX));
}

void mig_window_init(struct mig_window *window, uint64_t now_ns, uint64_t base_rtt_ns)
{
    *window = (struct mig_window){.epoch_begin_ns = now_ns, .base_rtt_ns = base_rtt_ns, .is_starting = true};
    resize(window, WINDOW_BYTES_FIRST);
}

void mig_window_on_delivery(struct mig_window *window, uint64_t bytes)
{
    window->epoch_bytes += bytes;
}

bool mig_window_is_due(const struct mig_window *window, uint64_t now_ns, uint64_t rtt_count)
{
    const uint64_t elapsed_ns = now_ns - window->epoch_begin_ns;
    const uint64_t least_ns = larger(EPOCH_NS_MIN, 2 * window->base_rtt_ns);
    const uint64_t enough = window->is_starting ? RTTS_TO_START : RTTS_ENOUGH;

    return elapsed_ns >= least_ns && (rtt_count >= enough || elapsed_ns >= EPOCH_NS_PATIENT);
}

static void measure_rate(struct mig_window *window, uint64_t now_ns)
{
    const uint64_t elapsed_ns = larger(1, now_ns - window->epoch_begin_ns);

    window->recent_rates[window->epochs++ % MIG_WINDOW_EPOCHS] =
        (uint64_t)((unsigned __int128)window->epoch_bytes * SECOND_NS / elapsed_ns);
    window->rate_bytes_per_s = 0;
    for (unsigned i = 0; i < MIG_WINDOW_EPOCHS; i++)
        window->rate_bytes_per_s = larger(window->rate_bytes_per_s, window->recent_rates[i]);
    window->epoch_begin_ns = now_ns;
    window->epoch_bytes = 0;
}

/* How long the queue is, once what is not ours has been left out. */
static void measure_queue(struct mig_window *window, uint64_t smallest_rtt_ns)
{
    const uint64_t wait_ns = smallest_rtt_ns - window->base_rtt_ns;
    const uint64_t queue_ns = wait_ns - mig_smaller(wait_ns, window->foreign_ns);
    const uint64_t dropped_ns = window->queue_ns - mig_smaller(window->queue_ns, queue_ns);
    const uint64_t surprise_ns = window->expected_drop_ns - mig_smaller(window->expected_drop_ns, dropped_ns);

    window->foreign_ns -= window->foreign_ns / FOREIGN_FADES;
    window->foreign_ns = mig_smaller(window->foreign_ns + surprise_ns, wait_ns);
    window->queue_ns = wait_ns - mig_smaller(wait_ns, window->foreign_ns);
}

void mig_window_tick(struct mig_window *window, uint64_t now_ns, struct mig_rtts rtts)
{
    const uint64_t rtt_ns = rtts.smallest_ns;

    measure_rate(window, now_ns);
    if (!rtts.count)
        return;
    if (!window->base_rtt_ns || rtt_ns < window->base_rtt_ns)
        window->base_rtt_ns = rtt_ns;
    measure_queue(window, rtt_ns);
    const uint64_t target_ns = larger(QUEUE_TARGET_NS, window->base_rtt_ns / 4);
    const uint64_t before_bytes = window->bytes;
    window->expected_drop_ns = 0;
    window->is_starting &= window->queue_ns < target_ns / 2;
    if (window->is_starting) {
        resize(window, 2 * before_bytes);
    } else if (window->queue_ns > target_ns) {
        const uint64_t excess = delivered_in(window->rate_bytes_per_s, window->queue_ns - target_ns);
        resize(window, before_bytes - mig_smaller(excess, before_bytes / SHRINKS_BY));
        if (window->rate_bytes_per_s)
            window->expected_drop_ns = (before_bytes - window->bytes) * SECOND_NS / window->rate_bytes_per_s;
    } else {
        /* In bytes where the queue is known, in proportion where it is not; less and less towards the target. */
        const uint64_t missing_ns = target_ns - window->queue_ns;
        const uint64_t missing = delivered_in(window->rate_bytes_per_s, missing_ns) / 2;
        resize(window, before_bytes + missing + before_bytes / GROWS_BY * missing_ns / target_ns);
    }
}

uint64_t mig_cap_delay_us(struct mig_cap *cap, uint64_t now_us, uint64_t count_bytes)
{
    if (!cap->bytes_per_s)
        return 0;
    const uint64_t start_us = larger(cap->free_at_us, now_us < BURST_US ? 0 : now_us - BURST_US);
    cap->free_at_us = start_us + count_bytes * 1000000u / cap->bytes_per_s;
    return start_us > now_us ? start_us - now_us : 0;
}
