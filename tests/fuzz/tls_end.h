/*
 * The peer's end of TLS. By itself it is an honest host, OpenSSL's own; what befalls its handshake on the wire, and
 * what records it sends then, is up to a script. It needs no thread: it goes on when what is tested waits for it.
 *
 * Its records are sealed here, not by OpenSSL, which would not send anything odd (RFC 8446, 5.2 and 7).
 */
#ifndef FUZZ_TLS_END_H
#define FUZZ_TLS_END_H

#include <openssl/ssl.h>

#include "session.h"

enum {
    TLS_END_KEY_BYTES = 16,
    TLS_END_IV_BYTES = 12,
    TLS_END_FLIGHT_BYTES = 16 << 10,
    TLS_END_RECORD_BYTES_MAX = 40 << 10,
    TLS_END_OPERATIONS = 8,
};

/* What seals the records of one epoch. */
struct tls_end_keys {
    bool is_known;
    uint8_t secret[32];
    uint64_t sequence;
};

struct tls_end {
    bool is_client;
    SSL *ssl;
    BIO *in, *out;
    struct tls_end_keys handshake, traffic;

    /* Of the handshake: what it says next, sealed; and the messages that this is made of, from its Certificate on. */
    uint8_t flight[TLS_END_FLIGHT_BYTES], messages[TLS_END_FLIGHT_BYTES];
    size_t flight_bytes, messages_bytes;
    bool is_disturbed; /* not what OpenSSL said is what arrived */

    /* How what is said after it becomes records. */
    size_t record_bytes, padding_bytes;
    bool is_damaging, is_cutting; /* the next one */
    size_t damage_at, cut_bytes;
    uint8_t damage;
    uint8_t *held; /* records that leave together; NULL: each alone */
    size_t held_bytes;
};

/** Nothing is said yet. */
void tls_end_create(struct tls_end *end, bool is_client, X509 *certificate);
void tls_end_destroy(struct tls_end *end);

/** What is tested waits in its handshake: say what comes next, as the script has it; NULL is as it should be. */
void tls_end_advance(struct session *session, struct script *script);

/** Seals bytes of data, and feeds what is tested with them. */
void tls_end_feed(struct session *session, const uint8_t *bytes, size_t count_bytes);
/** One of TLS_END_OPERATIONS things that happen between data. */
void tls_end_play(struct session *session, struct script *script, unsigned operation, bool flag);
/** Sends what is held. */
void tls_end_release(struct session *session);

#endif
