#include "dirty_scan.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ioctl.h>
#include <linux/types.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bitmap.h"
#include "uffd.h"
#include "units.h"

/* linux/fs.h of Linux 6.7, newer than that of Debian 12. */
#ifndef PAGEMAP_SCAN
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
struct page_region {
    __u64 start;
    __u64 end;
    __u64 categories;
};
struct pm_scan_arg {
    __u64 size;
    __u64 flags;
    __u64 start;
    __u64 end;
    __u64 walk_end;
    __u64 vec;
    __u64 vec_len;
    __u64 max_pages;
    __u64 category_inverted;
    __u64 category_mask;
    __u64 category_anyof_mask;
    __u64 return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#endif
_Static_assert(sizeof(struct pm_scan_arg) == 96, "the ioctl's number holds its size");

enum { REGIONS_MAX = 4096 };

struct mig_dirty_scan {
    int uffd, pagemap_fd;
    uint64_t hva, length_bytes;
    struct page_region regions[REGIONS_MAX];
};

int mig_dirty_scan_start(int uffd, int pagemap_fd, uint64_t hva, uint64_t length_bytes, struct mig_dirty_scan **ret)
{
    struct mig_dirty_scan *scan = malloc(sizeof(*scan));

    if (!scan)
        return -ENOMEM;
    scan->uffd = uffd;
    scan->pagemap_fd = pagemap_fd;
    scan->hva = hva;
    scan->length_bytes = length_bytes;
    int rc = mig_uffd_register(uffd, hva, length_bytes, MIG_UFFD_WP);
    if (rc < 0) {
        free(scan);
        return rc;
    }
    /* Marks what is not there, too: from here on, an entry that is empty was discarded, or written and then evicted. */
    rc = mig_uffd_write_protect(uffd, hva, length_bytes);
    if (rc < 0) {
        mig_dirty_scan_stop(scan);
        return rc;
    }
    *ret = scan;
    return 0;
}

/* Notes all pages whose categories, after inversion, have all of `wanted`. */
static int note(struct mig_dirty_scan *scan, struct mig_bitmap *bitmap, uint64_t inverted, uint64_t wanted, bool keep)
{
    const uint64_t end_hva = scan->hva + scan->length_bytes;
    struct pm_scan_arg arg = {
        .size = sizeof(arg),
        .flags = PM_SCAN_CHECK_WPASYNC | (keep ? 0 : PM_SCAN_WP_MATCHING),
        .start = scan->hva,
        .end = end_hva,
        .vec = (uintptr_t)scan->regions,
        .vec_len = REGIONS_MAX,
        .category_inverted = inverted,
        .category_mask = wanted,
        .return_mask = wanted,
    };

    while (arg.start < end_hva) {
        const int count = ioctl(scan->pagemap_fd, PAGEMAP_SCAN, &arg);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -errno;
        for (int i = 0; i < count; i++) {
            const struct page_region *found = &scan->regions[i];
            mig_bitmap_set_range(bitmap, mig_offset_page(found->start - scan->hva),
                                 mig_offset_page(found->end - found->start));
        }
        if (arg.walk_end <= arg.start)
            return -EIO; /* it came no further */
        arg.start = arg.walk_end;
    }
    return 0;
}

int64_t mig_dirty_scan_sync(struct mig_dirty_scan *scan, uint64_t *words, bool keep)
{
    struct mig_bitmap bitmap = {.words = words, .bits = mig_offset_page(scan->length_bytes)};
    const uint64_t word_count = (bitmap.bits + 63) / 64;
    const uint64_t is_there = PAGE_IS_PRESENT | PAGE_IS_SWAPPED; /* a mark counts as swapped */
    int64_t count = 0;

    memset(words, 0, word_count * sizeof(*words));
    int rc = note(scan, &bitmap, is_there, is_there, keep);
    if (rc == 0)
        rc = note(scan, &bitmap, 0, PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN, keep);
    if (rc < 0)
        return rc;
    for (uint64_t word = 0; word < word_count; word++)
        count += __builtin_popcountll(words[word]);
    return count;
}

int mig_dirty_scan_stop(struct mig_dirty_scan *scan)
{
    const int rc = mig_uffd_unregister(scan->uffd, scan->hva, scan->length_bytes);
    free(scan);
    return rc;
}

/* ---- whether it works here ---- */

enum { PROBE_PAGES = 4, PROBE_PAGE = 2 };

static int try_scan(volatile char *memory, int uffd, int pagemap_fd)
{
    struct mig_dirty_scan *scan;
    uint64_t words[1] = {0};

    int rc = mig_dirty_scan_start(uffd, pagemap_fd, (uintptr_t)memory, mig_page_offset(PROBE_PAGES), &scan);
    if (rc < 0)
        return rc;
    memory[mig_page_offset(PROBE_PAGE)] = 1;
    const int64_t count = mig_dirty_scan_sync(scan, words, false);
    rc = mig_dirty_scan_stop(scan);
    if (count < 0)
        return (int)count;
    return words[0] >> PROBE_PAGE & 1 ? rc : -ENOTSUP;
}

int mig_dirty_scan_probe(void)
{
    int uffd, rc = 0;
    void *memory = mmap(NULL, mig_page_offset(PROBE_PAGES), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const int pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    if (memory == MAP_FAILED || pagemap_fd < 0)
        rc = -errno;
    if (rc == 0)
        rc = mig_uffd_open(MIG_UFFD_WP_FEATURES, true, &uffd);
    if (rc == 0) {
        rc = try_scan(memory, uffd, pagemap_fd);
        close(uffd);
    }
    if (pagemap_fd >= 0)
        close(pagemap_fd);
    if (memory != MAP_FAILED)
        munmap(memory, mig_page_offset(PROBE_PAGES));
    return rc == -ENOTTY ? -ENOTSUP : rc; /* a pagemap without that ioctl */
}
