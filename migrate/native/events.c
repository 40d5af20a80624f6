#include "events.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void mig_events_init(struct mig_events *events)
{
    pthread_mutex_init(&events->mutex, NULL);
    pthread_cond_init(&events->changed, NULL);
}

void mig_events_deinit(struct mig_events *events)
{
    pthread_cond_destroy(&events->changed);
    pthread_mutex_destroy(&events->mutex);
}

void mig_events_note(struct mig_events *events, const char *format, ...)
{
    va_list arguments;

    pthread_mutex_lock(&events->mutex);
    if (events->tail - events->head < MIG_EVENTS_MAX) { /* a flood of events is worth its first ones */
        va_start(arguments, format);
        vsnprintf(events->texts[events->tail++ % MIG_EVENTS_MAX], MIG_EVENT_TEXT_BYTES, format, arguments);
        va_end(arguments);
    }
    pthread_cond_broadcast(&events->changed);
    pthread_mutex_unlock(&events->mutex);
}

int mig_events_next(struct mig_events *events, char text[MIG_EVENT_TEXT_BYTES])
{
    pthread_mutex_lock(&events->mutex);
    while (events->head == events->tail && !events->quiet)
        pthread_cond_wait(&events->changed, &events->mutex);
    const int found = events->head != events->tail;
    if (found)
        memcpy(text, events->texts[events->head++ % MIG_EVENTS_MAX], MIG_EVENT_TEXT_BYTES);
    pthread_mutex_unlock(&events->mutex);
    return found;
}

void mig_events_quiet(struct mig_events *events)
{
    pthread_mutex_lock(&events->mutex);
    events->quiet = true;
    pthread_cond_broadcast(&events->changed);
    pthread_mutex_unlock(&events->mutex);
}
