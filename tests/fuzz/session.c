#include "session.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "units.h"
#include "wire.h"

enum { SOCKET_BUFFER_BYTES = 8 << 10, HOP_BYTES_MAX = 4 << 10 };

void require(bool holds)
{
    if (!holds)
        abort();
}

/* ---- bytes to and from the peer ---- */

void drain(const struct session *session)
{
    static uint8_t sink[1 << 16];
    while (session->is_reading && recv(session->peer_fd, sink, sizeof(sink), MSG_DONTWAIT) > 0)
        ;
}

static void run(struct session *session)
{
    drain(session);
    if (!session->is_over)
        session->is_over = !session->step(session);
    drain(session);
}

void feed(struct session *session, const void *bytes, size_t count_bytes)
{
    const uint8_t *at = bytes;

    for (unsigned i = 0; count_bytes && !session->is_over && i < STEPS_MAX; i++) {
        const size_t portion = count_bytes < HOP_BYTES_MAX ? count_bytes : HOP_BYTES_MAX;
        const ssize_t sent = send(session->peer_fd, at, portion, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent > 0) {
            at += sent;
            count_bytes -= (size_t)sent;
        }
        run(session);
    }
}

void finish(struct session *session)
{
    shutdown(session->peer_fd, SHUT_WR);
    run(session);
    mig_h2_destroy(session->h2);
    close(session->peer_fd);
}

int connect_session(struct session *session)
{
    const int buffer_bytes = SOCKET_BUFFER_BYTES;
    int fds[2];

    signal(SIGPIPE, SIG_IGN); /* as in Python: sendfile has no MSG_NOSIGNAL */
    require(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds));
    fcntl(fds[0], F_SETFL, O_NONBLOCK);
    setsockopt(fds[0], SOL_SOCKET, SO_SNDBUF, &buffer_bytes, sizeof(buffer_bytes));
    session->peer_fd = fds[1];
    session->is_reading = true;
    return fds[0];
}

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

struct script {
    const uint8_t *at, *end;
};

static uint8_t next_byte(struct script *script)
{
    return script->at < script->end ? *script->at++ : 0;
}

static uint32_t next_number(struct script *script)
{
    /* Small ones mostly; 0xff begins one of four bytes. */
    const uint8_t first = next_byte(script);
    uint32_t number = 0;
    if (first != 0xff)
        return first;
    for (int i = 0; i < 4; i++)
        number = number << 8 | next_byte(script);
    return number;
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

void play(struct session *session, const uint8_t *bytes, size_t count_bytes)
{
    struct script whole = {bytes, bytes + count_bytes}, *script = &whole;
    enum { OPERATIONS = 16 };
    uint32_t stream_id = 1;

    for (unsigned i = 0; script->at < script->end && !session->is_over && i < STEPS_MAX; i++) {
        const uint8_t operation = next_byte(script);
        const unsigned flags = operation >> 7; /* END_STREAM */
        switch (operation % OPERATIONS) {
        case 0:
            stream_id = 1 + 2 * (next_byte(script) % 20u);
            break;
        case 1:
            send_headers(session, stream_id, flags, session->is_client ? ANSWER : CALL);
            break;
        case 2:
        case 3:
            send_message(session, stream_id, flags, script);
            break;
        case 4: { /* a part of a message, or some of the bytes of its pages */
            const size_t part_bytes = next_number(script) % sizeof(ZEROS);
            send_frame(session, DATA, flags, stream_id, ZEROS, part_bytes);
            break;
        }
        case 5:
            send_number(session, RST_STREAM, stream_id, next_number(script));
            break;
        case 6:
            send_number(session, WINDOW_UPDATE, stream_id, next_number(script) * 64);
            break;
        case 7:
            send_number(session, WINDOW_UPDATE, 0, next_number(script) * 64);
            break;
        case 8: {
            const uint16_t name = next_byte(script) % 8;
            send_setting(session, name, next_number(script));
            break;
        }
        case 9:
            send_frame(session, PING, next_byte(script) & ACK, 0, ZEROS, 8);
            break;
        case 10:
            session->is_late |= flags;
            send_frame(session, SETTINGS, ACK, 0, NULL, 0);
            break;
        case 11:
            session->is_reading = !session->is_reading;
            break;
        case 12: {
            const uint8_t body[8] = {0, 0, 0, next_byte(script), 0, 0, 0, next_byte(script)};
            send_frame(session, GOAWAY, 0, 0, body, sizeof(body));
            break;
        }
        case 13:
            send_headers(session, stream_id, END_STREAM, flags ? TRAILERS : OK_TRAILERS);
            break;
        case 14: { /* bytes as they are */
            size_t part_bytes = next_byte(script);
            if (part_bytes > (size_t)(script->end - script->at))
                part_bytes = (size_t)(script->end - script->at);
            feed(session, script->at, part_bytes);
            script->at += part_bytes;
            break;
        }
        case 15: { /* DATA as it is */
            size_t part_bytes = next_byte(script);
            if (part_bytes > (size_t)(script->end - script->at))
                part_bytes = (size_t)(script->end - script->at);
            send_frame(session, DATA, flags, stream_id, script->at, part_bytes);
            script->at += part_bytes;
            break;
        }
        }
    }
}
