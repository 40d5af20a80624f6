#include "page_call.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "compress.h"
#include "units.h"
#include "wire.h"

static const char PATH[] = "/migrate.v1.PageService/FetchPages";
/* Smaller requests are waited for: they are copied at once, and never compressed. */
enum { BUFFER_PAGES_MIN = 32, BULK_PAGES_MIN = 4 };
/* What is read ahead of the socket: enough to keep it busy, little enough that a request is not read long before. */
static const uint64_t READ_AHEAD_BYTES = 256 << 10;

/* A request, and the stream's bytes that it came in. */
struct asked {
    struct mig_fetch_request request;
    uint64_t wire_bytes;
    uint64_t at_ns; /* when it was whole; 0 unless replies are timed */
};

struct mig_page_call {
    struct mig_page_calls *calls;
    struct mig_page_call *next;
    struct mig_h2_stream *stream; /* NULL once it is closed */
    struct mig_export *export;
    /* Requests that wait, oldest first: the stream's window bounds them. */
    struct asked *asked;
    size_t asked_head, asked_count, asked_capacity;
    bool no_more, is_bulk;
    bool sends_from_file; /* something queued refers to the memfd */
    bool is_pinned;
    bool must_copy;                    /* as the source said last */
    struct mig_compressor *compressor; /* NULL: runs are sent as they are */
    /* Pages on their way out, back to back. */
    uint8_t *buffer;
    uint32_t buffer_pages, used_pages;
    struct mig_run runs[MIG_REQUEST_PAGES_MAX];
    struct mig_scan scan;
    uint64_t data_pages;
};

enum mig_status mig_page_call_begin(struct mig_h2_stream *stream, struct mig_exports *exports,
                                    struct mig_page_calls *calls, struct mig_page_call **ret)
{
    const char *path = mig_h2_header(stream, ":path");
    const char *migration_id = mig_h2_header(stream, "migration-id");
    struct mig_export *export;

    if (!path || strcmp(path, PATH) != 0) {
        mig_h2_explain(stream, "there is no method %.100s here", path ? path : "");
        return MIG_STATUS_UNIMPLEMENTED;
    }
    const int rc = mig_exports_find(exports, migration_id, mig_h2_header(stream, "authorization"), &export);
    if (rc == -EACCES) {
        mig_h2_explain(stream, "the token is not this migration's");
        return MIG_STATUS_PERMISSION_DENIED;
    }
    if (rc < 0) {
        mig_h2_explain(stream, "no pages are served here for migration '%.100s'", migration_id ? migration_id : "");
        return MIG_STATUS_NOT_FOUND;
    }
    if (mig_export_peer_name(export)[0] && !mig_h2_is_caller(stream, mig_export_peer_name(export))) {
        mig_export_put(export);
        mig_h2_explain(stream, "the migration's pages are for another host than the certificate's");
        return MIG_STATUS_PERMISSION_DENIED;
    }
    struct mig_page_call *call = calloc(1, sizeof(*call));
    if (!call) {
        mig_export_put(export);
        mig_h2_explain(stream, "out of memory");
        return MIG_STATUS_RESOURCE_EXHAUSTED;
    }
    call->export = export;
    call->stream = stream;
    call->calls = calls;
    call->next = calls->first;
    calls->first = call;
    *ret = call;
    return MIG_STATUS_OK;
}

static void unpin(struct mig_page_call *call)
{
    if (call->is_pinned)
        mig_export_leave(call->export);
    call->is_pinned = false;
}

void mig_page_call_free(struct mig_page_call *call)
{
    if (!call)
        return;
    struct mig_page_call **link = &call->calls->first;
    while (*link != call)
        link = &(*link)->next;
    *link = call->next;
    unpin(call);
    struct mig_page_source *source = mig_export_enter(call->export);
    if (source) {
        mig_page_source_end_scan(source, &call->scan);
        mig_export_leave(call->export);
    }
    mig_export_put(call->export);
    mig_compressor_destroy(call->compressor);
    free(call->asked);
    free(call->buffer);
    free(call);
}

uint64_t mig_page_call_data_pages(const struct mig_page_call *call)
{
    return call ? call->data_pages : 0;
}

void mig_page_call_closed(struct mig_page_call *call)
{
    if (call)
        call->stream = NULL;
}

bool mig_page_calls_pin(struct mig_page_calls *calls)
{
    bool all_pinned = true;

    for (struct mig_page_call *call = calls->first; call; call = call->next) {
        if (!call->sends_from_file)
            continue;
        call->is_pinned = mig_export_enter(call->export);
        if (!call->is_pinned && call->stream)
            mig_h2_end_at_once(call->stream, MIG_STATUS_NOT_FOUND, "the migration's pages are no longer served");
        all_pinned &= call->is_pinned;
    }
    return all_pinned;
}

