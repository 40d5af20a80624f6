/* gRPC on top of HTTP/2 streams: what a request must look like, how messages are framed, how calls end. */
#include <ctype.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "h2_internal.h"
#include "units.h"

static const char CONTENT_TYPE[] = "application/grpc";
enum { TIMEOUT_DIGITS_MAX = 8, STATUS_DIGITS_MAX = 2 };

static nghttp2_nv pair(const char *name, const char *value)
{
    return (nghttp2_nv){(uint8_t *)name, (uint8_t *)value, strlen(name), strlen(value), NGHTTP2_NV_FLAG_NONE};
}

static enum mig_status worded(struct mig_h2_stream *stream, enum mig_status status, const char *text)
{
    mig_h2_explain(stream, "%s", text);
    return status;
}

/* ---- status and words ---- */

const char *mig_status_name(enum mig_status status)
{
    static const char *const names[] = {
        "OK",        "CANCELLED",       "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
        "NOT_FOUND", "ALREADY_EXISTS",  "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
        "ABORTED",   "OUT_OF_RANGE",    "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
        "DATA_LOSS", "UNAUTHENTICATED",
    };
    return status < sizeof(names) / sizeof(*names) ? names[status] : "UNKNOWN";
}

void mig_h2_explain(struct mig_h2_stream *stream, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(stream->text, sizeof(stream->text), format, arguments);
    va_end(arguments);
}

/* Percent-encodes as gRPC asks: printable ASCII but '%' stays. */
static void encode_text(const char *text, char *encoded)
{
    for (; *text; text++) {
        const unsigned char byte = (unsigned char)*text;
        if (byte >= 0x20 && byte <= 0x7e && byte != '%')
            *encoded++ = (char)byte;
        else
            encoded += sprintf(encoded, "%%%02X", byte);
    }
    *encoded = '\0';
}

static void decode_text(const char *encoded, char *text, size_t text_bytes)
{
    const char *const last = text + text_bytes - 1;
    while (*encoded && text < last) {
        unsigned byte;
        if (encoded[0] == '%' && isxdigit((unsigned char)encoded[1]) && sscanf(encoded + 1, "%2x", &byte) == 1 &&
            isxdigit((unsigned char)encoded[2])) {
            *text++ = (char)byte;
            encoded += 3;
        } else {
            *text++ = *encoded++;
        }
    }
    *text = '\0';
}

size_t mig_h2_trailers(const struct mig_h2_stream *stream, nghttp2_nv nv[2], char text[3 * MIG_STATUS_TEXT_BYTES])
{
    static const char *const numbers[] = {"0", "1",  "2",  "3",  "4",  "5",  "6",  "7", "8",
                                          "9", "10", "11", "12", "13", "14", "15", "16"};
    encode_text(stream->text, text);
    nv[0] = pair("grpc-status", numbers[stream->status]);
    nv[1] = pair("grpc-message", text);
    return stream->text[0] ? 2 : 1;
}

/* ---- sending ---- */

static bool queue(struct mig_h2_stream *stream, const uint8_t *header, uint32_t header_bytes,
                  const struct message *body)
{
    if (stream->is_ending || stream->queue_tail - stream->queue_head == MIG_H2_QUEUE_MAX)
        return false;
    struct message *message = &stream->queue[stream->queue_tail++ % MIG_H2_QUEUE_MAX];
    *message = *body;
    memcpy(message->header, header, header_bytes);
    message->header_bytes = header_bytes;
    stream->queued_bytes += header_bytes + body->body_bytes;
    mig_h2_resume(stream);
    return true;
}

bool mig_h2_send(struct mig_h2_stream *stream, const uint8_t *header, uint32_t header_bytes, const void *body,
                 uint32_t body_bytes)
{
    const struct message message = {.fd = -1, .body = body, .body_bytes = body_bytes};
    return queue(stream, header, header_bytes, &message);
}

bool mig_h2_send_file(struct mig_h2_stream *stream, const uint8_t *header, uint32_t header_bytes, int fd,
                      uint64_t offset, uint32_t body_bytes)
{
    const struct message message = {.fd = fd, .offset = offset, .body_bytes = body_bytes};
    return queue(stream, header, header_bytes, &message);
}

