/*
 * The paravirtual device through which the workload counts and times its touches.
 *
 * It is not guest RAM and is never armed, so the host reads it at any time; it travels as device state.
 */
#ifndef MIG_MAILBOX_H
#define MIG_MAILBOX_H

#include <stdint.h>

enum { MIG_STALL_BUCKETS = 1024, MIG_STALL_OCTAVE_MIN = 10, MIG_STALL_SUB_BUCKETS = 32, MIG_VCPUS_MAX = 8 };

/* One vCPU's two pages: counters, and a log-linear histogram of touch times in TSC ticks. */
struct mig_mailbox {
    uint64_t touches;
    uint64_t writes; /* population included: equals the sum of all versions of the vCPU's pages */
    uint64_t errors;
    uint64_t first_error_page;
    uint64_t first_error_expected;
    uint64_t first_error_found;
    uint64_t stall_max_ticks;
    uint64_t populated;
    uint64_t audit_requested;
    uint64_t audit_done;
    uint64_t stop; /* kind process: leave the workload at the next touch */
    uint64_t reserved[501];
    uint32_t stall_histogram[MIG_STALL_BUCKETS];
};
_Static_assert(sizeof(struct mig_mailbox) == 8192, "a mailbox is two pages");

#endif
