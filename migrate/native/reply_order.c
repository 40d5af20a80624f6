#include "reply_order.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { CAPACITY_MIN = 64 };

typedef unsigned long long ull;

void mig_reply_order_deinit(struct mig_reply_order *order)
{
    free(order->asked);
    *order = (struct mig_reply_order){0};
}

static bool grow(struct mig_reply_order *order)
{
    const uint64_t capacity = order->capacity ? order->capacity * 2 : CAPACITY_MIN;
    struct mig_asked *grown = malloc(capacity * sizeof(*grown));
    if (!grown)
        return false;
    for (uint64_t i = 0; i < order->count; i++)
        grown[i] = order->asked[(order->head + i) % order->capacity];
    free(order->asked);
    order->asked = grown;
    order->capacity = capacity;
    order->head = 0;
    return true;
}

uint64_t mig_reply_order_ask(struct mig_reply_order *order, uint64_t first_page, uint64_t count_pages, uint64_t now_ns)
{
    if (order->count == order->capacity && !grow(order))
        return 0;
    order->asked[(order->head + order->count++) % order->capacity] = (struct mig_asked){
        .request_id = ++order->last_request_id,
        .next_page = first_page,
        .end_page = first_page + count_pages,
        .asked_ns = now_ns,
        .count_pages = count_pages,
    };
    order->open_pages += count_pages;
    return order->last_request_id;
}

bool mig_reply_order_take(struct mig_reply_order *order, struct mig_asked *ret)
{
    if (!order->count)
        return false;
    *ret = order->asked[order->head];
    order->head = (order->head + 1) % order->capacity;
    order->count--;
    order->open_pages -= ret->count_pages;
    return true;
}

__attribute__((format(printf, 2, 3))) static int refuse(struct mig_reply_order *order, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(order->flaw, sizeof(order->flaw), format, arguments);
    va_end(arguments);
    return -EBADMSG;
}

int mig_reply_order_answer(struct mig_reply_order *order, uint64_t request_id, uint64_t first_page,
                           uint64_t count_pages, bool is_zero, struct mig_asked *ret_done)
{
    if (!order->count)
        return refuse(order, "reply %llu came, but no request is open", (ull)request_id);
    struct mig_asked *asked = &order->asked[order->head];
    if (request_id != asked->request_id)
        return refuse(order, "reply %llu came where request %llu is the oldest", (ull)request_id,
                      (ull)asked->request_id);
    if (first_page != asked->next_page || !count_pages || count_pages > UINT64_MAX - first_page)
        return refuse(order, "reply %llu has %llu pages from %llu, expected %llu", (ull)request_id, (ull)count_pages,
                      (ull)first_page, (ull)asked->next_page);
    const uint64_t end_page = first_page + count_pages;
    if (end_page > asked->end_page && !is_zero)
        return refuse(order, "reply %llu has data up to page %llu, asked %llu", (ull)request_id, (ull)end_page,
                      (ull)asked->end_page);
    if (end_page < asked->end_page) {
        asked->next_page = end_page;
        return 0;
    }
    mig_reply_order_take(order, ret_done);
    return 1;
}
