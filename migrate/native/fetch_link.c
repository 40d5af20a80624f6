#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "fetch_internal.h"
#include "tcp.h"
#include "units.h"
#include "wire.h"

static const char PATH[] = "/migrate.v1.PageService/FetchPages";
/* A source that is silent this long though we ask (PING) is not there. */
static const uint64_t PING_AFTER_NS = 1000000000u, SILENT_NS = 5000000000u;
/* One that answers PING, but not what was asked of it, is not much better. */
static const uint64_t UNANSWERED_NS = 10000000000u;
/* A link that cannot be made again for this long has failed. */
static const uint64_t LOST_NS = 5000000000u, BACKOFF_FIRST_NS = 20000000u, BACKOFF_MAX_NS = 1000000000u;
static const uint64_t PROVEN_NS = 1000000000u;
static const uint64_t CONNECT_AGAIN_US = 500000;
static const uint64_t NEVER_NS = UINT64_MAX;

/* The largest response is a full request of data and its few fields. */
enum { MESSAGE_BYTES_MAX = (1 << 20) + 4096, GREETING_PINGS = 4 };
static const struct mig_h2_limits URGENT_LIMITS = {
    .message_bytes_max = MESSAGE_BYTES_MAX,
    .receive_bytes = 64 << 10,
    .frame_bytes_max = 16 << 10,
    .window_bytes = 1 << 20,
};
/* The staging message and what the socket hands over at a time share the L2 cache. */
static const struct mig_h2_limits BACKGROUND_LIMITS = {
    .message_bytes_max = MESSAGE_BYTES_MAX,
    .receive_bytes = 256 << 10,
    .frame_bytes_max = 1 << 20,
    .window_bytes = 16 << 20,
};

static const char *name_of(const struct mig_link *link)
{
    return link->kind == MIG_KIND_URGENT ? "urgent" : "background";
}

static uint64_t *wire_bytes_of(struct mig_link *link)
{
    struct mig_fetch_counters *counters = &link->fetch->counters;
    return link->kind == MIG_KIND_URGENT ? &counters->urgent_wire_bytes : &counters->background_wire_bytes;
}

/* ---- what comes ---- */

static enum mig_status refuse(struct mig_link *link, enum mig_fetch_reason reason, int error, const char *text)
{
    link->state = MIG_LINK_FAILED;
    mig_fetch_fail(link->fetch, reason, error, "%s", text);
    return MIG_STATUS_CANCELLED;
}

static enum mig_status refuse_placement(struct mig_link *link, const struct mig_fetch_response *response, int rc)
{
    char text[160];

    if (rc == -EBADMSG) {
        snprintf(text, sizeof(text), "pages %llu to %llu do not have the source's digest",
                 (unsigned long long)response->first_page,
                 (unsigned long long)(response->first_page + response->page_count));
        return refuse(link, MIG_FETCH_INTEGRITY, 0, text);
    }
    if (rc == -EINVAL) {
        snprintf(text, sizeof(text), "%u pages from %llu do not lie within the guest's memory", response->page_count,
                 (unsigned long long)response->first_page);
        return refuse(link, MIG_FETCH_PROTOCOL, 0, text);
    }
    if (rc == -ESRCH)
        return refuse(link, MIG_FETCH_GUEST, 0, "the guest process at the destination is gone");
    return refuse(link, MIG_FETCH_LOCAL, rc, "place pages");
}

static int place(struct mig_link *link, const struct mig_fetch_response *response)
{
    struct mig_fetch *fetch = link->fetch;
    struct mig_pager *pager = fetch->pager;
    const uint64_t total_pages = mig_pager_counters(pager)->total_pages;

    if (response->content == MIG_CONTENT_DATA)
        return mig_pager_place_data(pager, response->generation, response->first_page, response->page_count,
                                    response->data, link->kind, fetch->verify, response->digest);
    if (response->first_page >= total_pages)
        return -EINVAL;
    /* A hole is told as far as it goes, perhaps to the end of a larger file than our region. */
    const uint64_t room = total_pages - response->first_page;
    return mig_pager_place_zero(pager, response->generation, response->first_page,
                                response->page_count < room ? response->page_count : room);
}

/* Why a reply cannot be the answer to anything; NULL if it may be. */
static const char *flaw_of(const struct mig_link *link, const struct mig_fetch_response *response)
{
    if (response->content == MIG_CONTENT_NONE)
        return "the source sent a reply without content";
    if (response->region != 0)
        return "the source sent pages of a region that the guest does not have";
    if (response->content == MIG_CONTENT_DATA && response->data_bytes != mig_page_offset(response->page_count))
        return "the source sent a run that is not as long as it says";
    if (response->content != MIG_CONTENT_COMPRESSED)
        return NULL;
    if (link->fetch->compression != MIG_COMPRESSION_ZSTD)
        return "the source sent a compressed run, but no compression was agreed on";
    if (response->compression != MIG_COMPRESSION_ZSTD)
        return "the source sent a run in another compression than zstd, which was agreed on";
    return NULL;
}

