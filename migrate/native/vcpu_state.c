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

/* KVM takes MSRs in order and stops at one that it refuses: what it refuses is skipped, and the rest tried again. */
static int get_msrs(const struct mig_machine *machine, int fd, struct msr_table *table)
{
    struct {
        struct kvm_msr_list header;
        uint32_t indices[MSRS_MAX];
    } list = {.header.nmsrs = MSRS_MAX};

    if (ioctl(machine->kvm_fd, KVM_GET_MSR_INDEX_LIST, &list) < 0)
        return -errno;
    memset(table, 0, sizeof(*table));
    for (uint32_t next = 0; next < list.header.nmsrs;) {
        struct msr_table asked = {.header.nmsrs = list.header.nmsrs - next};
        for (uint32_t i = 0; i < asked.header.nmsrs; i++)
            asked.entries[i].index = list.indices[next + i];
        const int got = ioctl(fd, KVM_GET_MSRS, &asked);
        if (got < 0)
            return -errno;
        memcpy(table->entries + table->header.nmsrs, asked.entries, (size_t)got * sizeof(*asked.entries));
        table->header.nmsrs += (uint32_t)got;
        /* The list names MSRs that this vCPU's CPUID does not have: these cannot be read, and are not its state. */
        next += (uint32_t)got + 1;
    }
    return 0;
}

static int set_msrs(int fd, const struct msr_table *table)
{
    if (table->header.nmsrs > MSRS_MAX)
        return -EINVAL;
    for (uint32_t next = 0; next < table->header.nmsrs;) {
        struct msr_table rest = {.header.nmsrs = table->header.nmsrs - next};
        memcpy(rest.entries, table->entries + next, rest.header.nmsrs * sizeof(*rest.entries));
        const int set = ioctl(fd, KVM_SET_MSRS, &rest);
        if (set < 0)
            return -errno;
        next += (uint32_t)set;
        if (next == table->header.nmsrs)
            return 0;
        struct {
            struct kvm_msrs header;
            struct kvm_msr_entry entry;
        } now = {.header.nmsrs = 1, .entry.index = table->entries[next].index};
        /* A read-only MSR that has the right value already need not be written. */
        if (ioctl(fd, KVM_GET_MSRS, &now) != 1 || now.entry.data != table->entries[next].data)
            return -EINVAL;
        next++;
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
