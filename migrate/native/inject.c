#include "inject.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "target.h"
#include "tracee.h"
#include "units.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

enum { THREAD_SHARE = 4, GRACE_NS = 1000000000, POLL_NS = 100000, ENDING_MS = 50, TRIES = 100 };

/* Runs on a thread of its own, whose end lets go of what could not be stopped; outlives a caller that gave up. */
struct job {
    pid_t pid;
    int pidfd;
    int fd, target_fd; /* to close; none to open one */
    struct mig_inject_terms terms;
    uint64_t deadline_ns;
    struct mig_injected injected;
    int outcome;

    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t finished;
    bool is_finished, is_abandoned;
};

static bool has_ended(const struct job *job, int timeout_ms)
{
    struct pollfd pollfd = {.fd = job->pidfd, .events = POLLIN};
    return poll(&pollfd, 1, timeout_ms) == 1;
}

/* ---- in the process, while one of its threads is held ---- */

static int call(struct mig_tracee *tracee, int64_t *ret, long number, uint64_t first, uint64_t second, uint64_t third)
{
    const uint64_t arguments[6] = {first, second, third};
    return mig_tracee_call(tracee, number, arguments, ret);
}

/* The path has to stand somewhere in its memory: in a page that is there for as long as it takes. */
static int open_through_device(struct mig_tracee *tracee, int64_t *ret_fd)
{
    static const char PATH[24] = "/dev/userfaultfd";
    const uint64_t map[6] = {0, MIG_PAGE_SIZE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, UINT64_MAX};
    int64_t page_hva, device_fd, ignored;
    uint64_t word;

    int rc = mig_tracee_call(tracee, SYS_mmap, map, &page_hva);
    if (rc < 0 || page_hva < 0) {
        *ret_fd = page_hva;
        return rc;
    }
    for (size_t at = 0; rc == 0 && at < sizeof(PATH); at += sizeof(word)) {
        memcpy(&word, PATH + at, sizeof(word));
        rc = mig_tracee_poke(tracee, (uint64_t)page_hva + at, word);
    }
    if (rc == 0)
        rc = call(tracee, &device_fd, SYS_openat, (uint64_t)AT_FDCWD, (uint64_t)page_hva, O_RDWR | O_CLOEXEC);
    if (rc == 0)
        *ret_fd = device_fd;
    if (rc == 0 && device_fd >= 0) {
        rc = call(tracee, ret_fd, SYS_ioctl, (uint64_t)device_fd, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        if (rc == 0)
            rc = call(tracee, &ignored, SYS_close, (uint64_t)device_fd, 0, 0);
    }
    if (rc == 0)
        rc = call(tracee, &ignored, SYS_munmap, (uint64_t)page_hva, MIG_PAGE_SIZE_BYTES, 0);
    return rc;
}

static int open_in(struct job *job, struct mig_tracee *tracee)
{
    int64_t answer, by_device, ignored;

    int rc = call(tracee, &answer, SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0);
    if (rc == 0 && answer == -EPERM) {
        rc = open_through_device(tracee, &by_device);
        if (rc == 0 && by_device != -ENOENT)
            answer = by_device;
    }
    if (rc < 0)
        return rc;
    if (answer < 0) {
        job->injected.error = (int)-answer;
        return MIG_INJECT_CALL_REFUSED;
    }
    pthread_mutex_lock(&job->mutex);
    const bool is_abandoned = job->is_abandoned;
    pthread_mutex_unlock(&job->mutex);
    const int fd = is_abandoned ? -1 : (int)syscall(SYS_pidfd_getfd, job->pidfd, (int)answer, 0);
    if (fd < 0) {
        job->injected.error = errno;
        rc = call(tracee, &ignored, SYS_close, (uint64_t)answer, 0, 0);
        return rc < 0 ? rc : MIG_INJECT_NOT_ALLOWED;
    }
    job->injected.fd = fd;
    job->injected.target_fd = (int)answer;
    return MIG_INJECT_DONE;
}

static int close_in(struct job *job, struct mig_tracee *tracee)
{
    int64_t answer;
    const int rc = call(tracee, &answer, SYS_close, (uint64_t)job->target_fd, 0, 0);

    if (rc < 0)
        return rc;
    job->injected.error = answer < 0 ? (int)-answer : 0;
    return answer < 0 && answer != -EBADF ? MIG_INJECT_CALL_REFUSED : MIG_INJECT_DONE;
}

/* ---- up to there, and back ---- */

static bool is_32_bit(pid_t pid)
{
    unsigned char ident[5] = {0};
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/exe", pid);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false; /* the registers will tell */
    const bool is_read = read(fd, ident, sizeof(ident)) == sizeof(ident);
    close(fd);
    return is_read && ident[4] == 1; /* ELFCLASS32 */
}

/* Whether the descriptor there is still the one that we have a copy of. */
static bool is_same_file(const struct job *job)
{
    char path[64], name[64];
    const long order = syscall(SYS_kcmp, getpid(), job->pid, KCMP_FILE, job->fd, job->target_fd);

    if (order >= 0)
        return order == 0;
    if (errno == EBADF)
        return false;
    /* A kernel without kcmp(2), or one that keeps it from us: a userfaultfd at that number it is at least. */
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", job->pid, job->target_fd);
    const ssize_t name_bytes = readlink(path, name, sizeof(name) - 1);
    name[name_bytes > 0 ? name_bytes : 0] = '\0';
    return strcmp(name, "anon_inode:[userfaultfd]") == 0;
}

/* Whoever traces it, but for a thread of ours on its way out. 0 or an outcome. */
static int find_tracer(struct job *job)
{
    const struct timespec pause = {.tv_nsec = POLL_NS};
    uint64_t tracer = 0, process = 0;

    while (mig_target_status(job->pid, job->pid, "TracerPid", 10, &tracer) == 0 && tracer != 0) {
        /* It is a thread; whose, its own status says, unless it has just ended. */
        const bool is_there = mig_target_status((pid_t)tracer, (pid_t)tracer, "Tgid", 10, &process) == 0;
        if ((is_there && process != (uint64_t)getpid()) || mig_now_ns() > job->deadline_ns) {
            job->injected.tracer_pid = (int)(is_there ? process : tracer);
            return MIG_INJECT_TRACED;
        }
        nanosleep(&pause, NULL);
    }
    return 0;
}

static int hold(struct job *job, struct mig_tracee *tracee, uint64_t deadline_ns)
{
    uint64_t seccomp = 0;

    mig_target_status(tracee->pid, tracee->tid, "Seccomp", 10, &seccomp);
    if (seccomp) {
        const int rc = mig_tracee_stop(tracee, true, deadline_ns);
        if (rc != -EPERM && rc != -EINVAL)
            return rc;
        if (!job->terms.despite_seccomp)
            return MIG_INJECT_FILTERED;
    }
    return mig_tracee_stop(tracee, false, deadline_ns);
}

/* Holds one of its threads; 0, an outcome or -errno. */
static int hold_any(struct job *job, struct mig_tracee *tracee)
{
    pid_t tids[MIG_TARGET_THREADS_MAX];
    const uint64_t share_ns = job->terms.timeout_us * 1000 / THREAD_SHARE;
    const int count = mig_target_threads(job->pid, tids);
    int rc = count == 0 ? -ESRCH : count < 0 ? count : MIG_INJECT_NOT_STOPPED;

    for (int i = 0; i < count; i++) {
        const uint64_t now_ns = mig_now_ns();
        if (now_ns > job->deadline_ns)
            break;
        tracee->tid = tids[i];
        const bool is_last = i + 1 == count;
        rc = hold(job, tracee, is_last ? job->deadline_ns : mig_smaller(now_ns + share_ns, job->deadline_ns));
        if (rc != -ETIMEDOUT && rc != -ESRCH)
            return rc;
    }
    return rc == -ETIMEDOUT && !has_ended(job, 0) ? MIG_INJECT_NOT_STOPPED : rc;
}

static int outcome_of(const struct job *job, int rc)
{
    /* One that is about to end fails in many ways. */
    if (rc < 0 && has_ended(job, ENDING_MS))
        return MIG_INJECT_GONE;
    switch (-rc) {
    case ESRCH:
        return MIG_INJECT_GONE;
    case EPERM:
    case EACCES:
        return MIG_INJECT_NOT_ALLOWED;
    case ENOEXEC:
        return MIG_INJECT_NOT_64_BIT;
    case ENOENT:
        return MIG_INJECT_NO_SYSCALL;
    case EFAULT: /* the program was exchanged for another one, or its filter did not let the call through */
        return MIG_INJECT_CALL_REFUSED;
    default:
        return rc;
    }
}

/* The same; threads of ours take turns, of which the kernel says no more than that tracing is not permitted. */
static int hold_in_turn(struct job *job, struct mig_tracee *tracee)
{
    int rc = 0;

    for (int i = 0; i < TRIES; i++) {
        rc = find_tracer(job);
        if (rc == 0)
            rc = hold_any(job, tracee);
        if (rc != -EPERM && rc != MIG_INJECT_FILTERED)
            break;
        nanosleep(&(struct timespec){.tv_nsec = POLL_NS}, NULL);
    }
    return rc;
}

static int run(struct job *job)
{
    struct mig_tracee tracee = {.pid = job->pid};

    if (has_ended(job, 0))
        return MIG_INJECT_GONE;
    int rc = find_tracer(job);
    if (rc == 0 && is_32_bit(job->pid))
        rc = MIG_INJECT_NOT_64_BIT;
    if (rc == 0)
        rc = mig_target_find_syscall(job->pid, &tracee.syscall_hva);
    if (rc == 0 && job->fd >= 0 && !is_same_file(job))
        return MIG_INJECT_DONE;
    if (rc == 0)
        rc = hold_in_turn(job, &tracee);
    if (rc == 0) {
        rc = job->fd < 0 ? open_in(job, &tracee) : close_in(job, &tracee);
        const int released = mig_tracee_release(&tracee);
        job->injected.stopped_ns = mig_now_ns() - tracee.stopped_ns;
        if (released < 0 && rc == 0 && job->injected.fd >= 0) {
            close(job->injected.fd);
            job->injected.fd = -1;
        }
        rc = released < 0 ? released : rc;
    }
    if (rc == -EFAULT)
        job->injected.error = EFAULT;
    return outcome_of(job, rc);
}

/* ---- the thread ---- */

static void destroy(struct job *job)
{
    close(job->pidfd);
    pthread_cond_destroy(&job->finished);
    pthread_mutex_destroy(&job->mutex);
    free(job);
}

static void *work(void *argument)
{
    struct job *job = argument;

    job->outcome = run(job);
    pthread_mutex_lock(&job->mutex);
    job->is_finished = true;
    const bool is_abandoned = job->is_abandoned;
    pthread_cond_signal(&job->finished);
    pthread_mutex_unlock(&job->mutex);
    if (is_abandoned) {
        if (job->injected.fd >= 0)
            close(job->injected.fd);
        destroy(job);
    }
    return NULL;
}

/* Waits for the thread, or gives it up. Returns an outcome or -errno. */
static int await(struct job *job, pthread_t thread, struct mig_injected *ret)
{
    const uint64_t until_ns = job->deadline_ns + GRACE_NS;
    const struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000), .tv_nsec = (long)(until_ns % 1000000000)};
    int rc = 0;

    pthread_mutex_lock(&job->mutex);
    while (!job->is_finished && rc == 0)
        rc = pthread_cond_clockwait(&job->finished, &job->mutex, CLOCK_MONOTONIC, &until);
    job->is_abandoned = !job->is_finished;
    const bool is_abandoned = job->is_abandoned;
    pthread_mutex_unlock(&job->mutex);
    if (is_abandoned) {
        pthread_detach(thread);
        return MIG_INJECT_CALL_UNENDING;
    }
    pthread_join(thread, NULL);
    *ret = job->injected;
    rc = job->outcome;
    destroy(job);
    return rc;
}