/* Makes a compressed run plain data. Returns 0, or -errno with the link refused. */
static int decompress(struct mig_link *link, struct mig_fetch_response *response)
{
    char text[256];
    int rc = link->decompressor ? 0 : mig_decompressor_create(&link->decompressor);

    if (rc == 0)
        rc = mig_decompress_run(link->decompressor, response->data, response->data_bytes, response->page_count,
                                &response->data);
    if (rc == -EBADMSG) {
        snprintf(text, sizeof(text), "the source sent %s", mig_decompressor_flaw(link->decompressor));
        refuse(link, MIG_FETCH_PROTOCOL, 0, text);
    } else if (rc < 0) {
        refuse(link, MIG_FETCH_LOCAL, rc, "decompress pages");
    }
    response->content = MIG_CONTENT_DATA;
    response->data_bytes = mig_page_offset(response->page_count);
    return rc;
}

static enum mig_status on_message(void *user, struct mig_h2_stream *stream, const uint8_t *message, size_t bytes)
{
    struct mig_link *link = user;
    struct mig_fetch_response response;
    struct mig_asked asked;

    (void)stream;
    if (mig_wire_decode_response(message, bytes, &response) < 0)
        return refuse(link, MIG_FETCH_PROTOCOL, 0, "the source sent a message that is not a FetchPagesResponse");
    const char *flaw = flaw_of(link, &response);
    if (flaw)
        return refuse(link, MIG_FETCH_PROTOCOL, 0, flaw);
    const int answered = mig_reply_order_answer(&link->order, response.request_id, response.first_page,
                                                response.page_count, response.content == MIG_CONTENT_ZERO, &asked);
    if (answered < 0)
        return refuse(link, MIG_FETCH_PROTOCOL, 0, link->order.flaw);
    if (answered && link->kind == MIG_KIND_URGENT)
        mig_fetch_note_rtt(link->fetch, mig_h2_heard_ns(link->h2) - asked.asked_ns);
    if (answered && link->kind == MIG_KIND_BACKGROUND)
        mig_window_on_delivery(&link->fetch->window, mig_page_offset(asked.count_pages));
    link->lost_ns = link->backoff_ns = 0;
    link->progress_ns = mig_h2_heard_ns(link->h2);
    if (response.content == MIG_CONTENT_COMPRESSED && decompress(link, &response) < 0)
        return MIG_STATUS_CANCELLED;
    const int rc = place(link, &response);
    return rc < 0 ? refuse_placement(link, &response, rc) : MIG_STATUS_OK;
}

static void note_end(struct mig_link *link, struct mig_h2_stream *stream)
{
    const char *text;

    link->has_call_ended = true;
    link->call_status = mig_h2_status(stream, &text);
    snprintf(link->call_text, sizeof(link->call_text), "%s", text);
}

static void on_end(void *user, struct mig_h2_stream *stream)
{
    note_end(user, stream);
}

static void on_close(void *user, struct mig_h2_stream *stream)
{
    struct mig_link *link = user;

    if (link->stream != stream)
        return;
    link->stream = NULL;
    if (!link->has_call_ended)
        note_end(link, stream);
}

/* ---- up and down ---- */

void mig_link_close(struct mig_link *link)
{
    if (!link->h2)
        return;
    link->carried_bytes += mig_h2_wire_bytes(link->h2);
    *wire_bytes_of(link) = link->carried_bytes;
    mig_h2_destroy(link->h2);
    link->h2 = NULL;
    link->stream = NULL;
}

int mig_link_open(struct mig_link *link, uint64_t timeout_us)
{
    static const struct mig_h2_handler handler = {
        .on_message = on_message,
        .on_end = on_end,
        .on_close = on_close,
    };
    const bool is_urgent = link->kind == MIG_KIND_URGENT;
    int fd;
    int rc = mig_tcp_connect(link->fetch->host, link->fetch->port, timeout_us, &fd);

    if (rc < 0)
        return rc;
    rc = mig_h2_create(fd, MIG_H2_CLIENT, is_urgent ? &URGENT_LIMITS : &BACKGROUND_LIMITS, &handler, link, &link->h2);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    link->state = MIG_LINK_READY;
    link->opened_ns = mig_now_ns();
    rc = mig_h2_flush(link->h2);
    return rc < 0 ? rc : 0;
}

