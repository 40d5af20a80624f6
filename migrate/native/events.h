/* What is worth a line in a log: a few texts that wait for whoever writes it. Thread-safe. */
#ifndef MIG_EVENTS_H
#define MIG_EVENTS_H

#include <pthread.h>
#include <stdbool.h>

enum { MIG_EVENT_TEXT_BYTES = 320, MIG_EVENTS_MAX = 16 };

struct mig_events {
    pthread_mutex_t mutex; /* guards all */
    pthread_cond_t changed;
    bool quiet;
    char texts[MIG_EVENTS_MAX][MIG_EVENT_TEXT_BYTES];
    unsigned head, tail;
};

void mig_events_init(struct mig_events *events);
void mig_events_deinit(struct mig_events *events);

__attribute__((format(printf, 2, 3))) void mig_events_note(struct mig_events *events, const char *format, ...);

/** Wait for one. Returns 1 with the text, 0 once there is none and mig_events_quiet was called. */
int mig_events_next(struct mig_events *events, char text[MIG_EVENT_TEXT_BYTES]);
void mig_events_quiet(struct mig_events *events);

#endif
