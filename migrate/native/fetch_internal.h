/* What the parts of the fetch share: fetch.c (threads), fetch_open.c and fetch_link.c (one connection and its call). */
#ifndef MIG_FETCH_INTERNAL_H
#define MIG_FETCH_INTERNAL_H

#include <pthread.h>

#include "fetch.h"
#include "h2.h"
#include "pacing.h"
#include "patience.h"
#include "reply_order.h"

enum mig_link_state {
    MIG_LINK_DOWN,    /* no connection; another try at retry_ns */
    MIG_LINK_READY,   /* connected, no call yet */
    MIG_LINK_CALLING, /* requests may be sent */
    MIG_LINK_ENDING,  /* half-closed: the rest of the replies is still to come */
    MIG_LINK_DONE,    /* the call ended well, and no page is missing */
    MIG_LINK_FAILED,
};

/* One of the two connections. Its thread alone touches it, once started. */
struct mig_link {
    struct mig_fetch *fetch;
    enum mig_page_kind kind; /* MIG_KIND_URGENT or MIG_KIND_BACKGROUND */
    enum mig_link_state state;
    int wake_fd;
    struct mig_h2 *h2;
    struct mig_h2_stream *stream; /* NULL once the call is over */
    struct mig_reply_order order;
    struct mig_decompressor *decompressor; /* NULL until a run comes compressed */
    bool wants_to_write;
    bool is_refused;   /* the last trouble was that one side does not trust the other */
    char trouble[256]; /* why it could not be opened */
    bool has_call_ended;
    enum mig_status call_status;
    char call_text[MIG_STATUS_TEXT_BYTES];
    uint64_t lost_ns, retry_ns; /* since when, until when; 0 while all is well */
    struct mig_backoff backoff;
    uint64_t opened_ns;
    uint64_t pinged_ns;     /* when a sign of life was last asked for, because there was none */
    uint64_t progress_ns;   /* when a reply last came, or one began to be due */
    uint64_t carried_bytes; /* by connections that are no more */
};

struct mig_fetch {
    char *host, *migration_id, *authorization, *authority, *server_name;
    struct mig_tls *tls; /* NULL: plain text */
    uint16_t port;
    bool verify;
    enum mig_compression compression;
    struct mig_patience patience;
    struct mig_pager *pager;
    struct mig_link urgent, background;
    struct mig_window window; /* the background thread's */
    struct mig_cap cap;       /* likewise */
    uint64_t greeting_rtt_ns; /* before anything was asked for; 0 if not known */
    struct mig_rtts rtts;     /* atomic: urgent thread to background thread; UINT64_MAX is none */
    bool is_background_busy;  /* atomic */
    bool stopping;            /* atomic */
    unsigned threads;
    pthread_t urgent_thread, background_thread;

    pthread_mutex_t mutex; /* guards the rest but the counters */
    pthread_cond_t changed;
    unsigned done_links;
    struct mig_fetch_failure failure;
    struct mig_fetch_counters counters; /* each field is written by one thread */
};

/* ---- fetch_open.c; both leave the words for what went wrong in `trouble` ---- */

/** Connect and say hello; the call comes later. Returns 0 or -errno. */
int mig_link_open(struct mig_link *link, uint64_t deadline_ns);
/** Wait until the server has said hello and answered a few PINGs, whose round trips are noted. Returns 0 or -errno. */
int mig_link_greet(struct mig_link *link, uint64_t deadline_ns);

/* ---- fetch_link.c ---- */

extern const struct mig_h2_handler MIG_LINK_HANDLER;
/** Begin the call, connecting again if need be. */
void mig_link_call(struct mig_link *link, uint64_t now_ns);
/** Read, write, notice what ended, what broke, what is silent; connect again when it is time. */
void mig_link_step(struct mig_link *link, bool is_readable, uint64_t now_ns);
/** Ask for a run. False if the call takes no more requests now. */
bool mig_link_ask(struct mig_link *link, uint64_t first_page, uint64_t count_pages, uint64_t now_ns);
/** No more requests will come. */
void mig_link_end(struct mig_link *link);
/** Nanoseconds until the link wants to be stepped though nothing came. */
uint64_t mig_link_patience_ns(const struct mig_link *link, uint64_t now_ns);
void mig_link_close(struct mig_link *link);

/* ---- fetch.c ---- */

/** Note the first failure, and wake all who wait. */
__attribute__((format(printf, 4, 5))) void mig_fetch_fail(struct mig_fetch *fetch, enum mig_fetch_reason reason,
                                                          int error, const char *format, ...);
bool mig_fetch_has_failed(struct mig_fetch *fetch);
/** Urgent thread: a round trip was measured. */
void mig_fetch_note_rtt(struct mig_fetch *fetch, uint64_t rtt_ns);

#endif
