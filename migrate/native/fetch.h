/*
 * The page call of one incoming migration: C client of PageService.FetchPages, any gRPC server at the other end.
 *
 * Two threads, each with a TCP connection of its own. The urgent one polls {userfaultfd, socket}: it asks for each
 * missing page that a vCPU touches, pipelined, and places it when it comes. The background one keeps a window of runs
 * in flight (pacing.h) and places each with one UFFDIO_COPY. No Python runs in either.
 *
 * A connection that breaks is made again, and what it owed is asked for again; only when that has failed for half the
 * peer timeout, or when the source says something that makes no sense to repeat, does the fetch fail. The urgent thread
 * serves faults on known zero pages all the same, until it is stopped.
 */
#ifndef MIG_FETCH_H
#define MIG_FETCH_H

#include <stdbool.h>
#include <stdint.h>

#include "compress.h"
#include "pager.h"
#include "tls.h"

struct mig_fetch;

struct mig_fetch_terms {
    const char *host; /* numeric */
    uint16_t port;
    const char *migration_id;
    const char *token;
    bool verify;
    enum mig_compression compression;   /* that was agreed on; the source may use it or not */
    uint64_t max_bandwidth_bytes_per_s; /* of the background; 0 is no cap */
    uint64_t peer_timeout_us;           /* within so long the loss of the source is known (patience.h); 0 is 5 s */
    struct mig_tls *tls;                /* NULL: plain text. Held as long as the fetch is there */
    const char *server_name;            /* that the source's certificate is for; NULL is host */
};

/* Why a fetch failed. */
enum mig_fetch_reason {
    MIG_FETCH_FINE = 0,
    MIG_FETCH_LINK = 1,      /* the source cannot be reached, or not any more */
    MIG_FETCH_STATUS = 2,    /* it ended a call with a status that will not change */
    MIG_FETCH_PROTOCOL = 3,  /* it said what makes no sense */
    MIG_FETCH_INTEGRITY = 4, /* a page does not have its digest */
    MIG_FETCH_GUEST = 5,     /* the guest process is gone */
    MIG_FETCH_LOCAL = 6,     /* a system call here failed: `error` */
    MIG_FETCH_TLS = 7,       /* one side does not trust the other, or the source speaks no TLS */
};

struct mig_fetch_failure {
    int reason; /* enum mig_fetch_reason */
    int error;  /* -errno of MIG_FETCH_LOCAL */
    char text[320];
};

/* Read at any time, without a lock; each field is right by itself. */
struct mig_fetch_counters {
    uint64_t urgent_wire_bytes; /* of the sockets, both ways */
    uint64_t background_wire_bytes;
    uint64_t urgent_requests;
    uint64_t background_requests;
    uint64_t reconnects;
    uint64_t window_bytes; /* the background's, now */
    uint64_t run_pages;
    uint64_t rate_bytes_per_s;
    uint64_t base_rtt_ns; /* smallest urgent round trip */
    uint64_t queue_ns;    /* by how much the smallest of the last epoch was longer */
};

/** Nothing is sent yet. Copies the terms. Returns 0 or -errno. */
int mig_fetch_create(const struct mig_fetch_terms *terms, struct mig_fetch **ret);

/** Stop, close, free. NULL is nothing. */
void mig_fetch_destroy(struct mig_fetch *fetch);

/**
 * Open both connections and hear from an HTTP/2 server on each, all within the timeout. Returns 0, or a reason; then
 * ask for the failure, and destroy the fetch.
 */
int mig_fetch_connect(struct mig_fetch *fetch, uint64_t timeout_us);

/** Begin to fetch all that the pager misses, and to serve its faults. Returns 0 or -errno. */
int mig_fetch_start(struct mig_fetch *fetch, struct mig_pager *pager);

/**
 * Wait until both calls have ended by themselves, as they do once no page is missing.
 * Returns 1 when so, 0 after the timeout, -ECANCELED once stopped, or -EIO: ask for the failure.
 */
int mig_fetch_wait(struct mig_fetch *fetch, uint64_t timeout_us);

/** End both threads. The pager may be destroyed after this. Idempotent. */
void mig_fetch_stop(struct mig_fetch *fetch);

/** Have both threads look at the pager again: there may be something to ask for, or nothing any more. */
void mig_fetch_wake(struct mig_fetch *fetch);

/** What went wrong first; reason MIG_FETCH_FINE if nothing. */
void mig_fetch_read_failure(struct mig_fetch *fetch, struct mig_fetch_failure *ret);

const struct mig_fetch_counters *mig_fetch_counters(const struct mig_fetch *fetch);

#endif
