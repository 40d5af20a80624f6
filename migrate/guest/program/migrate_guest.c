/* The program's end of its socket; migrate/guest/embed.py is the same in Python, program/wire.py has the words. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "migrate_guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

enum { MAGIC = 0x3147494d, FDS_MAX = 2, TEXT_BYTES = 88, NAME_BYTES_MAX = 64 };
enum { ASK_HELLO = 1, ASK_PAUSE, ASK_RESUME, ASK_SAVE, ASK_LOAD, ASK_OPEN_UFFD, ASK_CLOSE_UFFD };
enum { FLAG_HAS_RUN = 1, FLAG_RUNNING = 2, FLAG_INCOMING = 4 };

static const size_t MEMORY_STEP_BYTES = 2 << 20, MEMORY_MIN_BYTES = 16 << 20;

struct mig_guest_message {
    uint32_t magic;
    uint32_t sequence; /* an answer's is its request's */
    uint32_t ask;
    int32_t error;
    uint32_t flags;
    uint32_t reserved;
    uint64_t memory_bytes;
    uint64_t hva;
    char text[TEXT_BYTES];
};
_Static_assert(sizeof(struct mig_guest_message) == 128, "what goes over the socket");

struct migrate_guest {
    struct migrate_guest_callbacks callbacks;
    void *context;
    void *memory;
    size_t memory_bytes;
    int memfd, pagemap_fd, uffd;
    int fd; /* of the daemon that started us, or where we listen */
    bool is_incoming, is_started;
    bool is_loaded, has_run, is_running; /* of the serving thread */
    char name[NAME_BYTES_MAX + 1];
};

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- what is asked; each returns a positive errno, or 0 ---- */

static int do_pause(struct migrate_guest *guest)
{
    if (!guest->has_run)
        return EBUSY;
    if (!guest->is_running)
        return 0;
    const int error = guest->callbacks.pause(guest->context);
    if (error == 0)
        guest->is_running = false;
    return error;
}

static int do_resume(struct migrate_guest *guest)
{
    if (!guest->is_loaded)
        return EBUSY;
    if (guest->is_running)
        return 0;
    const int error = guest->callbacks.resume(guest->context);
    if (error == 0)
        guest->has_run = guest->is_running = true;
    return error;
}

static int write_state(const char *state, size_t size_bytes, int *ret_fd)
{
    const int fd = memfd_create("migrate-state", MFD_CLOEXEC);
    if (fd < 0)
        return errno;
    for (size_t done = 0; done < size_bytes;) {
        const ssize_t count = pwrite(fd, state + done, size_bytes - done, (off_t)done);
        if (count < 0) {
            const int error = errno;
            close(fd);
            return error;
        }
        done += (size_t)count;
    }
    *ret_fd = fd;
    return 0;
}

static int do_save(struct migrate_guest *guest, int *ret_fd)
{
    size_t size_bytes = 0;

    if (guest->is_running || !guest->has_run)
        return EBUSY;
    char *state = malloc(MIGRATE_GUEST_STATE_BYTES_MAX);
    if (!state)
        return ENOMEM;
    int error = 0;
    if (guest->callbacks.save)
        error = guest->callbacks.save(guest->context, state, MIGRATE_GUEST_STATE_BYTES_MAX, &size_bytes);
    if (error == 0 && size_bytes > MIGRATE_GUEST_STATE_BYTES_MAX)
        error = EMSGSIZE;
    if (error == 0)
        error = write_state(state, size_bytes, ret_fd);
    free(state);
    return error;
}

static int do_load(struct migrate_guest *guest, int fd)
{
    struct stat status;

    if (guest->is_loaded)
        return EBUSY;
    if (fd < 0)
        return EINVAL;
    if (fstat(fd, &status) < 0)
        return errno;
    if (status.st_size > MIGRATE_GUEST_STATE_BYTES_MAX)
        return EMSGSIZE;
    const size_t size_bytes = (size_t)status.st_size;
    char *state = malloc(size_bytes + 1);
    if (!state)
        return ENOMEM;
    int error = 0;
    if (pread(fd, state, size_bytes, 0) != (ssize_t)size_bytes)
        error = EIO;
    if (error == 0 && mprotect(guest->memory, guest->memory_bytes, PROT_READ | PROT_WRITE) < 0)
        error = errno;
    if (error == 0 && guest->callbacks.load)
        error = guest->callbacks.load(guest->context, state, size_bytes);
    free(state);
    guest->is_loaded = error == 0;
    return error;
}

