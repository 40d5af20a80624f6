/*
 * Runs of pages in zstd (RFC 8878): each is one frame that says how long its content is. Not thread-safe.
 *
 * What is decompressed comes from a peer, so nothing in it is believed: whatever a frame claims, no more memory is
 * taken than its run has, and no more than its run is ever written.
 */
#ifndef MIG_COMPRESS_H
#define MIG_COMPRESS_H

#include <stdint.h>

/* The values of migrate.v1.PageCompression. */
enum mig_compression { MIG_COMPRESSION_UNSPECIFIED = 0, MIG_COMPRESSION_NONE = 1, MIG_COMPRESSION_ZSTD = 2 };

struct mig_compressor;
struct mig_decompressor;

/** Returns 0 or -ENOMEM. */
int mig_compressor_create(struct mig_compressor **ret);
/** NULL is nothing. */
void mig_compressor_destroy(struct mig_compressor *compressor);

/**
 * Compress a run of at most MIG_REQUEST_PAGES_MAX pages where it lies. Returns the bytes of the frame that is there
 * now, or 0 if the run would not shrink by an eighth: then it is as it was.
 */
uint32_t mig_compress_run(struct mig_compressor *compressor, uint8_t *pages, uint64_t count_pages);

/** Returns 0 or -ENOMEM. */
int mig_decompressor_create(struct mig_decompressor **ret);
/** NULL is nothing. */
void mig_decompressor_destroy(struct mig_decompressor *decompressor);

/**
 * Decompress a run of exactly count_pages. *ret_pages is valid until the next call, and aligned to pages.
 * Returns 0, -ENOMEM, or -EBADMSG if that is not what the data holds: mig_decompressor_flaw says why.
 */
int mig_decompress_run(struct mig_decompressor *decompressor, const uint8_t *data, uint64_t data_bytes,
                       uint64_t count_pages, const uint8_t **ret_pages);

/** What was wrong with the last run, in words. */
const char *mig_decompressor_flaw(const struct mig_decompressor *decompressor);

#endif
