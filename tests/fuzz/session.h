/* What the fuzz targets of server and client share: a connection to a peer that says what an input tells it to say. */
#ifndef FUZZ_SESSION_H
#define FUZZ_SESSION_H

#include "h2.h"
#include "reply_order.h"

enum { STEPS_MAX = 200 };

struct tls_end;

/* What is tested, and the peer's end of its connection. */
struct session {
    struct mig_h2 *h2; /* NULL before it is begun */
    int peer_fd;
    struct tls_end *tls; /* of the peer, whose bytes it seals; NULL: plain text */
    bool is_reading;     /* the peer takes what it is sent */
    bool is_over;
    unsigned looks; /* in a row, at what poll does not see, without a byte */
    bool is_late;   /* server: the deadlines of all calls have passed */
    /* Advances what is tested until it waits for the peer; false once the connection is over. */
    bool (*step)(struct session *session);
    /* client */
    bool is_client;
    struct mig_h2_stream *stream;
    struct mig_reply_order order;
};

/** Ends the process with a finding unless it holds. */
void require(bool holds);

/** Makes the connection; returns the end that is to be tested. */
int connect_session(struct session *session);
/** What is to be tested there: the page server, or the client of a page call. */
void begin_server(struct session *session, int fd, bool is_compressing);
void begin_client(struct session *session, int fd);
/** Takes what the peer was sent, if it reads at all. */
void drain(const struct session *session);
/** Hands the peer's bytes, in plain text or sealed, to what is tested, and has it look at each portion. */
void feed(struct session *session, const void *bytes, size_t count_bytes);
/** The same with bytes as they are, as many as the socket takes at a time. */
void feed_wire(struct session *session, const void *bytes, size_t count_bytes);
/** The peer leaves; frees what was tested. */
void finish(struct session *session);

/* ---- script.c: an input as a list of things to do ---- */

struct script {
    const uint8_t *at, *end;
};

/** 0 where there are no more. */
uint8_t next_byte(struct script *script);
/** Small ones mostly; 0xff begins one of four bytes. */
uint32_t next_number(struct script *script);
/** A byte that says how many, then as many as there are; they lie in the script. */
size_t next_bytes(struct script *script, const uint8_t **ret);

/** The peer's beginning: of a connection, and of a call. */
void send_greeting(struct session *session);
void send_call(struct session *session);

/** Plays frames that mostly make sense; each byte of the script, with those behind it, is one. */
void play(struct session *session, struct script *script);

#endif