/* One that sees what the kernel touches for us if it is to be had, else one that sees what we touch. */
static int do_open_uffd(struct migrate_guest *guest)
{
    const int flags = O_CLOEXEC | O_NONBLOCK;

    close_fd(&guest->uffd);
    const int device_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device_fd >= 0) {
        guest->uffd = ioctl(device_fd, USERFAULTFD_IOC_NEW, flags);
        close(device_fd);
    }
    if (guest->uffd < 0)
        guest->uffd = (int)syscall(__NR_userfaultfd, flags);
    if (guest->uffd < 0)
        guest->uffd = (int)syscall(__NR_userfaultfd, flags | UFFD_USER_MODE_ONLY);
    return guest->uffd < 0 ? errno : 0;
}

/* ---- the socket ---- */

union control {
    char bytes[CMSG_SPACE(FDS_MAX * sizeof(int))];
    struct cmsghdr align;
};

/* Returns the number of descriptors, or -1 if the companion is gone, or is none. */
static int receive(int connection, struct mig_guest_message *message, int fds[FDS_MAX])
{
    union control control;
    struct iovec part = {.iov_base = message, .iov_len = sizeof(*message)};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t size;
    int count = 0;

    do
        size = recvmsg(connection, &header, MSG_CMSG_CLOEXEC);
    while (size < 0 && errno == EINTR);
    if (size < 0)
        return -1;
    for (struct cmsghdr *item = CMSG_FIRSTHDR(&header); item; item = CMSG_NXTHDR(&header, item)) {
        if (item->cmsg_level != SOL_SOCKET || item->cmsg_type != SCM_RIGHTS)
            continue;
        count = (int)((item->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds, CMSG_DATA(item), (size_t)count * sizeof(int));
    }
    if (size == (ssize_t)sizeof(*message) && message->magic == MAGIC && !(header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
        return count;
    for (int i = 0; i < count; i++)
        close(fds[i]);
    return -1;
}

static int answer(int connection, const struct mig_guest_message *message, const int *fds, int count)
{
    union control control = {.bytes = {0}};
    struct iovec part = {.iov_base = (void *)message, .iov_len = sizeof(*message)};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t size;

    if (count > 0) {
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        struct cmsghdr *item = CMSG_FIRSTHDR(&header);
        item->cmsg_level = SOL_SOCKET;
        item->cmsg_type = SCM_RIGHTS;
        item->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
        memcpy(CMSG_DATA(item), fds, (size_t)count * sizeof(int));
    }
    do
        size = sendmsg(connection, &header, MSG_NOSIGNAL);
    while (size < 0 && errno == EINTR);
    return size < 0 ? -1 : 0;
}

static void hello(const struct migrate_guest *guest, struct mig_guest_message *reply)
{
    reply->flags = (guest->has_run ? FLAG_HAS_RUN : 0) | (guest->is_running ? FLAG_RUNNING : 0) |
                   (guest->is_loaded ? 0 : FLAG_INCOMING);
    reply->memory_bytes = guest->memory_bytes;
    reply->hva = (uintptr_t)guest->memory;
    memcpy(reply->text, guest->name, sizeof(guest->name));
}

static int serve_request(struct migrate_guest *guest, int connection, const struct mig_guest_message *request, int fd)
{
    struct mig_guest_message reply = {.magic = MAGIC, .sequence = request->sequence, .ask = request->ask};
    int fds[FDS_MAX], count = 0, state_fd = -1;

    switch (request->ask) {
    case ASK_HELLO:
        hello(guest, &reply);
        fds[count++] = guest->memfd;
        if (guest->pagemap_fd >= 0)
            fds[count++] = guest->pagemap_fd;
        break;
    case ASK_PAUSE:
        reply.error = do_pause(guest);
        break;
    case ASK_RESUME:
        reply.error = do_resume(guest);
        break;
    case ASK_SAVE:
        reply.error = do_save(guest, &state_fd);
        if (reply.error == 0)
            fds[count++] = state_fd;
        break;
    case ASK_LOAD:
        reply.error = do_load(guest, fd);
        break;
    case ASK_OPEN_UFFD:
        reply.error = do_open_uffd(guest);
        if (reply.error == 0)
            fds[count++] = guest->uffd;
        break;
    case ASK_CLOSE_UFFD:
        close_fd(&guest->uffd);
        break;
    default:
        reply.error = ENOSYS;
    }
    const int rc = answer(connection, &reply, fds, count);
    close_fd(&state_fd);
    return rc;
}

static void serve_connection(struct migrate_guest *guest, int connection)
{
    struct mig_guest_message request;
    int fds[FDS_MAX], count, rc;

    do {
        count = receive(connection, &request, fds);
        if (count < 0)
            break;
        rc = serve_request(guest, connection, &request, count == 1 ? fds[0] : -1);
        for (int i = 0; i < count; i++)
            close(fds[i]);
    } while (rc == 0);
    close(connection);
    /* A companion that is gone watches no page: what it registered is let go of. */
    close_fd(&guest->uffd);
}

static void *serve(void *argument)
{
    struct migrate_guest *guest = argument;

    if (guest->is_started) {
        serve_connection(guest, guest->fd);
        _exit(0); /* nobody else could say whether we may run */
    }
    for (;;) {
        const int connection = accept4(guest->fd, NULL, NULL, SOCK_CLOEXEC);
        if (connection >= 0)
            serve_connection(guest, connection);
        else if (errno != EINTR && errno != ECONNABORTED)
            return NULL;
    }
}

static int listen_at(const char *path)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};

    if (strlen(path) >= sizeof(name.sun_path))
        return -ENAMETOOLONG;
    strcpy(name.sun_path, path);
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    unlink(path);
    /* What is bound takes its mode from the socket: nobody else's, before it has a name (unix(7)). */
    if (fchmod(fd, 0600) < 0 || bind(fd, (struct sockaddr *)&name, sizeof(name)) < 0 || listen(fd, 1) < 0) {
        const int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

int migrate_guest_serve(struct migrate_guest *guest, const char *socket_path)
{
    const char *inherited = getenv("MIGRATE_GUEST_FD");
    sigset_t all, before;
    pthread_t thread;

    if (inherited) {
        guest->is_started = true;
        guest->fd = atoi(inherited);
        if (fcntl(guest->fd, F_SETFD, FD_CLOEXEC) < 0)
            return -errno;
        unsetenv("MIGRATE_GUEST_FD");
        unsetenv("MIGRATE_GUEST_INCOMING");
    } else {
        if (!socket_path)
            return -EINVAL;
        guest->fd = listen_at(socket_path);
        if (guest->fd < 0)
            return guest->fd;
    }
    sigfillset(&all); /* signals are the program's */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int error = pthread_create(&thread, NULL, serve, guest);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error == 0)
        pthread_detach(thread);
    return -error;
}

/* ---- the memory ---- */

static int make_memory(struct migrate_guest *guest)
{
    guest->memfd = memfd_create("migrate-program", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (guest->memfd < 0 || ftruncate(guest->memfd, (off_t)guest->memory_bytes) < 0 ||
        fcntl(guest->memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
        return -errno;
    const int protection = guest->is_incoming ? PROT_NONE : PROT_READ | PROT_WRITE;
    guest->memory = mmap(NULL, guest->memory_bytes, protection, MAP_SHARED, guest->memfd, 0);
    if (guest->memory == MAP_FAILED)
        return -errno;
    if (madvise(guest->memory, guest->memory_bytes, MADV_DONTDUMP) < 0 ||
        madvise(guest->memory, guest->memory_bytes, MADV_DONTFORK) < 0)
        return -errno;
    madvise(guest->memory, guest->memory_bytes, MADV_NOHUGEPAGE); /* EINVAL where there are none */
    return 0;
}

int migrate_guest_create(const char *name, size_t memory_bytes, const struct migrate_guest_callbacks *callbacks,
                         void *context, struct migrate_guest **ret)
{
    const char *incoming = getenv("MIGRATE_GUEST_INCOMING");

    if (strlen(name) > NAME_BYTES_MAX || !name[0] || !callbacks->pause || !callbacks->resume)
        return -EINVAL;
    struct migrate_guest *guest = calloc(1, sizeof(*guest));
    if (!guest)
        return -ENOMEM;
    strcpy(guest->name, name);
    guest->callbacks = *callbacks;
    guest->context = context;
    guest->uffd = -1;
    guest->is_incoming = incoming && strcmp(incoming, "1") == 0;
    guest->is_loaded = guest->has_run = guest->is_running = !guest->is_incoming;
    guest->memory_bytes = (memory_bytes + MEMORY_STEP_BYTES - 1) / MEMORY_STEP_BYTES * MEMORY_STEP_BYTES;
    if (guest->memory_bytes < MEMORY_MIN_BYTES)
        guest->memory_bytes = MEMORY_MIN_BYTES;
    guest->memory = MAP_FAILED;
    const int rc = make_memory(guest);
    if (rc < 0) {
        if (guest->memory != MAP_FAILED)
            munmap(guest->memory, guest->memory_bytes);
        close_fd(&guest->memfd);
        free(guest);
        return rc;
    }
    guest->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC); /* without, it moves in mode postcopy */
    *ret = guest;
    return 0;
}

void *migrate_guest_memory(const struct migrate_guest *guest)
{
    return guest->memory;
}

size_t migrate_guest_memory_bytes(const struct migrate_guest *guest)
{
    return guest->memory_bytes;
}

bool migrate_guest_is_incoming(const struct migrate_guest *guest)
{
    return guest->is_incoming;
}