void mig_page_calls_unpin(struct mig_page_calls *calls)
{
    for (struct mig_page_call *call = calls->first; call; call = call->next)
        unpin(call);
}

bool mig_page_call_is_bulk(const struct mig_page_call *call)
{
    return call && call->is_bulk;
}

void mig_page_call_no_more(struct mig_page_call *call)
{
    call->no_more = true;
}

/* ---- requests ---- */

static bool make_room(struct mig_page_call *call)
{
    if (call->asked_count < call->asked_capacity)
        return true;
    const size_t capacity = call->asked_capacity ? call->asked_capacity * 2 : 64;
    struct asked *grown = malloc(capacity * sizeof(*grown));
    if (!grown)
        return false;
    for (size_t i = 0; i < call->asked_count; i++)
        grown[i] = call->asked[(call->asked_head + i) % call->asked_capacity];
    free(call->asked);
    call->asked = grown;
    call->asked_capacity = capacity;
    call->asked_head = 0;
    return true;
}

/* A call that asks for bulk gets a compressor, if that was agreed on and there is memory for one. */
static void note_bulk(struct mig_page_call *call)
{
    if (!call->compressor && mig_export_compression(call->export) == MIG_COMPRESSION_ZSTD)
        mig_compressor_create(&call->compressor);
}

enum mig_status mig_page_call_request(struct mig_page_call *call, struct mig_h2_stream *stream, const uint8_t *message,
                                      size_t bytes)
{
    struct mig_fetch_request request;

    if (mig_wire_decode_request(message, bytes, &request) < 0) {
        mig_h2_explain(stream, "a message is not a FetchPagesRequest");
        return MIG_STATUS_INVALID_ARGUMENT;
    }
    if (!make_room(call)) {
        mig_h2_explain(stream, "out of memory");
        return MIG_STATUS_RESOURCE_EXHAUSTED;
    }
    call->asked[(call->asked_head + call->asked_count++) % call->asked_capacity] =
        (struct asked){request, MIG_PREFIX_BYTES + bytes, mig_export_times_replies(call->export) ? mig_now_ns() : 0};
    call->is_bulk |= request.page_count > 1;
    if (request.page_count >= BULK_PAGES_MIN)
        note_bulk(call);
    return MIG_STATUS_OK;
}

/* ---- answers ---- */

/* A few pages are copied at once; more are left where they are until the socket takes them, if they may be. */
static bool is_sent_from_file(const struct mig_page_call *call, uint32_t count_pages)
{
    return count_pages >= BULK_PAGES_MIN && !call->must_copy && !call->compressor;
}

/* Compresses a run that is about to be sent from the buffer, in its place there, if that makes it smaller. */
static void compress(const struct mig_page_call *call, struct mig_fetch_response *response, uint8_t *run)
{
    const uint32_t compressed_bytes = mig_compress_run(call->compressor, run, response->page_count);

    if (!compressed_bytes)
        return;
    response->content = MIG_CONTENT_COMPRESSED;
    response->compression = MIG_COMPRESSION_ZSTD;
    response->data_bytes = compressed_bytes;
}

/* Queues one run; its pages lie in `pages`, or, if that is NULL, are sent straight from the memfd. */
static void send_run(const struct mig_page_call *call, struct mig_h2_stream *stream, const struct asked *asked,
                     uint64_t generation, const struct mig_run *run, uint8_t *pages)
{
    const struct mig_fetch_request *request = &asked->request;
    uint8_t header[MIG_WIRE_HEADER_BYTES_MAX];
    uint8_t *copied = pages && !run->is_zero ? pages + mig_page_offset(run->first_page - request->first_page) : NULL;
    struct mig_fetch_response response = {
        .request_id = request->request_id,
        .region = request->region,
        .first_page = run->first_page,
        .page_count = (uint32_t)(run->count_pages < UINT32_MAX ? run->count_pages : UINT32_MAX),
        .generation = generation,
        .digest = run->digest,
        .read_ns = asked->at_ns ? mig_now_ns() - asked->at_ns : 0,
        .content = run->is_zero ? MIG_CONTENT_ZERO : MIG_CONTENT_DATA,
        .data_bytes = run->is_zero ? 0 : mig_page_offset(run->count_pages),
    };
    if (copied && call->compressor && request->page_count >= BULK_PAGES_MIN)
        compress(call, &response, copied);
    const uint32_t header_bytes = (uint32_t)mig_wire_encode_response(&response, header);
    if (run->is_zero || copied)
        mig_h2_send(stream, header, header_bytes, copied, (uint32_t)response.data_bytes);
    else
        mig_h2_send_file(stream, header, header_bytes, mig_export_memfd(call->export), mig_page_offset(run->first_page),
                         (uint32_t)response.data_bytes);
}

