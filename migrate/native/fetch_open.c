#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "fetch_internal.h"
#include "tcp.h"
#include "tls_stream.h"
#include "units.h"

/* The largest response is a full request of data and its few fields. */
enum { MESSAGE_BYTES_MAX = (1 << 20) + 4096, GREETING_PINGS = 4 };
static const struct mig_h2_limits URGENT_LIMITS = {
    .message_bytes_max = MESSAGE_BYTES_MAX,
    .receive_bytes = 64 << 10,
    .frame_bytes_max = 16 << 10,
    .window_bytes = 1 << 20,
};
/* The staging message and what the socket hands over at a time share the L2 cache. */
static const struct mig_h2_limits BACKGROUND_LIMITS = {
    .message_bytes_max = MESSAGE_BYTES_MAX,
    .receive_bytes = 256 << 10,
    .frame_bytes_max = 1 << 20,
    .window_bytes = 16 << 20,
};

/* Why the link is not open. Returns the same -errno. */
static int explain(struct mig_link *link, int rc, const char *words)
{
    link->is_refused = rc == -EKEYREJECTED;
    snprintf(link->trouble, sizeof(link->trouble), "%s", words && words[0] ? words : strerror(-rc));
    return rc;
}

/* Each side proves who it is. Returns 0 or -errno; *ret is NULL where there is no TLS. */
static int secure(struct mig_link *link, int fd, uint64_t deadline_ns, struct mig_tls_stream **ret)
{
    const struct mig_fetch *fetch = link->fetch;

    *ret = NULL;
    if (!fetch->tls)
        return 0;
    int rc = mig_tls_stream_create(fetch->tls, fd, fetch->server_name, ret);
    if (rc < 0)
        return explain(link, rc, rc == -EINVAL ? "what the server is called is no name" : NULL);
    rc = mig_tls_stream_handshake(*ret, deadline_ns);
    if (rc < 0) {
        explain(link, rc, mig_tls_stream_error(*ret));
        mig_tls_stream_destroy(*ret);
    }
    return rc;
}

int mig_link_open(struct mig_link *link, uint64_t deadline_ns)
{
    const bool is_urgent = link->kind == MIG_KIND_URGENT;
    const int64_t left_ns = (int64_t)(deadline_ns - mig_now_ns());
    struct mig_tls_stream *tls;
    int fd;
    int rc = left_ns <= 0 ? -ETIMEDOUT
                          : mig_tcp_connect(link->fetch->host, link->fetch->port, (uint64_t)left_ns / 1000, &fd);

    if (rc < 0)
        return explain(link, rc, NULL);
    rc = secure(link, fd, deadline_ns, &tls);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    rc = mig_h2_create(fd, MIG_H2_CLIENT, is_urgent ? &URGENT_LIMITS : &BACKGROUND_LIMITS, &MIG_LINK_HANDLER, link,
                       &link->h2);
    if (rc < 0) {
        mig_tls_stream_destroy(tls);
        close(fd);
        return explain(link, rc, NULL);
    }
    mig_h2_secure(link->h2, tls);
    link->state = MIG_LINK_READY;
    link->is_refused = false;
    link->opened_ns = mig_now_ns();
    rc = mig_h2_flush(link->h2);
    return rc < 0 ? explain(link, rc, mig_h2_error(link->h2)) : 0;
}

static int greet(struct mig_link *link, uint64_t deadline_ns)
{
    struct pollfd poll_fd = {.fd = mig_h2_fd(link->h2), .events = POLLIN};

    for (int pings = 0; pings < GREETING_PINGS || !mig_h2_is_greeted(link->h2);) {
        const int64_t left_ns = (int64_t)(deadline_ns - mig_now_ns());
        if (left_ns <= 0)
            return -ETIMEDOUT;
        mig_h2_ping(link->h2);
        int rc = mig_h2_flush(link->h2);
        if (rc >= 0) {
            poll(&poll_fd, 1, mig_h2_has_unseen(link->h2) ? 0 : (int)(left_ns / 1000000 + 1));
            rc = mig_h2_receive(link->h2, false);
        }
        if (rc < 0)
            return rc;
        const uint64_t ping_ns = mig_h2_take_ping_ns(link->h2);
        if (ping_ns) {
            mig_fetch_note_rtt(link->fetch, ping_ns);
            pings++;
        }
    }
    return 0;
}

int mig_link_greet(struct mig_link *link, uint64_t deadline_ns)
{
    const int rc = greet(link, deadline_ns);
    return rc < 0 ? explain(link, rc, mig_h2_error(link->h2)) : 0;
}
