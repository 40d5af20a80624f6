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
/* What a dirty scan cannot do without: write-protection that the kernel lifts by itself, of pages that are not there,
 * too. */
extern const uint64_t MIG_UFFD_WP_FEATURES;

/* What to register a range for; may be combined. */
enum mig_uffd_mode {
    MIG_UFFD_MISSING = 1,
    MIG_UFFD_WP = 2,
};

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

/**
 * Shake hands on a userfaultfd that was opened elsewhere; UFFD_FEATURE_POISON is asked for as above. Once in its life.
 *
 * Returns 0 or -errno; -ENOTSUP if a feature is unknown to this kernel, or hands were shaken before.
 */
int mig_uffd_shake_hands(int uffd, uint64_t required_features);

/**
 * Register a range of the address space that the userfaultfd belongs to, be it ours or not. Modes are of mig_uffd_mode.
 *
 * Returns 0 or -errno; -ENOTSUP if what the modes need cannot be done there.
 */
int mig_uffd_register(int uffd, uint64_t hva, uint64_t length_bytes, uint32_t modes);

/** Protect a range against writes; on files, the pages that are not there, too. Returns 0 or -errno. */
int mig_uffd_write_protect(int uffd, uint64_t hva, uint64_t length_bytes);

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
