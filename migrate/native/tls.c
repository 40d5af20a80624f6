#include "tls.h"

#include <dirent.h>
#include <errno.h>
#include <fnmatch.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tls_internal.h"

/* AES-128 seals a third faster than AES-256, and is no weaker link than what surrounds it. */
static const char SUITES[] = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256";
enum { SECURITY_LEVEL = 2, READ_BYTES = 64 << 10 };

struct mig_tls {
    unsigned holders; /* atomic */
    char *ca_path, *cert_path, *key_path, *peers_dir;
    pthread_mutex_t mutex; /* guards `now` */
    struct mig_credentials *now;
};

/* Where the words for what went wrong go. */
struct report {
    char *text;
    size_t text_bytes;
};

__attribute__((format(printf, 2, 3))) static int refuse(const struct report *report, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(report->text, report->text_bytes, format, arguments);
    va_end(arguments);
    ERR_clear_error();
    return -EINVAL;
}

const char *mig_tls_first_error(void)
{
    const unsigned long error = ERR_peek_error();
    const char *words = ERR_SYSTEM_ERROR(error) ? strerror(ERR_GET_REASON(error)) : ERR_reason_error_string(error);
    return words ? words : "unknown error";
}

/* ---- the list of peers ---- */

static int add_peer(struct mig_credentials *credentials, X509 *certificate)
{
    uint8_t (*grown)[SHA256_DIGEST_LENGTH] =
        realloc(credentials->peers, (credentials->peer_count + 1) * sizeof(*credentials->peers));

    if (!grown)
        return -ENOMEM;
    credentials->peers = grown;
    if (!X509_digest(certificate, EVP_sha256(), grown[credentials->peer_count], NULL))
        return -EINVAL;
    credentials->peer_count++;
    return 0;
}

/* All certificates of a file, of which there is at least one. */
static int load_peer_file(struct mig_credentials *credentials, const char *path, const struct report *report)
{
    BIO *file = BIO_new_file(path, "r");
    X509 *certificate;
    int found = 0, rc = 0;

    if (!file)
        return refuse(report, "%s: %s", path, mig_tls_first_error());
    while (rc == 0 && (certificate = PEM_read_bio_X509(file, NULL, NULL, NULL))) {
        rc = add_peer(credentials, certificate);
        X509_free(certificate);
        found++;
    }
    BIO_free(file);
    /* At the end of a file, OpenSSL finds no further beginning. */
    const bool is_at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
    if (rc < 0 || !found || !is_at_end)
        return refuse(report, "%s: not a certificate in PEM: %s", path, mig_tls_first_error());
    ERR_clear_error();
    return 0;
}

static int load_peers(struct mig_credentials *credentials, const char *directory, const struct report *report)
{
    DIR *opened = opendir(directory);
    int rc = 0;

    if (!opened && errno == ENOENT)
        return 0;
    if (!opened)
        return refuse(report, "%s: %s", directory, strerror(errno));
    credentials->has_peers = true;
    for (const struct dirent *entry; rc == 0 && (entry = readdir(opened));) {
        char path[4096];
        if (fnmatch("*.pem", entry->d_name, FNM_PERIOD) != 0)
            continue;
        if (snprintf(path, sizeof(path), "%s/%s", directory, entry->d_name) >= (int)sizeof(path))
            rc = refuse(report, "%s: the name of a file in it is too long", directory);
        else
            rc = load_peer_file(credentials, path, report);
    }
    closedir(opened);
    return rc;
}

bool mig_credentials_allow(const struct mig_credentials *credentials, X509 *certificate)
{
    uint8_t digest[SHA256_DIGEST_LENGTH];

    if (!credentials->has_peers)
        return true;
    if (!X509_digest(certificate, EVP_sha256(), digest, NULL))
        return false;
    for (size_t i = 0; i < credentials->peer_count; i++)
        if (memcmp(credentials->peers[i], digest, sizeof(digest)) == 0)
            return true;
    return false;
}

/* ---- our own certificate ---- */

/* A key that wants a passphrase is a mistake, nothing to ask the terminal for. */
static int no_passphrase(char *buffer, int buffer_bytes, int is_write, void *user)
{
    (void)buffer, (void)buffer_bytes, (void)is_write, (void)user;
    return -1;
}

/* OpenSSL has odd words for what is no key, and for one that we do not ask a passphrase for. */
static const char *flaw_of_key(void)
{
    const unsigned long error = ERR_peek_error();

    if (ERR_GET_REASON(error) == ERR_R_INTERRUPTED_OR_CANCELLED)
        return "the key must have no passphrase";
    return ERR_GET_LIB(error) == ERR_LIB_OSSL_DECODER ? "not a private key in PEM" : mig_tls_first_error();
}

static int load_files(SSL_CTX *context, const struct mig_tls *tls, const struct report *report)
{
    ERR_clear_error();
    if (!SSL_CTX_load_verify_file(context, tls->ca_path))
        return refuse(report, "%s: %s", tls->ca_path, mig_tls_first_error());
    if (!SSL_CTX_use_certificate_chain_file(context, tls->cert_path))
        return refuse(report, "%s: %s", tls->cert_path, mig_tls_first_error());
    const X509 *certificate = SSL_CTX_get0_certificate(context);
    if (X509_cmp_current_time(X509_get0_notAfter(certificate)) <= 0)
        return refuse(report, "%s: certificate has expired", tls->cert_path);
    if (X509_cmp_current_time(X509_get0_notBefore(certificate)) > 0)
        return refuse(report, "%s: certificate is not yet valid", tls->cert_path);
    /* Loading the key compares it with the certificate. */
    if (!SSL_CTX_use_PrivateKey_file(context, tls->key_path, SSL_FILETYPE_PEM) || !SSL_CTX_check_private_key(context))
        return refuse(report, "%s: %s", tls->key_path, flaw_of_key());
    return 0;
}

