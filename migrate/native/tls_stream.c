#include "tls_stream.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "tls_internal.h"
#include "units.h"

/* Messages of TLS's own, between two pieces of data, that a peer may make us take at a time. */
enum { READ_TRIES_MAX = 32, RECORD_FIRST = 20, RECORD_LAST = 23 };
/* AES-GCM wants another key long before 2^24.5 records (RFC 8446, 5.5). */
static const uint64_t KEY_BYTES = 256 << 20;
/* How often it is asked whether the peer is still trusted. */
static const uint64_t TRUST_NS = 1000000000u;

struct mig_tls_stream {
    int fd;
    bool is_server;
    SSL *ssl;
    struct mig_tls *tls;
    struct mig_credentials *credentials; /* of the handshake */
    uint64_t trusted_ns;                 /* when it was last known */

    /* as the BIO sees the socket */
    bool may_wait;    /* the next recv may sleep */
    bool is_drained;  /* the last recv took all that there was */
    bool is_starved;  /* OpenSSL wanted more than there was */
    int first_byte;   /* that the peer sent; -1 before */
    int socket_error; /* errno */
    bool is_at_end;
    uint64_t received_bytes, sent_bytes;

    bool has_data; /* the peer has sent data of its own: it accepts us */
    bool has_unseen;
    bool is_resuming; /* OpenSSL has sealed what is staged, but not sent it */
    int broken;       /* -errno, once it is */
    char error[MIG_TLS_TEXT_BYTES];
    uint64_t key_bytes; /* sealed with the present key */
    size_t staged_bytes;
    uint8_t staged[MIG_TLS_RECORD_BYTES];
};

/* ---- the socket, as OpenSSL sees it: like its own, but for flags, counting, and one look at a time ---- */

static int bio_read(BIO *bio, char *buffer, int buffer_bytes)
{
    struct mig_tls_stream *stream = BIO_get_data(bio);

    BIO_clear_retry_flags(bio);
    const ssize_t got =
        stream->is_drained ? -1 : recv(stream->fd, buffer, (size_t)buffer_bytes, stream->may_wait ? 0 : MSG_DONTWAIT);
    stream->may_wait = false;
    if (got < 0 && (stream->is_drained || errno == EAGAIN || errno == EINTR)) {
        stream->is_starved = true;
        BIO_set_retry_read(bio);
        return -1;
    }
    if (got < 0)
        stream->socket_error = errno;
    if (got <= 0) {
        stream->is_at_end = true;
        return (int)got;
    }
    if (stream->first_byte < 0)
        stream->first_byte = (unsigned char)buffer[0];
    stream->is_drained = got < buffer_bytes;
    stream->received_bytes += (uint64_t)got;
    return (int)got;
}

static int bio_write(BIO *bio, const char *bytes, int count_bytes)
{
    struct mig_tls_stream *stream = BIO_get_data(bio);

    BIO_clear_retry_flags(bio);
    const ssize_t sent = send(stream->fd, bytes, (size_t)count_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && (errno == EAGAIN || errno == EINTR))
        BIO_set_retry_write(bio);
    else if (sent < 0)
        stream->socket_error = errno;
    else
        stream->sent_bytes += (uint64_t)sent;
    return (int)sent;
}

static long bio_ctrl(BIO *bio, int command, long number, void *pointer)
{
    const struct mig_tls_stream *stream = BIO_get_data(bio);

    (void)number, (void)pointer;
    if (command == BIO_CTRL_EOF)
        return stream->is_at_end;
    return command == BIO_CTRL_FLUSH;
}

static BIO_METHOD *bio_method;

static void make_bio_method(void)
{
    bio_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "migrate socket");
    if (!bio_method)
        return;
    BIO_meth_set_read(bio_method, bio_read);
    BIO_meth_set_write(bio_method, bio_write);
    BIO_meth_set_ctrl(bio_method, bio_ctrl);
}

static BIO *make_bio(struct mig_tls_stream *stream)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, make_bio_method);
    BIO *bio = bio_method ? BIO_new(bio_method) : NULL;
    if (!bio)
        return NULL;
    BIO_set_data(bio, stream);
    BIO_set_init(bio, 1);
    return bio;
}

/* ---- life ---- */

static bool set_role(struct mig_tls_stream *stream, const char *server_name)
{
    stream->is_server = !server_name;
    if (server_name) {
        SSL_set_connect_state(stream->ssl);
        return SSL_set_purpose(stream->ssl, X509_PURPOSE_SSL_SERVER) && mig_tls_expect_name(stream->ssl, server_name);
    }
    SSL_set_accept_state(stream->ssl);
    return SSL_set_purpose(stream->ssl, X509_PURPOSE_SSL_CLIENT);
}

