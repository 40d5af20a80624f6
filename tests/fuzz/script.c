#include <string.h>
#include <sys/socket.h>

#include "session.h"
#include "tls_end.h"
#include "units.h"
#include "wire.h"

/* ---- frames ---- */

enum frame_type { DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4, FRAME_BYTES_MAX = 2048, FRAME_HEADER_BYTES = 9 };

static void send_frame(struct session *session, enum frame_type type, unsigned flags, uint32_t stream_id,
                       const void *body, size_t count_bytes)
{
    uint8_t frame[FRAME_HEADER_BYTES + FRAME_BYTES_MAX] = {
        (uint8_t)(count_bytes >> 16),
        (uint8_t)(count_bytes >> 8),
        (uint8_t)count_bytes,
        (uint8_t)type,
        (uint8_t)flags,
        (uint8_t)(stream_id >> 24),
        (uint8_t)(stream_id >> 16),
        (uint8_t)(stream_id >> 8),
        (uint8_t)stream_id,
    };
    if (count_bytes > FRAME_BYTES_MAX)
        return;
    if (count_bytes)
        memcpy(frame + FRAME_HEADER_BYTES, body, count_bytes);
    feed(session, frame, FRAME_HEADER_BYTES + count_bytes);
}

static void send_number(struct session *session, enum frame_type type, uint32_t stream_id, uint32_t number)
{
    const uint8_t body[4] = {(uint8_t)(number >> 24), (uint8_t)(number >> 16), (uint8_t)(number >> 8), (uint8_t)number};
    send_frame(session, type, 0, stream_id, body, sizeof(body));
}

static void send_setting(struct session *session, uint16_t name, uint32_t value)
{
    const uint8_t body[6] = {(uint8_t)(name >> 8),   (uint8_t)name,         (uint8_t)(value >> 24),
                             (uint8_t)(value >> 16), (uint8_t)(value >> 8), (uint8_t)value};
    send_frame(session, SETTINGS, 0, 0, body, sizeof(body));
}

/* HPACK: literals without indexing. */
static void send_headers(struct session *session, uint32_t stream_id, unsigned flags, const char *const fields[][2])
{
    uint8_t block[FRAME_BYTES_MAX];
    size_t bytes = 0;

    for (; (*fields)[0]; fields++) {
        block[bytes++] = 0;
        for (int i = 0; i < 2; i++) {
            const size_t length = strlen((*fields)[i]);
            block[bytes++] = (uint8_t)length;
            memcpy(block + bytes, (*fields)[i], length);
            bytes += length;
        }
    }
    send_frame(session, HEADERS, flags | END_HEADERS, stream_id, block, bytes);
}

