#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "h2_internal.h"

/* A frame's worth of messages is gathered at a time, so that any frame fits into an empty batch. */
enum { FRAME_MESSAGES_MAX = 64, FRAME_HEADER_BYTES = 9, RESETS_MAX = 1000 };
_Static_assert(2 * FRAME_MESSAGES_MAX + 1 <= BATCH_SEGMENTS_MAX, "the segments of a frame fit into a batch");

/* ---- streams ---- */

struct mig_h2_stream *mig_h2_stream_create(struct mig_h2 *connection, int32_t id)
{
    struct mig_h2_stream *stream = calloc(1, sizeof(*stream));
    if (!stream)
        return NULL;
    stream->connection = connection;
    stream->id = id;
    stream->status = MIG_STATUS_UNKNOWN;
    stream->next = connection->streams;
    connection->streams = stream;
    return stream;
}

void mig_h2_stream_free(struct mig_h2_stream *stream)
{
    const struct mig_h2 *connection = stream->connection;

    if (connection->handler.on_free)
        connection->handler.on_free(connection->user, stream);
    free(stream->assembly);
    free(stream->headers);
    free(stream);
}

static struct mig_h2_stream *stream_of(nghttp2_session *session, int32_t id)
{
    return nghttp2_session_get_stream_user_data(session, id);
}

/* ---- out ---- */

/* How many bytes of the queue, at most `limit`, go into one frame. */
static uint64_t frame_bytes(const struct mig_h2_stream *stream, uint64_t limit)
{
    uint64_t count_bytes = 0;
    for (uint32_t i = 0; i < FRAME_MESSAGES_MAX && stream->queue_head + i != stream->queue_tail; i++) {
        const struct message *message = &stream->queue[(stream->queue_head + i) % MIG_H2_QUEUE_MAX];
        count_bytes += message->header_bytes - message->header_sent + message->body_bytes - message->body_sent;
        if (count_bytes >= limit)
            return limit;
    }
    return count_bytes;
}

static ssize_t provide_data(nghttp2_session *session, int32_t id, uint8_t *buffer, size_t length, uint32_t *flags,
                            nghttp2_data_source *source, void *user)
{
    struct mig_h2_stream *stream = source->ptr;
    const uint64_t count_bytes = frame_bytes(stream, length);

    (void)buffer, (void)user;
    if (!count_bytes && !stream->is_ending) {
        stream->is_deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    if (count_bytes)
        *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (stream->is_ending && count_bytes == stream->queued_bytes) {
        *flags |= NGHTTP2_DATA_FLAG_EOF;
        if (stream->connection->role == MIG_H2_SERVER) {
            nghttp2_nv trailers[2];
            char text[3 * MIG_STATUS_TEXT_BYTES];
            *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
            nghttp2_submit_trailer(session, id, trailers, mig_h2_trailers(stream, trailers, text));
        }
    }
    return (ssize_t)count_bytes;
}

/* The frame that provide_data promised: its header and the messages' parts go into the batch. */
static int send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *frame_header, size_t length,
                     nghttp2_data_source *source, void *user)
{
    struct mig_h2 *connection = user;
    struct mig_h2_stream *stream = source->ptr;

    (void)session, (void)frame;
    if (!mig_h2_batch_has_room(connection, 2 * FRAME_MESSAGES_MAX + 1,
                               FRAME_HEADER_BYTES + FRAME_MESSAGES_MAX * MIG_WIRE_HEADER_BYTES_MAX))
        return NGHTTP2_ERR_WOULDBLOCK;
    mig_h2_batch_copy(connection, frame_header, FRAME_HEADER_BYTES);
    stream->queued_bytes -= length;
    while (length) {
        struct message *message = &stream->queue[stream->queue_head % MIG_H2_QUEUE_MAX];
        const size_t header_left = message->header_bytes - message->header_sent;
        const size_t header_part = header_left < length ? header_left : length;
        mig_h2_batch_copy(connection, message->header + message->header_sent, header_part);
        message->header_sent += (uint32_t)header_part;
        length -= header_part;
        const size_t body_left = message->body_bytes - message->body_sent;
        const size_t body_part = body_left < length ? body_left : length;
        mig_h2_batch_body(connection, message, body_part);
        length -= body_part;
        if (message->header_sent == message->header_bytes && message->body_sent == message->body_bytes)
            stream->queue_head++;
    }
    return 0;
}

static ssize_t frame_length(nghttp2_session *session, uint8_t frame_type, int32_t id, int32_t connection_window,
                            int32_t stream_window, uint32_t frame_max, void *user)
{
    int64_t length = frame_max;

    (void)session, (void)frame_type, (void)id, (void)user;
    length = length < connection_window ? length : connection_window;
    return (ssize_t)(length < stream_window ? length : stream_window);
}

nghttp2_data_provider mig_h2_data_of(struct mig_h2_stream *stream)
{
    return (nghttp2_data_provider){.source.ptr = stream, .read_callback = provide_data};
}

