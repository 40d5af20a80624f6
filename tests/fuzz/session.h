/* What the fuzz targets of server and client share: a connection to a peer that says what an input tells it to say. */
#ifndef FUZZ_SESSION_H
#define FUZZ_SESSION_H

#include "h2.h"
#include "reply_order.h"

enum { STEPS_MAX = 200 };

/* What is tested, and the peer's end of its connection. */
struct session {
    struct mig_h2 *h2;
    int peer_fd;
    bool is_reading; /* the peer takes what it is sent */
    bool is_over;
    bool is_late; /* server: the deadlines of all calls have passed */
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
/** Takes what the peer was sent, if it reads at all. */
void drain(const struct session *session);
/** Hands bytes to what is tested, as many as its socket takes at a time, and has it look at each portion. */
void feed(struct session *session, const void *bytes, size_t count_bytes);
/** The peer leaves; frees what was tested. */
void finish(struct session *session);

/** The peer's beginning: of a connection, and of a call. */
void send_greeting(struct session *session);
void send_call(struct session *session);

/** Plays frames that mostly make sense; each byte of the script, with those behind it, is one. */
void play(struct session *session, const uint8_t *script, size_t script_bytes);

#endif
