/* What the parts of the page server share: pageserver.c (who comes, who goes), page_connection.c (one who stays). */
#ifndef MIG_PAGESERVER_INTERNAL_H
#define MIG_PAGESERVER_INTERNAL_H

#include <pthread.h>
#include <stddef.h>

#include "page_call.h"

enum { CONNECTION_TICK_MS = 1000, PEER_NAME_BYTES = 96 };

enum standing {
    GREETING, /* it has yet to prove who it is: it takes no place from those who have */
    EVICTED,  /* it has not, and had to make room for newer ones */
    SETTLED,
};

struct connection {
    struct mig_page_server *server;
    struct connection *next;
    int fd;
    enum standing standing; /* guarded by the server's mutex */
    char peer[PEER_NAME_BYTES];
    struct mig_h2 *h2; /* NULL before it has settled */
    struct mig_page_calls calls;
    bool is_bulk;
    uint64_t busy_ns;     /* when a call was last open */
    uint64_t progress_ns; /* when the peer last took everything that we had to say */
};

struct mig_page_server {
    int listen_fd;
    struct mig_exports *exports;
    struct mig_tls *tls; /* NULL: plain text */
    struct mig_page_server_patience patience;
    struct mig_events events;
    pthread_t accept_thread;

    pthread_mutex_t mutex; /* guards all below but the counters */
    pthread_cond_t changed;
    bool stopping;
    struct connection *connections;           /* newest first */
    unsigned standings[SETTLED + 1];          /* how many are there */
    struct mig_page_server_counters counters; /* atomic */
};

static inline void count(struct mig_page_server *server, size_t counter_offset, uint64_t added)
{
    __atomic_fetch_add((uint64_t *)((char *)&server->counters + counter_offset), added, __ATOMIC_RELAXED);
}

#define COUNT(server, field, added) count(server, offsetof(struct mig_page_server_counters, field), (uint64_t)(added))

static inline bool is_stopping(struct mig_page_server *server)
{
    return __atomic_load_n(&server->stopping, __ATOMIC_ACQUIRE);
}

/* ---- page_connection.c ---- */

/** Begin to speak HTTP/2, through TLS if that is not NULL. Returns 0 or -errno. */
int mig_connection_begin(struct connection *connection, struct mig_tls_stream *tls);
/** Serve until the connection ends. Returns the reason if it was the peer's fault, else NULL. */
const char *mig_connection_serve(struct connection *connection);

#endif
