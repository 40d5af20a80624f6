/* A machine of our own: vCPU threads that run the workload, under KVM or as plain threads. */
#ifndef MIG_MACHINE_H
#define MIG_MACHINE_H

#include <stdbool.h>
#include <stdint.h>

#include "mailbox.h"

/* GPA and VA of the device pages: above any RAM, within every CPU's physical address width. */
enum { MIG_PAGE_TABLE_GPA = 0x2000 };
#define MIG_MAILBOX_GPA (1ull << 38)
#define MIG_DOORBELL_GPA (MIG_MAILBOX_GPA + (1ull << 21))
#define MIG_RAM_BYTES_MAX (1ull << 37)

struct mig_machine;
struct mig_cpuid_entry {
    uint32_t function, index, flags, eax, ebx, ecx, edx;
};

/** The CPUID table that this host's KVM can give a vCPU. Returns how many entries, or -errno. */
int mig_kvm_supported_cpuid(struct mig_cpuid_entry *entries, uint32_t max_entries);

/**
 * A machine over RAM and mailboxes that are mapped here, its vCPU threads parked.
 * `cpuid_count` of 0 makes plain threads instead of a KVM guest. Nothing in RAM is touched. It lives as long as the
 * process. Returns 0 or -errno; *ret_operation names what failed.
 */
int mig_machine_create(char *ram, uint64_t ram_bytes, struct mig_mailbox *mailboxes, uint32_t vcpus,
                       const struct mig_cpuid_entry *cpuid, uint32_t cpuid_count, struct mig_machine **ret,
                       const char **ret_operation);

/** Put page tables and code into RAM and vCPUs at their start. For a machine that begins to live here. 0 or -errno. */
int mig_machine_boot(struct mig_machine *machine, uint64_t code_gpa, uint64_t stack_gpa);

/** Let the vCPUs run. */
void mig_machine_resume(struct mig_machine *machine);

/** Stop the vCPUs between two instructions. Returns 0, or -ETIMEDOUT and they run on. */
int mig_machine_pause(struct mig_machine *machine, uint64_t timeout_us);

/* ---- the dirty log: which pages of RAM the vCPUs write. Kind kvm alone; -ENOTSUP else ---- */

/** Begin to log; the vCPUs may run. Returns 0 or -errno. */
int mig_machine_start_dirty_log(struct mig_machine *machine);
/**
 * Take out the log: `bitmap` (a bit for each page of RAM, in words of 64) gets the pages written since the last time.
 * A page that is read after this call has whatever was written before it. Returns how many there are, or -errno.
 * With `keep`, the pages stay in the log: they are not watched again, which costs the vCPUs nothing.
 */
int64_t mig_machine_sync_dirty_log(struct mig_machine *machine, uint64_t *bitmap, bool keep);
/** End it. Returns 0 or -errno. */
int mig_machine_stop_dirty_log(struct mig_machine *machine);

/**
 * What ended a vCPU's thread first, "" if all live. One that touches a page that is not to be had, as a poisoned one,
 * ends; the others run on.
 */
const char *mig_machine_failure(const struct mig_machine *machine);

/** The thread that runs a vCPU, as the kernel names it; it has run once the machine has been paused or resumed. */
uint32_t mig_machine_thread_id(const struct mig_machine *machine, uint32_t vcpu);

/** TSC ticks in a millisecond. */
uint64_t mig_machine_tsc_khz(const struct mig_machine *machine);

/* vCPU state by items, in the order in which they must be set. The machine must be paused. */
uint32_t mig_vcpu_item_count(void);
const char *mig_vcpu_item_name(uint32_t item);
uint32_t mig_vcpu_item_bytes(uint32_t item);
int mig_vcpu_get_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, void *data);
int mig_vcpu_set_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, const void *data);

#endif
