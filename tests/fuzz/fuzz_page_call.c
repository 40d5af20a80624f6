/*
 * libFuzzer targets of the page call: its decoders, the server against any client, the client against any server.
 *
 * The first byte of an input for server and client says what the rest is: bytes as they come, bytes behind the
 * beginning of a good conversation, or a script of frames (see play), which gets further than bytes ever do. A bit of
 * it has the server compress.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "compress.h"
#include "exports.h"
#include "page_call.h"
#include "page_source.h"
#include "session.h"
#include "targets.h"
#include "units.h"
#include "wire.h"

enum { PAGES = 64, ASK_AHEAD = 8, ASK_PAGES = 4 };

/* ---- the decoders ---- */

/* What was understood means the same when it is written and read again. */
int fuzz_wire(const uint8_t *data, size_t count_bytes)
{
    uint8_t header[MIG_WIRE_HEADER_BYTES_MAX];
    struct mig_fetch_request request, request_again;
    struct mig_fetch_response response, response_again;

    if (mig_wire_decode_request(data, count_bytes, &request) == 0) {
        const size_t bytes = mig_wire_encode_request(&request, header);
        require(!mig_wire_decode_request(header + MIG_PREFIX_BYTES, bytes - MIG_PREFIX_BYTES, &request_again));
        require(request.request_id == request_again.request_id && request.region == request_again.region &&
                request.first_page == request_again.first_page && request.page_count == request_again.page_count);
    }
    if (mig_wire_decode_response(data, count_bytes, &response) == 0) {
        require(!response.data_bytes ||
                (response.data >= data && response.data_bytes <= (size_t)(data + count_bytes - response.data)));
        const size_t bytes = mig_wire_encode_response(&response, header);
        uint8_t *whole = malloc(bytes + response.data_bytes);
        memcpy(whole, header, bytes);
        if (response.data_bytes)
            memcpy(whole + bytes, response.data, response.data_bytes);
        require(!mig_wire_decode_response(whole + MIG_PREFIX_BYTES, bytes - MIG_PREFIX_BYTES + response.data_bytes,
                                          &response_again));
        require(response.request_id == response_again.request_id && response.region == response_again.region &&
                response.first_page == response_again.first_page && response.page_count == response_again.page_count &&
                response.generation == response_again.generation && response.digest == response_again.digest &&
                response.content == response_again.content && response.compression == response_again.compression &&
                response.data_bytes == response_again.data_bytes);
        free(whole);
    }
    return 0;
}

/* What the peer says: see above. */
static void converse(struct session *session, const uint8_t *data, size_t count_bytes)
{
    struct script script = {data + 1, data + count_bytes};
    const unsigned mode = data[0] % 4;

    if (mode > 0)
        send_greeting(session);
    if (mode > 1)
        send_call(session);
    if (mode == 3)
        play(session, &script);
    else
        feed(session, data + 1, count_bytes - 1);
}

/*
 * Whether what poll does not see makes who is tested look again, and not sleep. It may, as long as it comes to an end
 * without the peer.
 */
static bool goes_on_at_once(struct session *session)
{
    enum { LOOKS_MAX = 64 };

    session->looks = mig_h2_has_unseen(session->h2) ? session->looks + 1 : 0;
    require(session->looks < LOOKS_MAX);
    return session->looks;
}

/* ---- the server ---- */

/* The same memory, for readers of plain pages and for readers of compressed ones. */
enum { PLAIN, COMPRESSED, AUDIENCES };
static int audience; /* of the one connection that there is at a time */

static struct mig_exports *served(void)
{
    static struct mig_exports *exports[AUDIENCES];
    struct mig_page_source *source;
    uint8_t page[MIG_PAGE_SIZE_BYTES];