static void set_rules(SSL_CTX *context)
{
    SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_max_proto_version(context, TLS1_3_VERSION);
    SSL_CTX_set_ciphersuites(context, SUITES);
    SSL_CTX_set_security_level(context, SECURITY_LEVEL);
    /* A peer that leaves without a goodbye may do so: a closed connection is never the end of a call. */
    SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
                                     SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_IGNORE_UNEXPECTED_EOF);
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(context, 0);
    SSL_CTX_clear_mode(context, SSL_MODE_AUTO_RETRY);
    SSL_CTX_set_mode(context, SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_read_ahead(context, 1); /* several records with one system call */
    SSL_CTX_set_default_read_buffer_len(context, READ_BYTES);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_set_cert_verify_callback(context, mig_tls_verify, NULL);
    SSL_CTX_set_client_hello_cb(context, mig_tls_on_hello, NULL);
    SSL_CTX_set_alpn_select_cb(context, mig_tls_select_protocol, NULL);
    SSL_CTX_set_alpn_protos(context, MIG_TLS_PROTOCOL, sizeof(MIG_TLS_PROTOCOL));
    SSL_CTX_set_default_passwd_cb(context, no_passphrase);
}

static int load(const struct mig_tls *tls, struct mig_credentials **ret, const struct report *report)
{
    struct mig_credentials *credentials = calloc(1, sizeof(*credentials));

    if (!credentials)
        return -ENOMEM;
    credentials->holders = 1;
    credentials->context = SSL_CTX_new(TLS_method());
    int rc = credentials->context ? 0 : refuse(report, "OpenSSL: %s", mig_tls_first_error());
    if (rc == 0) {
        set_rules(credentials->context);
        rc = load_files(credentials->context, tls, report);
    }
    if (rc == 0 && tls->peers_dir)
        rc = load_peers(credentials, tls->peers_dir, report);
    if (rc < 0)
        mig_credentials_put(credentials);
    else
        *ret = credentials;
    return rc;
}

void mig_credentials_put(struct mig_credentials *credentials)
{
    if (!credentials || __atomic_sub_fetch(&credentials->holders, 1, __ATOMIC_ACQ_REL))
        return;
    SSL_CTX_free(credentials->context);
    free(credentials->peers);
    free(credentials);
}

/* ---- life ---- */

static void free_tls(struct mig_tls *tls)
{
    mig_credentials_put(tls->now);
    pthread_mutex_destroy(&tls->mutex);
    free(tls->ca_path);
    free(tls->cert_path);
    free(tls->key_path);
    free(tls->peers_dir);
    free(tls);
}

int mig_tls_create(const char *ca_pem_path, const char *cert_pem_path, const char *key_pem_path, const char *peers_dir,
                   struct mig_tls **ret, char *text, size_t text_bytes)
{
    const struct report report = {text, text_bytes};
    struct mig_tls *tls = calloc(1, sizeof(*tls));

    snprintf(text, text_bytes, "out of memory");
    if (!tls)
        return -ENOMEM;
    /* Not at the end of the process: threads may still be speaking then. */
    OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, NULL);
    tls->holders = 1;
    pthread_mutex_init(&tls->mutex, NULL);
    tls->ca_path = strdup(ca_pem_path);
    tls->cert_path = strdup(cert_pem_path);
    tls->key_path = strdup(key_pem_path);
    tls->peers_dir = peers_dir ? strdup(peers_dir) : NULL;
    const bool has_paths = tls->ca_path && tls->cert_path && tls->key_path && (!peers_dir || tls->peers_dir);
    const int rc = has_paths ? load(tls, &tls->now, &report) : -ENOMEM;
    if (rc < 0)
        free_tls(tls);
    else
        *ret = tls;
    return rc;
}

int mig_tls_reload(struct mig_tls *tls, char *text, size_t text_bytes)
{
    const struct report report = {text, text_bytes};
    struct mig_credentials *loaded;

    snprintf(text, text_bytes, "out of memory");
    const int rc = load(tls, &loaded, &report);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&tls->mutex);
    struct mig_credentials *before = tls->now;
    tls->now = loaded;
    pthread_mutex_unlock(&tls->mutex);
    mig_credentials_put(before);
    return 0;
}

struct mig_credentials *mig_tls_credentials(struct mig_tls *tls)
{
    pthread_mutex_lock(&tls->mutex);
    struct mig_credentials *credentials = tls->now;
    __atomic_add_fetch(&credentials->holders, 1, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&tls->mutex);
    return credentials;
}

struct mig_tls *mig_tls_get(struct mig_tls *tls)
{
    if (tls)
        __atomic_add_fetch(&tls->holders, 1, __ATOMIC_RELAXED);
    return tls;
}

void mig_tls_put(struct mig_tls *tls)
{
    if (tls && !__atomic_sub_fetch(&tls->holders, 1, __ATOMIC_ACQ_REL))
        free_tls(tls);
}