static int start(struct job *job, pthread_t *ret_thread)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before); /* signals are for the other threads */
    const int rc = -pthread_create(ret_thread, NULL, work, job);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

static int inject(int pid, int fd, int target_fd, const struct mig_inject_terms *terms, struct mig_injected *ret)
{
    pthread_t thread;

    *ret = (struct mig_injected){.fd = -1, .target_fd = -1};
    const int pidfd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
    if (pidfd < 0)
        return pid <= 0 || errno == ESRCH || errno == EINVAL ? MIG_INJECT_GONE : -errno;
    struct job *job = malloc(sizeof(*job));
    if (!job) {
        close(pidfd);
        return -ENOMEM;
    }
    *job = (struct job){
        .pid = pid,
        .pidfd = pidfd,
        .fd = fd,
        .target_fd = target_fd,
        .terms = *terms,
        .deadline_ns = mig_now_ns() + terms->timeout_us * 1000,
        .injected = *ret,
    };
    pthread_mutex_init(&job->mutex, NULL);
    pthread_cond_init(&job->finished, NULL);
    const int rc = start(job, &thread);
    if (rc < 0) {
        destroy(job);
        return rc;
    }
    return await(job, thread, ret);
}

int mig_inject_open_uffd(int pid, const struct mig_inject_terms *terms, struct mig_injected *ret)
{
    return inject(pid, -1, -1, terms, ret);
}

int mig_inject_close_fd(int pid, int fd, int target_fd, const struct mig_inject_terms *terms, struct mig_injected *ret)
{
    return inject(pid, fd, target_fd, terms, ret);
}

int mig_inject_probe(void)
{
    /* There is no thread 0 to trace, which only who may trace gets to hear. */
    if (ptrace(PTRACE_SEIZE, 0, NULL, NULL) < 0 && errno != ESRCH)
        return -errno;
    const int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    if (pidfd < 0)
        return -errno;
    const int fd = (int)syscall(SYS_pidfd_getfd, pidfd, pidfd, 0);
    const int rc = fd < 0 ? -errno : 0;
    if (fd >= 0)
        close(fd);
    close(pidfd);
    return rc;
}
