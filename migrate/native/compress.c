#include "compress.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "page_source.h"
#include "units.h"

enum { LEVEL = 1, MAGIC_BYTES = 4, FLAW_BYTES = 200 };
/* Less gain than this is not worth the time that it costs at both ends. */
enum { GAIN_DIVISOR = 8 };

struct mig_compressor {
    ZSTD_CCtx *context;
    size_t scratch_bytes;
    uint8_t scratch[]; /* what the largest run may shrink to */
};

struct mig_decompressor {
    ZSTD_DCtx *context;
    uint8_t *staging;
    uint64_t staging_pages;
    char flaw[FLAW_BYTES];
};

static uint64_t compressed_bytes_max(uint64_t count_pages)
{
    return mig_page_offset(count_pages) - mig_page_offset(count_pages) / GAIN_DIVISOR;
}

/* ---- at the source ---- */

int mig_compressor_create(struct mig_compressor **ret)
{
    const size_t scratch_bytes = compressed_bytes_max(MIG_REQUEST_PAGES_MAX);
    struct mig_compressor *compressor = malloc(sizeof(*compressor) + scratch_bytes);

    if (!compressor)
        return -ENOMEM;
    compressor->scratch_bytes = scratch_bytes;
    compressor->context = ZSTD_createCCtx();
    if (!compressor->context ||
        ZSTD_isError(ZSTD_CCtx_setParameter(compressor->context, ZSTD_c_compressionLevel, LEVEL))) {
        mig_compressor_destroy(compressor);
        return -ENOMEM;
    }
    *ret = compressor;
    return 0;
}

void mig_compressor_destroy(struct mig_compressor *compressor)
{
    if (!compressor)
        return;
    ZSTD_freeCCtx(compressor->context);
    free(compressor);
}

uint32_t mig_compress_run(struct mig_compressor *compressor, uint8_t *pages, uint64_t count_pages)
{
    const uint64_t room_bytes = compressed_bytes_max(count_pages);

    if (room_bytes > compressor->scratch_bytes)
        return 0;
    /* The room is the limit of what is worth sending, so a run that does not shrink is given up on the way. */
    const size_t frame_bytes =
        ZSTD_compress2(compressor->context, compressor->scratch, room_bytes, pages, mig_page_offset(count_pages));
    if (ZSTD_isError(frame_bytes))
        return 0;
    memcpy(pages, compressor->scratch, frame_bytes);
    return (uint32_t)frame_bytes;
}

/* ---- at the destination ---- */

int mig_decompressor_create(struct mig_decompressor **ret)
{
    struct mig_decompressor *decompressor = calloc(1, sizeof(*decompressor));

    if (!decompressor)
        return -ENOMEM;
    decompressor->context = ZSTD_createDCtx();
    if (!decompressor->context) {
        free(decompressor);
        return -ENOMEM;
    }
    *ret = decompressor;
    return 0;
}

void mig_decompressor_destroy(struct mig_decompressor *decompressor)
{
    if (!decompressor)
        return;
    ZSTD_freeDCtx(decompressor->context);
    free(decompressor->staging);
    free(decompressor);
}

const char *mig_decompressor_flaw(const struct mig_decompressor *decompressor)
{
    return decompressor->flaw;
}

__attribute__((format(printf, 2, 3))) static int refuse(struct mig_decompressor *decompressor, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    vsnprintf(decompressor->flaw, sizeof(decompressor->flaw), format, arguments);
    va_end(arguments);
    return -EBADMSG;
}

/* The library would also take formats from before the RFC, and frames that are to be skipped. */
static bool has_magic(const uint8_t *data, uint64_t data_bytes)
{
    uint32_t magic = 0;

    for (unsigned i = 0; i < MAGIC_BYTES && i < data_bytes; i++)
        magic |= (uint32_t)data[i] << (8 * i);
    return magic == ZSTD_MAGICNUMBER;
}

/* Whether the data is one frame, and says that it holds as much as it should. Reads headers only. */
static int check_frame(struct mig_decompressor *decompressor, const uint8_t *data, uint64_t data_bytes,
                       uint64_t run_bytes)
{
    if (!has_magic(data, data_bytes))
        return refuse(decompressor, "a compressed run that is not zstd");
    const unsigned long long claimed_bytes = ZSTD_getFrameContentSize(data, data_bytes);
    if (claimed_bytes == ZSTD_CONTENTSIZE_ERROR)
        return refuse(decompressor, "a compressed run that is not zstd");
    if (claimed_bytes == ZSTD_CONTENTSIZE_UNKNOWN)
        return refuse(decompressor, "a compressed run that does not say how long it is");
    if (claimed_bytes != run_bytes)
        return refuse(decompressor, "a compressed run of %llu bytes that claims to hold %llu",
                      (unsigned long long)run_bytes, claimed_bytes);
    const size_t frame_bytes = ZSTD_findFrameCompressedSize(data, data_bytes);
    if (ZSTD_isError(frame_bytes))
        return refuse(decompressor, "a compressed run that is broken: %s", ZSTD_getErrorName(frame_bytes));
    if (frame_bytes != data_bytes)
        return refuse(decompressor, "a compressed run with %llu bytes behind its end",
                      (unsigned long long)(data_bytes - frame_bytes));
    return 0;
}

static bool make_room(struct mig_decompressor *decompressor, uint64_t count_pages)
{
    if (count_pages <= decompressor->staging_pages)
        return true;
    free(decompressor->staging);
    decompressor->staging = aligned_alloc(MIG_PAGE_SIZE_BYTES, mig_page_offset(count_pages));
    decompressor->staging_pages = decompressor->staging ? count_pages : 0;
    return decompressor->staging;
}

int mig_decompress_run(struct mig_decompressor *decompressor, const uint8_t *data, uint64_t data_bytes,
                       uint64_t count_pages, const uint8_t **ret_pages)
{
    const uint64_t run_bytes = mig_page_offset(count_pages);

    if (!count_pages || count_pages > MIG_REQUEST_PAGES_MAX)
        return refuse(decompressor, "a compressed run of %llu pages", (unsigned long long)count_pages);
    if (check_frame(decompressor, data, data_bytes, run_bytes) < 0)
        return -EBADMSG;
    if (!make_room(decompressor, count_pages))
        return -ENOMEM;
    const size_t got_bytes =
        ZSTD_decompressDCtx(decompressor->context, decompressor->staging, run_bytes, data, data_bytes);
    if (ZSTD_isError(got_bytes))
        return refuse(decompressor, "a compressed run that is broken: %s", ZSTD_getErrorName(got_bytes));
    if (got_bytes != run_bytes)
        return refuse(decompressor, "a compressed run of %llu bytes that holds %zu", (unsigned long long)run_bytes,
                      got_bytes);
    *ret_pages = decompressor->staging;
    return 0;
}
