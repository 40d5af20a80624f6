/* Shared by machine.c (threads), kvm.c (creation) and vcpu_state.c (what travels). */
#ifndef MIG_MACHINE_INTERNAL_H
#define MIG_MACHINE_INTERNAL_H

#include <linux/kvm.h>
#include <pthread.h>

#include "machine.h"

struct mig_vcpu {
    struct mig_machine *machine;
    uint32_t index;
    int fd;              /* -1 for kind process */
    struct kvm_run *run; /* NULL for kind process */
    pthread_t thread;
    bool parked;
    bool mmio_pending; /* the last exit is completed by entering once more */
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
    pthread_mutex_t mutex; /* guards `paused` and each vCPU's `parked` */
    pthread_cond_t changed;
    bool paused;
    char failure[128];
};

static inline bool mig_machine_is_kvm(const struct mig_machine *machine)
{
    return machine->vm_fd >= 0;
}

int mig_kvm_create(struct mig_machine *machine, const struct mig_cpuid_entry *cpuid, uint32_t cpuid_count,
                   const char **ret_operation);

#endif
