#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "units.h"

/* linux/userfaultfd.h of Debian 12 has all of these but the ioctl of /dev/userfaultfd in older point releases. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* Linux 6.6, newer than that header. */
#ifndef UFFD_FEATURE_POISON
#define UFFD_FEATURE_POISON (1 << 14)
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
struct uffdio_poison {
    struct uffdio_range range;
    __u64 mode;
    __s64 updated;
};
#endif
_Static_assert(sizeof(struct uffdio_poison) == 32, "the ioctl's number holds its size");

/* Linux 6.4 and 6.7. */
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif

_Static_assert((int)MIG_UFFD_MISSING == (int)UFFDIO_REGISTER_MODE_MISSING, "the kernel's numbers");
_Static_assert((int)MIG_UFFD_WP == (int)UFFDIO_REGISTER_MODE_WP, "the kernel's numbers");

const uint64_t MIG_UFFD_FEATURES = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_EXACT_ADDRESS;
const uint64_t MIG_UFFD_WP_FEATURES = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM |
                                      UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_ASYNC;

static int open_raw(bool user_mode_only)
{
    const int flags = O_CLOEXEC | O_NONBLOCK;
    int fd;

    if (user_mode_only) {
        fd = (int)syscall(__NR_userfaultfd, flags | UFFD_USER_MODE_ONLY);
        return fd < 0 ? -errno : fd;
    }
    const int dev_fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (dev_fd >= 0) {
        fd = ioctl(dev_fd, USERFAULTFD_IOC_NEW, flags);
        const int error = errno;
        close(dev_fd);
        return fd < 0 ? -error : fd;
    }
    const int dev_error = errno;
    fd = (int)syscall(__NR_userfaultfd, flags);
    if (fd >= 0)
        return fd;
    /* A closed door says more than a missing one. */
    return dev_error == ENOENT ? -errno : -dev_error;
}

static int shake_hands(int fd, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    return ioctl(fd, UFFDIO_API, &api) < 0 ? -errno : 0;
}

int mig_uffd_shake_hands(int uffd, uint64_t required_features)
{
    /* The kernel says EINVAL to a feature that it does not know, and may be asked once more. */
    int rc = shake_hands(uffd, required_features | UFFD_FEATURE_POISON);
    if (rc == -EINVAL)
        rc = shake_hands(uffd, required_features);
    return rc == -EINVAL ? -ENOTSUP : rc;
}

int mig_uffd_open(uint64_t required_features, bool user_mode_only, int *ret_fd)
{
    const int fd = open_raw(user_mode_only);
    if (fd < 0)
        return fd;
    const int rc = mig_uffd_shake_hands(fd, required_features);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    *ret_fd = fd;
    return 0;
}

int mig_uffd_register(int uffd, uint64_t hva, uint64_t length_bytes, uint32_t modes)
{
    struct uffdio_register arg = {.range = {.start = hva, .len = length_bytes}, .mode = modes};
    uint64_t needed = 1ull << _UFFDIO_WAKE;

    if (modes & MIG_UFFD_MISSING)
        needed |= (1ull << _UFFDIO_COPY) | (1ull << _UFFDIO_ZEROPAGE);
    if (modes & MIG_UFFD_WP)
        needed |= 1ull << _UFFDIO_WRITEPROTECT;
    if (ioctl(uffd, UFFDIO_REGISTER, &arg) < 0)
        return -errno;
    if ((arg.ioctls & needed) != needed) {
        mig_uffd_unregister(uffd, hva, length_bytes);
        return -ENOTSUP;
    }
    return 0;
}

int mig_uffd_register_missing(int uffd, uint64_t hva, uint64_t length_bytes)
{
    return mig_uffd_register(uffd, hva, length_bytes, MIG_UFFD_MISSING);
}

int mig_uffd_write_protect(int uffd, uint64_t hva, uint64_t length_bytes)
{
    struct uffdio_writeprotect arg = {
        .range = {.start = hva, .len = length_bytes},
        .mode = UFFDIO_WRITEPROTECT_MODE_WP,
    };
    while (ioctl(uffd, UFFDIO_WRITEPROTECT, &arg) < 0) {
        if (errno != EAGAIN)
            return -errno;
        sched_yield(); /* the address space is changing */
    }
    return 0;
}

int mig_uffd_unregister(int uffd, uint64_t hva, uint64_t length_bytes)
{
    struct uffdio_range range = {.start = hva, .len = length_bytes};
    return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

int mig_uffd_wake(int uffd, uint64_t hva, uint64_t length_bytes)
{
    struct uffdio_range range = {.start = hva, .len = length_bytes};
    return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

/* Shared tail of COPY, ZEROPAGE and POISON: `done` is the kernel's signed answer, `error` its errno. True: try the
 * rest. */
static bool may_go_on(int64_t done, int error, uint64_t *installed_bytes)
{
    if (done > 0) {
        *installed_bytes += (uint64_t)done;
        return true;
    }
    if (error == EAGAIN) {
        /* The address space is changing, or an event waits to be read by another thread: let it. */
        sched_yield();
        return true;
    }
    return false;
}

static int stopped_at(int uffd, uint64_t hva, int error)
{
    if (error != EEXIST)
        return -error;
    /* EEXIST wakes nobody, and a thread may wait for just this page. */
    const int rc = mig_uffd_wake(uffd, hva, MIG_PAGE_SIZE_BYTES);
    return rc < 0 ? rc : MIG_PLACE_PRESENT;
}

int mig_uffd_copy(int uffd, uint64_t dst_hva, const void *src, uint64_t length_bytes, uint64_t *ret_bytes)
{
    *ret_bytes = 0;
    while (*ret_bytes < length_bytes) {
        struct uffdio_copy arg = {
            .dst = dst_hva + *ret_bytes,
            .src = (uintptr_t)src + *ret_bytes,
            .len = length_bytes - *ret_bytes,
        };
        if (ioctl(uffd, UFFDIO_COPY, &arg) == 0) {
            *ret_bytes = length_bytes;
            break;
        }
        const int error = errno;
        if (!may_go_on(arg.copy, error, ret_bytes))
            return stopped_at(uffd, dst_hva + *ret_bytes, error);
    }
    return MIG_PLACE_INSTALLED;
}

int mig_uffd_zeropage(int uffd, uint64_t dst_hva, uint64_t length_bytes, uint64_t *ret_bytes)
{
    *ret_bytes = 0;
    while (*ret_bytes < length_bytes) {
        struct uffdio_zeropage arg = {
            .range = {.start = dst_hva + *ret_bytes, .len = length_bytes - *ret_bytes},
        };
        if (ioctl(uffd, UFFDIO_ZEROPAGE, &arg) == 0) {
            *ret_bytes = length_bytes;
            break;
        }
        const int error = errno;
        if (!may_go_on(arg.zeropage, error, ret_bytes))
            return stopped_at(uffd, dst_hva + *ret_bytes, error);
    }
    return MIG_PLACE_INSTALLED;
}

int mig_uffd_poison(int uffd, uint64_t hva, uint64_t length_bytes, uint64_t *ret_bytes)
{
    *ret_bytes = 0;
    while (*ret_bytes < length_bytes) {
        struct uffdio_poison arg = {
            .range = {.start = hva + *ret_bytes, .len = length_bytes - *ret_bytes},
        };
        if (ioctl(uffd, UFFDIO_POISON, &arg) == 0) {
            *ret_bytes = length_bytes;
            break;
        }
        const int error = errno;
        if (!may_go_on(arg.updated, error, ret_bytes))
            return stopped_at(uffd, hva + *ret_bytes, error);
    }
    return MIG_PLACE_INSTALLED;
}
