#include "wire.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

enum wire_type { VARINT = 0, FIXED64 = 1, BYTES = 2, GROUP_BEGIN = 3, GROUP_END = 4, FIXED32 = 5 };
enum { GROUP_DEPTH_MAX = 99, VARINT_BYTES_MAX = 10, TAG_BYTES_MAX = 5 }; /* protobuf's own limits */
static const uint64_t FIELD_MAX = (1u << 29) - 1;

/* Field numbers of page_service.proto; the first four are those of both messages. */
enum { REQUEST_ID = 1, REGION = 2, FIRST_PAGE = 3, PAGE_COUNT = 4, GENERATION = 5, DIGEST = 9, READ_NS = 10 };
enum { DATA = 6, ZERO = 7, COMPRESSED = 8 }; /* the oneof */
enum { COMPRESSION = 1, COMPRESSED_DATA = 2, COMPRESSED_HEADER_BYTES_MAX = 17 };

/* ---- writing ---- */

static uint8_t *put_varint(uint8_t *at, uint64_t value)
{
    for (; value >= 0x80; value >>= 7)
        *at++ = (uint8_t)(value | 0x80);
    *at++ = (uint8_t)value;
    return at;
}

static uint8_t *put_number(uint8_t *at, unsigned field, uint64_t value)
{
    if (!value)
        return at;
    *at++ = (uint8_t)(field << 3 | VARINT);
    return put_varint(at, value);
}

/* A Compressed, up to its data, which follows. */
static uint8_t *put_compressed(uint8_t *at, const struct mig_fetch_response *response)
{
    uint8_t inner[COMPRESSED_HEADER_BYTES_MAX];
    uint8_t *end = put_number(inner, COMPRESSION, (uint32_t)response->compression);

    *end++ = COMPRESSED_DATA << 3 | BYTES;
    end = put_varint(end, response->data_bytes);
    const size_t inner_bytes = (size_t)(end - inner);
    *at++ = COMPRESSED << 3 | BYTES;
    at = put_varint(at, inner_bytes + response->data_bytes);
    memcpy(at, inner, inner_bytes);
    return at + inner_bytes;
}

static size_t finish(uint8_t *header, const uint8_t *end, uint64_t body_bytes)
{
    const uint64_t message_bytes = (uint64_t)(end - header) - MIG_PREFIX_BYTES + body_bytes;

    header[0] = 0;
    for (int i = 0; i < 4; i++)
        header[1 + i] = (uint8_t)(message_bytes >> (24 - 8 * i));
    return (size_t)(end - header);
}

size_t mig_wire_encode_request(const struct mig_fetch_request *request, uint8_t header[MIG_WIRE_HEADER_BYTES_MAX])
{
    uint8_t *at = header + MIG_PREFIX_BYTES;
    at = put_number(at, REQUEST_ID, request->request_id);
    at = put_number(at, REGION, request->region);
    at = put_number(at, FIRST_PAGE, request->first_page);
    at = put_number(at, PAGE_COUNT, request->page_count);
    return finish(header, at, 0);
}

size_t mig_wire_encode_response(const struct mig_fetch_response *response, uint8_t header[MIG_WIRE_HEADER_BYTES_MAX])
{
    uint8_t *at = header + MIG_PREFIX_BYTES;
    at = put_number(at, REQUEST_ID, response->request_id);
    at = put_number(at, REGION, response->region);
    at = put_number(at, FIRST_PAGE, response->first_page);
    at = put_number(at, PAGE_COUNT, response->page_count);
    at = put_number(at, GENERATION, response->generation);
    at = put_number(at, READ_NS, response->read_ns);
    if (response->digest) {
        *at++ = DIGEST << 3 | FIXED64;
        for (int i = 0; i < 8; i++)
            *at++ = (uint8_t)(response->digest >> (8 * i));
    }
    if (response->content == MIG_CONTENT_ZERO) {
        *at++ = ZERO << 3 | BYTES;
        *at++ = 0;
    } else if (response->content == MIG_CONTENT_DATA) {
        *at++ = DATA << 3 | BYTES;
        at = put_varint(at, response->data_bytes);
    } else if (response->content == MIG_CONTENT_COMPRESSED) {
        at = put_compressed(at, response);
    }
    const bool has_body = response->content == MIG_CONTENT_DATA || response->content == MIG_CONTENT_COMPRESSED;
    return finish(header, at, has_body ? response->data_bytes : 0);
}

