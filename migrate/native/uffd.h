/* userfaultfd: open, register, resolve. Facts: Documentation/admin-guide/mm/userfaultfd.rst. */
#ifndef MIG_UFFD_H
#define MIG_UFFD_H

#include <stdbool.h>
#include <stdint.h>

/* What became of a page that we tried to place. Negative values are -errno. */
enum mig_place_outcome {
    MIG_PLACE_INSTALLED = 0, /* the page was missing and is there now */
    MIG_PLACE_PRESENT = 1,   /* somebody was faster; its waiters have been woken */
};

/* What the pager cannot do without, the thread and the exact address of a fault among it. */
extern const uint64_t MIG_UFFD_FEATURES;

/**
 * Open a userfaultfd, non-blocking and close-on-exec, and shake hands. UFFD_FEATURE_POISON is asked for, too, where
 * the kernel has it.
 *
 * Faults of a vCPU are kernel-mode faults (KVM reads guest memory for it), so only user_mode_only == false serves a
 * KVM guest. /dev/userfaultfd is tried first; the system call only where that file does not exist.
 *
 * Returns 0 or -errno; -ENOTSUP if a feature in required_features is unknown to this kernel.
 */
int mig_uffd_open(uint64_t required_features, bool user_mode_only, int *ret_fd);

/** Register a range, missing mode. Returns 0 or -errno; -ENOTSUP if pages could not be copied in. */
int mig_uffd_register_missing(int uffd, uint64_t hva, uint64_t length_bytes);

/** Unregister a range; its waiters are woken, its holes read as zero from now on. Returns 0 or -errno. */
int mig_uffd_unregister(int uffd, uint64_t hva, uint64_t length_bytes);

/** Wake every waiter in a range, so that each faults again. Returns 0 or -errno. */
int mig_uffd_wake(int uffd, uint64_t hva, uint64_t length_bytes);

/**
 * Copy whole pages in and wake their waiters.
 *
 * Goes on after partial copies and EAGAIN; stops at the first page that is already there, which it wakes.
 * *ret_bytes is what was installed before the return. Returns an outcome or -errno.
 */
int mig_uffd_copy(int uffd, uint64_t dst_hva, const void *src, uint64_t length_bytes, uint64_t *ret_bytes);

/** Put zero pages in and wake their waiters; same rules as mig_uffd_copy. */
int mig_uffd_zeropage(int uffd, uint64_t dst_hva, uint64_t length_bytes, uint64_t *ret_bytes);

/**
 * Have whoever touches these pages get a memory error, and wake their waiters into it; same rules as mig_uffd_copy.
 * -EINVAL where the kernel cannot (before Linux 6.6).
 */
int mig_uffd_poison(int uffd, uint64_t hva, uint64_t length_bytes, uint64_t *ret_bytes);

#endif
