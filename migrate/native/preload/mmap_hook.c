/*
 * A library for LD_PRELOAD: hands a userfaultfd of its process to a daemon where ptrace is not allowed.
 *
 * Each shared mapping of a file of at least MIGRATE_PRELOAD_MIN_BYTES is told of on the Unix socket
 * MIGRATE_PRELOAD_SOCKET (SOCK_SEQPACKET): one message, struct announcement, with two descriptors, a userfaultfd, hands
 * not shaken, and /proc/self/pagemap. The process keeps its copy of the former, so that its faults wait, rather than
 * read zeros, while no daemon is there. Whatever fails here costs a line on stderr and nothing else.
 *
 * Knows nothing of the rest of this package, allocates nothing, and waits for nobody.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
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

#define EXPORTED __attribute__((visibility("default")))

enum { VERSION = 1, FLAGS = O_CLOEXEC | O_NONBLOCK };

/* All of the host's byte order; native/preload.py reads it. */
struct announcement {
    uint32_t version;
    uint32_t pid;
    uint64_t hva, length_bytes;
    uint64_t file_offset_bytes;
    uint64_t device, inode; /* of the file, as fstat(2) says */
};

static void complain(const char *what, int error)
{
    char line[320];
    const int line_bytes = snprintf(line, sizeof(line), "migrate preload: %.160s: %.80s\n", what, strerror(error));

    if (line_bytes > 0 && write(STDERR_FILENO, line, (size_t)line_bytes) < 0)
        return;
}

static int open_uffd(void)
{
    const int device_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

    if (device_fd < 0)
        return (int)syscall(SYS_userfaultfd, FLAGS);
    const int fd = ioctl(device_fd, USERFAULTFD_IOC_NEW, FLAGS);
    const int error = errno;
    close(device_fd);
    errno = error;
    return fd;
}

static int send_to(const char *path, const struct announcement *announcement, const int fds[2])
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(2 * sizeof(int))];
    } control = {.header = {.cmsg_len = CMSG_LEN(2 * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec part = {.iov_base = (void *)announcement, .iov_len = sizeof(*announcement)};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};

    if (strlen(path) >= sizeof(address.sun_path))
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);
    memcpy(CMSG_DATA(&control.header), fds, 2 * sizeof(int));
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    int rc = 0;
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || sendmsg(fd, &message, MSG_NOSIGNAL) < 0)
        rc = -errno;
    close(fd);
    return rc;
}

static void announce(const char *path, void *mapping, size_t length_bytes, int file_fd, off_t offset)
{
    struct stat status;

    if (fstat(file_fd, &status) < 0 || !S_ISREG(status.st_mode))
        return; /* a device's memory is not for us */
    const struct announcement announcement = {
        .version = VERSION,
        .pid = (uint32_t)getpid(),
        .hva = (uintptr_t)mapping,
        .length_bytes = length_bytes,
        .file_offset_bytes = (uint64_t)offset,
        .device = status.st_dev,
        .inode = status.st_ino,
    };
    const int fds[2] = {open_uffd(), open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)};
    if (fds[0] < 0 || fds[1] < 0) {
        complain(fds[0] < 0 ? "no userfaultfd" : "no pagemap", errno);
    } else {
        const int rc = send_to(path, &announcement, fds);
        if (rc < 0)
            complain(path, -rc);
        if (rc == 0) {
            close(fds[1]);
            return; /* ours stays open */
        }
    }
    for (int i = 0; i < 2; i++) {
        if (fds[i] >= 0)
            close(fds[i]);
    }
}

static void *map(void *at, size_t length_bytes, int protection, int flags, int fd, off_t offset)
{
    /* The system call itself: no need to look for the next mmap, which may not be there yet. */
    void *mapping = (void *)syscall(SYS_mmap, at, length_bytes, protection, flags, fd, offset);
    const int error = errno;
    const int type = flags & MAP_TYPE;

    if (mapping != MAP_FAILED && fd >= 0 && (type == MAP_SHARED || type == MAP_SHARED_VALIDATE)) {
        const char *path = getenv("MIGRATE_PRELOAD_SOCKET"), *least = getenv("MIGRATE_PRELOAD_MIN_BYTES");
        if (path && least && length_bytes >= strtoull(least, NULL, 10))
            announce(path, mapping, length_bytes, fd, offset);
    }
    errno = error;
    return mapping;
}

EXPORTED void *mmap(void *at, size_t length_bytes, int protection, int flags, int fd, off_t offset)
{
    return map(at, length_bytes, protection, flags, fd, offset);
}

EXPORTED void *mmap64(void *at, size_t length_bytes, int protection, int flags, int fd, off64_t offset)
{
    return map(at, length_bytes, protection, flags, fd, offset);
}
