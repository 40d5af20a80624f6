/* What /proc says of another process that we want a system call of. Touches nothing in it. */
#ifndef MIG_TARGET_H
#define MIG_TARGET_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum { MIG_TARGET_THREADS_MAX = 64 };

/** State letter of a thread, as ps shows it; 0 once it is gone. */
char mig_target_thread_state(pid_t pid, pid_t tid);

/** A number from /proc/PID/task/TID/status, as TracerPid (base 10) or SigPnd (base 16). 0, or -errno; -ENOENT without
 * that field. */
int mig_target_status(pid_t pid, pid_t tid, const char *field, int base, uint64_t *ret);

/**
 * Threads of a process, at most MIG_TARGET_THREADS_MAX, those first that a stop is likely to reach soon: the main
 * thread, then those that run or sleep, then those in uninterruptible sleep. Returns how many, or -errno.
 */
int mig_target_threads(pid_t pid, pid_t *tids);

/**
 * Find a syscall instruction: in the vdso if it has one, else in any other code.
 *
 * Returns 0 or -errno: -EACCES or -EPERM if its memory is closed to us, -ENOENT if there is none.
 */
int mig_target_find_syscall(pid_t pid, uint64_t *ret_hva);

#endif
