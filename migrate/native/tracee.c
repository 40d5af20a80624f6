#include "tracee.h"

#include <elf.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "target.h"
#include "units.h"

/* linux/ptrace.h has it, which does not go with sys/ptrace.h. */
#ifndef PTRACE_O_SUSPEND_SECCOMP
#define PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#endif

/* linux/errno.h keeps it from user space. */
#define ERESTARTNOHAND 514ll

enum { SYSCALL_BYTES = 2, SYSCALL_OPCODE = 0x050f, SPIN_NS = 200000, POLL_NS = 50000 };
#define NO_DEADLINE UINT64_MAX

enum stop { STOP_BY_US, STOP_SYSCALL, STOP_SIGNAL };

/*
 * Waits for a stop. The siginfo is asked for instead of waitpid(2), which another thread of ours, waiting for a child
 * of ours, would win.
 */
static int await_stop(const struct mig_tracee *tracee, uint64_t deadline_ns, int *ret_signal)
{
    const struct timespec pause = {.tv_nsec = POLL_NS};
    const uint64_t began_ns = mig_now_ns();
    siginfo_t info;

    while (ptrace(PTRACE_GETSIGINFO, tracee->tid, NULL, &info) < 0) {
        const uint64_t now_ns = mig_now_ns();
        if (now_ns - began_ns < SPIN_NS) {
            sched_yield();
            continue;
        }
        const char state = mig_target_thread_state(tracee->pid, tracee->tid);
        if (state == 0 || state == 'Z' || state == 'X')
            return -ESRCH;
        if (now_ns > deadline_ns)
            return -ETIMEDOUT;
        nanosleep(&pause, NULL);
    }
    *ret_signal = info.si_signo;
    if (info.si_code == (SIGTRAP | 0x80))
        return STOP_SYSCALL;
    return info.si_code >> 8 == PTRACE_EVENT_STOP ? STOP_BY_US : STOP_SIGNAL;
}

/* Lets it run to the next stop of that kind; signals that come up on the way take their course. */
static int run_to(const struct mig_tracee *tracee, int request, enum stop wanted, uint64_t deadline_ns)
{
    int stop, signal = 0;

    if (request && ptrace(request, tracee->tid, NULL, NULL) < 0)
        return -errno;
    while ((stop = await_stop(tracee, deadline_ns, &signal)) >= 0 && stop != (int)wanted) {
        /* All others are blocked while it works for us: this one is of our making. */
        if (stop == STOP_SIGNAL && wanted == STOP_SYSCALL && signal != SIGSTOP)
            return -EFAULT;
        const long passed_on = stop == STOP_SIGNAL ? signal : 0;
        if (ptrace(request ? request : PTRACE_CONT, tracee->tid, NULL, passed_on) < 0)
            return -errno;
    }
    return stop < 0 ? stop : 0;
}

static bool is_syscall_at(const struct mig_tracee *tracee, uint64_t hva)
{
    errno = 0;
    const long word = ptrace(PTRACE_PEEKTEXT, tracee->tid, hva, NULL);
    return errno == 0 && (word & 0xffff) == SYSCALL_OPCODE;
}

/*
 * A few calls answer EINTR where others are restarted by the kernel (signal(7), "Interruption of system calls [...] by
 * stop signals"). Have it answer what those answer: EINTR if a handler runs, else it is made anew. One with a timeout
 * then waits for all of it once more.
 */
static void undo_interruption(struct mig_tracee *tracee)
{
    struct user_regs_struct *found = &tracee->found;

    if ((int64_t)found->rax != -EINTR)
        return;
    switch ((long)found->orig_rax) {
    case SYS_epoll_wait:
    case SYS_epoll_pwait:
    case SYS_epoll_pwait2:
    case SYS_rt_sigtimedwait:
    case SYS_semop:
    case SYS_semtimedop:
    case SYS_msgrcv:
    case SYS_msgsnd:
    case SYS_io_getevents:
    case SYS_io_pgetevents:
        break;
    default:
        return;
    }
    if (is_syscall_at(tracee, found->rip - SYSCALL_BYTES))
        found->rax = (uint64_t)-ERESTARTNOHAND;
}