/* ---- reading ---- */

struct cursor {
    const uint8_t *at;
    const uint8_t *end;
};

struct field {
    uint64_t number;
    enum wire_type type;
    uint64_t value;       /* of VARINT, FIXED64, FIXED32; the length of BYTES */
    const uint8_t *bytes; /* of BYTES */
};

static bool get_long_varint(struct cursor *cursor, unsigned bytes_max, uint64_t *ret)
{
    *ret = 0;
    for (unsigned i = 0; i < bytes_max && cursor->at < cursor->end; i++) {
        const uint8_t byte = *cursor->at++;
        *ret |= (uint64_t)(byte & 0x7f) << (7 * i);
        if (!(byte & 0x80))
            return i < VARINT_BYTES_MAX - 1 || byte <= 1;
    }
    return false;
}

static bool get_varint(struct cursor *cursor, uint64_t *ret)
{
    return get_long_varint(cursor, VARINT_BYTES_MAX, ret);
}

static bool get_fixed(struct cursor *cursor, unsigned count_bytes, uint64_t *ret)
{
    if (cursor->end - cursor->at < (ptrdiff_t)count_bytes)
        return false;
    *ret = 0;
    for (unsigned i = 0; i < count_bytes; i++)
        *ret |= (uint64_t)*cursor->at++ << (8 * i);
    return true;
}

static bool get_bytes(struct cursor *cursor, struct field *field)
{
    if (!get_varint(cursor, &field->value) || field->value > (uint64_t)(cursor->end - cursor->at))
        return false;
    field->bytes = cursor->at;
    cursor->at += field->value;
    return true;
}

/* Reads a tag and what belongs to it; of a group only the tag. */
static bool get_field(struct cursor *cursor, struct field *ret)
{
    uint64_t tag;
    if (!get_long_varint(cursor, TAG_BYTES_MAX, &tag))
        return false;
    *ret = (struct field){.number = tag >> 3, .type = (enum wire_type)(tag & 7)};
    if (!ret->number || ret->number > FIELD_MAX)
        return false;
    switch (ret->type) {
    case VARINT:
        return get_varint(cursor, &ret->value);
    case FIXED64:
        return get_fixed(cursor, 8, &ret->value);
    case FIXED32:
        return get_fixed(cursor, 4, &ret->value);
    case BYTES:
        return get_bytes(cursor, ret);
    case GROUP_BEGIN:
    case GROUP_END:
        return true;
    }
    return false;
}

/* Skips an unknown group, whose begin has been read, with all groups in it. */
static bool skip_group(struct cursor *cursor, uint64_t number)
{
    uint64_t open[GROUP_DEPTH_MAX] = {number};
    unsigned depth = 1;
    struct field field;

    while (depth) {
        if (!get_field(cursor, &field))
            return false;
        if (field.type == GROUP_BEGIN) {
            if (depth == GROUP_DEPTH_MAX)
                return false;
            open[depth++] = field.number;
        } else if (field.type == GROUP_END && open[--depth] != field.number) {
            return false;
        }
    }
    return true;
}

/* The next field that is not a group. Returns 1, 0 at the end, -EBADMSG. */
static int next_field(struct cursor *cursor, struct field *ret)
{
    while (cursor->at < cursor->end) {
        if (!get_field(cursor, ret) || ret->type == GROUP_END)
            return -EBADMSG;
        if (ret->type != GROUP_BEGIN)
            return 1;
        if (!skip_group(cursor, ret->number))
            return -EBADMSG;
    }
    return 0;
}

