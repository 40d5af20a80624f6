/*
 * Whom the page call trusts, and as whom it speaks: a certificate of ours, an authority, perhaps a list of peers.
 *
 * TLS 1.3 alone, both sides with a certificate, HTTP/2 by ALPN. Every host of a migration has the role "host" in a URI
 * of its certificate; no other role gets or gives pages.
 */
#ifndef MIG_TLS_H
#define MIG_TLS_H

#include <stddef.h>

enum { MIG_TLS_TEXT_BYTES = 512 };

/* Counted: each connection that began with it holds it. Thread-safe. */
struct mig_tls;

/**
 * Load the files, all PEM: authorities, our certificate with what is between it and an authority, its key.
 * If `peers_dir` is there, only peers whose certificate is in one of its *.pem files are trusted; NULL is all.
 * Returns 0, or -errno with the file and what is wrong with it in `text`.
 */
int mig_tls_create(const char *ca_pem_path, const char *cert_pem_path, const char *key_pem_path, const char *peers_dir,
                   struct mig_tls **ret, char *text, size_t text_bytes);

/**
 * Load the files again: connections that begin from now on go by them, and those that there are end within a second or
 * two if their peer is not trusted any more. Returns as mig_tls_create does; on an error all stays as it was.
 */
int mig_tls_reload(struct mig_tls *tls, char *text, size_t text_bytes);

/** Another holder. NULL is nothing, here and below. */
struct mig_tls *mig_tls_get(struct mig_tls *tls);
void mig_tls_put(struct mig_tls *tls);

#endif
