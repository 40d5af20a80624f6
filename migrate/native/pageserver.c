#include "pageserver.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "pageserver_internal.h"
#include "tcp.h"
#include "tls_stream.h"
#include "units.h"

enum { CONNECTIONS_MAX = 64, GREETING_MAX = 64 };

/* ---- events and counters ---- */

int mig_page_server_next_event(struct mig_page_server *server, char text[MIG_EVENT_TEXT_BYTES])
{
    return mig_events_next(&server->events, text);
}

void mig_page_server_quiet(struct mig_page_server *server)
{
    mig_events_quiet(&server->events);
}

const struct mig_page_server_counters *mig_page_server_counters(const struct mig_page_server *server)
{
    return &server->counters;
}

static void forget(struct connection *connection)
{
    struct mig_page_server *server = connection->server;
    struct connection **link = &server->connections;

    pthread_mutex_lock(&server->mutex);
    while (*link != connection)
        link = &(*link)->next;
    *link = connection->next;
    server->standings[connection->standing]--;
    pthread_mutex_unlock(&server->mutex);

    if (connection->h2) /* closes the socket, which nobody can find any more */
        mig_h2_destroy(connection->h2);
    else
        close(connection->fd);
    free(connection);

    pthread_mutex_lock(&server->mutex);
    __atomic_fetch_sub(&server->counters.connections_now, 1, __ATOMIC_RELAXED);
    pthread_cond_broadcast(&server->changed);
    pthread_mutex_unlock(&server->mutex);
}

/* ---- before it is served ---- */

static void set_standing(struct connection *connection, enum standing standing)
{
    connection->server->standings[connection->standing]--;
    connection->standing = standing;
    connection->server->standings[standing]++;
}

/* Begins to speak HTTP/2, through TLS if that is not NULL. False if that cannot be. */
static bool settle(struct connection *connection, struct mig_tls_stream *tls)
{
    struct mig_page_server *server = connection->server;

    if (mig_connection_begin(connection, tls) < 0) {
        COUNT(server, connections_failed, 1);
        mig_events_note(&server->events, "turned %s away: out of memory", connection->peer);
        mig_tls_stream_destroy(tls);
        return false;
    }
    pthread_mutex_lock(&server->mutex);
    set_standing(connection, SETTLED);
    pthread_mutex_unlock(&server->mutex);
    return true;
}

static const char *reason_to_refuse(const struct connection *connection, const struct mig_tls_stream *tls)
{
    if (__atomic_load_n(&connection->standing, __ATOMIC_RELAXED) == EVICTED)
        return "it took long to prove who it is, and others wait";
    return tls ? mig_tls_stream_error(tls) : "out of memory";
}

/* Lets the peer prove who it is, and settles it. False if it cannot. */
static bool welcome(struct connection *connection)
{
    struct mig_page_server *server = connection->server;
    struct mig_tls_stream *tls = NULL;
    uint8_t sink[4096];

    int rc = mig_tls_stream_create(server->tls, connection->fd, NULL, &tls);
    if (rc == 0)
        rc = mig_tls_stream_handshake(tls, mig_now_ns() + server->patience.handshake_ns);
    if (rc == 0)
        return settle(connection, tls);
    if (!is_stopping(server)) {
        COUNT(server, connections_failed, 1);
        COUNT(server, handshakes_failed, 1);
        mig_events_note(&server->events, "refused %s: %s", connection->peer, reason_to_refuse(connection, tls));
    }
    mig_tls_stream_destroy(tls);
    /* What is left unread would turn our last words into a reset. */
    shutdown(connection->fd, SHUT_WR);
    while (recv(connection->fd, sink, sizeof(sink), MSG_DONTWAIT) > 0)
        ;
    return false;
}