uint32_t mig_h2_queued(const struct mig_h2_stream *stream, uint64_t *ret_bytes)
{
    *ret_bytes = stream->queued_bytes;
    return stream->queue_tail - stream->queue_head;
}

/* Response headers; with `is_last` they are trailers too (Trailers-Only), and no message ever follows. */
static void answer(struct mig_h2_stream *stream, const char *http_status, bool is_last)
{
    char text[3 * MIG_STATUS_TEXT_BYTES];
    nghttp2_nv nv[4] = {pair(":status", http_status), pair("content-type", CONTENT_TYPE)};
    const nghttp2_data_provider data = mig_h2_data_of(stream);
    size_t count = 2;

    if (is_last)
        count += mig_h2_trailers(stream, nv + 2, text);
    stream->is_answered = true;
    nghttp2_submit_response(stream->connection->session, stream->id, nv, count, is_last ? NULL : &data);
}

void mig_h2_end(struct mig_h2_stream *stream, enum mig_status status, const char *text)
{
    if (stream->is_ending)
        return;
    stream->is_ending = true;
    if (!stream->queued_bytes)
        stream->deadline_ns = 0;
    if (stream->connection->role == MIG_H2_SERVER) {
        stream->status = status;
        if (text)
            mig_h2_explain(stream, "%s", text);
        if (!stream->is_answered) {
            answer(stream, "200", true);
            return;
        }
    }
    mig_h2_resume(stream);
}

void mig_h2_end_at_once(struct mig_h2_stream *stream, enum mig_status status, const char *text)
{
    if (!stream->queued_bytes) {
        mig_h2_end(stream, status, text);
        return;
    }
    /* Trailers cannot overtake what flow control holds back, so there will be none. */
    stream->status = status;
    mig_h2_explain(stream, "%s", text);
    stream->is_ending = true;
    stream->deadline_ns = 0;
    stream->queue_head = stream->queue_tail;
    stream->queued_bytes = 0;
    mig_h2_cancel(stream);
}

void mig_h2_cancel(struct mig_h2_stream *stream)
{
    nghttp2_submit_rst_stream(stream->connection->session, NGHTTP2_FLAG_NONE, stream->id, NGHTTP2_CANCEL);
}

void mig_h2_call_fail(struct mig_h2_stream *stream, enum mig_status status)
{
    if (stream->connection->role == MIG_H2_SERVER) {
        mig_h2_end(stream, status, NULL);
        return;
    }
    stream->status = status;
    stream->peer_ended = true;
    mig_h2_cancel(stream);
}

int mig_h2_call(struct mig_h2 *connection, const char *authority, const char *path, const char *const metadata[][2],
                size_t metadata_count, void *stream_user, struct mig_h2_stream **ret)
{
    enum { FIXED = 6, METADATA_MAX = 8 };
    nghttp2_nv nv[FIXED + METADATA_MAX] = {
        pair(":method", "POST"),
        pair(":scheme", connection->tls ? "https" : "http"),
        pair(":path", path),
        pair(":authority", authority),
        pair("content-type", CONTENT_TYPE),
        pair("te", "trailers"),
    };
    struct mig_h2_stream *stream = mig_h2_stream_create(connection, 0);

    if (!stream)
        return -ENOMEM;
    if (metadata_count > METADATA_MAX)
        metadata_count = METADATA_MAX;
    for (size_t i = 0; i < metadata_count; i++)
        nv[FIXED + i] = pair(metadata[i][0], metadata[i][1]);
    stream->user = stream_user;
    const nghttp2_data_provider data = mig_h2_data_of(stream);
    const int32_t id = nghttp2_submit_request(connection->session, NULL, nv, FIXED + metadata_count, &data, stream);
    if (id < 0) {
        connection->streams = stream->next;
        mig_h2_stream_free(stream);
        return id == NGHTTP2_ERR_NOMEM ? -ENOMEM : -EPROTO;
    }
    stream->id = id;
    *ret = stream;
    return 0;
}

