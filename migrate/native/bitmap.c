#include "bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int mig_bitmap_init(struct mig_bitmap *bitmap, uint64_t bits)
{
    bitmap->words = calloc((bits + 63) / 64, sizeof(*bitmap->words));
    bitmap->bits = bits;
    return bitmap->words ? 0 : -ENOMEM;
}

void mig_bitmap_deinit(struct mig_bitmap *bitmap)
{
    free(bitmap->words);
    memset(bitmap, 0, sizeof(*bitmap));
}

/* The bits of word `word` that lie in [first, end). */
static uint64_t mask_in_word(uint64_t word, uint64_t first, uint64_t end)
{
    const uint64_t low = word * 64;
    const uint64_t from = first > low ? first - low : 0;
    const uint64_t to = end - low < 64 ? end - low : 64;
    return (to == 64 ? ~0ull : (1ull << to) - 1) & ~0ull << from;
}

uint64_t mig_bitmap_set_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count)
{
    const uint64_t end = first + count;
    uint64_t changed = 0;

    for (uint64_t word = first / 64; word * 64 < end; word++) {
        const uint64_t mask = mask_in_word(word, first, end);
        changed += (uint64_t)__builtin_popcountll(mask & ~bitmap->words[word]);
        bitmap->words[word] |= mask;
    }
    return changed;
}

uint64_t mig_bitmap_clear_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count)
{
    const uint64_t end = first + count;
    uint64_t changed = 0;

    for (uint64_t word = first / 64; word * 64 < end; word++) {
        const uint64_t mask = mask_in_word(word, first, end);
        changed += (uint64_t)__builtin_popcountll(mask & bitmap->words[word]);
        bitmap->words[word] &= ~mask;
    }
    return changed;
}

/* `flip` turns the search for a set bit into one for a clear bit. */
static uint64_t next(const struct mig_bitmap *bitmap, uint64_t from, uint64_t flip)
{
    if (from >= bitmap->bits)
        return bitmap->bits;
    uint64_t word = from / 64;
    uint64_t found = (bitmap->words[word] ^ flip) & ~0ull << from % 64;
    while (!found) {
        if (++word * 64 >= bitmap->bits)
            return bitmap->bits;
        found = bitmap->words[word] ^ flip;
    }
    const uint64_t bit = word * 64 + (uint64_t)__builtin_ctzll(found);
    return bit < bitmap->bits ? bit : bitmap->bits;
}

uint64_t mig_bitmap_next_set_without(const struct mig_bitmap *bitmap, const struct mig_bitmap *without, uint64_t from)
{
    if (from >= bitmap->bits)
        return bitmap->bits;
    uint64_t word = from / 64;
    uint64_t found = bitmap->words[word] & ~without->words[word] & ~0ull << from % 64;
    while (!found) {
        if (++word * 64 >= bitmap->bits)
            return bitmap->bits;
        found = bitmap->words[word] & ~without->words[word];
    }
    return word * 64 + (uint64_t)__builtin_ctzll(found); /* no bit beyond the last is ever set */
}

uint64_t mig_bitmap_next_set(const struct mig_bitmap *bitmap, uint64_t from)
{
    return next(bitmap, from, 0);
}

uint64_t mig_bitmap_next_clear(const struct mig_bitmap *bitmap, uint64_t from)
{
    return next(bitmap, from, ~0ull);
}

uint64_t mig_bitmap_count(const struct mig_bitmap *bitmap, uint64_t first, uint64_t count)
{
    uint64_t found = 0;

    while (count) {
        const uint64_t shift = first % 64;
        const uint64_t width = count < 64 - shift ? count : 64 - shift;
        const uint64_t word = __atomic_load_n(&bitmap->words[first / 64], __ATOMIC_RELAXED) >> shift;
        found += (uint64_t)__builtin_popcountll(width == 64 ? word : word & ((1ull << width) - 1));
        first += width;
        count -= width;
    }
    return found;
}
