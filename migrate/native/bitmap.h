/* A bitmap of pages. Not locked: its owner is. */
#ifndef MIG_BITMAP_H
#define MIG_BITMAP_H

#include <stdbool.h>
#include <stdint.h>

struct mig_bitmap {
    uint64_t *words;
    uint64_t bits;
};

/** All bits clear. Returns 0 or -errno. */
int mig_bitmap_init(struct mig_bitmap *bitmap, uint64_t bits);
void mig_bitmap_deinit(struct mig_bitmap *bitmap);

static inline bool mig_bitmap_test(const struct mig_bitmap *bitmap, uint64_t bit)
{
    return bitmap->words[bit / 64] >> (bit % 64) & 1;
}

/** Set or clear a range; returns how many bits changed. */
uint64_t mig_bitmap_set_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count);
uint64_t mig_bitmap_clear_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count);

/** First bit at or after `from` that is set (or clear); `bits` if there is none. */
uint64_t mig_bitmap_next_set(const struct mig_bitmap *bitmap, uint64_t from);
uint64_t mig_bitmap_next_clear(const struct mig_bitmap *bitmap, uint64_t from);
/** How many bits of a range are set. Its owner may change them meanwhile: each is counted as it is, or was. */
uint64_t mig_bitmap_count(const struct mig_bitmap *bitmap, uint64_t first, uint64_t count);
/** First bit at or after `from` that is set in `bitmap` and clear in `without`, which has as many bits. */
uint64_t mig_bitmap_next_set_without(const struct mig_bitmap *bitmap, const struct mig_bitmap *without, uint64_t from);

#endif