static const char PREFACE[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
static const char *const CALL[][2] = {
    {":method", "POST"},
    {":scheme", "http"},
    {":path", "/migrate.v1.PageService/FetchPages"},
    {":authority", "x"},
    {"content-type", "application/grpc"},
    {"te", "trailers"},
    {"migration-id", "m"},
    {"authorization", "Bearer t"},
    {NULL, NULL},
};
static const char *const ANSWER[][2] = {{":status", "200"}, {"content-type", "application/grpc"}, {NULL, NULL}};
static const char *const TRAILERS[][2] = {{"grpc-status", "5"}, {"grpc-message", "a%20b%zz%"}, {NULL, NULL}};
static const char *const OK_TRAILERS[][2] = {{"grpc-status", "0"}, {NULL, NULL}};

void send_greeting(struct session *session)
{
    if (!session->is_client)
        feed(session, PREFACE, sizeof(PREFACE) - 1);
    send_frame(session, SETTINGS, 0, 0, NULL, 0);
}

void send_call(struct session *session)
{
    send_headers(session, 1, 0, session->is_client ? ANSWER : CALL);
}

/* ---- scripts ---- */

static const uint8_t ZEROS[1024];

uint8_t next_byte(struct script *script)
{
    return script->at < script->end ? *script->at++ : 0;
}

uint32_t next_number(struct script *script)
{
    const uint8_t first = next_byte(script);
    uint32_t number = 0;
    if (first != 0xff)
        return first;
    for (int i = 0; i < 4; i++)
        number = number << 8 | next_byte(script);
    return number;
}

size_t next_bytes(struct script *script, const uint8_t **ret)
{
    const size_t wanted = next_byte(script), left = (size_t)(script->end - script->at);
    const size_t count_bytes = wanted < left ? wanted : left;

    *ret = script->at;
    script->at += count_bytes;
    return count_bytes;
}

static size_t encode_request(struct script *script, uint8_t *message)
{
    const struct mig_fetch_request request = {
        .request_id = next_number(script),
        .region = next_byte(script) == 1,
        .first_page = next_number(script),
        .page_count = next_number(script),
    };
    return mig_wire_encode_request(&request, message);
}

static size_t encode_response(const struct session *session, struct script *script, uint8_t *message,
                              size_t *ret_body_bytes)
{
    const struct mig_reply_order *order = &session->order;
    const struct mig_asked *asked = order->count ? &order->asked[order->head] : NULL;
    const uint8_t how = next_byte(script);
    const bool is_honest = asked && how & 1;
    const struct mig_fetch_response response = {
        .request_id = is_honest ? asked->request_id : next_number(script),
        .region = how >> 6 == 1,
        .first_page = is_honest ? asked->next_page : next_number(script),
        .page_count = how & 16 ? 1 : next_number(script),
        .digest = how & 8 ? next_number(script) : 0,
        .content = how & 2   ? MIG_CONTENT_ZERO
                   : how & 4 ? MIG_CONTENT_DATA
                             : MIG_CONTENT_NONE,
        .data_bytes = how & 2 || !(how & 4) ? 0
                      : how & 16            ? mig_page_offset(1)
                                            : next_number(script) % 1000,
    };
    *ret_body_bytes = how & 32 ? response.data_bytes : 0;
    return mig_wire_encode_response(&response, message);
}

static void send_message(struct session *session, uint32_t stream_id, unsigned flags, struct script *script)
{
    uint8_t message[MIG_WIRE_HEADER_BYTES_MAX];
    size_t body_bytes = 0;
    const size_t bytes =
        session->is_client ? encode_response(session, script, message, &body_bytes) : encode_request(script, message);

    send_frame(session, DATA, flags, stream_id, message, bytes);
    for (size_t part; body_bytes; body_bytes -= part) {
        part = body_bytes < sizeof(ZEROS) ? body_bytes : sizeof(ZEROS);
        send_frame(session, DATA, 0, stream_id, ZEROS, part);
    }
}

/* ---- what a byte of a script does ---- */

/* Where a script is. */
struct turn {
    struct session *session;
    struct script *script;
    uint32_t stream_id;
    unsigned flags; /* END_STREAM, or another choice between two */
};

static void choose_stream(struct turn *turn)
{
    turn->stream_id = 1 + 2 * (next_byte(turn->script) % 20u);
}

static void say_headers(struct turn *turn)
{
    send_headers(turn->session, turn->stream_id, turn->flags, turn->session->is_client ? ANSWER : CALL);
}

static void say_message(struct turn *turn)
{
    send_message(turn->session, turn->stream_id, turn->flags, turn->script);
}

/* A part of a message, or some of the bytes of its pages. */
static void say_part(struct turn *turn)
{
    const size_t part_bytes = next_number(turn->script) % sizeof(ZEROS);
    send_frame(turn->session, DATA, turn->flags, turn->stream_id, ZEROS, part_bytes);
}

static void reset(struct turn *turn)
{
    send_number(turn->session, RST_STREAM, turn->stream_id, next_number(turn->script));
}

static void open_window(struct turn *turn)
{
    send_number(turn->session, WINDOW_UPDATE, turn->stream_id, next_number(turn->script) * 64);
}

static void open_connection(struct turn *turn)
{
    send_number(turn->session, WINDOW_UPDATE, 0, next_number(turn->script) * 64);
}

static void set(struct turn *turn)
{
    const uint16_t name = next_byte(turn->script) % 8;
    send_setting(turn->session, name, next_number(turn->script));
}

static void ping(struct turn *turn)
{
    send_frame(turn->session, PING, next_byte(turn->script) & ACK, 0, ZEROS, 8);
}

static void acknowledge(struct turn *turn)
{
    turn->session->is_late |= turn->flags;
    send_frame(turn->session, SETTINGS, ACK, 0, NULL, 0);
}

/* For now, or so that what is sent breaks. */
static void stop_reading(struct turn *turn)
{
    turn->session->is_reading = !turn->session->is_reading;
    if (turn->flags)
        shutdown(turn->session->peer_fd, SHUT_RD);
}

static void go_away(struct turn *turn)
{
    const uint8_t body[8] = {0, 0, 0, next_byte(turn->script), 0, 0, 0, next_byte(turn->script)};
    send_frame(turn->session, GOAWAY, 0, 0, body, sizeof(body));
}

static void say_trailers(struct turn *turn)
{
    send_headers(turn->session, turn->stream_id, END_STREAM, turn->flags ? TRAILERS : OK_TRAILERS);
}

static void say_bytes(struct turn *turn)
{
    const uint8_t *bytes;
    const size_t count_bytes = next_bytes(turn->script, &bytes);
    feed(turn->session, bytes, count_bytes);
}

static void say_data(struct turn *turn)
{
    const uint8_t *bytes;
    const size_t count_bytes = next_bytes(turn->script, &bytes);
    send_frame(turn->session, DATA, turn->flags, turn->stream_id, bytes, count_bytes);
}

/* By the byte's lower bits; those beyond are for TLS. */
static void (*const OPERATIONS[])(struct turn *) = {
    choose_stream, say_headers, say_message, say_message,  say_part, reset,        open_window, open_connection,
    set,           ping,        acknowledge, stop_reading, go_away,  say_trailers, say_bytes,   say_data,
};
enum { OPERATION_COUNT = sizeof(OPERATIONS) / sizeof(OPERATIONS[0]) };

void play(struct session *session, struct script *script)
{
    struct turn turn = {session, script, .stream_id = 1};
    const unsigned count = OPERATION_COUNT + (session->tls ? TLS_END_OPERATIONS : 0);

    for (unsigned i = 0; script->at < script->end && !session->is_over && i < STEPS_MAX; i++) {
        const uint8_t operation = next_byte(script);
        turn.flags = operation >> 7;
        if (operation % 64 % count < OPERATION_COUNT)
            OPERATIONS[operation % 64 % count](&turn);
        else
            tls_end_play(session, script, operation % 64 % count - OPERATION_COUNT, turn.flags);
    }
}
