#include "h2.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "h2_internal.h"
#include "units.h"

/* What nghttp2 hands out at once is at most one frame of 16 KiB that is not DATA; DATA comes through the batch. */
enum { CONTROL_FRAME_BYTES_MAX = 17 << 10 };
enum { LANDING_BYTES_MIN = 16 << 10, BEHIND_BYTES = 4 << 10 };

/* ---- the batch ---- */

bool mig_h2_batch_has_room(const struct mig_h2 *connection, int segments, size_t scratch_bytes)
{
    return connection->segment_count + segments <= BATCH_SEGMENTS_MAX &&
           connection->scratch_bytes + scratch_bytes <= BATCH_SCRATCH_BYTES;
}

/* Adds a segment, or lengthens the last one if it goes on there. */
static void add_segment(struct mig_h2 *connection, const struct segment *added)
{
    struct segment *last = connection->segment_count ? &connection->segments[connection->segment_count - 1] : NULL;

    if (!added->count_bytes)
        return;
    if (last && last->fd == added->fd && last->offset + last->count_bytes == added->offset)
        last->count_bytes += added->count_bytes;
    else
        connection->segments[connection->segment_count++] = *added;
}

void mig_h2_batch_body(struct mig_h2 *connection, struct message *message, size_t count_bytes)
{
    const struct segment segment = {
        .fd = message->fd,
        .offset = message->offset + message->body_sent, /* an address in memory counts alike */
        .count_bytes = count_bytes,
    };
    add_segment(connection, &segment);
    message->body_sent += (uint32_t)count_bytes;
}

void mig_h2_batch_copy(struct mig_h2 *connection, const void *bytes, size_t count_bytes)
{
    uint8_t *place = connection->scratch + connection->scratch_bytes;
    const struct segment segment = {.fd = -1, .bytes = place, .count_bytes = count_bytes};

    memcpy(place, bytes, count_bytes);
    connection->scratch_bytes += count_bytes;
    add_segment(connection, &segment);
}

/* Takes from nghttp2 what fits. Returns 0 or -errno. */
static int fill_batch(struct mig_h2 *connection)
{
    while (mig_h2_batch_has_room(connection, 1, CONTROL_FRAME_BYTES_MAX)) {
        const uint8_t *bytes;
        const ssize_t count = nghttp2_session_mem_send(connection->session, &bytes);
        if (count < 0) {
            connection->is_broken = true;
            return count == NGHTTP2_ERR_NOMEM ? -ENOMEM : -EPROTO;
        }
        if (count == 0)
            return 0;
        mig_h2_batch_copy(connection, bytes, (size_t)count);
    }
    return 0;
}

/* Writes what lies in memory up to the next file segment. Returns the bytes written or -errno. */
static ssize_t write_memory(struct mig_h2 *connection)
{
    struct iovec iov[WRITE_IOV_MAX];
    int count = 0, next = connection->segment_first;

    for (; next < connection->segment_count && connection->segments[next].fd < 0 && count < WRITE_IOV_MAX; next++)
        iov[count++] = (struct iovec){(void *)connection->segments[next].bytes, connection->segments[next].count_bytes};
    const struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)count};
    const int more = next < connection->segment_count ? MSG_MORE : 0;
    const ssize_t written = sendmsg(connection->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL | more);
    return written < 0 ? -errno : written;
}

static ssize_t write_file(struct mig_h2 *connection)
{
    const struct segment *first = &connection->segments[connection->segment_first];
    off_t offset = (off_t)first->offset;
    const ssize_t written = sendfile(connection->fd, first->fd, &offset, first->count_bytes);

    if (written == 0)
        return -EIO; /* the file is shorter than what was promised of it */
    return written < 0 ? -errno : written;
}

void mig_h2_batch_advance(struct mig_h2 *connection, size_t count_bytes)
{
    while (count_bytes) {
        struct segment *first = &connection->segments[connection->segment_first];
        const size_t part = count_bytes < first->count_bytes ? count_bytes : first->count_bytes;
        first->offset += part;
        first->count_bytes -= part;
        count_bytes -= part;
        connection->segment_first += !first->count_bytes;
    }
}

/* Returns 0 when the batch is written, 1 when the socket is full, or -errno. */
static int write_batch(struct mig_h2 *connection)
{
    while (connection->segment_first < connection->segment_count) {
        const bool is_file = connection->segments[connection->segment_first].fd >= 0;
        const ssize_t written = is_file ? write_file(connection) : write_memory(connection);
        if (written == -EINTR)
            continue;
        if (written < 0)
            return written == -EAGAIN ? 1 : (int)written;
        connection->wire_bytes += (uint64_t)written;
        mig_h2_batch_advance(connection, (size_t)written);
    }
    return 0;
}

