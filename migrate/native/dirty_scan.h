/*
 * A dirty log of any process's memory, kept by the kernel for us: write-protection that lifts itself as a page is
 * written, and an ioctl of /proc/PID/pagemap that says where it was lifted. See "PAGEMAP_SCAN" in
 * Documentation/admin-guide/mm/pagemap.rst.
 *
 * It sees what goes through the page tables of that process, the vCPUs of a KVM guest among it. It does not see other
 * processes that map the same file, pwrite(2) to that file, or that a page was punched out of it which had not been
 * written since the last time, as by a balloon.
 */
#ifndef MIG_DIRTY_SCAN_H
#define MIG_DIRTY_SCAN_H

#include <stdbool.h>
#include <stdint.h>

struct mig_dirty_scan;

/**
 * Begin an empty log of a range of the process's memory. Neither descriptor is taken over; both must stay open.
 *
 * uffd: a userfaultfd of the process, hands shaken with MIG_UFFD_WP_FEATURES. pagemap_fd: its /proc/PID/pagemap.
 *
 * Returns 0 or -errno.
 */
int mig_dirty_scan_start(int uffd, int pagemap_fd, uint64_t hva, uint64_t length_bytes, struct mig_dirty_scan **ret);

/**
 * Move the pages that were written since the last time into a bitmap, words of 64 pages; with `keep`, they stay in the
 * log, too. A page that is read after this holds every write that the bitmap tells of.
 *
 * Returns how many there are, or -errno; the log is incomplete from then on.
 */
int64_t mig_dirty_scan_sync(struct mig_dirty_scan *scan, uint64_t *bitmap, bool keep);

/** End it, and free it. Returns 0, or -errno of a process that has ended, for one. */
int mig_dirty_scan_stop(struct mig_dirty_scan *scan);

/** Whether this kernel can do it: tries it on memory of our own. Returns 0 or -errno. */
int mig_dirty_scan_probe(void);

#endif
