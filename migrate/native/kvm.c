#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine.h"
#include "machine_internal.h"
#include "payload.h"
#include "units.h"

enum { CPUID_ENTRIES_MAX = 256, TSS_GPA = 0xfffbd000, GIB_SHIFT = 30, HUGE_SHIFT = 21 };
enum { RAM_SLOT = 0, MAILBOX_SLOT = 1 };
enum { PTE_PRESENT = 1, PTE_WRITE = 2, PTE_USER = 4, PTE_HUGE = 0x80 };

static struct kvm_cpuid2 *alloc_cpuid(uint32_t count)
{
    struct kvm_cpuid2 *table = calloc(1, sizeof(*table) + count * sizeof(table->entries[0]));
    if (table)
        table->nent = count;
    return table;
}

int mig_kvm_supported_cpuid(struct mig_cpuid_entry *entries, uint32_t max_entries)
{
    const int kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm_fd < 0)
        return -errno;
    struct kvm_cpuid2 *table = alloc_cpuid(CPUID_ENTRIES_MAX);
    int rc = !table ? -ENOMEM : ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, table) < 0 ? -errno : (int)table->nent;
    if (rc > (int)max_entries)
        rc = -E2BIG;
    for (int i = 0; i < rc; i++) {
        const struct kvm_cpuid_entry2 *from = &table->entries[i];
        entries[i] = (struct mig_cpuid_entry){from->function, from->index, from->flags, from->eax,
                                              from->ebx,      from->ecx,   from->edx};
    }
    free(table);
    close(kvm_fd);
    return rc;
}

static int set_cpuid(int vcpu_fd, const struct mig_cpuid_entry *entries, uint32_t count)
{
    struct kvm_cpuid2 *table = alloc_cpuid(count);
    if (!table)
        return -ENOMEM;
    for (uint32_t i = 0; i < count; i++)
        table->entries[i] = (struct kvm_cpuid_entry2){
            .function = entries[i].function,
            .index = entries[i].index,
            .flags = entries[i].flags,
            .eax = entries[i].eax,
            .ebx = entries[i].ebx,
            .ecx = entries[i].ecx,
            .edx = entries[i].edx,
        };
    const int rc = ioctl(vcpu_fd, KVM_SET_CPUID2, table) < 0 ? -errno : 0;
    free(table);
    return rc;
}

static int set_memory(int vm_fd, uint32_t slot, uint32_t flags, uint64_t gpa, uint64_t length_bytes, void *hva)
{
    struct kvm_userspace_memory_region region = {
        .slot = slot,
        .flags = flags,
        .guest_phys_addr = gpa,
        .memory_size = length_bytes,
        .userspace_addr = (uintptr_t)hva,
    };
    return ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0 ? -errno : 0;
}

int mig_kvm_create(struct mig_machine *machine, const struct mig_cpuid_entry *cpuid, uint32_t cpuid_count,
                   const char **ret_operation)
{
    *ret_operation = "open /dev/kvm";
    machine->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (machine->kvm_fd < 0)
        return -errno;
    *ret_operation = "KVM_CREATE_VM";
    machine->vm_fd = ioctl(machine->kvm_fd, KVM_CREATE_VM, 0);
    if (machine->vm_fd < 0)
        return -errno;
    *ret_operation = "KVM_SET_TSS_ADDR";
    if (ioctl(machine->vm_fd, KVM_SET_TSS_ADDR, TSS_GPA) < 0)
        return -errno;
    /* Without it, the log is cleared as it is read, and the vCPUs stand still while all of RAM is protected again. */
    struct kvm_enable_cap manual = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                                    .args = {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}};
    machine->clears_dirty_log = ioctl(machine->vm_fd, KVM_ENABLE_CAP, &manual) == 0;
    *ret_operation = "KVM_SET_USER_MEMORY_REGION";
    int rc = set_memory(machine->vm_fd, RAM_SLOT, 0, 0, machine->ram_bytes, machine->ram);
    if (rc == 0)
        rc = set_memory(machine->vm_fd, MAILBOX_SLOT, 0, MIG_MAILBOX_GPA,
                        machine->vcpu_count * sizeof(struct mig_mailbox), machine->mailboxes);
    if (rc < 0)
        return rc;
    const int run_bytes = ioctl(machine->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        struct mig_vcpu *vcpu = &machine->vcpus[i];
        *ret_operation = "KVM_CREATE_VCPU";
        vcpu->fd = ioctl(machine->vm_fd, KVM_CREATE_VCPU, i);
        if (vcpu->fd < 0)
            return -errno;
        *ret_operation = "map struct kvm_run";
        void *run = mmap(NULL, (size_t)run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
        if (run == MAP_FAILED)
            return -errno;
        vcpu->run = run;
        *ret_operation = "KVM_SET_CPUID2";
        rc = set_cpuid(vcpu->fd, cpuid, cpuid_count);
        if (rc < 0)
            return rc;
    }
    const int tsc_khz = ioctl(machine->vcpus[0].fd, KVM_GET_TSC_KHZ, 0);
    machine->tsc_khz = tsc_khz > 0 ? (uint64_t)tsc_khz : 0;
    return 0;
}

/* ---- the dirty log: Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG ---- */

static int log_dirty(struct mig_machine *machine, uint32_t flags)
{
    if (!mig_machine_is_kvm(machine))
        return -ENOTSUP;
    return set_memory(machine->vm_fd, RAM_SLOT, flags, 0, machine->ram_bytes, machine->ram);
}

