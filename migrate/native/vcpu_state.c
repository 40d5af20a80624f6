#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

#include "machine.h"
#include "machine_internal.h"

enum { MSRS_MAX = 512 };

/* MSRs as they travel: how many, then each with its value. */
struct msr_table {
    struct kvm_msrs header;
    struct kvm_msr_entry entries[MSRS_MAX];
};

struct item {
    const char *name;
    unsigned long get, set;
    uint32_t bytes;
};

/* In the order in which KVM wants them set: control registers decide what the others may hold. */
static const struct item ITEMS[] = {
    {"sregs", KVM_GET_SREGS, KVM_SET_SREGS, sizeof(struct kvm_sregs)},
    {"regs", KVM_GET_REGS, KVM_SET_REGS, sizeof(struct kvm_regs)},
    {"xcrs", KVM_GET_XCRS, KVM_SET_XCRS, sizeof(struct kvm_xcrs)},
    {"xsave", KVM_GET_XSAVE, KVM_SET_XSAVE, sizeof(struct kvm_xsave)},
    {"msrs", 0, 0, sizeof(struct msr_table)},
    {"mp_state", KVM_GET_MP_STATE, KVM_SET_MP_STATE, sizeof(struct kvm_mp_state)},
    {"events", KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, sizeof(struct kvm_vcpu_events)},
    {"debugregs", KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, sizeof(struct kvm_debugregs)},
};

uint32_t mig_vcpu_item_count(void)
{
    return sizeof(ITEMS) / sizeof(ITEMS[0]);
}

const char *mig_vcpu_item_name(uint32_t item)
{
    return ITEMS[item].name;
}

uint32_t mig_vcpu_item_bytes(uint32_t item)
{
    return ITEMS[item].bytes;
}

static int get_msrs(const struct mig_machine *machine, int fd, struct msr_table *table)
{
    struct {
        struct kvm_msr_list header;
        uint32_t indices[MSRS_MAX];
    } list = {.header.nmsrs = MSRS_MAX};

    if (ioctl(machine->kvm_fd, KVM_GET_MSR_INDEX_LIST, &list) < 0)
        return -errno;
    memset(table, 0, sizeof(*table));
    for (uint32_t i = 0; i < list.header.nmsrs; i++) {
        struct {
            struct kvm_msrs header;
            struct kvm_msr_entry entry;
        } one = {.header.nmsrs = 1, .entry.index = list.header.indices[i]};
        /* The list names MSRs that this vCPU's CPUID does not have: these cannot be read, and are not its state. */
        if (ioctl(fd, KVM_GET_MSRS, &one) == 1)
            table->entries[table->header.nmsrs++] = one.entry;
    }
    return 0;
}

static int set_msrs(int fd, const struct msr_table *table)
{
    if (table->header.nmsrs > MSRS_MAX)
        return -EINVAL;
    for (uint32_t i = 0; i < table->header.nmsrs; i++) {
        struct {
            struct kvm_msrs header;
            struct kvm_msr_entry entry;
        } one = {.header.nmsrs = 1, .entry = table->entries[i]};
        struct {
            struct kvm_msrs header;
            struct kvm_msr_entry entry;
        } now = {.header.nmsrs = 1, .entry.index = table->entries[i].index};
        /* A read-only MSR that has the right value already need not be written. */
        if (ioctl(fd, KVM_SET_MSRS, &one) != 1 &&
            (ioctl(fd, KVM_GET_MSRS, &now) != 1 || now.entry.data != one.entry.data))
            return -EINVAL;
    }
    return 0;
}

int mig_vcpu_get_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, void *data)
{
    const int fd = machine->vcpus[vcpu].fd;
    if (!ITEMS[item].get)
        return get_msrs(machine, fd, data);
    return ioctl(fd, ITEMS[item].get, data) < 0 ? -errno : 0;
}

int mig_vcpu_set_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, const void *data)
{
    const int fd = machine->vcpus[vcpu].fd;
    if (!ITEMS[item].set)
        return set_msrs(fd, data);
    return ioctl(fd, ITEMS[item].set, data) < 0 ? -errno : 0;
}