/* Reads and queues the answers to one request. */
static enum mig_status answer(struct mig_page_call *call, struct mig_h2_stream *stream, const struct asked *asked)
{
    const struct mig_fetch_request *request = &asked->request;
    const bool is_copied = call->buffer && !is_sent_from_file(call, request->page_count);
    uint8_t *pages = is_copied ? call->buffer + mig_page_offset(call->used_pages) : NULL;

    if (request->region != 0) {
        mig_h2_explain(stream, "the guest has one RAM region, number 0, not number %u", request->region);
        return MIG_STATUS_INVALID_ARGUMENT;
    }
    struct mig_page_source *source = mig_export_enter(call->export);
    if (!source) {
        mig_h2_explain(stream, "the migration's pages are no longer served");
        return MIG_STATUS_NOT_FOUND;
    }
    const uint64_t pages_total = mig_page_source_pages(source);
    /* Before the read: what is written in between belongs to a later generation. */
    const uint64_t generation = mig_export_generation(call->export);
    const int found =
        pages ? mig_page_source_read(source, request->first_page, request->page_count, pages, call->runs)
              : mig_page_source_scan(source, &call->scan, request->first_page, request->page_count, call->runs);
    mig_export_leave(call->export);
    if (found == -EINVAL) {
        mig_h2_explain(stream, "%u pages from page %llu are not a request of 1 to %d pages within the guest's %llu",
                       request->page_count, (unsigned long long)request->first_page, MIG_REQUEST_PAGES_MAX,
                       (unsigned long long)pages_total);
        return MIG_STATUS_INVALID_ARGUMENT;
    }
    if (found < 0) {
        mig_h2_explain(stream, "read the guest's memory: %s", strerror(-found));
        return MIG_STATUS_INTERNAL;
    }
    call->sends_from_file |= !pages;
    for (int i = 0; i < found; i++) {
        send_run(call, stream, asked, generation, &call->runs[i], pages);
        call->data_pages += call->runs[i].is_zero ? 0 : call->runs[i].count_pages;
    }
    if (pages)
        call->used_pages += request->page_count;
    return MIG_STATUS_OK;
}

static bool must_copy(struct mig_page_call *call)
{
    const struct mig_page_source *source = mig_export_enter(call->export);
    const bool answer = source && mig_page_source_must_copy(source);

    if (source)
        mig_export_leave(call->export);
    return answer;
}

/* Room for the pages of a request. An empty buffer may grow; a full one must be written first. */
static bool has_room(struct mig_page_call *call, uint32_t wanted_pages, bool is_empty)
{
    wanted_pages = wanted_pages < MIG_REQUEST_PAGES_MAX ? wanted_pages : MIG_REQUEST_PAGES_MAX;
    call->must_copy = must_copy(call);
    if (is_empty) {
        call->used_pages = 0;
        call->sends_from_file = false;
    }
    if (is_sent_from_file(call, wanted_pages))
        return true;
    if (call->used_pages + wanted_pages <= call->buffer_pages)
        return true;
    if (call->used_pages)
        return false;
    const uint32_t grown_pages = wanted_pages > BUFFER_PAGES_MIN ? wanted_pages : BUFFER_PAGES_MIN;
    uint8_t *grown = aligned_alloc(MIG_PAGE_SIZE_BYTES, mig_page_offset(grown_pages));
    if (!grown)
        return false;
    free(call->buffer);
    call->buffer = grown;
    call->buffer_pages = grown_pages;
    return true;
}

bool mig_page_call_work(struct mig_page_call *call, struct mig_h2_stream *stream)
{
    uint64_t queued_bytes;
    bool worked = false;

    while (call && call->asked_count) {
        const struct asked *asked = &call->asked[call->asked_head];
        const struct mig_fetch_request *request = &asked->request;
        const uint32_t queued = mig_h2_queued(stream, &queued_bytes);
        /* A request is answered by at most as many messages as it has pages. */
        if (queued_bytes >= READ_AHEAD_BYTES || (queued && queued + request->page_count > MIG_H2_QUEUE_MAX) ||
            !has_room(call, request->page_count, !queued && !worked))
            return worked;
        const enum mig_status status = answer(call, stream, asked);
        worked = true;
        if (status != MIG_STATUS_OK) {
            call->asked_count = 0;
            mig_h2_end(stream, status, NULL);
            return true;
        }
        mig_h2_consume(stream, asked->wire_bytes);
        call->asked_head = (call->asked_head + 1) % call->asked_capacity;
        call->asked_count--;
    }
    if (call && call->no_more) {
        call->no_more = false;
        mig_h2_end(stream, MIG_STATUS_OK, NULL);
        worked = true;
    }
    return worked;
}
