#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "h2_internal.h"
#include "units.h"

/* Copies what goes out next into the record that is sealed next. Returns 0 or -errno. */
static int stage(struct mig_h2 *connection)
{
    uint8_t *record;
    const size_t room_bytes = mig_tls_stream_room(connection->tls, &record);
    size_t staged_bytes = 0;

    while (staged_bytes < room_bytes && connection->segment_first < connection->segment_count) {
        const struct segment *first = &connection->segments[connection->segment_first];
        const size_t left_bytes = room_bytes - staged_bytes;
        ssize_t part = (ssize_t)(first->count_bytes < left_bytes ? first->count_bytes : left_bytes);
        if (first->fd < 0)
            memcpy(record + staged_bytes, first->bytes, (size_t)part);
        else
            part = pread(first->fd, record + staged_bytes, (size_t)part, (off_t)first->offset);
        if (part <= 0) /* at the end of the file, it is shorter than what was promised of it */
            return part < 0 ? -errno : -EIO;
        mig_h2_batch_advance(connection, (size_t)part);
        staged_bytes += (size_t)part;
    }
    mig_tls_stream_stage(connection->tls, staged_bytes);
    return 0;
}

int mig_h2_write_sealed(struct mig_h2 *connection)
{
    int rc = mig_tls_stream_send(connection->tls);

    while (rc == 0 && connection->segment_first < connection->segment_count) {
        rc = stage(connection);
        if (rc == 0)
            rc = mig_tls_stream_send(connection->tls);
    }
    return rc;
}

ssize_t mig_h2_receive_sealed(struct mig_h2 *connection, const struct iovec iov[2], bool may_wait)
{
    const uint64_t before_bytes = mig_tls_stream_received_bytes(connection->tls);
    const ssize_t got = mig_tls_stream_receive(connection->tls, iov, 2, may_wait);

    if (mig_tls_stream_received_bytes(connection->tls) != before_bytes)
        connection->heard_ns = mig_now_ns(); /* a part of a record is a sign of life, too */
    return got;
}