static void free_streams(struct mig_h2_stream **list)
{
    while (*list) {
        struct mig_h2_stream *stream = *list;
        *list = stream->next;
        mig_h2_stream_free(stream);
    }
}

static void note_errno(struct mig_h2 *connection, int rc)
{
    const char *words = connection->tls ? mig_tls_stream_error(connection->tls) : "";

    if (!connection->error[0])
        snprintf(connection->error, sizeof(connection->error), "%s", words[0] ? words : strerror(-rc));
}

int mig_h2_flush(struct mig_h2 *connection)
{
    for (;;) {
        int rc = connection->tls ? mig_h2_write_sealed(connection) : write_batch(connection);
        if (rc == 0) {
            connection->segment_first = connection->segment_count = 0;
            connection->scratch_bytes = 0;
            free_streams(&connection->graveyard);
            rc = fill_batch(connection);
        }
        if (rc < 0)
            note_errno(connection, rc);
        if (rc || !connection->segment_count)
            return rc;
    }
}

/* Hands bytes to nghttp2. Returns 0 or -errno. */
static int take(struct mig_h2 *connection, const uint8_t *bytes, size_t count_bytes)
{
    const ssize_t taken = count_bytes ? nghttp2_session_mem_recv(connection->session, bytes, count_bytes) : 0;

    if (taken >= 0 && !connection->is_broken)
        return 0;
    connection->is_broken = true;
    if (!connection->error[0])
        snprintf(connection->error, sizeof(connection->error), "HTTP/2: %s",
                 nghttp2_strerror(taken < 0 ? (int)taken : NGHTTP2_ERR_PROTO));
    nghttp2_session_terminate_session(connection->session, NGHTTP2_PROTOCOL_ERROR);
    return taken == NGHTTP2_ERR_NOMEM ? -ENOMEM : -EPROTO;
}

/* Whether this is the beginning of a record of TLS, a handshake or an alert, from who takes us for one of its kind. */
static bool is_tls(const uint8_t *bytes, size_t count_bytes)
{
    return count_bytes >= 2 && (bytes[0] == 0x16 || bytes[0] == 0x15) && bytes[1] == 0x03;
}

/* The place of what arrives next, if it is much of a message: it need not be copied there. */
static size_t find_landing(const struct mig_h2 *connection, uint8_t **ret)
{
    const size_t room = connection->landing ? mig_h2_call_room(connection->landing, ret) : 0;
    const size_t bytes = room < connection->frame_left_bytes ? room : connection->frame_left_bytes;
    return bytes >= LANDING_BYTES_MIN ? bytes : 0;
}

static ssize_t receive_plain(struct mig_h2 *connection, struct msghdr *message, bool may_wait)
{
    const ssize_t got = recvmsg(connection->fd, message, may_wait ? 0 : MSG_DONTWAIT);

    if (got <= 0)
        return got < 0 ? -errno : 0;
    connection->heard_ns = mig_now_ns();
    connection->wire_bytes += (uint64_t)got;
    return got;
}

int mig_h2_receive(struct mig_h2 *connection, bool may_wait)
{
    uint8_t *landing = NULL;
    const size_t landing_bytes = find_landing(connection, &landing);
    /* Behind the rest of a message, just enough for the next one to begin, which then lands in its place too. */
    const size_t behind_bytes = landing_bytes ? BEHIND_BYTES : connection->limits.receive_bytes;
    struct iovec iov[2] = {{landing, landing_bytes}, {connection->received, behind_bytes}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};
    const ssize_t got = connection->tls ? mig_h2_receive_sealed(connection, iov, may_wait)
                                        : receive_plain(connection, &message, may_wait);
    connection->has_more = got == (ssize_t)(landing_bytes + behind_bytes);
    if (got == -EAGAIN || got == -EINTR)
        return 0;
    if (got <= 0) {
        const int rc = got < 0 ? (int)got : -ECONNRESET;
        if (got == 0 && !connection->error[0])
            snprintf(connection->error, sizeof(connection->error), "the peer closed the connection");
        note_errno(connection, rc);
        return rc;
    }
    if (!connection->has_received && is_tls(connection->received, (size_t)got)) {
        snprintf(connection->error, sizeof(connection->error), "%s",
                 connection->role == MIG_H2_SERVER ? "TLS on a plain-text port" : "the peer speaks TLS, we do not");
        return -EPROTO;
    }
    connection->has_received = true;
    const size_t landed_bytes = (size_t)got < landing_bytes ? (size_t)got : landing_bytes;
    int rc = take(connection, landing, landed_bytes);
    if (rc == 0)
        rc = take(connection, connection->received, (size_t)got - landed_bytes);
    return rc < 0 ? rc : 1;
}

