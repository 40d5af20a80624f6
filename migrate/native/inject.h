/*
 * A userfaultfd inside another process, an unpatched hypervisor for one, made from outside; see tracee.h for how.
 *
 * The process keeps its copy: while no daemon holds one, its faults wait instead of reading zeros.
 */
#ifndef MIG_INJECT_H
#define MIG_INJECT_H

#include <stdbool.h>
#include <stdint.h>

/* What came of it. In all cases but the first, nothing was changed in the process, which runs on. */
enum mig_inject_outcome {
    MIG_INJECT_DONE = 0,
    MIG_INJECT_GONE,          /* there is no such process, or it has ended */
    MIG_INJECT_NOT_ALLOWED,   /* the kernel lets us not trace it, or not have its descriptor */
    MIG_INJECT_TRACED,        /* somebody else traces it */
    MIG_INJECT_NOT_64_BIT,    /* its system calls are other ones */
    MIG_INJECT_NO_SYSCALL,    /* no syscall instruction was found in it */
    MIG_INJECT_FILTERED,      /* its seccomp filter might kill it for the call, and could not be suspended */
    MIG_INJECT_NOT_STOPPED,   /* none of its threads stopped in time, as in uninterruptible sleep */
    MIG_INJECT_CALL_REFUSED,  /* the process itself may not make the call */
    MIG_INJECT_CALL_UNENDING, /* the call has not returned; the process is let go as soon as it does */
};

struct mig_inject_terms {
    uint64_t timeout_us;  /* for the stop; the call itself has a second more */
    bool despite_seccomp; /* a filter that cannot be suspended is no obstacle */
};

struct mig_injected {
    int fd;              /* ours, close-on-exec */
    int target_fd;       /* the process's own number for it */
    int error;           /* errno of an outcome that has one */
    int tracer_pid;      /* of MIG_INJECT_TRACED */
    uint64_t stopped_ns; /* how long one of its threads stood still */
};

/**
 * Have a process open a userfaultfd, non-blocking and close-on-exec, and take a copy. Hands are not shaken yet.
 *
 * The system call is tried first; where that takes a privilege that the process lacks, /dev/userfaultfd.
 *
 * Returns an outcome, or -errno if we ourselves lack something.
 */
int mig_inject_open_uffd(int pid, const struct mig_inject_terms *terms, struct mig_injected *ret);

/**
 * Have the process close its copy again. Done, too, if target_fd is no longer what `fd`, our copy, is.
 *
 * Returns an outcome, or -errno if we ourselves lack something.
 */
int mig_inject_close_fd(int pid, int fd, int target_fd, const struct mig_inject_terms *terms, struct mig_injected *ret);

/** Whether this process may trace others at all, and copy their descriptors. Returns 0 or -errno. */
int mig_inject_probe(void);

#endif
