/* Shared by machine.c (threads), memory_error.c (what ends them), kvm.c (creation) and vcpu_state.c (what travels). */
#ifndef MIG_MACHINE_INTERNAL_H
#define MIG_MACHINE_INTERNAL_H

#include <linux/kvm.h>
#include <pthread.h>
#include <setjmp.h>

#include "machine.h"

/* Of a SIGBUS: its si_code, 0 if there was none, and the address that was touched. */
struct mig_memory_error {
    int code;
    uint64_t hva;
};

struct mig_vcpu {
    struct mig_machine *machine;
    uint32_t index;
    int fd;              /* -1 for kind process */
    struct kvm_run *run; /* NULL for kind process */
    pthread_t thread;
    uint32_t thread_id; /* atomic; as the kernel has it */
    bool parked;
    bool mmio_pending; /* the last exit is completed by entering once more */
    /* Its thread's own, and its signal handler's. */
    volatile bool is_inside; /* the guest's code runs */
    sigjmp_buf way_out;      /* of the payload */
    struct mig_memory_error memory_error;
};

struct mig_machine {
    char *ram;
    uint64_t ram_bytes;
    struct mig_mailbox *mailboxes;
    uint32_t vcpu_count;
    uint64_t tsc_khz;
    int kvm_fd, vm_fd;
    bool clears_dirty_log; /* after it was read, by a call of its own */
    struct mig_vcpu vcpus[MIG_VCPUS_MAX];
    pthread_mutex_t mutex; /* guards `paused`, `failure` and each vCPU's `parked` */
    pthread_cond_t changed;
    bool paused;
    bool has_failed; /* atomic; then `failure` does not change */
    char failure[160];
};

static inline bool mig_machine_is_kvm(const struct mig_machine *machine)
{
    return machine->vm_fd >= 0;
}

int mig_kvm_create(struct mig_machine *machine, const struct mig_cpuid_entry *cpuid, uint32_t cpuid_count,
                   const char **ret_operation);

/** Have a memory error end a vCPU instead of the process. */
void mig_memory_error_handle(void);
/** This thread is a vCPU's. */
void mig_vcpu_claim_thread(struct mig_vcpu *vcpu);
/** Run the payload of kind process. Returns 0, or -EHWPOISON if a memory error ended it. */
int mig_vcpu_step(struct mig_vcpu *vcpu, uint64_t *ret_code);
/** KVM_RUN. Returns 0 or -errno; -EHWPOISON after a memory error. */
int mig_vcpu_enter(struct mig_vcpu *vcpu);
/** Say what ended a vCPU for good; the first is kept. */
__attribute__((format(printf, 2, 3))) void mig_machine_fail(struct mig_machine *machine, const char *format, ...);
/** The same of a memory error. */
void mig_vcpu_fail_memory(struct mig_vcpu *vcpu);

#endif
