/* How long a peer is waited for, and how long one waits before trying again. */
#ifndef MIG_PATIENCE_H
#define MIG_PATIENCE_H

#include <stdint.h>

enum { MIG_PEER_TIMEOUT_US = 5000000 };

/*
 * All that follows from the time in which the loss of a peer must be known: half of it for noticing that it is silent,
 * half of it for coming back.
 */
struct mig_patience {
    uint64_t ping_ns;       /* silent for so long, it is asked for a sign of life */
    uint64_t silent_ns;     /* and for so long, it is not there */
    uint64_t unanswered_ns; /* one that answers PING, but not what was asked of it, is not much better */
    uint64_t lost_ns;       /* a link that could not be made again for so long has failed */
    uint64_t proven_ns;     /* one that has held for so long is well again */
    uint64_t connect_ns;    /* one try of a connection */
};

/** Of a peer whose loss must be known within so long; 0 is MIG_PEER_TIMEOUT_US. */
struct mig_patience mig_patience_of(uint64_t peer_timeout_us);

/* Pauses between tries: none, then growing ones, drawn so that those who lost the same peer do not come in step. */
struct mig_backoff {
    uint64_t pause_ns; /* the longest that the next one may be; 0 before the first */
    uint64_t random;   /* any state but 0 */
};

/** No try has failed yet. */
void mig_backoff_init(struct mig_backoff *backoff);
/** All is well: the next pause is none again. */
void mig_backoff_reset(struct mig_backoff *backoff);
/** The next pause: uniformly from the upper half of one that doubles each time, up to a second. */
uint64_t mig_backoff_next_ns(struct mig_backoff *backoff);

#endif
