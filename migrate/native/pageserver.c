#include "pageserver.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "page_call.h"
#include "tcp.h"
#include "units.h"

enum { CONNECTIONS_MAX = 64, EVENTS_MAX = 16, TICK_MS = 1000, PEER_NAME_BYTES = 96 };
/* Without a call, or with a peer that does not read, a connection is given up; a call may last for ever. */
static const uint64_t IDLE_NS = 60ull * 1000000000u, STUCK_NS = 20ull * 1000000000u;

/* A server's sockets are bounded, and so are their buffers; window_bytes bounds how many requests wait in a call. */
static const struct mig_h2_limits LIMITS = {
    .message_bytes_max = 1024,
    .receive_bytes = 16 << 10,
    .frame_bytes_max = 16 << 10,
    .window_bytes = 65535,
};

struct connection {
    struct mig_page_server *server;
    struct connection *next;
    int fd;
    char peer[PEER_NAME_BYTES];
    struct mig_h2 *h2;
    struct mig_page_calls calls;
    bool is_bulk;
    uint64_t busy_ns;     /* when a call was last open */
    uint64_t progress_ns; /* when the peer last took everything that we had to say */
};

struct mig_page_server {
    int listen_fd;
    struct mig_exports *exports;
    pthread_t accept_thread;

    pthread_mutex_t mutex; /* guards all below but the counters */
    pthread_cond_t changed;
    bool stopping, quiet;
    struct connection *connections;
    char events[EVENTS_MAX][MIG_EVENT_TEXT_BYTES];
    unsigned event_head, event_tail;
    struct mig_page_server_counters counters; /* atomic */
};

/* ---- events and counters ---- */

static void count(struct mig_page_server *server, size_t counter_offset, uint64_t added)
{
    __atomic_fetch_add((uint64_t *)((char *)&server->counters + counter_offset), added, __ATOMIC_RELAXED);
}

#define COUNT(server, field, added) count(server, offsetof(struct mig_page_server_counters, field), (uint64_t)(added))

__attribute__((format(printf, 2, 3))) static void note_event(struct mig_page_server *server, const char *format, ...)
{
    va_list arguments;

    pthread_mutex_lock(&server->mutex);
    if (server->event_tail - server->event_head < EVENTS_MAX) { /* a flood of events is worth its first ones */
        va_start(arguments, format);
        vsnprintf(server->events[server->event_tail++ % EVENTS_MAX], MIG_EVENT_TEXT_BYTES, format, arguments);
        va_end(arguments);
    }
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mutex);
}

int mig_page_server_next_event(struct mig_page_server *server, char text[MIG_EVENT_TEXT_BYTES])
{
    pthread_mutex_lock(&server->mutex);
    while (server->event_head == server->event_tail && !server->quiet)
        pthread_cond_wait(&server->changed, &server->mutex);
    const int found = server->event_head != server->event_tail;
    if (found)
        memcpy(text, server->events[server->event_head++ % EVENTS_MAX], MIG_EVENT_TEXT_BYTES);
    pthread_mutex_unlock(&server->mutex);
    return found;
}

void mig_page_server_quiet(struct mig_page_server *server)
{
    pthread_mutex_lock(&server->mutex);
    server->quiet = true;
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mutex);
}

const struct mig_page_server_counters *mig_page_server_counters(const struct mig_page_server *server)
{
    return &server->counters;
}

/* ---- a connection's thread ---- */

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
        note_event(connection->server, "refused a call of %s: %s: %s", connection->peer, mig_status_name(status), text);
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
    int64_t sleep_ms = TICK_MS;

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
    if (is_full && now_ns - connection->progress_ns > STUCK_NS)
        return "it takes no more of what it asked for";
    if (now_ns - connection->busy_ns > IDLE_NS)
        return "it has not called for a minute";
    return NULL;
}

static int wait_and_receive(struct connection *connection, uint64_t now_ns, bool is_full)
{
    const int sleep_ms = wait_ms(connection, now_ns);
    struct pollfd poll_fd = {.fd = connection->fd, .events = (short)(is_full ? POLLIN | POLLOUT : POLLIN)};

    /* The usual case costs one system call: SO_RCVTIMEO is a tick. */
    if (!is_full && sleep_ms == TICK_MS && !connection->is_bulk)
        return mig_h2_receive(connection->h2, true);
    if (poll(&poll_fd, 1, sleep_ms) < 0 && errno != EINTR)
        return -errno;
    return poll_fd.revents & ~POLLOUT ? mig_h2_receive(connection->h2, false) : 0;
}