void mig_h2_resume(struct mig_h2_stream *stream)
{
    if (!stream->is_deferred)
        return;
    stream->is_deferred = false;
    nghttp2_session_resume_data(stream->connection->session, stream->id);
}

/* ---- in ---- */

static int on_begin_frame(nghttp2_session *session, const nghttp2_frame_hd *header, void *user)
{
    struct mig_h2 *connection = user;
    const bool is_plain_data = header->type == NGHTTP2_DATA && !(header->flags & NGHTTP2_FLAG_PADDED);

    connection->landing = is_plain_data ? stream_of(session, header->stream_id) : NULL;
    connection->frame_left_bytes = header->length;
    return 0;
}

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
    struct mig_h2 *connection = user;

    if (connection->role != MIG_H2_SERVER || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0;
    struct mig_h2_stream *stream = mig_h2_stream_create(connection, frame->hd.stream_id);
    if (!stream)
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    return nghttp2_session_set_stream_user_data(session, stream->id, stream);
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_bytes,
                     const uint8_t *value, size_t value_bytes, uint8_t flags, void *user)
{
    struct mig_h2_stream *stream = stream_of(session, frame->hd.stream_id);
    const size_t added_bytes = name_bytes + value_bytes + 2;

    (void)flags, (void)user;
    if (!stream || stream->headers_too_large)
        return 0;
    if (stream->headers_bytes + added_bytes > MIG_H2_HEADERS_BYTES_MAX) {
        stream->headers_too_large = true;
        return 0;
    }
    char *grown = realloc(stream->headers, stream->headers_bytes + added_bytes);
    if (!grown)
        return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    stream->headers = grown;
    char *place = grown + stream->headers_bytes;
    memcpy(place, name, name_bytes);
    place[name_bytes] = '\0';
    memcpy(place + name_bytes + 1, value, value_bytes);
    place[name_bytes + 1 + value_bytes] = '\0';
    stream->headers_bytes += added_bytes;
    return 0;
}

static void on_headers(struct mig_h2_stream *stream, const nghttp2_frame *frame)
{
    const bool is_last = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;

    if (stream->connection->role == MIG_H2_CLIENT) {
        mig_h2_call_headers(stream, is_last);
        return;
    }
    if (frame->headers.cat == NGHTTP2_HCAT_REQUEST)
        mig_h2_call_begin(stream);
    if (is_last)
        mig_h2_call_half_closed(stream);
}

static void on_data_end(struct mig_h2_stream *stream)
{
    if (stream->connection->role == MIG_H2_SERVER) {
        mig_h2_call_half_closed(stream);
        return;
    }
    mig_h2_explain(stream, "the server ended the call without trailers");
    mig_h2_call_fail(stream, MIG_STATUS_INTERNAL);
}

static int on_frame_recv(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
    struct mig_h2 *connection = user;
    struct mig_h2_stream *stream = stream_of(session, frame->hd.stream_id);

    switch (frame->hd.type) {
    case NGHTTP2_HEADERS:
        if (stream)
            on_headers(stream, frame);
        break;
    case NGHTTP2_DATA:
        if (stream && frame->hd.flags & NGHTTP2_FLAG_END_STREAM)
            on_data_end(stream);
        break;
    case NGHTTP2_SETTINGS:
        if (!(frame->hd.flags & NGHTTP2_FLAG_ACK))
            connection->is_greeted = true;
        break;
    case NGHTTP2_PING:
        if (frame->hd.flags & NGHTTP2_FLAG_ACK && connection->ping_sent_ns) {
            connection->ping_ns = connection->heard_ns - connection->ping_sent_ns;
            connection->ping_sent_ns = 0;
        }
        break;
    case NGHTTP2_GOAWAY:
        connection->is_leaving = true;
        if (frame->goaway.error_code == NGHTTP2_NO_ERROR && connection->role == MIG_H2_SERVER)
            break; /* a client that is through */
        snprintf(connection->error, sizeof(connection->error), "the peer said GOAWAY: %s%s%.*s",
                 nghttp2_http2_strerror(frame->goaway.error_code), frame->goaway.opaque_data_len ? ": " : "",
                 (int)(frame->goaway.opaque_data_len < 64 ? frame->goaway.opaque_data_len : 64),
                 (const char *)frame->goaway.opaque_data);
        break;
    default:
        break;
    }
    return 0;
}

static int on_data_chunk(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *bytes, size_t count_bytes,
                         void *user)
{
    struct mig_h2 *connection = user;
    struct mig_h2_stream *stream = stream_of(session, id);

    (void)flags;
    connection->frame_left_bytes -= count_bytes;
    nghttp2_session_consume_connection(session, count_bytes);
    /* A server's owner says when a stream's bytes are dealt with: that is what holds a greedy client back. */
    if (!stream || connection->role == MIG_H2_CLIENT)
        nghttp2_session_consume_stream(session, id, count_bytes);
    if (stream)
        mig_h2_call_bytes(stream, bytes, count_bytes);
    return 0;
}

