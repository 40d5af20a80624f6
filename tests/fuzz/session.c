#include "session.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tls_end.h"

enum { SOCKET_BUFFER_BYTES = 8 << 10, HOP_BYTES_MAX = 4 << 10 };

void require(bool holds)
{
    if (!holds)
        abort();
}

void drain(const struct session *session)
{
    static uint8_t sink[1 << 16];
    while (session->is_reading && recv(session->peer_fd, sink, sizeof(sink), MSG_DONTWAIT) > 0)
        ;
}

static void run(struct session *session)
{
    drain(session);
    if (!session->is_over)
        session->is_over = !session->step(session);
    drain(session);
}

void feed_wire(struct session *session, const void *bytes, size_t count_bytes)
{
    const uint8_t *at = bytes;

    for (unsigned i = 0; count_bytes && !session->is_over && i < STEPS_MAX; i++) {
        const size_t portion = count_bytes < HOP_BYTES_MAX ? count_bytes : HOP_BYTES_MAX;
        const ssize_t sent = send(session->peer_fd, at, portion, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent > 0) {
            at += sent;
            count_bytes -= (size_t)sent;
        }
        run(session);
    }
}

void feed(struct session *session, const void *bytes, size_t count_bytes)
{
    if (session->tls)
        tls_end_feed(session, bytes, count_bytes);
    else
        feed_wire(session, bytes, count_bytes);
}

void finish(struct session *session)
{
    shutdown(session->peer_fd, SHUT_WR);
    run(session);
    mig_h2_destroy(session->h2);
    mig_reply_order_deinit(&session->order);
    close(session->peer_fd);
}

int connect_session(struct session *session)
{
    const int buffer_bytes = SOCKET_BUFFER_BYTES;
    int fds[2];

    signal(SIGPIPE, SIG_IGN); /* as in Python: sendfile has no MSG_NOSIGNAL */
    require(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
    fcntl(fds[0], F_SETFL, O_NONBLOCK);
    setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &buffer_bytes, sizeof(buffer_bytes));
    session->peer_fd = fds[1];
    session->is_reading = true;
    return fds[0];
}
