/*
 * A vCPU that touches a page which is not to be had: it stops for good, and the guest's process lives.
 *
 * The kernel sends SIGBUS to the thread. The payload of kind process is left with a jump: it holds no lock, and its
 * memory is as torn as the guest's. KVM_RUN is interrupted by the signal's arrival, and finds it noted.
 */
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/ioctl.h>

#include "machine_internal.h"
#include "payload.h"

/* Its first use must not allocate: it is read in a signal handler. */
static __thread __attribute__((tls_model("initial-exec"))) struct mig_vcpu *this_vcpu;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    struct mig_vcpu *vcpu = this_vcpu;

    (void)context;
    if (!vcpu || !vcpu->is_inside || info->si_code <= 0) {
        /* Not the guest's, or not the kernel's: as if nobody handled it. */
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    vcpu->memory_error = (struct mig_memory_error){.code = info->si_code, .hva = (uintptr_t)info->si_addr};
    if (!vcpu->run)
        siglongjmp(vcpu->way_out, 1);
}

void mig_memory_error_handle(void)
{
    /* Not deferred, so that a jump out of it leaves the signal as it was. */
    const struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGBUS, &action, NULL);
}

void mig_vcpu_claim_thread(struct mig_vcpu *vcpu)
{
    this_vcpu = vcpu;
}

int mig_vcpu_step(struct mig_vcpu *vcpu, uint64_t *ret_code)
{
    struct mig_machine *machine = vcpu->machine;

    if (sigsetjmp(vcpu->way_out, 0)) {
        vcpu->is_inside = false;
        return -EHWPOISON;
    }
    vcpu->is_inside = true;
    *ret_code = mig_payload_step(machine->ram, &machine->mailboxes[vcpu->index], vcpu->index);
    vcpu->is_inside = false;
    return 0;
}

int mig_vcpu_enter(struct mig_vcpu *vcpu)
{
    vcpu->is_inside = true;
    const int rc = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;
    vcpu->is_inside = false;
    return vcpu->memory_error.code ? -EHWPOISON : rc;
}

void mig_machine_fail(struct mig_machine *machine, const char *format, ...)
{
    va_list arguments;

    va_start(arguments, format);
    pthread_mutex_lock(&machine->mutex);
    if (!machine->has_failed)
        vsnprintf(machine->failure, sizeof(machine->failure), format, arguments);
    __atomic_store_n(&machine->has_failed, true, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&machine->mutex);
    va_end(arguments);
}

void mig_vcpu_fail_memory(struct mig_vcpu *vcpu)
{
    const struct mig_machine *machine = vcpu->machine;
    const uint64_t gpa = vcpu->memory_error.hva - (uintptr_t)machine->ram;
    /* A kernel without CONFIG_MEMORY_FAILURE tells user code of poison as it does of a tmpfs that is full. */
    const bool is_poison = !vcpu->memory_error.code || vcpu->memory_error.code == BUS_MCEERR_AR;
    const char *cause = is_poison ? "the page was lost in a migration"
                                  : "the page was lost in a migration, or this host has no memory for it";

    if (vcpu->memory_error.code && gpa < machine->ram_bytes)
        mig_machine_fail(vcpu->machine, "vCPU %u: memory error at guest address %#llx: %s", vcpu->index,
                         (unsigned long long)gpa, cause);
    else
        mig_machine_fail(vcpu->machine, "vCPU %u: memory error: %s", vcpu->index, cause);
}