    if (exports[audience])
        return exports[audience];
    const int memfd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    require(memfd >= 0 && !ftruncate(memfd, (off_t)mig_page_offset(PAGES)));
    require(!fcntl(memfd, F_ADD_SEALS, F_SEAL_SHRINK)); /* else its pages are never sent from the file */
    for (uint64_t i = 0; i < PAGES / 2; i++) {          /* the rest is a hole */
        memset(page, i % 5 ? (int)i : 0, sizeof(page));
        require(pwrite(memfd, page, sizeof(page), (off_t)mig_page_offset(i)) == (ssize_t)sizeof(page));
    }
    require(!mig_page_source_create(memfd, PAGES, &source));
    for (int i = 0; i < AUDIENCES; i++)
        require(!mig_exports_create(&exports[i]) &&
                !mig_exports_publish(exports[i], "m", "t", source,
                                     i == COMPRESSED ? MIG_COMPRESSION_ZSTD : MIG_COMPRESSION_NONE, "",
                                     i == COMPRESSED));
    return exports[audience];
}

/* Of the one connection that there is at a time. */
static struct mig_page_calls calls;

static enum mig_status on_call(void *user, struct mig_h2_stream *stream)
{
    struct mig_page_call *call = NULL;
    const enum mig_status status = mig_page_call_begin(stream, served(), &calls, &call);

    (void)user;
    mig_h2_set_stream_user(stream, call);
    return status;
}

static enum mig_status on_request(void *user, struct mig_h2_stream *stream, const uint8_t *message, size_t bytes)
{
    (void)user;
    return mig_page_call_request(mig_h2_stream_user(stream), stream, message, bytes);
}

static void on_request_end(void *user, struct mig_h2_stream *stream)
{
    (void)user;
    mig_page_call_no_more(mig_h2_stream_user(stream));
}

static void on_close(void *user, struct mig_h2_stream *stream)
{
    (void)user;
    mig_page_call_closed(mig_h2_stream_user(stream));
}

static void on_free(void *user, struct mig_h2_stream *stream)
{
    (void)user;
    mig_page_call_free(mig_h2_stream_user(stream));
}

/* As the server's thread does it, but for the waiting. */
static bool serve(struct session *session)
{
    for (unsigned i = 0; i < STEPS_MAX; i++) {
        bool worked = false;
        require(mig_page_calls_pin(&calls));
        const int flushed = mig_h2_flush(session->h2);
        mig_page_calls_unpin(&calls);
        if (flushed < 0)
            return false;
        if (flushed == 0) {
            for (struct mig_h2_stream *stream = mig_h2_next_stream(session->h2, NULL); stream;
                 stream = mig_h2_next_stream(session->h2, stream)) {
                if (session->is_late)
                    mig_h2_end_at_once(stream, MIG_STATUS_DEADLINE_EXCEEDED, "late");
                else
                    worked |= mig_page_call_work(mig_h2_stream_user(stream), stream);
            }
            worked |= session->is_late;
            session->is_late = false;
            if (!worked && mig_h2_is_over(session->h2))
                return false;
        }
        const int received = worked ? 1 : mig_h2_receive(session->h2, false);
        if (received < 0) {
            mig_h2_flush(session->h2);
            return false;
        }
        drain(session);
        if (!received && !goes_on_at_once(session))
            return true;
    }
    return true;
}

void begin_server(struct session *session, int fd, bool is_compressing)
{
    static const struct mig_h2_limits limits = {
        .message_bytes_max = 1024,
        .receive_bytes = 4 << 10,
        .frame_bytes_max = 16 << 10,
        .window_bytes = 65535,
    };
    static const struct mig_h2_handler handler = {on_call, on_request, on_request_end, on_close, on_free};

    audience = is_compressing ? COMPRESSED : PLAIN;
    session->step = serve;
    require(!mig_h2_create(fd, MIG_H2_SERVER, &limits, &handler, session, &session->h2));
}

int fuzz_server(const uint8_t *data, size_t count_bytes)
{
    struct session session = {0};

    if (!count_bytes)
        return 0;
    begin_server(&session, connect_session(&session), data[0] & 4);
    converse(&session, data, count_bytes);
    finish(&session);
    require(!calls.first);
    return 0;
}

/* ---- the client ---- */

/* Keeps some requests open, until the pages are all asked for. */
static void ask(struct session *session)
{
    uint8_t header[MIG_WIRE_HEADER_BYTES_MAX];

    while (session->stream && session->order.count < ASK_AHEAD && session->order.last_request_id < PAGES) {
        const uint64_t first_page = session->order.last_request_id;
        const struct mig_fetch_request request = {
            .request_id = mig_reply_order_ask(&session->order, first_page, ASK_PAGES, 0),
            .first_page = first_page,
            .page_count = ASK_PAGES,
        };
        if (!mig_h2_send(session->stream, header, (uint32_t)mig_wire_encode_request(&request, header), NULL, 0))
            return;
    }
}

