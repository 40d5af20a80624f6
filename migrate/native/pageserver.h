/*
 * PageService in C: serves FetchPages to any gRPC client, a thread for each connection.
 *
 * The path, the messages and the statuses are those of proto/migrate/v1/page_service.proto; docs/protocol.md has the
 * rules. A connection that asks for runs rather than single pages lowers its own priority, so that faults go first.
 */
#ifndef MIG_PAGESERVER_H
#define MIG_PAGESERVER_H

#include <stdbool.h>
#include <stdint.h>

#include "events.h"
#include "exports.h"
#include "tls.h"

struct mig_page_server;

/* Read at any time, without a lock; each field is right by itself. */
struct mig_page_server_counters {
    uint64_t connections_now;
    uint64_t connections;
    uint64_t connections_failed; /* ended by a peer that broke the protocol, went silent, or came one too many */
    uint64_t handshakes_failed;  /* those of them that did not prove who they are */
    uint64_t calls;
    uint64_t calls_failed;
    uint64_t requests;
    uint64_t data_pages;
};

/* How long peers are borne with. The clock is looked at once a second, but for the handshake. */
struct mig_page_server_patience {
    uint64_t handshake_ns; /* who has not proven who it is after so long is turned away */
    uint64_t idle_ns;      /* a connection without a call for so long is given up; a call may last for ever */
    uint64_t stuck_ns;     /* so is one whose peer takes nothing of what it asked for */
};

/** Those of docs/protocol.md. */
struct mig_page_server_patience mig_page_server_usual_patience(void);

/**
 * Serve on a listening TCP socket, which it takes over; in plain text, or, if `tls` is not NULL, to hosts that prove
 * who they are. The exports stay the caller's. Returns 0 or -errno.
 */
int mig_page_server_create(int listen_fd, struct mig_exports *exports, struct mig_tls *tls,
                           struct mig_page_server_patience patience, struct mig_page_server **ret);

/** End all connections and threads, free. */
void mig_page_server_destroy(struct mig_page_server *server);

const struct mig_page_server_counters *mig_page_server_counters(const struct mig_page_server *server);

/**
 * Wait for something worth a line in a log: a connection that failed, a call that was refused.
 * Returns 1 with the text, 0 once mig_page_server_quiet was called.
 */
int mig_page_server_next_event(struct mig_page_server *server, char text[MIG_EVENT_TEXT_BYTES]);
/** Have mig_page_server_next_event return 0 from now on. */
void mig_page_server_quiet(struct mig_page_server *server);

#endif