int mig_tls_stream_create(struct mig_tls *tls, int fd, const char *server_name, struct mig_tls_stream **ret)
{
    struct mig_tls_stream *stream = calloc(1, sizeof(*stream));

    if (!stream)
        return -ENOMEM;
    stream->fd = fd;
    stream->first_byte = -1;
    stream->tls = mig_tls_get(tls);
    stream->credentials = mig_tls_credentials(tls);
    stream->ssl = SSL_new(stream->credentials->context);
    BIO *bio = stream->ssl ? make_bio(stream) : NULL;
    int rc = bio ? 0 : -ENOMEM;
    if (rc == 0) {
        SSL_set_bio(stream->ssl, bio, bio);
        SSL_set_app_data(stream->ssl, stream->credentials);
        rc = set_role(stream, server_name) ? 0 : -EINVAL;
    }
    ERR_clear_error();
    if (rc < 0)
        mig_tls_stream_destroy(stream);
    else
        *ret = stream;
    return rc;
}

void mig_tls_stream_destroy(struct mig_tls_stream *stream)
{
    if (!stream)
        return;
    if (stream->ssl && !stream->broken && SSL_is_init_finished(stream->ssl)) {
        ERR_clear_error();
        SSL_shutdown(stream->ssl);
    }
    ERR_clear_error();
    SSL_free(stream->ssl);
    mig_credentials_put(stream->credentials);
    mig_tls_put(stream->tls);
    free(stream);
}

/* ---- what went wrong ---- */

/* Remembers it; returns -errno. */
static int fail(struct mig_tls_stream *stream, int rc, const char *words)
{
    stream->broken = rc;
    snprintf(stream->error, sizeof(stream->error), "%s", words);
    ERR_clear_error();
    return rc;
}

static bool is_plain_text(const struct mig_tls_stream *stream)
{
    return stream->first_byte >= 0 && (stream->first_byte < RECORD_FIRST || stream->first_byte > RECORD_LAST);
}

static int fail_of_plain_text(struct mig_tls_stream *stream)
{
    /* OpenSSL does not answer what is no TLS; this alert (protocol_version) tells the peer what it has met. */
    static const uint8_t alert[] = {21, 3, 3, 0, 2, 2, 70};

    if (!stream->is_server)
        return fail(stream, -EKEYREJECTED, "the peer answers in plain text, not in TLS");
    send(stream->fd, alert, sizeof(alert), MSG_DONTWAIT | MSG_NOSIGNAL);
    return fail(stream, -EKEYREJECTED, "plain text on a TLS port");
}

/* After SSL_get_error. */
static int fail_of_openssl(struct mig_tls_stream *stream, int ssl_error)
{
    /* Until the peer has sent something, it may be telling us that it does not trust us. */
    const int refused = stream->has_data ? -EPROTO : -EKEYREJECTED;

    if (ssl_error == SSL_ERROR_SSL && is_plain_text(stream))
        return fail_of_plain_text(stream);
    if (ssl_error == SSL_ERROR_SSL)
        return fail(stream, refused, mig_tls_words(stream->ssl));
    if (!stream->is_server && !stream->has_data && SSL_is_init_finished(stream->ssl)) /* gRPC's own servers do so */
        return fail(stream, -ECONNRESET, "the peer hung up without a word: it may not trust our certificate");
    if (stream->socket_error)
        return fail(stream, -stream->socket_error, strerror(stream->socket_error));
    return fail(stream, -ECONNRESET, "the peer closed the connection");
}

/* ---- the handshake ---- */

/* Waits for the socket. Returns 0, -ETIMEDOUT, or -errno. */
static int wait_for(struct mig_tls_stream *stream, short events, uint64_t deadline_ns)
{
    const int64_t left_ns = (int64_t)(deadline_ns - mig_now_ns());
    struct pollfd poll_fd = {.fd = stream->fd, .events = events};

    if (left_ns <= 0)
        return fail(stream, -ETIMEDOUT, "the TLS handshake took too long");
    if (poll(&poll_fd, 1, (int)(left_ns / 1000000 + 1)) < 0 && errno != EINTR)
        return fail(stream, -errno, strerror(errno));
    return 0;
}

int mig_tls_stream_handshake(struct mig_tls_stream *stream, uint64_t deadline_ns)
{
    int rc = 0;

    while (rc == 0) {
        stream->is_drained = false;
        ERR_clear_error();
        const int done = SSL_do_handshake(stream->ssl);
        if (done == 1)
            break;
        const int ssl_error = SSL_get_error(stream->ssl, done);
        if (ssl_error != SSL_ERROR_WANT_READ && ssl_error != SSL_ERROR_WANT_WRITE)
            return fail_of_openssl(stream, ssl_error);
        rc = wait_for(stream, ssl_error == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT, deadline_ns);
    }
    if (rc == 0 && !mig_tls_is_protocol_chosen(stream->ssl))
        return fail(stream, -EKEYREJECTED, "the peer does not speak HTTP/2 (ALPN h2)");
    stream->has_unseen = rc == 0; /* what came with the last of the handshake */
    stream->trusted_ns = mig_now_ns();
    return rc;
}

/* A certificate may expire, or be revoked, while its connection lasts. Returns 0 or what the stream broke of. */
static int check_trust(struct mig_tls_stream *stream)
{
    const uint64_t now_ns = mig_now_ns();

    if (stream->broken || now_ns - stream->trusted_ns < TRUST_NS)
        return stream->broken;
    stream->trusted_ns = now_ns;
    struct mig_credentials *now = mig_tls_credentials(stream->tls);
    const char *flaw = mig_tls_why_not_now(stream->ssl, now);
    mig_credentials_put(now);
    return flaw ? fail(stream, -EKEYREJECTED, flaw) : 0;
}

