/*
 * One HTTP/2 connection that carries gRPC calls, either end of it, over libnghttp2.
 *
 * It has no thread: its owner waits for the descriptor, calls mig_h2_receive when there is something to read, and
 * mig_h2_flush when there is something to say. Callbacks run inside these two. Not thread-safe.
 *
 * Whatever the peer sends costs it at most this connection: a call that breaks gRPC's rules ends with a status, a
 * connection that breaks HTTP/2's gets a GOAWAY, and mig_h2_error says why.
 * Sources: RFC 9113; gRPC's PROTOCOL-HTTP2 and keepalive documents; nghttp2's API reference.
 */
#ifndef MIG_H2_H
#define MIG_H2_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum mig_h2_role { MIG_H2_SERVER, MIG_H2_CLIENT };

/* Those of gRPC's status codes that we give or look for (google.rpc.Code). */
enum mig_status {
    MIG_STATUS_OK = 0,
    MIG_STATUS_CANCELLED = 1,
    MIG_STATUS_UNKNOWN = 2,
    MIG_STATUS_INVALID_ARGUMENT = 3,
    MIG_STATUS_DEADLINE_EXCEEDED = 4,
    MIG_STATUS_NOT_FOUND = 5,
    MIG_STATUS_PERMISSION_DENIED = 7,
    MIG_STATUS_RESOURCE_EXHAUSTED = 8,
    MIG_STATUS_UNIMPLEMENTED = 12,
    MIG_STATUS_INTERNAL = 13,
    MIG_STATUS_UNAVAILABLE = 14,
    MIG_STATUS_UNAUTHENTICATED = 16,
};

enum { MIG_STATUS_TEXT_BYTES = 256, MIG_H2_HEADERS_BYTES_MAX = 8 << 10, MIG_H2_STREAMS_MAX = 16 };

struct mig_h2;
struct mig_tls_stream;

/* One call. */
struct mig_h2_stream;

/* What the owner of a connection is told. Any of them may be NULL. */
struct mig_h2_handler {
    /* Server: a call's path and metadata are known. Returns a status; OK lets it go on. */
    enum mig_status (*on_call)(void *user, struct mig_h2_stream *stream);
    /* A whole message, without its prefix; it lies there until the return. Same answer. */
    enum mig_status (*on_message)(void *user, struct mig_h2_stream *stream, const uint8_t *message, size_t bytes);
    /* The peer will send no more messages. At a client, mig_h2_status is the call's. */
    void (*on_end)(void *user, struct mig_h2_stream *stream);
    /* The call is over in both directions, or was reset. */
    void (*on_close)(void *user, struct mig_h2_stream *stream);
    /* The last that is heard of a stream: no body of its messages is referred to any more. */
    void (*on_free)(void *user, struct mig_h2_stream *stream);
};

struct mig_h2_limits {
    size_t message_bytes_max; /* of one received message */
    size_t receive_bytes;     /* taken from the socket at a time */
    uint32_t frame_bytes_max; /* that we offer the peer: 16 KiB to 16 MiB */
    uint32_t window_bytes;    /* of each stream and the connection */
};

/**
 * A connection over a connected socket, which it takes over. Nothing is sent yet.
 * `user` is handed to the callbacks. Returns 0 or -errno; on an error the socket stays the caller's.
 */
int mig_h2_create(int fd, enum mig_h2_role role, const struct mig_h2_limits *limits,
                  const struct mig_h2_handler *handler, void *user, struct mig_h2 **ret);

/**
 * From now on all bytes go through TLS, whose handshake is done; before any was sent or received. Takes it over, and
 * ends it with the connection.
 */
void mig_h2_secure(struct mig_h2 *connection, struct mig_tls_stream *tls);

/** Close the socket, end all calls (on_close, on_free), free. NULL is nothing. */
void mig_h2_destroy(struct mig_h2 *connection);

/**
 * Take in what the socket has; with `may_wait`, sleep until it has something (SO_RCVTIMEO bounds that).
 * Returns 1 if there was something, 0 if not, or -errno: -ECONNRESET when the peer has closed, -EPROTO when it broke
 * the protocol (a GOAWAY is queued: flush once more), -EKEYREJECTED when it does not trust our certificate.
 */
int mig_h2_receive(struct mig_h2 *connection, bool may_wait);

/**
 * Write what is queued. Returns 0 when all is written, 1 when the socket takes no more now, or -errno.
 * After 0, no message's body is referred to any more, unless flow control holds it back (mig_h2_queued).
 */
int mig_h2_flush(struct mig_h2 *connection);

/** Whether nothing waits for the socket. */
bool mig_h2_is_written(const struct mig_h2 *connection);

