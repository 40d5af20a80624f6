/* An authority in memory, and the certificates that it issues: the same ones in every run, and valid for ever. */
#ifndef FUZZ_AUTHORITY_H
#define FUZZ_AUTHORITY_H

#include <openssl/x509.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tls.h"

/* Whom the honest host's certificate names, as does that of what is tested. */
#define HOST_NAME "one.example"
#define HOST_ADDRESS "127.0.0.1"

/** From here on, OpenSSL draws the same random bytes for every input. */
void authority_rewind_random(void);

/** A certificate with a subjectAltName of any bytes, to be freed; it has the key of all hosts. */
X509 *authority_issue(const uint8_t *names, size_t names_bytes);
/** Not to be freed. */
X509 *authority_host(void);
EVP_PKEY *authority_host_key(void);

/** What is tested: trusts the authority; with has_peers, of its hosts only the honest one. Not to be put. */
struct mig_tls *authority_tls(bool has_peers);

#endif