/* ---- receiving ---- */

void mig_h2_consume(struct mig_h2_stream *stream, uint64_t bytes)
{
    nghttp2_session_consume_stream(stream->connection->session, stream->id, bytes);
}

const char *mig_h2_header(const struct mig_h2_stream *stream, const char *name)
{
    const char *found = NULL;
    const char *const end = stream->headers + stream->headers_bytes;

    for (const char *at = stream->headers; at < end;) {
        const char *value = at + strlen(at) + 1;
        if (!strcmp(at, name))
            found = value; /* trailers come after headers */
        at = value + strlen(value) + 1;
    }
    return found;
}

/* grpc-timeout: at most eight digits and a unit. False if it is not one. */
static bool parse_timeout(const char *value, uint64_t *ret_ns)
{
    static const struct {
        char unit;
        uint64_t ns;
    } units[] = {{'H', 3600000000000}, {'M', 60000000000}, {'S', 1000000000}, {'m', 1000000}, {'u', 1000}, {'n', 1}};
    char *unit;
    const unsigned long long count = strtoull(value, &unit, 10);

    if (!isdigit((unsigned char)*value) || unit - value > TIMEOUT_DIGITS_MAX || !unit[0] || unit[1])
        return false;
    for (size_t i = 0; i < sizeof(units) / sizeof(*units); i++)
        if (units[i].unit == *unit) {
            *ret_ns = count * units[i].ns;
            return true;
        }
    return false;
}

static enum mig_status check_call(struct mig_h2_stream *stream)
{
    const char *encoding = mig_h2_header(stream, "grpc-encoding");
    const char *timeout = mig_h2_header(stream, "grpc-timeout");
    uint64_t timeout_ns;

    if (stream->headers_too_large)
        return worded(stream, MIG_STATUS_RESOURCE_EXHAUSTED, "the call's metadata is larger than 8 KiB");
    if (encoding && strcmp(encoding, "identity") != 0)
        return worded(stream, MIG_STATUS_UNIMPLEMENTED, "compressed messages are not understood here");
    if (timeout) {
        if (!parse_timeout(timeout, &timeout_ns))
            return worded(stream, MIG_STATUS_INVALID_ARGUMENT, "grpc-timeout is not a duration");
        stream->deadline_ns = mig_now_ns() + timeout_ns;
    }
    return MIG_STATUS_OK;
}

void mig_h2_call_begin(struct mig_h2_stream *stream)
{
    const struct mig_h2 *connection = stream->connection;
    const char *method = mig_h2_header(stream, ":method");
    const char *content_type = mig_h2_header(stream, "content-type");

    if (!stream->headers_too_large && (!method || strcmp(method, "POST") != 0 || !content_type ||
                                       strncmp(content_type, CONTENT_TYPE, strlen(CONTENT_TYPE)) != 0)) {
        mig_h2_explain(stream, "only gRPC is spoken here: POST, content-type application/grpc");
        stream->status = MIG_STATUS_INTERNAL;
        stream->is_ending = true;
        answer(stream, "415", true);
        return;
    }
    enum mig_status status = check_call(stream);
    if (status == MIG_STATUS_OK && connection->handler.on_call)
        status = connection->handler.on_call(connection->user, stream);
    if (status == MIG_STATUS_OK)
        answer(stream, "200", false);
    else
        mig_h2_call_fail(stream, status);
}

void mig_h2_call_half_closed(struct mig_h2_stream *stream)
{
    const struct mig_h2 *connection = stream->connection;

    if (stream->peer_ended)
        return;
    stream->peer_ended = true;
    if (stream->is_ending)
        return;
    if (stream->prefix_bytes) {
        mig_h2_explain(stream, "the caller stopped in the middle of a message");
        mig_h2_call_fail(stream, MIG_STATUS_INVALID_ARGUMENT);
    } else if (connection->handler.on_end) {
        connection->handler.on_end(connection->user, stream);
    }
}