int mig_link_greet(struct mig_link *link, uint64_t timeout_us)
{
    const uint64_t deadline_ns = mig_now_ns() + timeout_us * 1000;
    struct pollfd poll_fd = {.fd = mig_h2_fd(link->h2), .events = POLLIN};

    for (int pings = 0; pings < GREETING_PINGS || !mig_h2_is_greeted(link->h2);) {
        const int64_t left_ns = (int64_t)(deadline_ns - mig_now_ns());
        if (left_ns <= 0)
            return -ETIMEDOUT;
        mig_h2_ping(link->h2);
        int rc = mig_h2_flush(link->h2);
        if (rc >= 0) {
            poll(&poll_fd, 1, (int)(left_ns / 1000000 + 1));
            rc = mig_h2_receive(link->h2, false);
        }
        if (rc < 0)
            return rc;
        const uint64_t ping_ns = mig_h2_take_ping_ns(link->h2);
        if (ping_ns) {
            mig_fetch_note_rtt(link->fetch, ping_ns);
            pings++;
        }
    }
    return 0;
}

/* The connection is of no more use: what it owes must be asked for again, by whoever comes. */
static void lose(struct mig_link *link, uint64_t now_ns, const char *text)
{
    struct mig_fetch *fetch = link->fetch;
    struct mig_asked asked;
    char reason[256];
    int rc = 0;

    snprintf(reason, sizeof(reason), "%s",
             text[0] ? text : "the connection broke"); /* text may go with the connection */
    mig_link_close(link);
    while (mig_reply_order_take(&link->order, &asked))
        rc = rc < 0 ? rc : mig_pager_give_back(fetch->pager, asked.next_page, asked.end_page - asked.next_page);
    link->has_call_ended = link->wants_to_write = false;
    if (link->state == MIG_LINK_FAILED)
        return;
    link->state = MIG_LINK_DOWN;
    if (!link->lost_ns)
        link->lost_ns = now_ns;
    if (rc < 0) {
        refuse(link, MIG_FETCH_LOCAL, rc, "queue pages again");
    } else if (now_ns - link->lost_ns >= LOST_NS) {
        link->state = MIG_LINK_FAILED;
        mig_fetch_fail(fetch, MIG_FETCH_LINK, 0, "the page call to the source at %s broke: %s", fetch->authority,
                       reason);
    } else {
        link->retry_ns = now_ns + link->backoff_ns;
        link->backoff_ns = link->backoff_ns ? link->backoff_ns * 2 : BACKOFF_FIRST_NS;
        if (link->backoff_ns > BACKOFF_MAX_NS)
            link->backoff_ns = BACKOFF_MAX_NS;
    }
    mig_fetch_wake(fetch);
}

static void begin_call(struct mig_link *link, uint64_t now_ns)
{
    const struct mig_fetch *fetch = link->fetch;
    const char *const metadata[][2] = {
        {"migration-id", fetch->migration_id},
        {"authorization", fetch->authorization},
    };
    const int rc = mig_h2_call(link->h2, fetch->authority, PATH, metadata, 2, link, &link->stream);

    if (rc < 0)
        lose(link, now_ns, strerror(-rc));
    else
        link->state = MIG_LINK_CALLING;
}

void mig_link_call(struct mig_link *link, uint64_t now_ns)
{
    if (link->state == MIG_LINK_READY) {
        begin_call(link, now_ns);
        return;
    }
    const int rc = mig_link_open(link, CONNECT_AGAIN_US);
    if (rc < 0) {
        lose(link, mig_now_ns(), strerror(-rc));
        return;
    }
    __atomic_fetch_add(&link->fetch->counters.reconnects, 1, __ATOMIC_RELAXED); /* both links count there */
    begin_call(link, now_ns);
}

/* A call that is over: well, or for a reason that another connection may cure, or for good. */
static void settle_call(struct mig_link *link, uint64_t now_ns)
{
    const bool is_complete = mig_pager_is_complete(link->fetch->pager);

    link->has_call_ended = false;
    if (link->state == MIG_LINK_FAILED)
        return;
    if (link->call_status == MIG_STATUS_OK && link->state == MIG_LINK_ENDING && !link->order.count) {
        if (!is_complete) {
            lose(link, now_ns, "the source is leaving");
            return;
        }
        link->state = MIG_LINK_DONE;
        mig_h2_go_away(link->h2);
        mig_h2_flush(link->h2);
        mig_link_close(link);
    } else if (link->call_status == MIG_STATUS_UNAVAILABLE || link->call_status == MIG_STATUS_CANCELLED ||
               (mig_h2_is_leaving(link->h2) && link->call_status == MIG_STATUS_OK)) {
        lose(link, now_ns, link->call_text);
    } else if (link->call_status == MIG_STATUS_OK) {
        refuse(link, MIG_FETCH_PROTOCOL, 0, "the source ended a page call with requests unanswered");
    } else {
        link->state = MIG_LINK_FAILED;
        mig_fetch_fail(link->fetch, MIG_FETCH_STATUS, 0, "the source at %s ended the %s page call: %s: %s",
                       link->fetch->authority, name_of(link), mig_status_name(link->call_status), link->call_text);
    }
}

