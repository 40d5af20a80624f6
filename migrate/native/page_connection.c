#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>

#include "pageserver_internal.h"
#include "units.h"

/* A server's sockets are bounded, and so are their buffers; window_bytes bounds how many requests wait in a call. */
static const struct mig_h2_limits LIMITS = {
    .message_bytes_max = 1024,
    .receive_bytes = 16 << 10,
    .frame_bytes_max = 16 << 10,
    .window_bytes = 65535,
};

static struct mig_page_call *call_of(const struct mig_h2_stream *stream)
{
    return mig_h2_stream_user(stream);
}

static enum mig_status on_call(void *user, struct mig_h2_stream *stream)
{
    struct connection *connection = user;
    struct mig_page_call *call = NULL;
    const enum mig_status status = mig_page_call_begin(stream, connection->server->exports, &connection->calls, &call);

    COUNT(connection->server, calls, 1);
    mig_h2_set_stream_user(stream, call);
    return status;
}

static enum mig_status on_message(void *user, struct mig_h2_stream *stream, const uint8_t *message, size_t bytes)
{
    struct connection *connection = user;

    COUNT(connection->server, requests, 1);
    return mig_page_call_request(call_of(stream), stream, message, bytes);
}

static void on_end(void *user, struct mig_h2_stream *stream)
{
    (void)user;
    mig_page_call_no_more(call_of(stream));
}

static void on_close(void *user, struct mig_h2_stream *stream)
{
    struct connection *connection = user;
    const char *text;
    const enum mig_status status = mig_h2_status(stream, &text);

    if (text[0]) {
        COUNT(connection->server, calls_failed, 1);
        mig_events_note(&connection->server->events, "refused a call of %s: %s: %s", connection->peer,
                        mig_status_name(status), text);
    }
    COUNT(connection->server, data_pages, mig_page_call_data_pages(call_of(stream)));
    mig_page_call_closed(call_of(stream));
}

static void on_free(void *user, struct mig_h2_stream *stream)
{
    (void)user;
    mig_page_call_free(call_of(stream));
}

/* A connection that asks for runs sends them from the memfd, and must not be held up in that. */
static void become_bulk(struct connection *connection)
{
    connection->is_bulk = true;
    fcntl(connection->fd, F_SETFL, O_NONBLOCK);
}

/* Answers what is asked, ends what is late. Returns whether there is something new to write. */
static bool work(struct connection *connection, uint64_t now_ns)
{
    bool worked = false;

    for (struct mig_h2_stream *stream = mig_h2_next_stream(connection->h2, NULL); stream;
         stream = mig_h2_next_stream(connection->h2, stream)) {
        const uint64_t deadline_ns = mig_h2_deadline_ns(stream);
        if (call_of(stream)) /* a call that is not one yet keeps no place */
            connection->busy_ns = now_ns;
        if (mig_page_call_is_bulk(call_of(stream)) && !connection->is_bulk)
            become_bulk(connection);
        if (deadline_ns && now_ns >= deadline_ns) {
            mig_h2_end_at_once(stream, MIG_STATUS_DEADLINE_EXCEEDED, "the call's deadline has passed");
            worked = true;
        } else {
            worked |= mig_page_call_work(call_of(stream), stream);
        }
    }
    return worked;
}

/* How long to sleep: until a call's deadline, or the next look at the clock. */
static int wait_ms(const struct connection *connection, uint64_t now_ns)
{
    int64_t sleep_ms = CONNECTION_TICK_MS;

    for (struct mig_h2_stream *stream = mig_h2_next_stream(connection->h2, NULL); stream;
         stream = mig_h2_next_stream(connection->h2, stream)) {
        const uint64_t deadline_ns = mig_h2_deadline_ns(stream);
        const int64_t left_ms = deadline_ns > now_ns ? (int64_t)((deadline_ns - now_ns + 999999) / 1000000) : 0;
        if (deadline_ns && left_ms < sleep_ms)
            sleep_ms = left_ms;
    }
    return (int)sleep_ms;
}