/* ---- bytes in ---- */

static ssize_t receive_some(struct mig_tls_stream *stream, void *place, size_t place_bytes)
{
    for (int i = 0; i < READ_TRIES_MAX; i++) {
        size_t got;
        stream->is_starved = false;
        ERR_clear_error();
        if (SSL_read_ex(stream->ssl, place, place_bytes, &got) == 1) {
            stream->has_data = true;
            return (ssize_t)got;
        }
        const int ssl_error = SSL_get_error(stream->ssl, 0);
        /* Reading goes on when that has left, which poll would not tell us from what there is to read. */
        if (ssl_error == SSL_ERROR_WANT_WRITE)
            return fail(stream, -EPROTO, "the peer asks for one new key after another, and takes none of them");
        if (ssl_error != SSL_ERROR_WANT_READ)
            return fail_of_openssl(stream, ssl_error);
        if (stream->is_starved) {
            stream->has_unseen = false;
            return -EAGAIN;
        }
    }
    return -EAGAIN;
}

ssize_t mig_tls_stream_receive(struct mig_tls_stream *stream, const struct iovec *places, int count, bool may_wait)
{
    ssize_t total_bytes = 0;

    if (check_trust(stream) < 0)
        return stream->broken;
    stream->may_wait = may_wait;
    stream->is_drained = false;
    stream->has_unseen = true;
    for (int i = 0; i < count; i++) {
        for (size_t at = 0; at < places[i].iov_len;) {
            const ssize_t got = receive_some(stream, (uint8_t *)places[i].iov_base + at, places[i].iov_len - at);
            if (got < 0)
                return total_bytes ? total_bytes : got; /* what is broken is told when asked again */
            stream->may_wait = false;
            at += (size_t)got;
            total_bytes += got;
        }
    }
    return total_bytes;
}

bool mig_tls_stream_has_unseen(const struct mig_tls_stream *stream)
{
    return stream->has_unseen;
}

/* ---- bytes out ---- */

size_t mig_tls_stream_room(struct mig_tls_stream *stream, uint8_t **ret)
{
    *ret = stream->staged;
    return stream->staged_bytes ? 0 : sizeof(stream->staged);
}

void mig_tls_stream_stage(struct mig_tls_stream *stream, size_t count_bytes)
{
    stream->staged_bytes = count_bytes;
}

bool mig_tls_stream_is_sent(const struct mig_tls_stream *stream)
{
    return !stream->staged_bytes;
}

/* A peer that does not trust us says so, and closes: its last words may wait where we have not looked yet. */
static int fail_to_send(struct mig_tls_stream *stream, int ssl_error)
{
    uint8_t byte;

    if (stream->has_data || ssl_error != SSL_ERROR_SYSCALL)
        return fail_of_openssl(stream, ssl_error);
    const int socket_error = stream->socket_error;
    stream->socket_error = 0;
    stream->is_drained = stream->may_wait = false;
    receive_some(stream, &byte, sizeof(byte));
    if (stream->broken == -EKEYREJECTED)
        return stream->broken;
    stream->socket_error = socket_error;
    return fail_of_openssl(stream, ssl_error);
}

int mig_tls_stream_send(struct mig_tls_stream *stream)
{
    size_t written;

    if (check_trust(stream) < 0)
        return stream->broken;
    if (!stream->staged_bytes)
        return 0;
    ERR_clear_error();
    if (stream->key_bytes >= KEY_BYTES && !stream->is_resuming) {
        stream->key_bytes = 0;
        if (!SSL_key_update(stream->ssl, SSL_KEY_UPDATE_NOT_REQUESTED))
            return fail_of_openssl(stream, SSL_ERROR_SSL);
    }
    if (SSL_write_ex(stream->ssl, stream->staged, stream->staged_bytes, &written) != 1) {
        const int ssl_error = SSL_get_error(stream->ssl, 0);
        stream->is_resuming = ssl_error == SSL_ERROR_WANT_WRITE || ssl_error == SSL_ERROR_WANT_READ;
        return stream->is_resuming ? 1 : fail_to_send(stream, ssl_error);
    }
    stream->is_resuming = false;
    stream->key_bytes += written;
    stream->staged_bytes = 0;
    return 0;
}

/* ---- facts ---- */

bool mig_tls_stream_is_peer(const struct mig_tls_stream *stream, const char *name)
{
    return mig_tls_is_peer_named(stream->ssl, name);
}

uint64_t mig_tls_stream_wire_bytes(const struct mig_tls_stream *stream)
{
    return stream->received_bytes + stream->sent_bytes;
}

uint64_t mig_tls_stream_received_bytes(const struct mig_tls_stream *stream)
{
    return stream->received_bytes;
}

const char *mig_tls_stream_error(const struct mig_tls_stream *stream)
{
    return stream->error;
}
