#include "tls_end.h"

#include <openssl/err.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "authority.h"

enum { RECORD_HEADER_BYTES = 5, TAG_BYTES = 16, PLAIN_BYTES_MAX = 16 << 10, SECRET_BYTES = 32, HELD_BYTES = 64 << 10 };
enum { CHANGE_CIPHER_SPEC = 20, ALERT = 21, HANDSHAKE = 22, DATA = 23 };

/* ---- keys ---- */

/* HKDF-Expand-Label with no context, for at most one block. */
static void derive(const uint8_t secret[SECRET_BYTES], const char *label, uint8_t *ret, size_t bytes)
{
    uint8_t block[SECRET_BYTES],
        info[64] = {0, (uint8_t)bytes, (uint8_t)(6 + strlen(label)), 't', 'l', 's', '1', '3', ' '};
    unsigned block_bytes;
    size_t at = 9;

    memcpy(info + at, label, strlen(label));
    at += strlen(label);
    info[at++] = 0; /* the context is empty */
    info[at++] = 1; /* the first block */
    require(HMAC(EVP_sha256(), secret, SECRET_BYTES, info, at, block, &block_bytes) && block_bytes == sizeof(block));
    memcpy(ret, block, bytes);
}

static void update_key(struct tls_end_keys *keys)
{
    derive(keys->secret, "traffic upd", keys->secret, SECRET_BYTES);
    keys->sequence = 0;
}

/* Seals one record; returns its length. `record` has room for the longest. */
static size_t seal(struct tls_end_keys *keys, uint8_t type, const uint8_t *bytes, size_t count_bytes,
                   size_t padding_bytes, uint8_t *record)
{
    const size_t inner_bytes = count_bytes + 1 + padding_bytes, sealed_bytes = inner_bytes + TAG_BYTES;
    uint8_t key[TLS_END_KEY_BYTES], iv[TLS_END_IV_BYTES], *body = record + RECORD_HEADER_BYTES;
    EVP_CIPHER_CTX *cipher = EVP_CIPHER_CTX_new();
    int bytes_done;

    derive(keys->secret, "key", key, sizeof(key));
    derive(keys->secret, "iv", iv, sizeof(iv));
    for (unsigned i = 0; i < 8; i++)
        iv[sizeof(iv) - 1 - i] ^= (uint8_t)(keys->sequence >> 8 * i);
    keys->sequence++;
    memcpy(record, (uint8_t[]){DATA, 3, 3, (uint8_t)(sealed_bytes >> 8), (uint8_t)sealed_bytes}, RECORD_HEADER_BYTES);
    if (count_bytes)
        memcpy(body, bytes, count_bytes);
    body[count_bytes] = type;
    memset(body + count_bytes + 1, 0, padding_bytes);
    require(cipher && EVP_EncryptInit_ex(cipher, EVP_aes_128_gcm(), NULL, key, iv) &&
            EVP_EncryptUpdate(cipher, NULL, &bytes_done, record, RECORD_HEADER_BYTES) &&
            EVP_EncryptUpdate(cipher, body, &bytes_done, body, (int)inner_bytes) &&
            EVP_EncryptFinal_ex(cipher, body + bytes_done, &bytes_done) &&
            EVP_CIPHER_CTX_ctrl(cipher, EVP_CTRL_AEAD_GET_TAG, TAG_BYTES, body + inner_bytes));
    EVP_CIPHER_CTX_free(cipher);
    return RECORD_HEADER_BYTES + sealed_bytes;
}

/* ---- OpenSSL's part ---- */

static void note_secret(struct tls_end_keys *keys, const char *name, const char *line)
{
    const char *secret = strrchr(line, ' ');

    if (strncmp(line, name, strlen(name)) != 0)
        return;
    require(secret && strlen(secret + 1) == 2 * (size_t)SECRET_BYTES); /* AES-128: SHA-256 */
    for (size_t i = 0; i < SECRET_BYTES; i++)
        keys->secret[i] = (uint8_t)(OPENSSL_hexchar2int((unsigned char)secret[1 + 2 * i]) << 4 |
                                    OPENSSL_hexchar2int((unsigned char)secret[2 + 2 * i]));
    keys->is_known = true;
}