/* gRPC's http-grpc-status-mapping. */
static enum mig_status status_of_http(const char *http_status)
{
    switch (http_status ? atoi(http_status) : 0) {
    case 400:
        return MIG_STATUS_INTERNAL;
    case 401:
        return MIG_STATUS_UNAUTHENTICATED;
    case 403:
        return MIG_STATUS_PERMISSION_DENIED;
    case 404:
        return MIG_STATUS_UNIMPLEMENTED;
    case 429:
    case 502:
    case 503:
    case 504:
        return MIG_STATUS_UNAVAILABLE;
    default:
        return MIG_STATUS_UNKNOWN;
    }
}

static void take_status(struct mig_h2_stream *stream)
{
    const char *status = mig_h2_header(stream, "grpc-status");
    const char *text = mig_h2_header(stream, "grpc-message");

    if (!status || !isdigit((unsigned char)*status) || strlen(status) > STATUS_DIGITS_MAX ||
        atoi(status) > MIG_STATUS_UNAUTHENTICATED) {
        stream->status = MIG_STATUS_UNKNOWN;
        mig_h2_explain(stream, "the server ended the call without a status");
        return;
    }
    stream->status = (enum mig_status)atoi(status);
    decode_text(text ? text : "", stream->text, sizeof(stream->text));
    if (stream->status == MIG_STATUS_OK && stream->prefix_bytes) {
        stream->status = MIG_STATUS_INTERNAL;
        mig_h2_explain(stream, "the server stopped in the middle of a message");
    }
}

void mig_h2_call_headers(struct mig_h2_stream *stream, bool is_last)
{
    const struct mig_h2 *connection = stream->connection;
    const char *http_status = mig_h2_header(stream, ":status");
    const char *content_type = mig_h2_header(stream, "content-type");

    if (stream->peer_ended || (http_status && *http_status == '1' && !is_last))
        return;
    if (stream->headers_too_large) {
        mig_h2_explain(stream, "the server's metadata is larger than 8 KiB");
        mig_h2_call_fail(stream, MIG_STATUS_RESOURCE_EXHAUSTED);
    } else if (!http_status || strcmp(http_status, "200") != 0) {
        mig_h2_explain(stream, "the server answered HTTP %s", http_status ? http_status : "without a status");
        mig_h2_call_fail(stream, status_of_http(http_status));
    } else if (!content_type || strncmp(content_type, CONTENT_TYPE, strlen(CONTENT_TYPE)) != 0) {
        mig_h2_explain(stream, "the server does not speak gRPC");
        mig_h2_call_fail(stream, MIG_STATUS_UNKNOWN);
    } else if (!is_last) {
        return;
    } else {
        stream->peer_ended = true;
        take_status(stream);
    }
    if (connection->handler.on_end)
        connection->handler.on_end(connection->user, stream);
}

/* Reads the prefix of the next message. Returns a status; OK with prefix_bytes == MIG_PREFIX_BYTES when it is whole. */
static enum mig_status take_prefix(struct mig_h2_stream *stream, const uint8_t **bytes, size_t *count_bytes)
{
    while (stream->prefix_bytes < MIG_PREFIX_BYTES && *count_bytes) {
        stream->prefix[stream->prefix_bytes++] = *(*bytes)++;
        --*count_bytes;
    }
    if (stream->prefix_bytes < MIG_PREFIX_BYTES)
        return MIG_STATUS_OK;
    const uint8_t *prefix = stream->prefix;
    if (prefix[0])
        return worded(stream, MIG_STATUS_INTERNAL, "a message is marked compressed, but no compression was agreed");
    stream->message_bytes = (size_t)prefix[1] << 24 | (size_t)prefix[2] << 16 | (size_t)prefix[3] << 8 | prefix[4];
    stream->assembled_bytes = 0;
    if (stream->message_bytes > stream->connection->limits.message_bytes_max) {
        mig_h2_explain(stream, "a message of %zu bytes; at most %zu are taken", stream->message_bytes,
                       stream->connection->limits.message_bytes_max);
        return MIG_STATUS_RESOURCE_EXHAUSTED;
    }
    return MIG_STATUS_OK;
}