static bool is_stopping(struct mig_page_server *server)
{
    return __atomic_load_n(&server->stopping, __ATOMIC_ACQUIRE);
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

/* Serves until the connection ends. Returns the reason if it was the peer's fault, else NULL. */
static const char *serve(struct connection *connection)
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

static void forget(struct connection *connection)
{
    struct mig_page_server *server = connection->server;
    struct connection **link = &server->connections;

    pthread_mutex_lock(&server->mutex);
    while (*link != connection)
        link = &(*link)->next;
    *link = connection->next;
    pthread_mutex_unlock(&server->mutex);

    mig_h2_destroy(connection->h2); /* closes the socket, which nobody can find any more */
    free(connection);

    pthread_mutex_lock(&server->mutex);
    __atomic_fetch_sub(&server->counters.connections_now, 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mutex);
}

static void *connection_thread(void *argument)
{
    struct connection *connection = argument;

    sigset_t broken_pipe;

    pthread_setname_np(pthread_self(), "mig-serve");
    sigemptyset(&broken_pipe);
    sigaddset(&broken_pipe, SIGPIPE); /* sendfile has no MSG_NOSIGNAL */
    pthread_sigmask(SIG_BLOCK, &broken_pipe, NULL);
    const char *reason = serve(connection);
    if (reason) {
        COUNT(connection->server, connections_failed, 1);
        note_event(connection->server, "ended the connection of %s: %s", connection->peer, reason);
    }
    forget(connection);
    return NULL;
}

/* ---- accepting ---- */

static void name_peer(struct connection *connection, const struct sockaddr *address, socklen_t address_bytes)
{
    char host[64], port[8];

    if (getnameinfo(address, address_bytes, host, sizeof(host), port, sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV))
        snprintf(connection->peer, sizeof(connection->peer), "a peer without a name");
    else
        snprintf(connection->peer, sizeof(connection->peer), "%s port %s", host, port);
}

static int start_connection(struct mig_page_server *server, int fd, const struct sockaddr *address,
                            socklen_t address_bytes)
{
    static const struct mig_h2_handler handler = {on_call, on_message, on_end, on_close, on_free};
    const struct timeval tick = {.tv_sec = TICK_MS / 1000};
    struct connection *connection = calloc(1, sizeof(*connection));
    pthread_attr_t attributes;
    pthread_t thread;

    if (!connection)
        return -ENOMEM;
    *connection = (struct connection){.server = server, .fd = fd};
    name_peer(connection, address, address_bytes);
    mig_tcp_tune(fd);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof(tick));
    int rc = mig_h2_create(fd, MIG_H2_SERVER, &LIMITS, &handler, connection, &connection->h2);
    if (rc < 0) {
        free(connection);
        return rc;
    }
    pthread_mutex_lock(&server->mutex);
    connection->next = server->connections;
    server->connections = connection;
    __atomic_fetch_add(&server->counters.connections_now, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&server->mutex);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    rc = pthread_create(&thread, &attributes, connection_thread, connection);
    pthread_attr_destroy(&attributes);
    if (rc)
        forget(connection); /* and with it the socket */
    return 0;
}

static void *accept_thread(void *argument)
{
    struct mig_page_server *server = argument;

    pthread_setname_np(pthread_self(), "mig-accept");
    for (;;) {
        struct sockaddr_storage address;
        socklen_t address_bytes = sizeof(address);
        const int fd = accept4(server->listen_fd, (struct sockaddr *)&address, &address_bytes, SOCK_CLOEXEC);
        if (is_stopping(server)) {
            if (fd >= 0)
                close(fd);
            return NULL;
        }
        if (fd < 0) {
            if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
                /* Nothing to accept it with: give others a moment to let go of what they hold. */
                note_event(server, "cannot accept a connection: %s", strerror(errno));
                poll(NULL, 0, TICK_MS);
            }
            continue;
        }
        COUNT(server, connections, 1);
        const bool is_full = __atomic_load_n(&server->counters.connections_now, __ATOMIC_RELAXED) >= CONNECTIONS_MAX;
        if (is_full || start_connection(server, fd, (struct sockaddr *)&address, address_bytes) < 0) {
            COUNT(server, connections_failed, 1);
            note_event(server, "turned a connection away: %d are open", CONNECTIONS_MAX);
            close(fd);
        }
    }
}

/* ---- life ---- */

int mig_page_server_create(int listen_fd, struct mig_exports *exports, struct mig_page_server **ret)
{
    struct mig_page_server *server = calloc(1, sizeof(*server));
    if (!server)
        return -ENOMEM;
    *server = (struct mig_page_server){.listen_fd = listen_fd, .exports = exports};
    pthread_mutex_init(&server->mutex, NULL);
    pthread_cond_init(&server->changed, NULL);
    int rc = fcntl(listen_fd, F_SETFL, 0) < 0 ? -errno : 0;
    if (rc == 0)
        rc = -pthread_create(&server->accept_thread, NULL, accept_thread, server);
    if (rc < 0) {
        free(server);
        return rc;
    }
    *ret = server;
    return 0;
}

void mig_page_server_destroy(struct mig_page_server *server)
{
    if (!server)
        return;
    pthread_mutex_lock(&server->mutex);
    __atomic_store_n(&server->stopping, true, __ATOMIC_RELEASE);
    shutdown(server->listen_fd, SHUT_RDWR); /* wakes accept */
    for (struct connection *connection = server->connections; connection; connection = connection->next)
        shutdown(connection->fd, SHUT_RD); /* wakes its thread, which still says GOAWAY */
    pthread_mutex_unlock(&server->mutex);
    pthread_join(server->accept_thread, NULL);
    pthread_mutex_lock(&server->mutex);
    while (__atomic_load_n(&server->counters.connections_now, __ATOMIC_RELAXED))
        pthread_cond_wait(&server->changed, &server->mutex);
    pthread_mutex_unlock(&server->mutex);
    mig_page_server_quiet(server);
    close(server->listen_fd);
    pthread_cond_destroy(&server->changed);
    pthread_mutex_destroy(&server->mutex);
    free(server);
}
