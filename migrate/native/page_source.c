#include "page_source.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "digest.h"
#include "units.h"

enum { DIGEST_BATCH_PAGES = 256, SCANNED_PAGES_MAX = 2048, PREFETCH_PAGES = 8 };

struct mig_page_source {
    int memfd;
    uint64_t pages;
    void *mapping;          /* for mincore and resident pages: a read of a hole would populate it */
    bool is_sealed;         /* against shrinking */
    bool digests_replies;   /* until page_digests are there */
    uint64_t *page_digests; /* NULL until taken; 0 for a zero page */
};

int mig_page_source_create(int memfd, uint64_t pages, struct mig_page_source **ret)
{
    struct mig_page_source *source = calloc(1, sizeof(*source));
    if (!source)
        return -ENOMEM;
    source->memfd = memfd;
    source->pages = pages;
    const int seals = fcntl(memfd, F_GET_SEALS);
    source->is_sealed = seals >= 0 && seals & F_SEAL_SHRINK;
    source->mapping = mmap(NULL, mig_page_offset(pages), PROT_READ, MAP_SHARED | MAP_NORESERVE, memfd, 0);
    if (source->mapping == MAP_FAILED) {
        const int error = errno;
        free(source);
        return -error;
    }
    /* A dump of the daemon is no place for a guest's memory. */
    (void)madvise(source->mapping, mig_page_offset(pages), MADV_DONTDUMP);
    *ret = source;
    return 0;
}

void mig_page_source_destroy(struct mig_page_source *source)
{
    if (!source)
        return;
    munmap(source->mapping, mig_page_offset(source->pages));
    free(source->page_digests);
    free(source);
}

uint64_t mig_page_source_pages(const struct mig_page_source *source)
{
    return source->pages;
}

void mig_page_source_digest_replies(struct mig_page_source *source)
{
    source->digests_replies = true;
}

static const uint64_t *taken_digests(const struct mig_page_source *source)
{
    return __atomic_load_n(&source->page_digests, __ATOMIC_ACQUIRE);
}

bool mig_page_source_must_copy(const struct mig_page_source *source)
{
    return !source->is_sealed || (source->digests_replies && !taken_digests(source));
}

/* The digest of a run of data, whose bytes are at `data` if they were copied. */
static uint64_t digest_of(const struct mig_page_source *source, const struct mig_run *run, const char *data)
{
    const uint64_t *taken = taken_digests(source);
    uint64_t page_digests[MIG_REQUEST_PAGES_MAX];

    if (taken)
        return mig_digest_run(taken + run->first_page, run->count_pages);
    if (!source->digests_replies || !data)
        return 0;
    for (uint64_t i = 0; i < run->count_pages; i++)
        page_digests[i] = mig_digest_page(data + mig_page_offset(i));
    return mig_digest_run(page_digests, run->count_pages);
}

static int read_pages(const struct mig_page_source *source, uint64_t first_page, uint64_t count_pages, void *buffer)
{
    uint64_t done_bytes = 0;
    const uint64_t length_bytes = mig_page_offset(count_pages);

    while (done_bytes < length_bytes) {
        const ssize_t got = pread(source->memfd, (char *)buffer + done_bytes, length_bytes - done_bytes,
                                  (off_t)(mig_page_offset(first_page) + done_bytes));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : -EIO; /* the file is shorter than the RAM it holds */
        done_bytes += (uint64_t)got;
    }
    return 0;
}

/* The first page at or after `page` that the memfd holds, in memory or swapped out; `pages` if none; or -errno. */
static int64_t next_data_page(const struct mig_page_source *source, uint64_t page)
{
    const off_t offset = lseek(source->memfd, (off_t)mig_page_offset(page), SEEK_DATA);
    if (offset >= 0)
        return (int64_t)mig_offset_page((uint64_t)offset);
    return errno == ENXIO ? (int64_t)source->pages : -errno;
}

/* How many pages from `first` are data, at most `count`; 0 if `first` is in a hole; or -errno. `core` has count bytes.
 */
static int64_t data_pages(const struct mig_page_source *source, uint64_t first, uint64_t count, unsigned char *core)
{
    char *start = (char *)source->mapping + mig_page_offset(first);
    if (mincore(start, mig_page_offset(count), core) < 0)
        return -errno;
    uint64_t run = 0;
    while (run < count && core[run] & 1)
        run++;
    if (run)
        return (int64_t)run;
    /* Not resident is a hole, or swapped out: only the file knows. */
    const int64_t next = next_data_page(source, first);
    return next < 0 ? next : next == (int64_t)first;
}

static void append_run(struct mig_run *runs, int *run_count, uint64_t first_page, uint64_t count_pages, bool is_zero)
{
    if (*run_count && runs[*run_count - 1].is_zero == is_zero)
        runs[*run_count - 1].count_pages += count_pages;
    else
        runs[(*run_count)++] = (struct mig_run){first_page, count_pages, 0, is_zero};
}

/* Splits resident pages into runs; with a buffer, reads them there first. Returns 0 or -errno. */
static int64_t split_data(struct mig_page_source *source, uint64_t first, uint64_t count, char *buffer,
                          struct mig_run *runs, int *run_count)
{
    char *pages = buffer ? buffer : (char *)source->mapping + mig_page_offset(first);
    const int64_t rc = buffer ? read_pages(source, first, count, buffer) : 0;

