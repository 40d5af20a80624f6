/* What the parts of TLS share: tls.c (files), tls_peer.c (who the peer is, why it is refused), tls_stream.c (bytes). */
#ifndef MIG_TLS_INTERNAL_H
#define MIG_TLS_INTERNAL_H

#include <openssl/sha.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdint.h>

#include "tls.h"

/* What was loaded at one time. Counted: a reload leaves those in use to their connections. */
struct mig_credentials {
    unsigned holders; /* atomic */
    SSL_CTX *context;
    bool has_peers;
    size_t peer_count;
    uint8_t (*peers)[SHA256_DIGEST_LENGTH]; /* of the DER of each certificate that is allowed */
};

/** Those in use now; to be put. */
struct mig_credentials *mig_tls_credentials(struct mig_tls *tls);
void mig_credentials_put(struct mig_credentials *credentials);

/** Whether this certificate may be a peer's, as far as the list goes. */
bool mig_credentials_allow(const struct mig_credentials *credentials, X509 *certificate);

/** OpenSSL's words for what failed first in this thread. */
const char *mig_tls_first_error(void);

/* ---- tls_peer.c ---- */

/** Verifies the chain, the name if one is set, the use, the role and the list; of SSL_CTX_set_cert_verify_callback. */
int mig_tls_verify(X509_STORE_CTX *store, void *unused);
/** Server: turns away who does not offer HTTP/2; of SSL_CTX_set_client_hello_cb and SSL_CTX_set_alpn_select_cb. */
int mig_tls_on_hello(SSL *ssl, int *alert, void *unused);
int mig_tls_select_protocol(SSL *ssl, const unsigned char **ret, unsigned char *ret_bytes, const unsigned char *offered,
                            unsigned offered_bytes, void *unused);
/** What both ends say in ALPN. */
extern const unsigned char MIG_TLS_PROTOCOL[3];
bool mig_tls_is_protocol_chosen(const SSL *ssl);

/** Expect the server's certificate to be for a name or a numeric address. False if it is neither. */
bool mig_tls_expect_name(SSL *ssl, const char *server_name);
/** Whether the peer's certificate is for that name or numeric address. */
bool mig_tls_is_peer_named(const SSL *ssl, const char *name);
/** What there is against the peer's certificate by what is trusted now, in words; NULL if it is all right. */
const char *mig_tls_why_not_now(const SSL *ssl, const struct mig_credentials *now);
/** Why OpenSSL gave the connection up, in words. */
const char *mig_tls_words(const SSL *ssl);

#endif