/* Whatever the peer compressed, it is exactly its run, or refused with words. */
static int decompress(struct mig_fetch_response *response)
{
    static struct mig_decompressor *decompressor;

    require(decompressor || !mig_decompressor_create(&decompressor));
    const int rc =
        mig_decompress_run(decompressor, response->data, response->data_bytes, response->page_count, &response->data);
    require(!rc || strlen(mig_decompressor_flaw(decompressor)));
    return rc;
}

static enum mig_status on_reply(void *user, struct mig_h2_stream *stream, const uint8_t *message, size_t bytes)
{
    struct session *session = user;
    struct mig_fetch_response response;
    struct mig_asked asked;
    uint64_t sum = 0;

    (void)stream;
    if (mig_wire_decode_response(message, bytes, &response) < 0 || response.content == MIG_CONTENT_NONE ||
        (response.content == MIG_CONTENT_DATA && response.data_bytes != mig_page_offset(response.page_count)))
        return MIG_STATUS_CANCELLED;
    if (mig_reply_order_answer(&session->order, response.request_id, response.first_page, response.page_count,
                               response.content == MIG_CONTENT_ZERO, &asked) < 0)
        return MIG_STATUS_CANCELLED;
    if (response.content == MIG_CONTENT_COMPRESSED) {
        if (decompress(&response) < 0)
            return MIG_STATUS_CANCELLED;
        response.data_bytes = mig_page_offset(response.page_count);
    }
    for (uint64_t i = 0; i < response.data_bytes; i++)
        sum += response.data[i];
    return sum == UINT64_MAX ? MIG_STATUS_INTERNAL : MIG_STATUS_OK;
}

static void on_call_end(void *user, struct mig_h2_stream *stream)
{
    const char *text;
    (void)user;
    require(mig_status_name(mig_h2_status(stream, &text)) && strlen(text) < MIG_STATUS_TEXT_BYTES);
}

static void on_call_close(void *user, struct mig_h2_stream *stream)
{
    struct session *session = user;
    if (session->stream == stream)
        session->stream = NULL;
}

static bool fetch(struct session *session)
{
    for (unsigned i = 0; i < STEPS_MAX; i++) {
        ask(session);
        if (session->stream && (mig_h2_is_leaving(session->h2) || session->order.last_request_id == PAGES))
            mig_h2_end(session->stream, MIG_STATUS_OK, NULL);
        if (mig_h2_flush(session->h2) < 0 || mig_h2_is_over(session->h2))
            return false;
        mig_h2_ping(session->h2);
        mig_h2_take_ping_ns(session->h2);
        const int received = mig_h2_receive(session->h2, false);
        if (received < 0) {
            mig_h2_flush(session->h2);
            return false;
        }
        drain(session);
        if (!received && !goes_on_at_once(session))
            return true;
    }
    return true;
}

void begin_client(struct session *session, int fd)
{
    static const struct mig_h2_limits limits = {
        .message_bytes_max = 64 << 10,
        .receive_bytes = 4 << 10,
        .frame_bytes_max = 64 << 10,
        .window_bytes = 1 << 20,
    };
    static const struct mig_h2_handler handler = {
        .on_message = on_reply, .on_end = on_call_end, .on_close = on_call_close};
    static const char *const metadata[][2] = {{"migration-id", "m"}, {"authorization", "Bearer t"}};

    session->step = fetch;
    session->is_client = true;
    require(!mig_h2_create(fd, MIG_H2_CLIENT, &limits, &handler, session, &session->h2));
    require(!mig_h2_call(session->h2, "x", "/migrate.v1.PageService/FetchPages", metadata, 2, NULL, &session->stream));
}

int fuzz_client(const uint8_t *data, size_t count_bytes)
{
    struct session session = {0};

    if (!count_bytes)
        return 0;
    begin_client(&session, connect_session(&session));
    converse(&session, data, count_bytes);
    finish(&session);
    return 0;
}
