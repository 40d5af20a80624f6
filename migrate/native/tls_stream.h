/*
 * One TLS connection over a socket: the handshake, then bytes both ways, as long as the peer is trusted: its
 * certificate is looked at every second, by the files of then. Not thread-safe.
 */
#ifndef MIG_TLS_STREAM_H
#define MIG_TLS_STREAM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "tls.h"

/* A record's worth is staged, sealed and sent at a time. */
enum { MIG_TLS_RECORD_BYTES = 16 << 10 };

struct mig_tls_stream;

/**
 * Prepare to speak over a connected socket, which stays the caller's and must outlive us. A client names the server
 * that it means (DNS name or numeric address); for a server, that is NULL. Returns 0 or -errno.
 */
int mig_tls_stream_create(struct mig_tls *tls, int fd, const char *server_name, struct mig_tls_stream **ret);
/** Says goodbye, if there was a handshake. NULL is nothing. */
void mig_tls_stream_destroy(struct mig_tls_stream *stream);

/**
 * Do the handshake, until a time of CLOCK_MONOTONIC. Returns 0, -EKEYREJECTED if either side does not trust the other
 * or the peer speaks no TLS that we do, or another -errno.
 */
int mig_tls_stream_handshake(struct mig_tls_stream *stream, uint64_t deadline_ns);

/**
 * Fill the places in turn with what the socket has; with `may_wait`, sleep until there is something.
 * Returns the bytes, -EAGAIN if there were none, or -errno: -ECONNRESET at the end, -EPROTO, -EKEYREJECTED as above.
 */
ssize_t mig_tls_stream_receive(struct mig_tls_stream *stream, const struct iovec *places, int count, bool may_wait);
/** Whether something may have been taken from the socket, where poll does not see it: then receive it first. */
bool mig_tls_stream_has_unseen(const struct mig_tls_stream *stream);

/** Where to put what is to be sent next, and how much fits; nothing fits while something is staged. */
size_t mig_tls_stream_room(struct mig_tls_stream *stream, uint8_t **ret);
/** So much was put there, at most the room. */
void mig_tls_stream_stage(struct mig_tls_stream *stream, size_t count_bytes);
/** Send what is staged. Returns 0, 1 if the socket takes no more now, or -errno. */
int mig_tls_stream_send(struct mig_tls_stream *stream);
bool mig_tls_stream_is_sent(const struct mig_tls_stream *stream);

/** Whether the peer's certificate is for that name or numeric address. */
bool mig_tls_stream_is_peer(const struct mig_tls_stream *stream, const char *name);
/** Bytes of the socket so far: both ways, and received. */
uint64_t mig_tls_stream_wire_bytes(const struct mig_tls_stream *stream);
uint64_t mig_tls_stream_received_bytes(const struct mig_tls_stream *stream);
/** Why it is no more, in words; empty while it is. */
const char *mig_tls_stream_error(const struct mig_tls_stream *stream);

#endif