/* Returns why the connection must end, or NULL. */
static const char *overdue(const struct connection *connection, uint64_t now_ns, bool is_full)
{
    const struct mig_page_server_patience *patience = &connection->server->patience;

    if (is_full && now_ns - connection->progress_ns > patience->stuck_ns)
        return "it takes no more of what it asked for";
    if (now_ns - connection->busy_ns > patience->idle_ns)
        return "it has not called for too long";
    return NULL;
}

static int wait_and_receive(struct connection *connection, uint64_t now_ns, bool is_full)
{
    const int sleep_ms = wait_ms(connection, now_ns);
    struct pollfd poll_fd = {.fd = connection->fd, .events = (short)(is_full ? POLLIN | POLLOUT : POLLIN)};

    /* The usual case costs one system call: SO_RCVTIMEO is a tick. */
    if (!is_full && sleep_ms == CONNECTION_TICK_MS && !connection->is_bulk)
        return mig_h2_receive(connection->h2, true);
    if (mig_h2_has_unseen(connection->h2))
        return mig_h2_receive(connection->h2, false);
    if (poll(&poll_fd, 1, sleep_ms) < 0 && errno != EINTR)
        return -errno;
    return poll_fd.revents & ~POLLOUT ? mig_h2_receive(connection->h2, false) : 0;
}

/* A peer that has closed the connection may do so, unless a call was open. */
static const char *reason_of_leaving(const struct connection *connection)
{
    return mig_h2_next_stream(connection->h2, NULL) ? "it closed the connection with a call open" : NULL;
}

/*
 * Writes, unless the memory of what is queued was withdrawn: then those calls end at once, and if some of it is in a
 * frame that has begun, the connection does. Returns as mig_h2_flush does; -ESTALE for that end.
 */
static int flush_pinned(struct connection *connection)
{
    const bool may_write = mig_page_calls_pin(&connection->calls) || mig_h2_is_written(connection->h2);
    const int rc = may_write ? mig_h2_flush(connection->h2) : -ESTALE;

    mig_page_calls_unpin(&connection->calls);
    return rc;
}

const char *mig_connection_serve(struct connection *connection)
{
    connection->busy_ns = connection->progress_ns = mig_now_ns();
    while (!is_stopping(connection->server)) {
        const int flushed = flush_pinned(connection);
        const uint64_t now_ns = mig_now_ns();
        if (flushed == -EPIPE || flushed == -ECONNRESET)
            return reason_of_leaving(connection);
        if (flushed == -ESTALE)
            return "the pages on their way were withdrawn";
        if (flushed < 0)
            return mig_h2_error(connection->h2);
        if (flushed == 0) {
            connection->progress_ns = now_ns;
            if (work(connection, now_ns))
                continue;
            if (mig_h2_is_over(connection->h2))
                return mig_h2_error(connection->h2)[0] ? mig_h2_error(connection->h2) : NULL;
        }
        const char *reason = overdue(connection, now_ns, flushed == 1);
        if (reason) {
            mig_h2_go_away(connection->h2);
            mig_h2_flush(connection->h2);
            return reason;
        }
        const int received = wait_and_receive(connection, now_ns, flushed == 1);
        if (received == -ECONNRESET && is_stopping(connection->server))
            break; /* it was us who closed that half */
        if (received == -ECONNRESET)
            return reason_of_leaving(connection);
        if (received < 0) {
            mig_h2_flush(connection->h2); /* the GOAWAY says why */
            return mig_h2_error(connection->h2);
        }
    }
    mig_h2_go_away(connection->h2);
    mig_h2_flush(connection->h2);
    return NULL;
}

int mig_connection_begin(struct connection *connection, struct mig_tls_stream *tls)
{
    static const struct mig_h2_handler handler = {on_call, on_message, on_end, on_close, on_free};
    const int rc = mig_h2_create(connection->fd, MIG_H2_SERVER, &LIMITS, &handler, connection, &connection->h2);

    if (rc == 0)
        mig_h2_secure(connection->h2, tls);
    return rc;
}
