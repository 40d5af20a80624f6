#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "fetch_internal.h"
#include "units.h"
#include "wire.h"

static const char PATH[] = "/migrate.v1.PageService/FetchPages";
static const uint64_t NEVER_NS = UINT64_MAX;

static const char *name_of(const struct mig_link *link)
{
    return link->kind == MIG_KIND_URGENT ? "urgent" : "background";
}

/* It is well again. */
static void recover(struct mig_link *link)
{
    link->lost_ns = 0;
    mig_backoff_reset(&link->backoff);
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

    if (response->read_ns)
        mig_pager_note_read(pager, response->first_page, response->page_count, response->read_ns);
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
    recover(link);
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

const struct mig_h2_handler MIG_LINK_HANDLER = {
    .on_message = on_message,
    .on_end = on_end,
    .on_close = on_close,
};

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
    } else if (now_ns - link->lost_ns >= fetch->patience.lost_ns) {
        link->state = MIG_LINK_FAILED;
        mig_fetch_fail(fetch, link->is_refused ? MIG_FETCH_TLS : MIG_FETCH_LINK, 0,
                       "the page call to the source at %s broke: %s", fetch->authority, reason);
    } else {
        /* The last try is at the end of the time there is. */
        const uint64_t retry_ns = now_ns + mig_backoff_next_ns(&link->backoff);
        const uint64_t last_ns = link->lost_ns + fetch->patience.lost_ns;
        link->retry_ns = retry_ns < last_ns ? retry_ns : last_ns;
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

/* A try ends with the time for tries, even one that begins at its very end. */
static uint64_t try_until(const struct mig_link *link, uint64_t now_ns)
{
    const struct mig_patience *patience = &link->fetch->patience;
    const uint64_t longest_ns = now_ns + patience->connect_ns, shortest_ns = now_ns + patience->connect_ns / 10;
    const uint64_t last_ns = link->lost_ns + patience->lost_ns;

    return last_ns < shortest_ns ? shortest_ns : last_ns < longest_ns ? last_ns : longest_ns;
}

void mig_link_call(struct mig_link *link, uint64_t now_ns)
{
    if (link->state == MIG_LINK_READY) {
        begin_call(link, now_ns);
        return;
    }
    const int rc = mig_link_open(link, try_until(link, now_ns));
    if (rc < 0) {
        lose(link, mig_now_ns(), link->trouble);
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

/* Whether a reply, or the end of the call, is due. */
static bool is_owed(const struct mig_link *link)
{
    return link->order.count || link->state == MIG_LINK_ENDING;
}

/* For how long nothing came. What came may be newer than the time at which we looked at the clock. */
static uint64_t silent_for(const struct mig_link *link, uint64_t now_ns)
{
    const uint64_t heard_ns = mig_h2_heard_ns(link->h2);
    return heard_ns < now_ns ? now_ns - heard_ns : 0;
}

static uint64_t stuck_for(const struct mig_link *link, uint64_t now_ns)
{
    return is_owed(link) && link->progress_ns < now_ns ? now_ns - link->progress_ns : 0;
}

/* Whether it was asked for a sign of life since it was last heard. */
static bool is_pinged(const struct mig_link *link)
{
    return link->pinged_ns > mig_h2_heard_ns(link->h2);
}

/* How long it has to answer. It is not lost before that, for it may be we who stood still for so long. */
static uint64_t answer_ns(const struct mig_link *link)
{
    return link->fetch->patience.silent_ns - link->fetch->patience.ping_ns;
}

static uint64_t rest_of(uint64_t limit_ns, uint64_t passed_ns)
{
    return passed_ns < limit_ns ? limit_ns - passed_ns : 0;
}

uint64_t mig_link_patience_ns(const struct mig_link *link, uint64_t now_ns)
{
    const struct mig_patience *patience = &link->fetch->patience;

    if (link->state == MIG_LINK_DOWN)
        return link->retry_ns > now_ns ? link->retry_ns - now_ns : 0;
    if (!is_up(link))
        return NEVER_NS;
    const uint64_t sign_ns = is_pinged(link) ? rest_of(answer_ns(link), now_ns - link->pinged_ns)
                                             : rest_of(patience->ping_ns, silent_for(link, now_ns));
    const uint64_t reply_ns = is_owed(link) ? rest_of(patience->unanswered_ns, stuck_for(link, now_ns)) : NEVER_NS;
    return sign_ns < reply_ns ? sign_ns : reply_ns;
}

static void keep_alive(struct mig_link *link, uint64_t now_ns)
{
    const uint64_t silent_ns = silent_for(link, now_ns), stuck_ns = stuck_for(link, now_ns);
    char text[64] = "";

    if (is_pinged(link) && now_ns - link->pinged_ns >= answer_ns(link))
        snprintf(text, sizeof(text), "the source has been silent for %.1f s", (double)silent_ns / 1e9);
    else if (stuck_ns >= link->fetch->patience.unanswered_ns)
        snprintf(text, sizeof(text), "the source has not answered for %.1f s", (double)stuck_ns / 1e9);
    if (text[0])
        lose(link, now_ns, text);
}

void mig_link_step(struct mig_link *link, bool is_readable, uint64_t now_ns)
{
    if (link->state == MIG_LINK_DOWN && now_ns >= link->retry_ns)
        mig_link_call(link, now_ns);
    if (!is_up(link))
        return;
    int rc = is_readable ? mig_h2_receive(link->h2, false) : 0;
    if (rc > 0 && now_ns - link->opened_ns >= link->fetch->patience.proven_ns)
        recover(link); /* it lives, though nothing may have been asked of it */
    if (rc > 0 && link->kind == MIG_KIND_URGENT) {
        const uint64_t ping_ns = mig_h2_take_ping_ns(link->h2);
        if (ping_ns)
            mig_fetch_note_rtt(link->fetch, ping_ns);
    }
    if (rc >= 0 && mig_h2_is_leaving(link->h2))
        mig_link_end(link);
    if (!is_pinged(link) && silent_for(link, now_ns) >= link->fetch->patience.ping_ns) {
        mig_h2_ping(link->h2);
        link->pinged_ns = now_ns;
    }
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
    link->is_refused = rc == -EKEYREJECTED;
    if (rc < 0 || mig_h2_is_over(link->h2))
        lose(link, now_ns, mig_h2_error(link->h2));
    else
        keep_alive(link, now_ns);
}