void mig_link_end(struct mig_link *link)
{
    if (link->state != MIG_LINK_CALLING || !link->stream)
        return;
    mig_h2_end(link->stream, MIG_STATUS_OK, NULL);
    link->state = MIG_LINK_ENDING;
    link->progress_ns = mig_now_ns();
}

bool mig_link_ask(struct mig_link *link, uint64_t first_page, uint64_t count_pages, uint64_t now_ns)
{
    uint8_t header[MIG_WIRE_HEADER_BYTES_MAX];
    uint64_t queued_bytes;

    if (link->state != MIG_LINK_CALLING || !link->stream ||
        mig_h2_queued(link->stream, &queued_bytes) == MIG_H2_QUEUE_MAX)
        return false;
    if (!link->order.count)
        link->progress_ns = now_ns;
    const uint64_t request_id = mig_reply_order_ask(&link->order, first_page, count_pages, now_ns);
    if (!request_id)
        return false;
    const struct mig_fetch_request request = {
        .request_id = request_id,
        .first_page = first_page,
        .page_count = (uint32_t)count_pages,
    };
    return mig_h2_send(link->stream, header, (uint32_t)mig_wire_encode_request(&request, header), NULL, 0);
}

/* ---- one step ---- */

static bool is_up(const struct mig_link *link)
{
    return link->state == MIG_LINK_CALLING || link->state == MIG_LINK_ENDING;
}

uint64_t mig_link_patience_ns(const struct mig_link *link, uint64_t now_ns)
{
    if (link->state == MIG_LINK_DOWN)
        return link->retry_ns > now_ns ? link->retry_ns - now_ns : 0;
    return is_up(link) ? PING_AFTER_NS : NEVER_NS;
}

static void keep_alive(struct mig_link *link, uint64_t now_ns)
{
    const int64_t silent_ns = (int64_t)(now_ns - mig_h2_heard_ns(link->h2));
    const int64_t stuck_ns = (int64_t)(now_ns - link->progress_ns);

    if (silent_ns >= (int64_t)PING_AFTER_NS)
        mig_h2_ping(link->h2);
    if (silent_ns >= (int64_t)SILENT_NS)
        lose(link, now_ns, "the source has been silent for five seconds");
    else if ((link->order.count || link->state == MIG_LINK_ENDING) && stuck_ns >= (int64_t)UNANSWERED_NS)
        lose(link, now_ns, "the source has not answered for ten seconds");
}

void mig_link_step(struct mig_link *link, bool is_readable, uint64_t now_ns)
{
    if (link->state == MIG_LINK_DOWN && now_ns >= link->retry_ns)
        mig_link_call(link, now_ns);
    if (!is_up(link))
        return;
    int rc = is_readable ? mig_h2_receive(link->h2, false) : 0;
    if (rc > 0 && now_ns - link->opened_ns >= PROVEN_NS)
        link->lost_ns = link->backoff_ns = 0; /* it lives, though nothing may have been asked of it */
    if (rc > 0 && link->kind == MIG_KIND_URGENT) {
        const uint64_t ping_ns = mig_h2_take_ping_ns(link->h2);
        if (ping_ns)
            mig_fetch_note_rtt(link->fetch, ping_ns);
    }
    if (rc >= 0 && mig_h2_is_leaving(link->h2))
        mig_link_end(link);
    if (rc >= 0 || rc == -EPROTO) { /* a GOAWAY or RST_STREAM says what we did not like */
        const int flushed = mig_h2_flush(link->h2);
        link->wants_to_write = flushed == 1;
        rc = flushed < 0 ? flushed : rc;
    }
    *wire_bytes_of(link) = link->carried_bytes + mig_h2_wire_bytes(link->h2);
    if (link->has_call_ended)
        settle_call(link, now_ns);
    if (link->state == MIG_LINK_FAILED)
        mig_link_close(link);
    if (!is_up(link))
        return;
    if (rc < 0 || mig_h2_is_over(link->h2))
        lose(link, now_ns, mig_h2_error(link->h2));
    else
        keep_alive(link, now_ns);
}