bool mig_h2_is_written(const struct mig_h2 *connection)
{
    return connection->segment_first == connection->segment_count &&
           (!connection->tls || mig_tls_stream_is_sent(connection->tls));
}

bool mig_h2_is_over(const struct mig_h2 *connection)
{
    return !nghttp2_session_want_read(connection->session) && !nghttp2_session_want_write(connection->session) &&
           mig_h2_is_written(connection);
}

/* ---- life ---- */

int mig_h2_create(int fd, enum mig_h2_role role, const struct mig_h2_limits *limits,
                  const struct mig_h2_handler *handler, void *user, struct mig_h2 **ret)
{
    struct mig_h2 *connection = calloc(1, sizeof(*connection));
    if (!connection)
        return -ENOMEM;
    connection->fd = -1; /* the caller's, until all went well */
    connection->role = role;
    connection->limits = *limits;
    connection->handler = *handler;
    connection->user = user;
    connection->heard_ns = mig_now_ns();
    connection->received = malloc(limits->receive_bytes);
    const int rc = connection->received ? mig_h2_session_create(connection) : -ENOMEM;
    if (rc < 0) {
        mig_h2_destroy(connection);
        return rc;
    }
    connection->fd = fd;
    *ret = connection;
    return 0;
}

void mig_h2_secure(struct mig_h2 *connection, struct mig_tls_stream *tls)
{
    connection->tls = tls;
}

void mig_h2_destroy(struct mig_h2 *connection)
{
    if (!connection)
        return;
    for (struct mig_h2_stream *stream = connection->streams; stream; stream = stream->next)
        if (connection->handler.on_close)
            connection->handler.on_close(connection->user, stream);
    nghttp2_session_del(connection->session);
    free_streams(&connection->streams);
    free_streams(&connection->graveyard);
    mig_tls_stream_destroy(connection->tls);
    if (connection->fd >= 0)
        close(connection->fd);
    free(connection->received);
    free(connection);
}

void mig_h2_go_away(struct mig_h2 *connection)
{
    nghttp2_session_terminate_session(connection->session, NGHTTP2_NO_ERROR);
}

void mig_h2_ping(struct mig_h2 *connection)
{
    if (connection->ping_sent_ns)
        return;
    connection->ping_sent_ns = mig_now_ns();
    nghttp2_submit_ping(connection->session, NGHTTP2_FLAG_NONE, NULL);
}

uint64_t mig_h2_take_ping_ns(struct mig_h2 *connection)
{
    const uint64_t ping_ns = connection->ping_ns;
    connection->ping_ns = 0;
    return ping_ns;
}

/* ---- facts ---- */

int mig_h2_fd(const struct mig_h2 *connection)
{
    return connection->fd;
}

bool mig_h2_has_more(const struct mig_h2 *connection)
{
    return connection->has_more;
}

bool mig_h2_has_unseen(const struct mig_h2 *connection)
{
    return connection->tls && mig_tls_stream_has_unseen(connection->tls);
}

bool mig_h2_is_caller(const struct mig_h2_stream *stream, const char *name)
{
    const struct mig_tls_stream *tls = stream->connection->tls;
    return !tls || mig_tls_stream_is_peer(tls, name);
}

uint64_t mig_h2_heard_ns(const struct mig_h2 *connection)
{
    return connection->heard_ns;
}

bool mig_h2_is_greeted(const struct mig_h2 *connection)
{
    return connection->is_greeted;
}

bool mig_h2_is_leaving(const struct mig_h2 *connection)
{
    return connection->is_leaving;
}

uint64_t mig_h2_wire_bytes(const struct mig_h2 *connection)
{
    return connection->wire_bytes + (connection->tls ? mig_tls_stream_wire_bytes(connection->tls) : 0);
}

const char *mig_h2_error(const struct mig_h2 *connection)
{
    return connection->error;
}

struct mig_h2_stream *mig_h2_next_stream(const struct mig_h2 *connection, const struct mig_h2_stream *after)
{
    return after ? after->next : connection->streams;
}
