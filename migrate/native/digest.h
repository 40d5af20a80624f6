/* Digests of pages, runs and whole memories; XXH3 of libxxhash underneath, inlined. */
#ifndef MIG_DIGEST_H
#define MIG_DIGEST_H

#include <stdbool.h>
#include <stdint.h>

/** Whether a page holds only zero bytes. */
bool mig_page_is_zero(const void *page);

/** XXH3-64 of one page. */
uint64_t mig_digest_page(const void *page);

/** XXH3-64 over the little-endian digests of the pages of a run: FetchPagesResponse.digest. */
uint64_t mig_digest_run(const uint64_t *page_digests, uint64_t count_pages);

/** What one non-zero page adds to the digest of a memory, which is the sum of these modulo 2^64. */
uint64_t mig_digest_memory_term(uint64_t page, uint64_t page_digest);

#endif
