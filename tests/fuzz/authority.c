#define OPENSSL_SUPPRESS_DEPRECATED /* RAND_METHOD: a provider would do the same with ten times the lines */

#include "authority.h"

#include <fcntl.h>
#include <openssl/ec.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "session.h"

static const char FIRST_DAY[] = "20000101000000Z", LAST_DAY[] = "99991231235959Z"; /* RFC 5280: there is no last day */

/* ---- random bytes that are none ---- */

static uint64_t random_state;

/* SplitMix64. */
static int draw(unsigned char *bytes, int count_bytes)
{
    for (int i = 0; i < count_bytes; i++) {
        uint64_t mixed = random_state += 0x9e3779b97f4a7c15;
        mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
        mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
        bytes[i] = (unsigned char)(mixed >> 56);
    }
    return 1;
}

static int is_seeded(void)
{
    return 1;
}

void authority_rewind_random(void)
{
    static const RAND_METHOD method = {.bytes = draw, .pseudorand = draw, .status = is_seeded};

    require(RAND_set_rand_method(&method));
    random_state = 0;
}

/* ---- certificates ---- */

struct party {
    X509 *certificate;
    EVP_PKEY *key;
};

static void extend(X509 *certificate, X509_EXTENSION *extension)
{
    require(extension && X509_add_ext(certificate, extension, -1));
    X509_EXTENSION_free(extension);
}

/* A certificate for a key, signed by an issuer; NULL is by itself. */
static X509 *make(const char *name, EVP_PKEY *key, const struct party *issuer, X509_EXTENSION *names)
{
    X509 *made = X509_new();
    X509_NAME *subject = X509_NAME_new();

    require(made && subject && X509_set_version(made, X509_VERSION_3));
    require(X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)name, -1, -1, 0));
    require(X509_set_subject_name(made, subject));
    require(X509_set_issuer_name(made, issuer ? X509_get_subject_name(issuer->certificate) : subject));
    require(ASN1_INTEGER_set(X509_get_serialNumber(made), issuer ? 2 : 1) && X509_set_pubkey(made, key));
    require(ASN1_TIME_set_string_X509(X509_getm_notBefore(made), FIRST_DAY));
    require(ASN1_TIME_set_string_X509(X509_getm_notAfter(made), LAST_DAY));
    if (issuer) {
        extend(made, names);
        extend(made, X509V3_EXT_conf_nid(NULL, NULL, NID_ext_key_usage, "serverAuth,clientAuth"));
    } else {
        extend(made, X509V3_EXT_conf_nid(NULL, NULL, NID_basic_constraints, "critical,CA:TRUE"));
    }
    require(X509_sign(made, issuer ? issuer->key : key, EVP_sha256()) > 0);
    X509_NAME_free(subject);
    return made;
}

static const struct party *authority(void)
{
    static struct party made;

    if (!made.certificate) {
        authority_rewind_random();
        made.key = EVP_EC_gen("P-256");
        require(made.key);
        made.certificate = make("authority", made.key, NULL, NULL);
    }
    return &made;
}

static const struct party *host(void)
{
    static struct party made;

    if (!made.certificate) {
        const struct party *issuer = authority();
        made.key = EVP_EC_gen("P-256");
        require(made.key);
        made.certificate = make("host", made.key, issuer,
                                X509V3_EXT_conf_nid(NULL, NULL, NID_subject_alt_name,
                                                    "IP:" HOST_ADDRESS ",DNS:" HOST_NAME ",URI:urn:migrate:role:host"));
    }
    return &made;
}

X509 *authority_host(void)
{
    return host()->certificate;
}

EVP_PKEY *authority_host_key(void)
{
    return host()->key;
}

X509 *authority_issue(const uint8_t *names, size_t names_bytes)
{
    ASN1_OCTET_STRING *value = ASN1_OCTET_STRING_new();
    EVP_PKEY *key = host()->key;

    require(value && ASN1_OCTET_STRING_set(value, names, (int)names_bytes));
    X509_EXTENSION *extension = X509_EXTENSION_create_by_NID(NULL, NID_subject_alt_name, 0, value);
    ASN1_OCTET_STRING_free(value);
    return make("any", key, authority(), extension);
}

/* ---- as files ---- */

enum { PATH_BYTES = 64 };

/* A file of no directory, from what was written to a BIO, which it frees. */
static void keep(BIO *written, const char *directory, const char *name, char path[PATH_BYTES])
{
    char *bytes;
    const long count_bytes = BIO_get_mem_data(written, &bytes);

    snprintf(path, PATH_BYTES, "%s/%s", directory, name);
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    require(fd >= 0 && write(fd, bytes, (size_t)count_bytes) == count_bytes);
    close(fd);
    BIO_free(written);
}

static BIO *written_certificate(X509 *certificate)
{
    BIO *written = BIO_new(BIO_s_mem());
    require(written && PEM_write_bio_X509(written, certificate));
    return written;
}

static struct mig_tls *load(bool has_peers)
{
    enum { CA, CERTIFICATE, KEY, PEER, FILES };
    char directory[] = "/tmp/fuzz-authority-XXXXXX", paths[FILES][PATH_BYTES], text[MIG_TLS_TEXT_BYTES];
    BIO *key = BIO_new(BIO_s_mem());
    struct mig_tls *loaded;

    require(mkdtemp(directory) && key);
    require(PEM_write_bio_PrivateKey(key, host()->key, NULL, NULL, 0, NULL, NULL));
    keep(key, directory, "key", paths[KEY]);
    keep(written_certificate(authority()->certificate), directory, "ca", paths[CA]);
    keep(written_certificate(host()->certificate), directory, "certificate", paths[CERTIFICATE]);
    keep(written_certificate(host()->certificate), directory, "peer.pem", paths[PEER]);
    require(!mig_tls_create(paths[CA], paths[CERTIFICATE], paths[KEY], has_peers ? directory : NULL, &loaded, text,
                            sizeof(text)));
    for (int i = 0; i < FILES; i++)
        unlink(paths[i]);
    rmdir(directory);
    return loaded;
}

struct mig_tls *authority_tls(bool has_peers)
{
    static struct mig_tls *loaded[2];

    if (!loaded[has_peers])
        loaded[has_peers] = load(has_peers);
    return loaded[has_peers];
}
