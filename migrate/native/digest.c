#include "digest.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "units.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "digests are hashed as they lie in memory");

bool mig_page_is_zero(const void *page)
{
    const unsigned char *bytes = page;
    uint64_t first_word;

    memcpy(&first_word, bytes, sizeof(first_word));
    return first_word == 0 && memcmp(bytes, bytes + sizeof(first_word), MIG_PAGE_SIZE_BYTES - sizeof(first_word)) == 0;
}

uint64_t mig_digest_page(const void *page)
{
    return XXH3_64bits(page, MIG_PAGE_SIZE_BYTES);
}

uint64_t mig_digest_run(const uint64_t *page_digests, uint64_t count_pages)
{
    return XXH3_64bits(page_digests, count_pages * sizeof(*page_digests));
}

uint64_t mig_digest_memory_term(uint64_t page, uint64_t page_digest)
{
    return XXH3_64bits_withSeed(&page_digest, sizeof(page_digest), page);
}
