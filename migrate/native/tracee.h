/*
 * One thread of another process, held by ptrace so that it runs system calls for us; see ptrace(2).
 *
 * All calls come from one thread of ours, which must end once it is done: the kernel then lets go of a tracee that
 * could not be stopped. A thread whose call was interrupted goes on with it as if nothing had been, by the kernel's
 * own rules; signals wait until then. Should we die between mig_tracee_call and mig_tracee_release, a few ten
 * microseconds, the process dies of it.
 */
#ifndef MIG_TRACEE_H
#define MIG_TRACEE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/user.h>

struct mig_tracee {
    pid_t pid, tid;
    uint64_t syscall_hva;          /* of a syscall instruction */
    struct user_regs_struct found; /* the registers to go on with */
    uint64_t signal_mask;
    uint64_t stopped_ns; /* when it stopped */
    bool has_called;
};

/**
 * Stop the thread. suspends_seccomp: its filters do not apply while it is held; takes CAP_SYS_ADMIN.
 *
 * Returns 0 or -errno, with the thread running on: -ESRCH it has ended, -EPERM it may not be traced, -ETIMEDOUT it did
 * not stop, -ENOEXEC it is not of 64 bits, -EFAULT there is no syscall instruction at syscall_hva.
 */
int mig_tracee_stop(struct mig_tracee *tracee, bool suspends_seccomp, uint64_t deadline_ns);

/**
 * Run one system call in it, however long that takes. *ret_value is the kernel's answer, -errno among it.
 *
 * Returns 0 or -errno: -ESRCH it has ended, -EFAULT it was kept from making the call.
 */
int mig_tracee_call(struct mig_tracee *tracee, long number, const uint64_t arguments[6], int64_t *ret_value);

/** Write a word into its memory. Returns 0 or -errno. */
int mig_tracee_poke(struct mig_tracee *tracee, uint64_t hva, uint64_t word);

/** Let it go on where it was. Returns 0, or -ESRCH if it has ended. */
int mig_tracee_release(struct mig_tracee *tracee);

#endif
