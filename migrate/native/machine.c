#include "machine.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <x86intrin.h>

#include "machine_internal.h"
#include "payload.h"
#include "units.h"

static void ignore_kick(int number)
{
    (void)number; /* its arrival alone makes KVM_RUN return */
}

static struct timespec to_timespec(uint64_t time_ns)
{
    return (struct timespec){.tv_sec = (time_t)(time_ns / 1000000000u), .tv_nsec = (long)(time_ns % 1000000000u)};
}

static void park(struct mig_vcpu *vcpu)
{
    struct mig_machine *machine = vcpu->machine;

    if (vcpu->mmio_pending) {
        /* KVM finishes the instruction on the next entry; only then is the state one between two instructions. */
        vcpu->run->immediate_exit = 1;
        mig_vcpu_enter(vcpu);
        vcpu->mmio_pending = false;
    }
    pthread_mutex_lock(&machine->mutex);
    vcpu->parked = true;
    pthread_cond_broadcast(&machine->changed);
    while (machine->paused)
        pthread_cond_wait(&machine->changed, &machine->mutex);
    vcpu->parked = false;
    if (vcpu->run)
        vcpu->run->immediate_exit = 0;
    pthread_mutex_unlock(&machine->mutex);
}

/* Sleeps for the workload; a pause ends it early. */
static void sleep_ticks(struct mig_machine *machine, uint64_t ticks)
{
    const struct timespec deadline = to_timespec(mig_now_ns() + ticks * 1000000 / machine->tsc_khz);

    pthread_mutex_lock(&machine->mutex);
    while (!machine->paused && pthread_cond_timedwait(&machine->changed, &machine->mutex, &deadline) != ETIMEDOUT)
        ;
    pthread_mutex_unlock(&machine->mutex);
}

static void hear(struct mig_machine *machine, uint64_t code)
{
    if ((code & 0xff) == MIG_PAYLOAD_SLEEP)
        sleep_ticks(machine, code >> 8);
}

/* Returns false when the vCPU cannot go on. */
static bool run_kvm(struct mig_vcpu *vcpu)
{
    struct mig_machine *machine = vcpu->machine;
    struct kvm_run *run = vcpu->run;

    vcpu->mmio_pending = false;
    const int rc = mig_vcpu_enter(vcpu);
    if (rc == -EINTR || rc == -EAGAIN)
        return true;
    if (rc == -EHWPOISON || rc == -EFAULT) {
        mig_vcpu_fail_memory(vcpu);
        return false;
    }
    if (rc < 0) {
        mig_machine_fail(machine, "vCPU %u: KVM_RUN: %s", vcpu->index, strerror(-rc));
        return false;
    }
    if (run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.phys_addr == MIG_DOORBELL_GPA) {
        uint64_t code = 0;
        memcpy(&code, run->mmio.data, sizeof(code));
        vcpu->mmio_pending = true;
        hear(machine, code);
        return true;
    }
    if (run->exit_reason == KVM_EXIT_INTR)
        return true;
    if (run->exit_reason == KVM_EXIT_SHUTDOWN)
        mig_machine_fail(machine, "vCPU %u: triple fault, as when its page tables were lost in a migration",
                         vcpu->index);
    else
        mig_machine_fail(machine, "vCPU %u: unexpected exit %u of KVM_RUN", vcpu->index, run->exit_reason);
    return false;
}

static bool run_payload(struct mig_vcpu *vcpu)
{
    uint64_t code;

    if (mig_vcpu_step(vcpu, &code) < 0) {
        mig_vcpu_fail_memory(vcpu);
        return false;
    }
    hear(vcpu->machine, code);
    return true;
}

static void *vcpu_thread(void *argument)
{
    struct mig_vcpu *vcpu = argument;
    struct mig_machine *machine = vcpu->machine;

    __atomic_store_n(&vcpu->thread_id, (uint32_t)gettid(), __ATOMIC_RELAXED);
    mig_vcpu_claim_thread(vcpu);
    for (bool alive = true; alive;) {
        if (__atomic_load_n(&machine->paused, __ATOMIC_ACQUIRE))
            park(vcpu);
        else
            alive = vcpu->run ? run_kvm(vcpu) : run_payload(vcpu);
    }
    /* It stands still for good; `failure` says why. */
    pthread_mutex_lock(&machine->mutex);
    vcpu->parked = true;
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->mutex);
    return NULL;
}