/* Whether some bytes are a message at all: ZeroPages has no fields, but may have unknown ones. */
static bool is_message(const uint8_t *bytes, uint64_t count_bytes)
{
    struct cursor cursor = {bytes, bytes + count_bytes};
    struct field field;
    int rc;
    while ((rc = next_field(&cursor, &field)) > 0)
        ;
    return rc == 0;
}

/* A known field with another wire type is an unknown field. */
static bool is_number(const struct field *field, uint64_t number)
{
    return field->number == number && field->type == VARINT;
}

int mig_wire_decode_request(const uint8_t *message, size_t message_bytes, struct mig_fetch_request *ret)
{
    struct cursor cursor = {message, message + message_bytes};
    struct field field;
    int rc;

    memset(ret, 0, sizeof(*ret));
    while ((rc = next_field(&cursor, &field)) > 0) {
        if (is_number(&field, REQUEST_ID))
            ret->request_id = field.value;
        else if (is_number(&field, REGION))
            ret->region = (uint32_t)field.value;
        else if (is_number(&field, FIRST_PAGE))
            ret->first_page = field.value;
        else if (is_number(&field, PAGE_COUNT))
            ret->page_count = (uint32_t)field.value;
    }
    return rc;
}

/* A second Compressed is merged into the first, unless another member of the oneof came between. */
static int decode_compressed(const struct field *compressed, struct mig_fetch_response *ret)
{
    struct cursor cursor = {compressed->bytes, compressed->bytes + compressed->value};
    struct field field;
    int rc;

    if (ret->content != MIG_CONTENT_COMPRESSED) {
        ret->content = MIG_CONTENT_COMPRESSED;
        ret->compression = 0;
        ret->data = NULL;
        ret->data_bytes = 0;
    }
    while ((rc = next_field(&cursor, &field)) > 0) {
        if (is_number(&field, COMPRESSION)) {
            ret->compression = (int32_t)field.value;
        } else if (field.number == COMPRESSED_DATA && field.type == BYTES) {
            ret->data = field.bytes;
            ret->data_bytes = field.value;
        }
    }
    return rc;
}

/* Takes a field in if it is a member of the oneof. Returns 0 or -EBADMSG. */
static int decode_content(const struct field *field, struct mig_fetch_response *ret)
{
    if (field->type != BYTES)
        return 0;
    if (field->number == COMPRESSED)
        return decode_compressed(field, ret);
    if (field->number == ZERO && !is_message(field->bytes, field->value))
        return -EBADMSG;
    if (field->number == DATA || field->number == ZERO) {
        const bool is_data = field->number == DATA;
        ret->content = is_data ? MIG_CONTENT_DATA : MIG_CONTENT_ZERO;
        ret->compression = 0;
        ret->data = is_data ? field->bytes : NULL;
        ret->data_bytes = is_data ? field->value : 0;
    }
    return 0;
}

int mig_wire_decode_response(const uint8_t *message, size_t message_bytes, struct mig_fetch_response *ret)
{
    struct cursor cursor = {message, message + message_bytes};
    struct field field;
    int rc;

    memset(ret, 0, sizeof(*ret));
    while ((rc = next_field(&cursor, &field)) > 0) {
        if (is_number(&field, REQUEST_ID)) {
            ret->request_id = field.value;
        } else if (is_number(&field, REGION)) {
            ret->region = (uint32_t)field.value;
        } else if (is_number(&field, FIRST_PAGE)) {
            ret->first_page = field.value;
        } else if (is_number(&field, PAGE_COUNT)) {
            ret->page_count = (uint32_t)field.value;
        } else if (is_number(&field, GENERATION)) {
            ret->generation = field.value;
        } else if (is_number(&field, READ_NS)) {
            ret->read_ns = field.value;
        } else if (field.number == DIGEST && field.type == FIXED64) {
            ret->digest = field.value;
        } else if (decode_content(&field, ret) < 0) {
            return -EBADMSG;
        }
    }
    return rc;
}
