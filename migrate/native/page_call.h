/* One FetchPages call at the server: its requests, read from an export, answered in their order. Not thread-safe. */
#ifndef MIG_PAGE_CALL_H
#define MIG_PAGE_CALL_H

#include "h2.h"
#include "pageserver.h"

struct mig_page_call;

/* All calls of a connection, from their begin until they are freed, which is after their streams are closed. */
struct mig_page_calls {
    struct mig_page_call *first;
};

/** A call came: check its path and token. With OK, *ret is the call. */
enum mig_status mig_page_call_begin(struct mig_h2_stream *stream, struct mig_exports *exports,
                                    struct mig_page_calls *calls, struct mig_page_call **ret);
/** NULL is nothing. */
void mig_page_call_free(struct mig_page_call *call);

/** A message came. */
enum mig_status mig_page_call_request(struct mig_page_call *call, struct mig_h2_stream *stream, const uint8_t *message,
                                      size_t bytes);
/** The caller half-closed: once all is answered, the call is over. */
void mig_page_call_no_more(struct mig_page_call *call);

/**
 * Queue answers, as far as there is room. All that was queued before must have been handed to the socket, or be held
 * back by flow control. Returns whether there is something new to write. NULL is nothing.
 */
bool mig_page_call_work(struct mig_page_call *call, struct mig_h2_stream *stream);

/** The stream is closed: nothing more is said on it, though the socket may still take what was queued. */
void mig_page_call_closed(struct mig_page_call *call);

/**
 * Keep the memory of queued runs from being withdrawn while they are written: it may belong to a running guest after.
 * Calls whose memory was withdrawn already end at once. False if there were any. Always paired with an unpin.
 */
bool mig_page_calls_pin(struct mig_page_calls *calls);
void mig_page_calls_unpin(struct mig_page_calls *calls);

uint64_t mig_page_call_data_pages(const struct mig_page_call *call);
/** Whether it asks for runs, not for single pages: then its socket must be non-blocking. */
bool mig_page_call_is_bulk(const struct mig_page_call *call);

#endif