/** Whether both sides are through: after a GOAWAY, nothing is left to do. */
bool mig_h2_is_over(const struct mig_h2 *connection);

/** Client: begin a call. Returns 0 or -errno. `timeout_us` of 0 is none. */
int mig_h2_call(struct mig_h2 *connection, const char *authority, const char *path, const char *const metadata[][2],
                size_t metadata_count, void *stream_user, struct mig_h2_stream **ret);

/** How many messages and bytes of a stream are not yet written; up to messages_max may be queued. */
uint32_t mig_h2_queued(const struct mig_h2_stream *stream, uint64_t *ret_bytes);
enum { MIG_H2_QUEUE_MAX = 256 };

/**
 * Queue a message: a header with the prefix, copied, and a body that stays the caller's and must not change until it
 * is written. False if the queue is full.
 */
bool mig_h2_send(struct mig_h2_stream *stream, const uint8_t *header, uint32_t header_bytes, const void *body,
                 uint32_t body_bytes);

/**
 * The same with a body that goes from a file to the socket without a copy (sendfile). The file must stay open, and the
 * socket be non-blocking, until the stream is freed.
 */
bool mig_h2_send_file(struct mig_h2_stream *stream, const uint8_t *header, uint32_t header_bytes, int fd,
                      uint64_t offset, uint32_t body_bytes);

/** End our side once the queue is written. A server says the status; a client has none to say. Idempotent. */
void mig_h2_end(struct mig_h2_stream *stream, enum mig_status status, const char *text);

/** Server: the same, but what is queued is dropped; if there was anything, the call is reset (CANCEL). */
void mig_h2_end_at_once(struct mig_h2_stream *stream, enum mig_status status, const char *text);

/** Give a call up (RST_STREAM, CANCEL). */
void mig_h2_cancel(struct mig_h2_stream *stream);

/** Say why a callback's status is not OK. */
__attribute__((format(printf, 2, 3))) void mig_h2_explain(struct mig_h2_stream *stream, const char *format, ...);

/** Let a peer that we held back send more: `bytes` of what it sent on the stream have been dealt with. */
void mig_h2_consume(struct mig_h2_stream *stream, uint64_t bytes);

/** Begin to end the connection: GOAWAY, and nothing new from the peer. */
void mig_h2_go_away(struct mig_h2 *connection);

/** Ask for a sign of life (PING), unless one is on its way already; mig_h2_heard_ns moves when it comes. */
void mig_h2_ping(struct mig_h2 *connection);
/** The round trip of a PING that was answered since the last call, 0 if none was. */
uint64_t mig_h2_take_ping_ns(struct mig_h2 *connection);

/* ---- facts ---- */

int mig_h2_fd(const struct mig_h2 *connection);
/** Whether the last receive took all that it had room for: then there is more, probably. */
bool mig_h2_has_more(const struct mig_h2 *connection);
/** Whether there may be bytes that poll does not see, since TLS has taken them from the socket: receive before it. */
bool mig_h2_has_unseen(const struct mig_h2 *connection);
/** When bytes last came, CLOCK_MONOTONIC. */
uint64_t mig_h2_heard_ns(const struct mig_h2 *connection);
/** Whether the peer's SETTINGS have come: somebody who speaks HTTP/2 is there. */
bool mig_h2_is_greeted(const struct mig_h2 *connection);
/** Whether the peer sent a GOAWAY. */
bool mig_h2_is_leaving(const struct mig_h2 *connection);
/** Bytes of the socket, both ways. */
uint64_t mig_h2_wire_bytes(const struct mig_h2 *connection);
/** Whether the caller is that host, by its certificate (DNS name or numeric address). Anybody is, in plain text. */
bool mig_h2_is_caller(const struct mig_h2_stream *stream, const char *name);
/** Why the connection is no more, in words. */
const char *mig_h2_error(const struct mig_h2 *connection);

/** Calls of a connection: NULL, or the first, then the next. */
struct mig_h2_stream *mig_h2_next_stream(const struct mig_h2 *connection, const struct mig_h2_stream *after);
void *mig_h2_stream_user(const struct mig_h2_stream *stream);
void mig_h2_set_stream_user(struct mig_h2_stream *stream, void *user);
/** A header that the peer sent, or NULL. Pseudo-headers too. */
const char *mig_h2_header(const struct mig_h2_stream *stream, const char *name);
/** CLOCK_MONOTONIC time by which the caller wants the call over (grpc-timeout); 0 if it did not say. */
uint64_t mig_h2_deadline_ns(const struct mig_h2_stream *stream);
/** Client: how the call ended, and the server's words. */
enum mig_status mig_h2_status(const struct mig_h2_stream *stream, const char **ret_text);
const char *mig_status_name(enum mig_status status);

#endif
