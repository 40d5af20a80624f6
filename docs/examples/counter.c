/*
 * A store of counters that moves to another host while it counts: `counter [SOCKET]` (docs/embedding.md).
 *
 * Each counter has a page of its own, its value at both ends; a table behind the pages has all values once more. A page
 * that was lost, or is an old one, is found at the next touch. With COUNTER_STATUS=DIR, DIR/PID tells how it goes.
 *
 *     cc -O2 -pthread -I "$DIR" counter.c "$DIR/migrate_guest.c" -o counter
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "migrate_guest.h"

enum { PAGE = 4096, WORDS = PAGE / 8, COUNTERS = 2048 };

/* The state: what is not in the memory, and must not be lost. No pointers: they mean nothing elsewhere. */
static struct {
    uint64_t touches, total, errors, audits;
} state;

static uint64_t *memory; /* COUNTERS pages, and the table */
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_changed = PTHREAD_COND_INITIALIZER;
static int is_paused, is_at_gate = 1;

static int pause_store(void *context)
{
    (void)context;
    pthread_mutex_lock(&gate);
    is_paused = 1;
    while (!is_at_gate)
        pthread_cond_wait(&gate_changed, &gate);
    pthread_mutex_unlock(&gate);
    return 0;
}

static int resume_store(void *context)
{
    (void)context;
    pthread_mutex_lock(&gate);
    is_paused = 0;
    pthread_cond_broadcast(&gate_changed);
    pthread_mutex_unlock(&gate);
    return 0;
}

static int save_store(void *context, void *buffer, size_t capacity_bytes, size_t *ret_bytes)
{
    (void)context, (void)capacity_bytes;
    memcpy(buffer, &state, sizeof(state));
    *ret_bytes = sizeof(state);
    return 0;
}

static int load_store(void *context, const void *buffer, size_t size_bytes)
{
    (void)context;
    if (size_bytes != sizeof(state))
        return 22; /* EINVAL */
    memcpy(&state, buffer, sizeof(state));
    return 0;
}

static uint64_t check(unsigned index)
{
    const uint64_t expected = memory[COUNTERS * WORDS + index];
    state.errors += memory[index * WORDS] != expected;
    state.errors += memory[index * WORDS + WORDS - 1] != expected;
    return expected;
}

static void touch(unsigned index)
{
    const uint64_t value = check(index) + 1;
    memory[index * WORDS] = memory[index * WORDS + WORDS - 1] = memory[COUNTERS * WORDS + index] = value;
    state.touches++;
    state.total++;
}

static void audit(void)
{
    uint64_t total = 0;
    for (unsigned index = 0; index < COUNTERS; index++)
        total += check(index);
    state.errors += total != state.total;
    state.audits++;
}

static void report(void)
{
    const char *directory = getenv("COUNTER_STATUS");
    char path[4096], made[4128];

    if (!directory)
        return;
    snprintf(path, sizeof(path), "%s/%d", directory, (int)getpid());
    snprintf(made, sizeof(made), "%s.new", path);
    FILE *file = fopen(made, "w");
    if (!file)
        return;
    fprintf(file, "%llu %llu %llu\n", (unsigned long long)state.touches, (unsigned long long)state.errors,
            (unsigned long long)state.audits);
    fclose(file);
    rename(made, path);
}

int main(int argc, char **argv)
{
    const struct migrate_guest_callbacks callbacks = {pause_store, resume_store, save_store, load_store};
    struct migrate_guest *guest;

    int rc = migrate_guest_create("counter-c", COUNTERS * (PAGE + 8), &callbacks, NULL, &guest);
    if (rc == 0) {
        memory = migrate_guest_memory(guest);
        is_paused = migrate_guest_is_incoming(guest); /* whoever arrives waits for `resume` */
        rc = migrate_guest_serve(guest, argc > 1 ? argv[1] : NULL);
    }
    if (rc < 0) {
        fprintf(stderr, "counter: %s\n", strerror(-rc));
        return 1;
    }
    for (;;) { /* nothing happens, and nothing is told to anybody, but between gate and gate */
        pthread_mutex_lock(&gate);
        is_at_gate = 1;
        pthread_cond_broadcast(&gate_changed);
        while (is_paused)
            pthread_cond_wait(&gate_changed, &gate);
        is_at_gate = 0;
        pthread_mutex_unlock(&gate);
        for (int i = 0; i < 10; i++)
            touch((unsigned)(state.touches * 1103 % COUNTERS));
        if (state.touches % 1000 == 0) {
            audit();
            report();
        }
        usleep(5000);
    }
}