static enum mig_status status_of_reset(uint32_t code)
{
    switch (code) {
    case NGHTTP2_REFUSED_STREAM:
        return MIG_STATUS_UNAVAILABLE;
    case NGHTTP2_CANCEL:
        return MIG_STATUS_CANCELLED;
    case NGHTTP2_ENHANCE_YOUR_CALM:
        return MIG_STATUS_RESOURCE_EXHAUSTED;
    default:
        return MIG_STATUS_INTERNAL;
    }
}

static int on_stream_close(nghttp2_session *session, int32_t id, uint32_t code, void *user)
{
    struct mig_h2 *connection = user;
    struct mig_h2_stream *stream = stream_of(session, id);
    struct mig_h2_stream **link = &connection->streams;

    if (!stream)
        return 0;
    if (connection->landing == stream)
        connection->landing = NULL;
    if (code != NGHTTP2_NO_ERROR && ++connection->resets > RESETS_MAX)
        nghttp2_session_terminate_session(session, NGHTTP2_ENHANCE_YOUR_CALM);
    if (connection->role == MIG_H2_CLIENT && !stream->peer_ended && !stream->text[0]) {
        stream->status = status_of_reset(code);
        mig_h2_explain(stream, "the server reset the call: %s", nghttp2_http2_strerror(code));
    }
    if (connection->handler.on_close)
        connection->handler.on_close(connection->user, stream);
    while (*link != stream)
        link = &(*link)->next;
    *link = stream->next;
    stream->next = connection->graveyard;
    connection->graveyard = stream;
    return 0;
}

static int on_frame_send(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
    struct mig_h2 *connection = user;
    const struct mig_h2_stream *stream = stream_of(session, frame->hd.stream_id);

    /* A server that has said its last word wants no more requests (RFC 9113, 8.1). */
    if (frame->hd.type == NGHTTP2_HEADERS && frame->hd.flags & NGHTTP2_FLAG_END_STREAM &&
        connection->role == MIG_H2_SERVER && stream && !stream->peer_ended)
        nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
    if (frame->hd.type == NGHTTP2_GOAWAY && frame->goaway.error_code != NGHTTP2_NO_ERROR && !connection->error[0])
        snprintf(connection->error, sizeof(connection->error), "the peer broke HTTP/2: %s",
                 nghttp2_http2_strerror(frame->goaway.error_code));
    return 0;
}

static int on_error(nghttp2_session *session, int code, const char *text, size_t text_bytes, void *user)
{
    struct mig_h2 *connection = user;

    (void)session, (void)code;
    if (!connection->error[0])
        snprintf(connection->error, sizeof(connection->error), "HTTP/2: %.*s", (int)text_bytes, text);
    return 0;
}

/* ---- life ---- */

static void set_callbacks(nghttp2_session_callbacks *callbacks)
{
    nghttp2_session_callbacks_set_on_begin_frame_callback(callbacks, on_begin_frame);
    nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(callbacks, on_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, on_frame_recv);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, on_data_chunk);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, on_stream_close);
    nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, on_frame_send);
    nghttp2_session_callbacks_set_send_data_callback(callbacks, send_data);
    nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, frame_length);
    nghttp2_session_callbacks_set_error_callback2(callbacks, on_error);
}

static int submit_settings(struct mig_h2 *connection)
{
    const nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, connection->limits.window_bytes},
        {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, connection->limits.frame_bytes_max},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, MIG_H2_HEADERS_BYTES_MAX},
        {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, MIG_H2_STREAMS_MAX},
    };
    /* The last one is for servers to say, the one before for clients. */
    nghttp2_settings_entry ours[4];
    memcpy(ours, settings, sizeof(ours));
    if (connection->role == MIG_H2_SERVER)
        ours[3] = settings[4];
    int rc = nghttp2_submit_settings(connection->session, NGHTTP2_FLAG_NONE, ours, 4);
    if (rc == 0) /* SETTINGS sizes streams alone */
        rc = nghttp2_session_set_local_window_size(connection->session, NGHTTP2_FLAG_NONE, 0,
                                                   (int32_t)connection->limits.window_bytes);
    return rc;
}

int mig_h2_session_create(struct mig_h2 *connection)
{
    nghttp2_session_callbacks *callbacks = NULL;
    nghttp2_option *option = NULL;
    int rc = nghttp2_session_callbacks_new(&callbacks);

    if (rc == 0)
        rc = nghttp2_option_new(&option);
    if (rc == 0) {
        set_callbacks(callbacks);
        nghttp2_option_set_no_auto_window_update(option, 1);
        nghttp2_option_set_max_outbound_ack(option, 256);
        rc = connection->role == MIG_H2_SERVER
                 ? nghttp2_session_server_new2(&connection->session, callbacks, connection, option)
                 : nghttp2_session_client_new2(&connection->session, callbacks, connection, option);
    }
    nghttp2_option_del(option);
    nghttp2_session_callbacks_del(callbacks);
    if (rc == 0)
        rc = submit_settings(connection);
    return rc == 0 ? 0 : rc == NGHTTP2_ERR_NOMEM ? -ENOMEM : -EINVAL;
}