int mig_machine_start_dirty_log(struct mig_machine *machine)
{
    return log_dirty(machine, KVM_MEM_LOG_DIRTY_PAGES);
}

int mig_machine_stop_dirty_log(struct mig_machine *machine)
{
    return log_dirty(machine, 0);
}

int64_t mig_machine_sync_dirty_log(struct mig_machine *machine, uint64_t *bitmap, bool keep)
{
    const uint64_t pages = mig_offset_page(machine->ram_bytes);
    struct kvm_dirty_log get = {.slot = RAM_SLOT, .dirty_bitmap = bitmap};
    struct kvm_clear_dirty_log clear = {.slot = RAM_SLOT, .num_pages = (uint32_t)pages, .dirty_bitmap = bitmap};
    int64_t count = 0;

    if (!mig_machine_is_kvm(machine))
        return -ENOTSUP;
    if (ioctl(machine->vm_fd, KVM_GET_DIRTY_LOG, &get) < 0)
        return -errno;
    /* A write in between is not logged again, and need not be: its page is read after this. */
    if (machine->clears_dirty_log && !keep && ioctl(machine->vm_fd, KVM_CLEAR_DIRTY_LOG, &clear) < 0)
        return -errno;
    for (uint64_t word = 0; word < (pages + 63) / 64; word++)
        count += __builtin_popcountll(bitmap[word]);
    return count;
}

/* Identity map of 2 MiB pages for RAM, and one more page directory for the device pages. */
static void write_page_tables(struct mig_machine *machine)
{
    const uint64_t flags = PTE_PRESENT | PTE_WRITE | PTE_USER;
    const uint64_t gibs = (machine->ram_bytes + (1ull << GIB_SHIFT) - 1) >> GIB_SHIFT;
    const uint64_t pdpt_gpa = MIG_PAGE_TABLE_GPA + MIG_PAGE_SIZE_BYTES;
    const uint64_t pd_gpa = pdpt_gpa + MIG_PAGE_SIZE_BYTES;
    const uint64_t device_pd_gpa = pd_gpa + gibs * MIG_PAGE_SIZE_BYTES;
    uint64_t *pml4 = (void *)(machine->ram + MIG_PAGE_TABLE_GPA);
    uint64_t *pdpt = (void *)(machine->ram + pdpt_gpa);
    uint64_t *pd = (void *)(machine->ram + pd_gpa);
    uint64_t *device_pd = (void *)(machine->ram + device_pd_gpa);

    pml4[0] = pdpt_gpa | flags;
    for (uint64_t i = 0; i < gibs; i++)
        pdpt[i] = (pd_gpa + i * MIG_PAGE_SIZE_BYTES) | flags;
    for (uint64_t i = 0; i < machine->ram_bytes >> HUGE_SHIFT; i++)
        pd[i] = i << HUGE_SHIFT | flags | PTE_HUGE;
    pdpt[MIG_MAILBOX_GPA >> GIB_SHIFT] = device_pd_gpa | flags;
    device_pd[0] = MIG_MAILBOX_GPA | flags | PTE_HUGE;
    device_pd[1] = MIG_DOORBELL_GPA | flags | PTE_HUGE;
}

/* Long mode at CPL 3, as it runs natively on VT-x, SVM and KVM-PVM. */
static int set_registers(struct mig_vcpu *vcpu, uint64_t code_gpa, uint64_t stack_gpa)
{
    struct kvm_sregs sregs;
    struct kvm_segment code = {
        .limit = 0xfffff, .selector = 0x33, .present = 1, .type = 11, .dpl = 3, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {
        .limit = 0xfffff, .selector = 0x2b, .present = 1, .type = 3, .dpl = 3, .s = 1, .db = 1, .g = 1};
    const uint64_t entry_offset = (uint64_t)((const char *)mig_payload_guest_entry - __start_mig_guest);

    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
        return -errno;
    sregs.cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
    sregs.cr3 = MIG_PAGE_TABLE_GPA;
    sregs.cr4 = 0x620;  /* OSXMMEXCPT OSFXSR PAE */
    sregs.efer = 0xd01; /* NXE LMA LME SCE */
    memset(&sregs.ldt, 0, sizeof(sregs.ldt));
    sregs.tr.present = 1;
    sregs.tr.type = 11;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0)
        return -errno;
    const struct kvm_regs regs = {
        .rip = code_gpa + entry_offset,
        .rflags = 0x202,
        /* As after a call: 16-byte aligned before the return address. */
        .rsp = stack_gpa + (vcpu->index + 1) * MIG_PAGE_SIZE_BYTES - 8,
        .rdi = 0,
        .rsi = MIG_MAILBOX_GPA + vcpu->index * sizeof(struct mig_mailbox),
        .rdx = vcpu->index,
        .rcx = MIG_DOORBELL_GPA,
    };
    return ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0 ? -errno : 0;
}

int mig_machine_boot(struct mig_machine *machine, uint64_t code_gpa, uint64_t stack_gpa)
{
    if (!mig_machine_is_kvm(machine))
        return 0;
    write_page_tables(machine);
    memcpy(machine->ram + code_gpa, __start_mig_guest, (size_t)(__stop_mig_guest - __start_mig_guest));
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < machine->vcpu_count; i++)
        rc = set_registers(&machine->vcpus[i], code_gpa, stack_gpa);
    return rc;
}