static void *connection_thread(void *argument)
{
    struct connection *connection = argument;

    sigset_t broken_pipe;

    pthread_setname_np(pthread_self(), "mig-serve");
    sigemptyset(&broken_pipe);
    sigaddset(&broken_pipe, SIGPIPE); /* sendfile has no MSG_NOSIGNAL */
    pthread_sigmask(SIG_BLOCK, &broken_pipe, NULL);
    if (connection->server->tls ? welcome(connection) : settle(connection, NULL)) {
        const char *reason = mig_connection_serve(connection);
        if (reason) {
            COUNT(connection->server, connections_failed, 1);
            mig_events_note(&connection->server->events, "ended the connection of %s: %s", connection->peer, reason);
        }
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

/* Under the mutex: the one that has been at its handshake for longest makes room. */
static void evict_oldest(struct mig_page_server *server)
{
    struct connection *oldest = NULL;

    for (struct connection *connection = server->connections; connection; connection = connection->next)
        if (connection->standing == GREETING)
            oldest = connection;
    if (!oldest)
        return;
    set_standing(oldest, EVICTED);
    shutdown(oldest->fd, SHUT_RDWR); /* wakes its thread */
}

static int start_connection(struct mig_page_server *server, int fd, const struct sockaddr *address,
                            socklen_t address_bytes)
{
    const struct timeval tick = {.tv_sec = CONNECTION_TICK_MS / 1000};
    struct connection *connection = calloc(1, sizeof(*connection));
    pthread_attr_t attributes;
    pthread_t thread;

    if (!connection)
        return -ENOMEM;
    *connection = (struct connection){.server = server, .fd = fd};
    name_peer(connection, address, address_bytes);
    mig_tcp_tune(fd);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof(tick));
    pthread_mutex_lock(&server->mutex);
    if (server->standings[GREETING] >= GREETING_MAX)
        evict_oldest(server);
    connection->standing = server->tls ? GREETING : SETTLED;
    server->standings[connection->standing]++;
    connection->next = server->connections;
    server->connections = connection;
    __atomic_fetch_add(&server->counters.connections_now, 1, __ATOMIC_RELAXED);
    if (is_stopping(server)) /* it came too late to be woken with the others */
        shutdown(fd, SHUT_RD);
    pthread_mutex_unlock(&server->mutex);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    const int rc = pthread_create(&thread, &attributes, connection_thread, connection);
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
                mig_events_note(&server->events, "cannot accept a connection: %s", strerror(errno));
                poll(NULL, 0, CONNECTION_TICK_MS);
            }
            continue;
        }
        COUNT(server, connections, 1);
        const bool is_full = __atomic_load_n(&server->standings[SETTLED], __ATOMIC_RELAXED) >= CONNECTIONS_MAX;
        if (is_full || start_connection(server, fd, (struct sockaddr *)&address, address_bytes) < 0) {
            COUNT(server, connections_failed, 1);
            mig_events_note(&server->events, "turned a connection away: %d are open", CONNECTIONS_MAX);
            close(fd);
        }
    }
}

/* ---- life ---- */

struct mig_page_server_patience mig_page_server_usual_patience(void)
{
    return (struct mig_page_server_patience){
        .handshake_ns = 5ull * 1000000000u,
        .idle_ns = 60ull * 1000000000u,
        .stuck_ns = 20ull * 1000000000u,
    };
}

int mig_page_server_create(int listen_fd, struct mig_exports *exports, struct mig_tls *tls,
                           struct mig_page_server_patience patience, struct mig_page_server **ret)
{
    struct mig_page_server *server = calloc(1, sizeof(*server));
    if (!server)
        return -ENOMEM;
    *server = (struct mig_page_server){
        .listen_fd = listen_fd,
        .exports = exports,
        .tls = mig_tls_get(tls),
        .patience = patience,
    };
    mig_events_init(&server->events);
    pthread_mutex_init(&server->mutex, NULL);
    pthread_cond_init(&server->changed, NULL);
    int rc = fcntl(listen_fd, F_SETFL, 0) < 0 ? -errno : 0;
    if (rc == 0)
        rc = -pthread_create(&server->accept_thread, NULL, accept_thread, server);
    if (rc < 0) {
        mig_tls_put(tls);
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
    mig_events_deinit(&server->events);
    mig_tls_put(server->tls);
    free(server);
}
