/*
 * libFuzzer targets of TLS: both ends of it against whatever comes, and what a certificate may say of its holder.
 *
 * The first byte of an input for tls says what the rest is: bytes as they come to one who awaits a handshake; a script
 * of what befalls the handshake of an honest peer, and then of what goes through the connection; or that script
 * without the former. Bits of it have the client tested, not the server, or say what it calls its server, or that it
 * is late; that the server compresses; that only hosts on a list are trusted.
 */
#include <ctype.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "authority.h"
#include "session.h"
#include "targets.h"
#include "tls_end.h"
#include "tls_internal.h"
#include "tls_stream.h"
#include "units.h"

enum { MODE = 3, TESTS_CLIENT = 4, BY_ADDRESS = 8, COMPRESSES = 16, HAS_PEERS = 32, IS_LATE = 64 };
enum { RAW, DISTURBED, HONEST };

static const uint64_t HANDSHAKE_NS = 3600ull * 1000000000u;

/* ---- what is tested waits ---- */

/* Whose handshake it is, and what happens then. */
static struct {
    struct session *session;
    struct script *script;
    void (*go_on)(struct session *session, struct script *script);
} waiting;

/* What is tested waits in the handshake, and nowhere else; this takes the place of the C library's. */
int poll(struct pollfd *fds, nfds_t count, int timeout_ms)
{
    (void)timeout_ms;
    require(waiting.session && count == 1);
    waiting.go_on(waiting.session, waiting.script);
    fds->revents = fds->events;
    return 1;
}

/* In portions, each heard before the next is sent: the first byte of each says how long it is. */
static void say_raw(struct session *session, struct script *script)
{
    const uint8_t *bytes;
    const size_t count_bytes = next_bytes(script, &bytes);

    drain(session);
    if (count_bytes)
        send(session->peer_fd, bytes, count_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    else if (script->at == script->end)
        shutdown(session->peer_fd, SHUT_WR);
}

static int shake_hands(struct session *session, struct script *script, unsigned mode, struct mig_tls_stream *tls)
{
    waiting.session = session;
    waiting.script = mode == HONEST ? NULL : script;
    waiting.go_on = mode == RAW ? say_raw : tls_end_advance;
    const int rc = mig_tls_stream_handshake(tls, mig_now_ns() + HANDSHAKE_NS);
    waiting.session = NULL;
    return rc;
}

/* ---- a connection ---- */

/* Whatever happened on the wire, a handshake that is done is one with the host that its certificate names. */
static void check_peer(const struct mig_tls_stream *tls)
{
    require(mig_tls_stream_is_peer(tls, HOST_NAME) && mig_tls_stream_is_peer(tls, HOST_ADDRESS));
    require(!mig_tls_stream_is_peer(tls, "two.example") && !mig_tls_stream_is_peer(tls, "127.0.0.2"));
    require(!mig_tls_stream_is_peer(tls, "") && !mig_tls_stream_is_peer(tls, ".example"));
    require(!mig_tls_stream_error(tls)[0]);
}

static void converse(struct session *session, struct script *script, int fd, unsigned how, struct mig_tls_stream *tls)
{
    require(session->tls->traffic.is_known);
    if (how & TESTS_CLIENT)
        begin_client(session, fd);
    else
        begin_server(session, fd, how & COMPRESSES);
    mig_h2_secure(session->h2, tls);
    send_greeting(session);
    send_call(session);
    play(session, script);
    tls_end_release(session);
    finish(session);
}

int fuzz_tls(const uint8_t *data, size_t count_bytes)
{
    struct session session = {0};
    struct script script = {data + 1, data + count_bytes};
    struct mig_tls_stream *tls;
    struct tls_end end;

    if (!count_bytes)
        return 0;
    const unsigned how = data[0], mode = how & MODE;
    const char *server_name = how & BY_ADDRESS ? HOST_ADDRESS : HOST_NAME;
    struct mig_tls *credentials = authority_tls(how & HAS_PEERS);
    const int fd = connect_session(&session);
    authority_rewind_random();
    require(!mig_tls_stream_create(credentials, fd, how & TESTS_CLIENT ? server_name : NULL, &tls));
    tls_end_create(&end, !(how & TESTS_CLIENT), authority_host());
    session.tls = &end;
    const int rc = how & IS_LATE ? mig_tls_stream_handshake(tls, 0) : shake_hands(&session, &script, mode, tls);
    if (rc == 0) {
        require(mode != RAW);
        check_peer(tls);
        converse(&session, &script, fd, how, tls);
    } else {
        require(mig_tls_stream_error(tls)[0] && (mode == RAW || end.is_disturbed || how & IS_LATE));
        mig_tls_stream_destroy(tls);
        close(fd);
        close(session.peer_fd);
    }
    tls_end_destroy(&end);
    return 0;
}

/* ---- certificates ---- */

enum { ANY_CERTIFICATE = 1, ON_LIST = 2, SHAKES_HANDS = 4 };

/* Whether these bytes are there in their order; what is in pieces in BER lies between others. */
static bool contains(const uint8_t *bytes, size_t count_bytes, const char *wanted, size_t wanted_bytes)
{
    size_t found_bytes = 0;

    for (size_t i = 0; i < count_bytes && found_bytes < wanted_bytes; i++)
        found_bytes += tolower(bytes[i]) == wanted[found_bytes];
    return found_bytes == wanted_bytes;
}

/* OpenSSL has found something wrong with the certificate, and is not asked about that here. */
static int forgive(int is_valid, X509_STORE_CTX *store)
{
    (void)is_valid;
    X509_STORE_CTX_set_error(store, X509_V_OK);
    return 1;
}

/* Whether a caller with that certificate is let in. */
static bool is_trusted(struct mig_tls *tls, X509 *certificate, bool is_forgiving)
{
    struct mig_credentials *credentials = mig_tls_credentials(tls);
    SSL *ssl = SSL_new(credentials->context);
    X509_STORE_CTX *store = X509_STORE_CTX_new();

    require(ssl && store &&
            X509_STORE_CTX_init(store, SSL_CTX_get_cert_store(credentials->context), certificate, NULL));
    require(X509_STORE_CTX_set_default(store, "ssl_client"));
    SSL_set_app_data(ssl, credentials);
    X509_STORE_CTX_set_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx(), ssl);
    if (is_forgiving)
        X509_STORE_CTX_set_verify_cb(store, forgive);
    const bool is_good = mig_tls_verify(store, NULL) == 1;
    X509_STORE_CTX_free(store);
    SSL_free(ssl);
    mig_credentials_put(credentials);
    ERR_clear_error();
    return is_good;
}