static uint64_t measure_tsc_khz(void)
{
    const uint64_t begin_ns = mig_now_ns(), begin_ticks = __rdtsc();
    uint64_t now_ns;
    do
        now_ns = mig_now_ns();
    while (now_ns - begin_ns < 10 * 1000 * 1000);
    return (__rdtsc() - begin_ticks) * 1000000 / (now_ns - begin_ns);
}

int mig_machine_create(char *ram, uint64_t ram_bytes, struct mig_mailbox *mailboxes, uint32_t vcpus,
                       const struct mig_cpuid_entry *cpuid, uint32_t cpuid_count, struct mig_machine **ret,
                       const char **ret_operation)
{
    struct mig_machine *machine = calloc(1, sizeof(*machine));
    const struct sigaction kick = {.sa_handler = ignore_kick};
    pthread_condattr_t attributes;

    *ret_operation = "create the machine";
    if (!machine)
        return -ENOMEM;
    if (vcpus < 1 || vcpus > MIG_VCPUS_MAX) {
        free(machine);
        return -EINVAL;
    }
    *machine = (struct mig_machine){.ram = ram, .ram_bytes = ram_bytes, .mailboxes = mailboxes, .vcpu_count = vcpus};
    machine->kvm_fd = machine->vm_fd = -1;
    machine->paused = true;
    pthread_mutex_init(&machine->mutex, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&machine->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    sigaction(SIGRTMIN, &kick, NULL);
    mig_memory_error_handle();
    for (uint32_t i = 0; i < vcpus; i++)
        machine->vcpus[i] = (struct mig_vcpu){.machine = machine, .index = i, .fd = -1};
    /* On failure the process ends, and with it every descriptor and mapping. */
    int rc = cpuid_count ? mig_kvm_create(machine, cpuid, cpuid_count, ret_operation) : 0;
    if (rc == 0 && !machine->tsc_khz)
        machine->tsc_khz = measure_tsc_khz();
    for (uint32_t i = 0; rc == 0 && i < vcpus; i++) {
        *ret_operation = "start a vCPU thread";
        rc = -pthread_create(&machine->vcpus[i].thread, NULL, vcpu_thread, &machine->vcpus[i]);
    }
    *ret = machine;
    return rc;
}

void mig_machine_resume(struct mig_machine *machine)
{
    pthread_mutex_lock(&machine->mutex);
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        __atomic_store_n(&machine->mailboxes[i].stop, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&machine->paused, false, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&machine->changed);
    pthread_mutex_unlock(&machine->mutex);
}

static bool all_parked(const struct mig_machine *machine)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        if (!machine->vcpus[i].parked)
            return false;
    return true;
}

int mig_machine_pause(struct mig_machine *machine, uint64_t timeout_us)
{
    const struct timespec deadline = to_timespec(mig_now_ns() + timeout_us * 1000);
    bool in_time = true;

    pthread_mutex_lock(&machine->mutex);
    __atomic_store_n(&machine->paused, true, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < machine->vcpu_count; i++) {
        struct mig_vcpu *vcpu = &machine->vcpus[i];
        if (vcpu->run) {
            /* In this order: a vCPU that is about to enter sees the flag, one that is inside gets the signal. */
            __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
            pthread_kill(vcpu->thread, SIGRTMIN);
        } else {
            __atomic_store_n(&machine->mailboxes[i].stop, 1, __ATOMIC_RELEASE);
        }
    }
    pthread_cond_broadcast(&machine->changed); /* ends sleeps */
    while (in_time && !all_parked(machine))
        in_time = pthread_cond_timedwait(&machine->changed, &machine->mutex, &deadline) != ETIMEDOUT;
    const bool stopped = all_parked(machine);
    pthread_mutex_unlock(&machine->mutex);
    if (stopped)
        return 0;
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        if (machine->vcpus[i].run)
            machine->vcpus[i].run->immediate_exit = 0;
    mig_machine_resume(machine);
    return -ETIMEDOUT;
}

const char *mig_machine_failure(const struct mig_machine *machine)
{
    return __atomic_load_n(&machine->has_failed, __ATOMIC_ACQUIRE) ? machine->failure : "";
}

uint32_t mig_machine_thread_id(const struct mig_machine *machine, uint32_t vcpu)
{
    return __atomic_load_n(&machine->vcpus[vcpu].thread_id, __ATOMIC_RELAXED);
}

uint64_t mig_machine_tsc_khz(const struct mig_machine *machine)
{
    return machine->tsc_khz;
}