static int look_around(struct mig_tracee *tracee)
{
    struct iovec regs = {.iov_base = &tracee->found, .iov_len = sizeof(tracee->found)};

    if (ptrace(PTRACE_GETREGSET, tracee->tid, NT_PRSTATUS, &regs) < 0)
        return -errno;
    if (regs.iov_len != sizeof(tracee->found))
        return -ENOEXEC;
    if (ptrace(PTRACE_GETSIGMASK, tracee->tid, sizeof(tracee->signal_mask), &tracee->signal_mask) < 0)
        return -errno;
    return is_syscall_at(tracee, tracee->syscall_hva) ? 0 : -EFAULT;
}

int mig_tracee_stop(struct mig_tracee *tracee, bool suspends_seccomp, uint64_t deadline_ns)
{
    const long options = PTRACE_O_TRACESYSGOOD | (suspends_seccomp ? PTRACE_O_SUSPEND_SECCOMP : 0);

    tracee->has_called = false;
    if (ptrace(PTRACE_SEIZE, tracee->tid, NULL, options) < 0)
        return -errno;
    int rc = ptrace(PTRACE_INTERRUPT, tracee->tid, NULL, NULL) < 0 ? -errno : 0;
    if (rc == 0)
        rc = run_to(tracee, 0, STOP_BY_US, deadline_ns);
    if (rc < 0)
        return rc; /* not stopped, so it cannot be let go of: this thread's end does it */
    tracee->stopped_ns = mig_now_ns();
    rc = look_around(tracee);
    if (rc < 0) {
        ptrace(PTRACE_DETACH, tracee->tid, NULL, NULL);
        return rc;
    }
    undo_interruption(tracee);
    return 0;
}

int mig_tracee_call(struct mig_tracee *tracee, long number, const uint64_t arguments[6], int64_t *ret_value)
{
    /* A filter's SIGSYS is forced on who makes the call; were it blocked, its handler would be lost, too. */
    const uint64_t blocked = ~(1ull << (SIGSYS - 1));
    struct user_regs_struct regs = tracee->found;

    regs.rip = tracee->syscall_hva;
    regs.rax = (uint64_t)number;
    regs.orig_rax = UINT64_MAX; /* nothing to restart */
    regs.rdi = arguments[0];
    regs.rsi = arguments[1];
    regs.rdx = arguments[2];
    regs.r10 = arguments[3];
    regs.r8 = arguments[4];
    regs.r9 = arguments[5];
    tracee->has_called = true;
    if (ptrace(PTRACE_SETSIGMASK, tracee->tid, sizeof(blocked), &blocked) < 0 ||
        ptrace(PTRACE_SETREGS, tracee->tid, NULL, &regs) < 0)
        return -errno;
    int rc = run_to(tracee, PTRACE_SYSCALL, STOP_SYSCALL, NO_DEADLINE); /* enters the call */
    if (rc == 0)
        rc = run_to(tracee, PTRACE_SYSCALL, STOP_SYSCALL, NO_DEADLINE); /* leaves it */
    if (rc == 0 && ptrace(PTRACE_GETREGS, tracee->tid, NULL, &regs) < 0)
        rc = -errno;
    *ret_value = (int64_t)regs.rax;
    return rc;
}

int mig_tracee_poke(struct mig_tracee *tracee, uint64_t hva, uint64_t word)
{
    return ptrace(PTRACE_POKEDATA, tracee->tid, hva, word) < 0 ? -errno : 0;
}

int mig_tracee_release(struct mig_tracee *tracee)
{
    int rc = 0;

    if (tracee->has_called) {
        /* Only who goes on from here restarts an interrupted call, or answers EINTR if a signal's handler runs. */
        rc = ptrace(PTRACE_INTERRUPT, tracee->tid, NULL, NULL) < 0 ? -errno : 0;
        if (rc == 0)
            rc = run_to(tracee, PTRACE_CONT, STOP_BY_US, NO_DEADLINE);
    }
    /* It may have been changed by what undid an interruption, even if nothing was called. */
    if (rc == 0 && (ptrace(PTRACE_SETREGS, tracee->tid, NULL, &tracee->found) < 0 ||
                    ptrace(PTRACE_SETSIGMASK, tracee->tid, sizeof(tracee->signal_mask), &tracee->signal_mask) < 0 ||
                    ptrace(PTRACE_DETACH, tracee->tid, NULL, NULL) < 0))
        rc = -errno;
    return rc;
}
