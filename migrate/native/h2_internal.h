/* What the parts of the HTTP/2 connection share: h2.c (bytes), h2_session.c (nghttp2's events), h2_call.c (gRPC). */
#ifndef MIG_H2_INTERNAL_H
#define MIG_H2_INTERNAL_H

#include <nghttp2/nghttp2.h>

#include "h2.h"
#include "tls_stream.h"
#include "wire.h"

enum { BATCH_SEGMENTS_MAX = 256, WRITE_IOV_MAX = 128, BATCH_SCRATCH_BYTES = 64 << 10, ERROR_BYTES = 256 };

/* A message on its way out. */
struct message {
    uint8_t header[MIG_WIRE_HEADER_BYTES_MAX];
    uint32_t header_bytes, header_sent;
    int fd; /* of a body in a file, else -1 */
    union {
        const uint8_t *body;
        uint64_t offset;
    };
    uint32_t body_bytes, body_sent;
};

/* A part of what goes out: bytes in memory, or, with fd >= 0, in a file. */
struct segment {
    int fd;
    union {
        const uint8_t *bytes;
        uint64_t offset;
    };
    size_t count_bytes;
};

struct mig_h2_stream {
    struct mig_h2 *connection;
    struct mig_h2_stream *next;
    int32_t id;
    void *user;

    /* out */
    struct message queue[MIG_H2_QUEUE_MAX];
    uint32_t queue_head, queue_tail;
    uint64_t queued_bytes;
    bool is_ending; /* nothing follows what is queued */
    bool is_deferred;
    bool is_answered; /* server: response headers are out */

    /* in: the message that is arriving */
    uint8_t prefix[MIG_PREFIX_BYTES];
    uint32_t prefix_bytes;
    uint8_t *assembly;
    size_t assembly_capacity, message_bytes, assembled_bytes;
    bool peer_ended;

    /* name\0value\0 pairs, as they came */
    char *headers;
    size_t headers_bytes;
    bool headers_too_large;
    uint64_t deadline_ns;

    enum mig_status status;
    char text[MIG_STATUS_TEXT_BYTES];
};

struct mig_h2 {
    int fd;
    struct mig_tls_stream *tls; /* NULL: plain text */
    enum mig_h2_role role;
    struct mig_h2_limits limits;
    struct mig_h2_handler handler;
    void *user;
    nghttp2_session *session;
    struct mig_h2_stream *streams;
    struct mig_h2_stream *graveyard; /* closed, but perhaps still referred to by the batch */
    uint32_t resets;

    uint8_t *received;
    struct mig_h2_stream *landing; /* whose DATA frame is arriving; NULL if it is none, or padded */
    size_t frame_left_bytes;       /* of that frame */
    bool has_more;                 /* the last receive took all that it had room for */
    uint64_t heard_ns;
    uint64_t ping_sent_ns; /* 0 if none is on its way */
    uint64_t ping_ns;
    uint64_t wire_bytes;
    bool has_received, is_greeted, is_leaving, is_broken;
    char error[ERROR_BYTES];

    /* What goes out next: frame headers and small frames in scratch, bodies where they lie. */
    struct segment segments[BATCH_SEGMENTS_MAX];
    int segment_count, segment_first;
    uint8_t scratch[BATCH_SCRATCH_BYTES];
    size_t scratch_bytes;
};

/* h2_session.c */
int mig_h2_session_create(struct mig_h2 *connection);
struct mig_h2_stream *mig_h2_stream_create(struct mig_h2 *connection, int32_t id);
/** Tells on_free. */
void mig_h2_stream_free(struct mig_h2_stream *stream);
/** Give a stream to nghttp2 as the source of its DATA frames. */
nghttp2_data_provider mig_h2_data_of(struct mig_h2_stream *stream);
void mig_h2_resume(struct mig_h2_stream *stream);

/* h2_call.c */
/** Server: the request's headers are complete. Ends the call if it is not one of gRPC's. */
void mig_h2_call_begin(struct mig_h2_stream *stream);
/** Client: response headers or trailers are complete. */
void mig_h2_call_headers(struct mig_h2_stream *stream, bool is_last);
/** Where the rest of the message that is arriving goes, and how much that is; 0 if there is no place for it yet. */
size_t mig_h2_call_room(const struct mig_h2_stream *stream, uint8_t **ret);
/** Bytes of messages, perhaps in their place already (mig_h2_call_room). Returns false if the call broke the rules. */
bool mig_h2_call_bytes(struct mig_h2_stream *stream, const uint8_t *bytes, size_t count_bytes);
/** Server: the peer half-closed. */
void mig_h2_call_half_closed(struct mig_h2_stream *stream);
/** End a call that broke a rule, on either side. */
void mig_h2_call_fail(struct mig_h2_stream *stream, enum mig_status status);
/** Fill in grpc-status and grpc-message; returns how many. `text` gets the percent-encoded words. */
size_t mig_h2_trailers(const struct mig_h2_stream *stream, nghttp2_nv nv[2], char text[3 * MIG_STATUS_TEXT_BYTES]);

/* h2_tls.c */
/** Write the batch; returns 0 when all is written, 1 when the socket is full, or -errno. */
int mig_h2_write_sealed(struct mig_h2 *connection);
/** As recvmsg does, but for -errno. */
ssize_t mig_h2_receive_sealed(struct mig_h2 *connection, const struct iovec iov[2], bool may_wait);

/* h2.c */
/** So much of the batch was taken. */
void mig_h2_batch_advance(struct mig_h2 *connection, size_t count_bytes);
bool mig_h2_batch_has_room(const struct mig_h2 *connection, int segments, size_t scratch_bytes);
void mig_h2_batch_copy(struct mig_h2 *connection, const void *bytes, size_t count_bytes);
/** The next part of a message's body, which is not copied. */
void mig_h2_batch_body(struct mig_h2 *connection, struct message *message, size_t count_bytes);

#endif
