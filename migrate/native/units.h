/* The only page and time arithmetic of the C core. */
#ifndef MIG_UNITS_H
#define MIG_UNITS_H

#include <stdint.h>
#include <time.h>

enum { MIG_PAGE_SHIFT = 12, MIG_PAGE_SIZE_BYTES = 1 << MIG_PAGE_SHIFT };

static inline uint64_t mig_page_offset(uint64_t page)
{
    return page << MIG_PAGE_SHIFT;
}

static inline uint64_t mig_offset_page(uint64_t offset)
{
    return offset >> MIG_PAGE_SHIFT;
}

static inline uint64_t mig_smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/** CLOCK_MONOTONIC, nanoseconds. */
static inline uint64_t mig_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