    for (uint64_t i = 0; rc >= 0 && i < count; i++) {
        /* Of most pages one line is looked at, and it is in no cache. */
        if (i + PREFETCH_PAGES < count)
            __builtin_prefetch(pages + mig_page_offset(i + PREFETCH_PAGES));
        append_run(runs, run_count, first + i, 1, mig_page_is_zero(pages + mig_page_offset(i)));
    }
    return rc;
}

/* Splits a request into runs. `buffer` is where its pages are read to, or NULL. */
static int split_request(struct mig_page_source *source, uint64_t first_page, uint32_t count_pages, char *buffer,
                         struct mig_run *runs)
{
    if (!count_pages || count_pages > MIG_REQUEST_PAGES_MAX || first_page >= source->pages ||
        count_pages > source->pages - first_page)
        return -EINVAL;
    const uint64_t end = first_page + count_pages;
    unsigned char *core = malloc(count_pages);
    if (!core)
        return -ENOMEM;
    int run_count = 0;
    int64_t rc = 0;

    for (uint64_t page = first_page; page < end;) {
        rc = data_pages(source, page, end - page, core);
        if (rc < 0)
            break;
        if (rc == 0) {
            const int64_t next = next_data_page(source, page);
            rc = next;
            if (next < 0)
                break;
            /* A hole that the request leaves is told whole; one page filled meanwhile ends it at once. */
            append_run(runs, &run_count, page, (uint64_t)next - page, true);
            page = (uint64_t)next;
            continue;
        }
        const uint64_t run = (uint64_t)rc;
        rc = split_data(source, page, run, buffer ? buffer + mig_page_offset(page - first_page) : NULL, runs,
                        &run_count);
        if (rc < 0)
            break;
        page += run;
    }
    free(core);
    if (rc < 0)
        return (int)rc;
    for (int i = 0; i < run_count; i++)
        if (!runs[i].is_zero)
            runs[i].digest =
                digest_of(source, &runs[i], buffer ? buffer + mig_page_offset(runs[i].first_page - first_page) : NULL);
    return run_count;
}

/* One page that is not zero, as most faults ask for: a single system call. Returns 1, 0 if it is zero, or -errno. */
static int read_one(struct mig_page_source *source, uint64_t page, void *buffer, struct mig_run *run)
{
    if (page >= source->pages)
        return -EINVAL;
    const int rc = read_pages(source, page, 1, buffer); /* of a hole, pread makes no page */
    if (rc < 0 || mig_page_is_zero(buffer))
        return rc;
    *run = (struct mig_run){.first_page = page, .count_pages = 1};
    run->digest = digest_of(source, run, buffer);
    return 1;
}

int mig_page_source_read(struct mig_page_source *source, uint64_t first_page, uint32_t count_pages, void *buffer,
                         struct mig_run *runs)
{
    const int found = count_pages == 1 ? read_one(source, first_page, buffer, runs) : 0;
    return found ? found : split_request(source, first_page, count_pages, buffer, runs);
}

void mig_page_source_end_scan(struct mig_page_source *source, struct mig_scan *scan)
{
    if (scan->count_pages)
        madvise((char *)source->mapping + mig_page_offset(scan->first_page), mig_page_offset(scan->count_pages),
                MADV_DONTNEED);
    *scan = (struct mig_scan){0};
}

int mig_page_source_scan(struct mig_page_source *source, struct mig_scan *scan, uint64_t first_page,
                         uint32_t count_pages, struct mig_run *runs)
{
    const int found = split_request(source, first_page, count_pages, NULL, runs);
    if (found < 0)
        return found;
    /* Unmapping interrupts every CPU that runs us, so it waits until there is much of it. */
    const uint64_t end_page = first_page + count_pages;
    if (first_page < scan->first_page || end_page - scan->first_page > SCANNED_PAGES_MAX)
        mig_page_source_end_scan(source, scan);
    if (!scan->count_pages)
        scan->first_page = first_page;
    scan->count_pages = end_page - scan->first_page;
    return found;
}

int mig_page_source_memfd(const struct mig_page_source *source)
{
    return source->memfd;
}

int mig_page_source_take_digests(struct mig_page_source *source, uint64_t *ret_memory_digest)
{
    uint64_t *digests = calloc(source->pages, sizeof(*digests));
    char *buffer = malloc(mig_page_offset(DIGEST_BATCH_PAGES));
    int64_t rc = digests && buffer ? 0 : -ENOMEM;
    uint64_t memory_digest = 0;
    unsigned char core[DIGEST_BATCH_PAGES];

    for (uint64_t page = 0; rc >= 0 && page < source->pages;) {
        const uint64_t left = source->pages - page;
        rc = data_pages(source, page, left < DIGEST_BATCH_PAGES ? left : DIGEST_BATCH_PAGES, core);
        if (rc == 0) {
            rc = next_data_page(source, page);
            page = rc < 0 ? page : (uint64_t)rc;
            continue;
        }
        const uint64_t run = rc < 0 ? 0 : (uint64_t)rc;
        if (run)
            rc = read_pages(source, page, run, buffer);
        for (uint64_t i = 0; rc >= 0 && i < run; i++) {
            const char *data = buffer + mig_page_offset(i);
            if (mig_page_is_zero(data))
                continue;
            digests[page + i] = mig_digest_page(data);
            memory_digest += mig_digest_memory_term(page + i, digests[page + i]);
        }
        page += run;
    }
    free(buffer);
    if (rc < 0) {
        free(digests);
        return (int)rc;
    }
    uint64_t *before = source->page_digests;
    __atomic_store_n(&source->page_digests, digests, __ATOMIC_RELEASE);
    free(before);
    *ret_memory_digest = memory_digest;
    return 0;
}
