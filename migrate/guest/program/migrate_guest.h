/*
 * Makes an ordinary program a guest that `migrate` can move to another host while it runs. See docs/embedding.md.
 *
 * Compile migrate_guest.c with the program, and link with -pthread. It needs Linux 5.18 and nothing else.
 */
#ifndef MIGRATE_GUEST_H
#define MIGRATE_GUEST_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MIGRATE_GUEST_STATE_BYTES_MAX = 512 << 10 };

/**
 * What is asked of the program, in a thread of the library's, one at a time. Each returns 0 or a positive errno, which
 * the operator is told; the program is then as it was. None may wait for long: the guest stands still meanwhile.
 */
struct migrate_guest_callbacks {
    /** Stop; return when nothing of the program touches its memory any more, or changes anything elsewhere. */
    int (*pause)(void *context);
    /** Go on; return at once. */
    int (*resume)(void *context);
    /** What the memory does not hold and the program needs elsewhere. Comes while paused. NULL if there is nothing. */
    int (*save)(void *context, void *state, size_t capacity_bytes, size_t *ret_bytes);
    /** The same bytes, at the destination, before the program runs for the first time. NULL if there is nothing. */
    int (*load)(void *context, const void *state, size_t size_bytes);
};

struct migrate_guest;

/**
 * Make the movable memory, once in a process. `name` is what the program is found under on every host; `memory_bytes`
 * is rounded up, and untouched memory costs nothing. `context` is passed on to the callbacks.
 *
 * Returns 0 or -errno.
 */
int migrate_guest_create(const char *name, size_t memory_bytes, const struct migrate_guest_callbacks *callbacks,
                         void *context, struct migrate_guest **ret);

/** Where the movable memory is, at a page's boundary. It is at another address in another process. */
void *migrate_guest_memory(const struct migrate_guest *guest);

/** How much it is. */
size_t migrate_guest_memory_bytes(const struct migrate_guest *guest);

/**
 * Whether this process was started for a guest that arrives: memory and state are still to come, and nothing may run
 * before `resume`. Touching the memory before `load` ends the program with SIGSEGV.
 */
bool migrate_guest_is_incoming(const struct migrate_guest *guest);

/**
 * Be a guest from now on, in a thread of its own; returns at once.
 *
 * socket_path: where `migrate guest attach --socket` finds the program, unless a daemon started it; replaced if one
 * lies there. At most 107 bytes.
 *
 * Returns 0 or -errno; -EINVAL if no daemon started it and no path is given.
 */
int migrate_guest_serve(struct migrate_guest *guest, const char *socket_path);

#ifdef __cplusplus
}
#endif

#endif