/* Its end lies on a page boundary, and so do the pages that end it: the kernel copies these much faster. */
static size_t lead_bytes(const struct mig_h2_stream *stream)
{
    return -stream->message_bytes % MIG_PAGE_SIZE_BYTES;
}

size_t mig_h2_call_room(const struct mig_h2_stream *stream, uint8_t **ret)
{
    if (stream->peer_ended || stream->prefix_bytes < MIG_PREFIX_BYTES || !stream->assembled_bytes)
        return 0;
    *ret = stream->assembly + lead_bytes(stream) + stream->assembled_bytes;
    return stream->message_bytes - stream->assembled_bytes;
}

/* The whole message if it lies in the chunk, or once its last part has come; NULL until then. */
static const uint8_t *assemble(struct mig_h2_stream *stream, const uint8_t **bytes, size_t *count_bytes)
{
    const size_t wanted = stream->message_bytes - stream->assembled_bytes;
    const size_t part = wanted < *count_bytes ? wanted : *count_bytes;
    const uint8_t *start = *bytes;

    if (part == stream->message_bytes) {
        *bytes += part;
        *count_bytes -= part;
        return start;
    }
    const size_t needed_bytes = lead_bytes(stream) + stream->message_bytes;
    if (stream->assembly_capacity < needed_bytes) {
        free(stream->assembly); /* nothing of the message is in it: its length was known before its first byte */
        stream->assembly = aligned_alloc(MIG_PAGE_SIZE_BYTES, needed_bytes);
        stream->assembly_capacity = stream->assembly ? needed_bytes : 0;
        if (!stream->assembly) {
            mig_h2_explain(stream, "out of memory");
            return NULL;
        }
    }
    uint8_t *message = stream->assembly + lead_bytes(stream);
    if (start != message + stream->assembled_bytes)
        memcpy(message + stream->assembled_bytes, start, part);
    stream->assembled_bytes += part;
    *bytes += part;
    *count_bytes -= part;
    return stream->assembled_bytes == stream->message_bytes ? message : NULL;
}

bool mig_h2_call_bytes(struct mig_h2_stream *stream, const uint8_t *bytes, size_t count_bytes)
{
    const struct mig_h2 *connection = stream->connection;
    enum mig_status status = MIG_STATUS_OK;

    /* A call that is ending here wants no more; it only lets the peer finish. */
    while (status == MIG_STATUS_OK && count_bytes && !stream->peer_ended &&
           !(connection->role == MIG_H2_SERVER && stream->is_ending)) {
        if (stream->prefix_bytes < MIG_PREFIX_BYTES) {
            status = take_prefix(stream, &bytes, &count_bytes);
            if (stream->prefix_bytes < MIG_PREFIX_BYTES || (stream->message_bytes && !count_bytes))
                continue;
        }
        if (status != MIG_STATUS_OK)
            break;
        const uint8_t *message = assemble(stream, &bytes, &count_bytes);
        if (!message) {
            status = count_bytes ? MIG_STATUS_RESOURCE_EXHAUSTED : MIG_STATUS_OK;
            continue;
        }
        stream->prefix_bytes = 0;
        if (connection->handler.on_message)
            status = connection->handler.on_message(connection->user, stream, message, stream->message_bytes);
    }
    if (status == MIG_STATUS_OK)
        return true;
    mig_h2_call_fail(stream, status);
    if (connection->role == MIG_H2_CLIENT && connection->handler.on_end)
        connection->handler.on_end(connection->user, stream);
    return false;
}

/* ---- facts ---- */

void *mig_h2_stream_user(const struct mig_h2_stream *stream)
{
    return stream->user;
}

void mig_h2_set_stream_user(struct mig_h2_stream *stream, void *user)
{
    stream->user = user;
}

uint64_t mig_h2_deadline_ns(const struct mig_h2_stream *stream)
{
    return stream->deadline_ns;
}

enum mig_status mig_h2_status(const struct mig_h2_stream *stream, const char **ret_text)
{
    *ret_text = stream->text;
    return stream->status;
}