/* A name or address that it is said to be for is in it. */
static void check_names(const struct mig_tls_stream *tls, const uint8_t *names, size_t bytes)
{
    require(!mig_tls_stream_is_peer(tls, "127.0.0.1") || contains(names, bytes, "\x7f\0\0\1", 4));
    require(!mig_tls_stream_is_peer(tls, "::2") || contains(names, bytes, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\2", 16));
    require(!mig_tls_stream_is_peer(tls, "one.a.b") || contains(names, bytes, ".a.b", 4)); /* perhaps for all there */
    require(!mig_tls_stream_is_peer(tls, "") && !mig_tls_stream_is_peer(tls, ".a.b"));
}

/* A caller with a certificate of the authority, whose names are any bytes. */
static void check_caller(X509 *certificate, const uint8_t *names, size_t names_bytes, unsigned how)
{
    static const char role[] = "urn:migrate:role:host";
    const bool is_listed = how & ON_LIST;
    const bool is_good = is_trusted(authority_tls(is_listed), certificate, false);
    struct session session = {0};
    struct mig_tls_stream *tls;
    struct tls_end end;

    require(!is_good || (!is_listed && contains(names, names_bytes, role, sizeof(role) - 1)));
    if (!is_good && !(how & SHAKES_HANDS))
        return;
    const int fd = connect_session(&session);
    require(!mig_tls_stream_create(authority_tls(is_listed), fd, NULL, &tls));
    tls_end_create(&end, true, certificate);
    session.tls = &end;
    require((shake_hands(&session, NULL, HONEST, tls) == 0) == is_good);
    if (is_good)
        check_names(tls, names, names_bytes);
    else
        require(mig_tls_stream_error(tls)[0]);
    mig_tls_stream_destroy(tls);
    tls_end_destroy(&end);
    close(fd);
    close(session.peer_fd);
}

int fuzz_certificate(const uint8_t *data, size_t count_bytes)
{
    if (!count_bytes)
        return 0;
    const uint8_t how = *data++;
    const unsigned char *at = data;
    count_bytes--;
    struct mig_tls *tls = authority_tls(how & ON_LIST);
    authority_rewind_random();
    X509 *certificate =
        how & ANY_CERTIFICATE ? d2i_X509(NULL, &at, (long)count_bytes) : authority_issue(data, count_bytes);
    if (certificate && how & ANY_CERTIFICATE) {
        require(!is_trusted(tls, certificate, false));
        is_trusted(tls, certificate, true);
    } else if (certificate) {
        check_caller(certificate, data, count_bytes, how);
    }
    X509_free(certificate);
    ERR_clear_error();
    return 0;
}