static void on_secret(const SSL *ssl, const char *line)
{
    struct tls_end *end = SSL_get_app_data(ssl);

    note_secret(&end->handshake, end->is_client ? "CLIENT_HANDSHAKE_" : "SERVER_HANDSHAKE_", line);
    note_secret(&end->traffic, end->is_client ? "CLIENT_TRAFFIC_" : "SERVER_TRAFFIC_", line);
}

static void on_message(int is_sent, int version, int type, const void *bytes, size_t count_bytes, SSL *ssl, void *user)
{
    struct tls_end *end = SSL_get_app_data(ssl);

    (void)version, (void)user;
    if (!is_sent || type != HANDSHAKE || !end->handshake.is_known)
        return;
    require(end->messages_bytes + count_bytes <= sizeof(end->messages));
    memcpy(end->messages + end->messages_bytes, bytes, count_bytes);
    end->messages_bytes += count_bytes;
}

static int on_protocols(SSL *ssl, const unsigned char **ret, unsigned char *ret_bytes, const unsigned char *offered,
                        unsigned offered_bytes, void *unused)
{
    (void)ssl, (void)unused;
    *ret = offered + 1; /* it offers one */
    *ret_bytes = offered[0];
    return offered_bytes > 1 && offered[0] < offered_bytes ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* Whoever it is. */
static int on_certificate(X509_STORE_CTX *store, void *unused)
{
    (void)store, (void)unused;
    return 1;
}

static SSL_CTX *context(void)
{
    static const unsigned char h2[] = {2, 'h', '2'};
    static SSL_CTX *made;

    if (made)
        return made;
    made = SSL_CTX_new(TLS_method());
    require(made && SSL_CTX_set_min_proto_version(made, TLS1_3_VERSION));
    require(SSL_CTX_set_ciphersuites(made, "TLS_AES_128_GCM_SHA256") && SSL_CTX_set_num_tickets(made, 0));
    require(!SSL_CTX_set_alpn_protos(made, h2, sizeof(h2)));
    SSL_CTX_set_alpn_select_cb(made, on_protocols, NULL);
    SSL_CTX_set_session_cache_mode(made, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_verify(made, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_cert_verify_callback(made, on_certificate, NULL);
    SSL_CTX_set_keylog_callback(made, on_secret);
    SSL_CTX_set_msg_callback(made, on_message);
    return made;
}

void tls_end_create(struct tls_end *end, bool is_client, X509 *certificate)
{
    *end = (struct tls_end){.is_client = is_client, .record_bytes = PLAIN_BYTES_MAX};
    end->ssl = SSL_new(context());
    end->in = BIO_new(BIO_s_mem());
    end->out = BIO_new(BIO_s_mem());
    require(end->ssl && end->in && end->out);
    SSL_set_bio(end->ssl, end->in, end->out);
    SSL_set_app_data(end->ssl, end);
    require(SSL_use_certificate(end->ssl, certificate) && SSL_use_PrivateKey(end->ssl, authority_host_key()));
    if (is_client)
        SSL_set_connect_state(end->ssl);
    else
        SSL_set_accept_state(end->ssl);
}

void tls_end_destroy(struct tls_end *end)
{
    SSL_free(end->ssl);
    free(end->held);
    ERR_clear_error();
}

/* ---- what befalls the handshake ---- */

static void push(const struct session *session, const uint8_t *bytes, size_t count_bytes)
{
    send(session->peer_fd, bytes, count_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void hang_up(const struct session *session)
{
    shutdown(session->peer_fd, SHUT_WR);
}

/* Replaces a part of some bytes by others, as far as there is room; returns how many there are then. */
static size_t edit(struct script *script, uint8_t *bytes, size_t count_bytes, size_t room_bytes)
{
    const size_t at = next_number(script) % (count_bytes + 1), wanted = next_byte(script);
    const size_t removed = wanted < count_bytes - at ? wanted : count_bytes - at;
    const uint8_t *added;
    const size_t added_bytes = next_bytes(script, &added);

    if (count_bytes - removed + added_bytes > room_bytes)
        return count_bytes;
    memmove(bytes + at + added_bytes, bytes + at + removed, count_bytes - at - removed);
    if (added_bytes)
        memcpy(bytes + at, added, added_bytes);
    return count_bytes - removed + added_bytes;
}

/* The records that are in plain text come first, and stay: ServerHello, ChangeCipherSpec. */
static size_t plain_bytes_of(const struct tls_end *end)
{
    size_t at = 0;

    while (at + RECORD_HEADER_BYTES <= end->flight_bytes && end->flight[at] != DATA)
        at += RECORD_HEADER_BYTES + (size_t)(end->flight[at + 3] << 8 | end->flight[at + 4]);
    return at < end->flight_bytes ? at : end->flight_bytes;
}

/* Edits the messages behind the sealing, and seals them in records of any length and type. */
static void say_otherwise(struct tls_end *end, struct script *script)
{
    static uint8_t record[TLS_END_RECORD_BYTES_MAX];
    const unsigned edits = next_byte(script) % 4;
    const size_t record_bytes = 1 + next_number(script) % PLAIN_BYTES_MAX;
    const uint8_t type = next_byte(script), padding_bytes = next_byte(script);

    if (!end->handshake.is_known)
        return;
    for (unsigned i = 0; i < edits; i++)
        end->messages_bytes = edit(script, end->messages, end->messages_bytes, sizeof(end->messages));
    end->flight_bytes = plain_bytes_of(end);
    for (size_t at = 0, part; at < end->messages_bytes; at += part) {
        part = end->messages_bytes - at < record_bytes ? end->messages_bytes - at : record_bytes;
        const size_t bytes =
            seal(&end->handshake, type ? type : HANDSHAKE, end->messages + at, part, padding_bytes, record);
        if (end->flight_bytes + bytes > sizeof(end->flight))
            break;
        memcpy(end->flight + end->flight_bytes, record, bytes);
        end->flight_bytes += bytes;
    }
    end->messages_bytes = 0;
}

static void say_part(struct session *session, size_t count_bytes)
{
    struct tls_end *end = session->tls;
    const size_t bytes = count_bytes < end->flight_bytes ? count_bytes : end->flight_bytes;

    push(session, end->flight, bytes);
    memmove(end->flight, end->flight + bytes, end->flight_bytes - bytes);
    end->flight_bytes -= bytes;
}

static void say_flight(struct session *session, struct script *script)
{
    enum { ALL, PART, EDIT, OTHERWISE, BYTES, END, OPERATIONS };
    struct tls_end *end = session->tls;
    const uint8_t *bytes;
    size_t count_bytes;

    for (;;) {
        const unsigned operation = script ? next_byte(script) % OPERATIONS : ALL;
        end->is_disturbed |= operation != ALL && operation != PART;
        switch (operation) {
        case PART: /* what is tested waits again before it hears the rest */
            say_part(session, 1 + next_number(script));
            return;
        case EDIT:
            end->flight_bytes = edit(script, end->flight, end->flight_bytes, sizeof(end->flight));
            break;
        case OTHERWISE:
            say_otherwise(end, script);
            break;
        case BYTES:
            count_bytes = next_bytes(script, &bytes);
            push(session, bytes, count_bytes);
            break;
        case END:
            say_part(session, next_number(script));
            hang_up(session);
            return;
        default:
            say_part(session, end->flight_bytes);
            return;
        }
    }
}

void tls_end_advance(struct session *session, struct script *script)
{
    struct tls_end *end = session->tls;
    uint8_t heard[4096];
    ssize_t bytes;

    while ((bytes = recv(session->peer_fd, heard, sizeof(heard), MSG_DONTWAIT)) > 0)
        require(BIO_write(end->in, heard, (int)bytes) == bytes);
    ERR_clear_error();
    SSL_do_handshake(end->ssl);
    const int said =
        BIO_read(end->out, end->flight + end->flight_bytes, (int)(sizeof(end->flight) - end->flight_bytes));
    end->flight_bytes += said > 0 ? (size_t)said : 0;
    if (end->flight_bytes)
        say_flight(session, script);
    else
        hang_up(session);
}

/* ---- records ---- */

void tls_end_release(struct session *session)
{
    struct tls_end *end = session->tls;
    uint8_t *held = end->held;

    end->held = NULL; /* what is fed looks at us again */
    if (held)
        feed_wire(session, held, end->held_bytes);
    free(held);
}

static void send_record(struct session *session, const uint8_t *record, size_t count_bytes)
{
    struct tls_end *end = session->tls;

    if (end->held && end->held_bytes + count_bytes > HELD_BYTES)
        tls_end_release(session);
    if (!end->held) {
        feed_wire(session, record, count_bytes);
        return;
    }
    memcpy(end->held + end->held_bytes, record, count_bytes);
    end->held_bytes += count_bytes;
}

static void say_record(struct session *session, uint8_t type, const uint8_t *bytes, size_t count_bytes)
{
    static uint8_t record[TLS_END_RECORD_BYTES_MAX];
    struct tls_end *end = session->tls;
    size_t record_bytes = seal(&end->traffic, type, bytes, count_bytes, end->padding_bytes, record);

    if (end->is_damaging)
        record[end->damage_at % record_bytes] ^= end->damage;
    if (end->is_cutting && end->cut_bytes < record_bytes)
        record_bytes = end->cut_bytes;
    end->is_damaging = end->is_cutting = false;
    send_record(session, record, record_bytes);
}

void tls_end_feed(struct session *session, const uint8_t *bytes, size_t count_bytes)
{
    enum { RECORDS_MAX = 64 };
    const size_t least_bytes = count_bytes / RECORDS_MAX + 1, wanted_bytes = session->tls->record_bytes;
    const size_t record_bytes = wanted_bytes < least_bytes ? least_bytes : wanted_bytes;

    for (size_t at = 0, part; at < count_bytes && !session->is_over; at += part) {
        part = count_bytes - at < record_bytes ? count_bytes - at : record_bytes;
        say_record(session, DATA, bytes + at, part);
    }
}

void tls_end_play(struct session *session, struct script *script, unsigned operation, bool flag)
{
    enum { ANY_RECORD, KEY_UPDATE, SAY_ALERT, PADDING, RECORD_LENGTH, DAMAGE, PLAIN, CUT };
    struct tls_end *end = session->tls;
    const uint8_t *bytes;
    size_t count_bytes;

    switch (operation) {
    case ANY_RECORD: {
        const uint8_t type = flag ? HANDSHAKE : next_byte(script);
        count_bytes = next_bytes(script, &bytes);
        say_record(session, type, bytes, count_bytes);
        break;
    }
    case KEY_UPDATE:
        say_record(session, HANDSHAKE, (uint8_t[]){24, 0, 0, 1, flag}, 5);
        update_key(&end->traffic);
        break;
    case SAY_ALERT: {
        const uint8_t alert[] = {1 + flag, next_byte(script)};
        say_record(session, ALERT, alert, sizeof(alert));
        break;
    }
    case PADDING:
        end->padding_bytes = next_number(script) % (PLAIN_BYTES_MAX + 512);
        break;
    case RECORD_LENGTH:
        end->record_bytes = 1 + next_number(script) % PLAIN_BYTES_MAX;
        tls_end_release(session);
        end->held = flag ? malloc(HELD_BYTES) : NULL;
        end->held_bytes = 0;
        break;
    case DAMAGE:
        end->is_damaging = true;
        end->damage_at = next_number(script);
        end->damage = next_byte(script);
        break;
    case PLAIN:
        count_bytes = next_bytes(script, &bytes);
        send_record(session, bytes, count_bytes);
        break;
    case CUT:
        end->is_cutting = true;
        end->cut_bytes = next_number(script);
        break;
    }
}
