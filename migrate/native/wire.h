/*
 * The page call's messages on the wire: gRPC's length prefix and protobuf, as proto/migrate/v1/page_service.proto has
 * it.
 *
 * Decoders take any valid encoding: fields in any order, repeated (the last one counts), unknown ones skipped. They
 * read one whole message that lies in memory, never beyond it. Sources: protobuf.dev/programming-guides/encoding;
 * gRPC's PROTOCOL-HTTP2.
 */
#ifndef MIG_WIRE_H
#define MIG_WIRE_H

#include <stddef.h>
#include <stdint.h>

enum {
    MIG_PREFIX_BYTES = 5,          /* compressed flag, big-endian length */
    MIG_WIRE_HEADER_BYTES_MAX = 96 /* prefix and all fields of a message but the bytes of its pages */
};

struct mig_fetch_request {
    uint64_t request_id;
    uint32_t region;
    uint64_t first_page;
    uint32_t page_count;
};

enum mig_content { MIG_CONTENT_NONE = 0, MIG_CONTENT_DATA = 1, MIG_CONTENT_ZERO = 2, MIG_CONTENT_COMPRESSED = 3 };

struct mig_fetch_response {
    uint64_t request_id;
    uint32_t region;
    uint64_t first_page;
    uint32_t page_count;
    uint64_t generation;
    uint64_t digest;
    uint64_t read_ns; /* 0 unless the migration is traced */
    enum mig_content content;
    int32_t compression; /* of MIG_CONTENT_COMPRESSED: a migrate.v1.PageCompression, known here or not */
    const uint8_t *data; /* decoded: within the message */
    uint64_t data_bytes;
};

/** Write a request with its prefix. Returns its bytes. */
size_t mig_wire_encode_request(const struct mig_fetch_request *request, uint8_t header[MIG_WIRE_HEADER_BYTES_MAX]);

/** Write a response with its prefix, up to the bytes of its pages, which follow. Returns the bytes written. */
size_t mig_wire_encode_response(const struct mig_fetch_response *response, uint8_t header[MIG_WIRE_HEADER_BYTES_MAX]);

/** Read a message without its prefix. Returns 0, or -EBADMSG if it is not one. */
int mig_wire_decode_request(const uint8_t *message, size_t message_bytes, struct mig_fetch_request *ret);
int mig_wire_decode_response(const uint8_t *message, size_t message_bytes, struct mig_fetch_response *ret);

#endif
