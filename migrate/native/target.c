#include "target.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "units.h"

enum { CHUNK_BYTES = 64 << 10, SEARCHED_BYTES_MAX = 64 << 20 };

char mig_target_thread_state(pid_t pid, pid_t tid)
{
    char path[64], text[256];

    snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    const ssize_t text_bytes = read(fd, text, sizeof(text) - 1);
    close(fd);
    if (text_bytes <= 0)
        return 0;
    text[text_bytes] = '\0';
    /* The name before it may hold anything, a parenthesis among it. */
    const char *state = strrchr(text, ')');
    return state && state[1] == ' ' ? state[2] : 0;
}

int mig_target_status(pid_t pid, pid_t tid, const char *field, int base, uint64_t *ret)
{
    char path[64], line[256];
    const size_t field_bytes = strlen(field);
    int rc = -ENOENT;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/status", pid, tid);
    FILE *file = fopen(path, "re");
    if (!file)
        return -errno;
    while (rc < 0 && fgets(line, sizeof(line), file)) {
        if (strncmp(line, field, field_bytes) == 0 && line[field_bytes] == ':') {
            *ret = strtoull(line + field_bytes + 1, NULL, base);
            rc = 0;
        }
    }
    fclose(file);
    return rc;
}

/* How late a thread is tried; negative: not at all. */
static int rank(pid_t pid, pid_t tid)
{
    const char state = mig_target_thread_state(pid, tid);

    if (state == 0 || state == 'Z' || state == 'X')
        return -1;
    if (tid == pid)
        return 0;
    return state == 'D' ? 2 : 1;
}

int mig_target_threads(pid_t pid, pid_t *tids)
{
    pid_t found[3][MIG_TARGET_THREADS_MAX];
    int counts[3] = {0}, count = 0;
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    if (!tasks)
        return errno == ENOENT ? -ESRCH : -errno;
    for (struct dirent *entry; (entry = readdir(tasks));) {
        const pid_t tid = atoi(entry->d_name);
        const int at = tid > 0 ? rank(pid, tid) : -1;
        if (at >= 0 && counts[at] < MIG_TARGET_THREADS_MAX)
            found[at][counts[at]++] = tid;
    }
    closedir(tasks);
    for (int at = 0; at < 3; at++) {
        for (int i = 0; i < counts[at] && count < MIG_TARGET_THREADS_MAX; i++)
            tids[count++] = found[at][i];
    }
    return count;
}

/* ---- a syscall instruction ---- */

/* Looks through a range of the memory; 0, or -ENOENT. What cannot be read has none. */
static int search(int mem_fd, uint64_t start_hva, uint64_t end_hva, uint8_t *buffer, uint64_t *ret_hva)
{
    static const uint8_t SYSCALL[] = {0x0f, 0x05};

    /* Chunks overlap by a byte. */
    for (uint64_t hva = start_hva; hva + sizeof(SYSCALL) <= end_hva; hva += CHUNK_BYTES - 1) {
        const size_t wanted = (size_t)mig_smaller(CHUNK_BYTES, end_hva - hva);
        const ssize_t got = pread(mem_fd, buffer, wanted, (off_t)hva);
        if (got < (ssize_t)sizeof(SYSCALL))
            break;
        const uint8_t *at = memmem(buffer, (size_t)got, SYSCALL, sizeof(SYSCALL));
        if (at) {
            *ret_hva = hva + (uint64_t)(at - buffer);
            return 0;
        }
        if ((size_t)got < wanted)
            break;
    }
    return -ENOENT;
}

static int search_mappings(FILE *maps, int mem_fd, bool in_vdso, uint8_t *buffer, uint64_t *ret_hva)
{
    uint64_t searched_bytes = 0, start_hva, end_hva;
    char line[512], may[5];

    rewind(maps);
    while (searched_bytes < SEARCHED_BYTES_MAX && fgets(line, sizeof(line), maps)) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &start_hva, &end_hva, may) != 3)
            continue; /* the rest of a long path */
        if (may[2] != 'x' || strstr(line, "[vsyscall]") || (strstr(line, "[vdso]") != NULL) != in_vdso)
            continue;
        if (search(mem_fd, start_hva, end_hva, buffer, ret_hva) == 0)
            return 0;
        searched_bytes += end_hva - start_hva;
    }
    return -ENOENT;
}

int mig_target_find_syscall(pid_t pid, uint64_t *ret_hva)
{
    char path[64];
    int rc = -ENOMEM;

    snprintf(path, sizeof(path), "/proc/%d/mem", pid);
    const int mem_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (mem_fd < 0)
        return errno == ENOENT ? -ESRCH : -errno;
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    FILE *maps = fopen(path, "re");
    uint8_t *buffer = malloc(CHUNK_BYTES);
    if (!maps)
        rc = errno == ENOENT ? -ESRCH : -errno;
    else if (buffer)
        rc = search_mappings(maps, mem_fd, true, buffer, ret_hva);
    if (rc == -ENOENT)
        rc = search_mappings(maps, mem_fd, false, buffer, ret_hva);
    free(buffer);
    if (maps)
        fclose(maps);
    close(mem_fd);
    return rc;
}
