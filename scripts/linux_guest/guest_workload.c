// What the Linux guest does: fills a file with data, rewrites and checks another one, counts, answers HTTP.
//
//   guest_workload fill FILE MIB
//   guest_workload run FILE MIB WRITES_PER_S SUMS_FILE   (the second serial port as its input, for HTTP)
//
// Every block of the second file is filled from its number and its version; the versions stand in a table elsewhere,
// and their sum in a third place. A block that is lost, stale, swapped with another or torn is one that does not fit
// its version; a table that is stale does not fit its blocks, or its sum.

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
    BLOCK_BYTES = 4096,
    BLOCK_WORDS = BLOCK_BYTES / 8,
    TICK_NS = 66666667,
    BATCH_WRITES = 64,
    LINE_BYTES = 256,
};

#define NS_PER_S 1000000000ULL
#define MIB (1ULL << 20)

static atomic_ullong g_ticks, g_writes, g_audits, g_errors;

static void die(const char *what)
{
    fprintf(stderr, "versions BAD: guest_workload: %s: %s\n", what, strerror(errno));
    exit(1);
}

// One write is one line, whatever else is written to the port.
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char line[LINE_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    if (write(STDOUT_FILENO, line, (size_t)length) != length)
        exit(1);
}

static uint64_t mix(uint64_t value)
{
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
    return value ^ (value >> 31);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static void sleep_until(uint64_t due_ns)
{
    struct timespec due = {.tv_sec = (time_t)(due_ns / NS_PER_S), .tv_nsec = (long)(due_ns % NS_PER_S)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR)
        ;
}

static uint64_t *map_file(const char *path, uint64_t file_bytes)
{
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, (off_t)file_bytes) < 0)
        die(path);
    void *mapped = mmap(NULL, file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED)
        die("mmap");
    close(file);
    return mapped;
}

// Different data at every boot: what is left of another run is never right.
static int fill(const char *path, uint64_t file_bytes)
{
    uint64_t *words = map_file(path, file_bytes), state;
    if (getrandom(&state, sizeof state, GRND_NONBLOCK) != sizeof state)
        state = now_ns();
    state = mix(state) | 1;
    for (uint64_t word = 0; word < file_bytes / 8; word++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words[word] = state;
    }
    return 0;
}

struct versions {
    uint64_t *blocks, *table, block_count, writes_per_s, sum;
};

static uint64_t word_of(uint64_t block, uint64_t version, uint64_t word)
{
    return (mix(block << 32 ^ version) + word) * 0x9e3779b97f4a7c15ULL;
}

static void write_block(struct versions *versions, uint64_t block, uint64_t version)
{
    uint64_t *words = versions->blocks + block * BLOCK_WORDS;
    for (uint64_t word = 0; word < BLOCK_WORDS; word++)
        words[word] = word_of(block, version, word);
}

static void check_block(struct versions *versions, uint64_t block)
{
    const volatile uint64_t *words = versions->blocks + block * BLOCK_WORDS;
    uint64_t version = versions->table[block];
    for (uint64_t word = 0; word < BLOCK_WORDS; word++) {
        uint64_t found = words[word], expected = word_of(block, version, word);
        if (found == expected)
            continue;
        atomic_fetch_add(&g_errors, 1);
        say("versions BAD: block %llu version %llu word %llu is %llx instead of %llx", (unsigned long long)block,
            (unsigned long long)version, (unsigned long long)word, (unsigned long long)found,
            (unsigned long long)expected);
        return;
    }
}

// Every block against the table, and the table against its sum.
static void audit(struct versions *versions)
{
    uint64_t sum = 0;
    for (uint64_t block = 0; block < versions->block_count; block++) {
        check_block(versions, block);
        sum += versions->table[block];
    }
    if (sum != versions->sum) {
        atomic_fetch_add(&g_errors, 1);
        say("versions BAD: the sum of all is %llu instead of %llu", (unsigned long long)sum,
            (unsigned long long)versions->sum);
    }
    unsigned long long audits = atomic_fetch_add(&g_audits, 1) + 1;
    if (!atomic_load(&g_errors))
        say("versions ok %llu writes=%llu", audits, (unsigned long long)atomic_load(&g_writes));
}

static void *rewrite_for_ever(void *argument)
{
    struct versions *versions = argument;
    uint64_t random = mix(now_ns()) | 1, due_ns = now_ns();
    for (;;) {
        audit(versions);
        for (uint64_t write = 0; write < versions->block_count; write++) {
            random = random * 6364136223846793005ULL + 1442695040888963407ULL;
            uint64_t block = (random >> 33) % versions->block_count;
            check_block(versions, block);
            write_block(versions, block, ++versions->table[block]);
            versions->sum++;
            atomic_fetch_add(&g_writes, 1);
            if (versions->writes_per_s == 0 || write % BATCH_WRITES)
                continue;
            due_ns += BATCH_WRITES * NS_PER_S / versions->writes_per_s;
            // What could not be done in time is not made up for.
            if (due_ns < now_ns())
                due_ns = now_ns();
            sleep_until(due_ns);
        }
    }
    return NULL;
}

static void *tick_for_ever(void *argument)
{
    (void)argument;
    uint64_t due_ns = now_ns();
    for (;;) {
        say("tick %llu", (unsigned long long)atomic_fetch_add(&g_ticks, 1) + 1);
        due_ns += TICK_NS;
        if (due_ns < now_ns())
            due_ns = now_ns();
        sleep_until(due_ns);
    }
    return NULL;
}

static void read_sums(const char *path, unsigned long long *ret_ok, unsigned long long *ret_bad)
{
    *ret_ok = *ret_bad = 0;
    FILE *file = fopen(path, "re");
    if (!file)
        return;
    if (fscanf(file, "%llu %llu", ret_ok, ret_bad) != 2)
        *ret_bad = 1;
    fclose(file);
}

static void answer(FILE *port, const char *path, const char *sums_file)
{
    char body[2 * LINE_BYTES];
    unsigned long long sums_ok, sums_bad;
    read_sums(sums_file, &sums_ok, &sums_bad);
    int length =
        snprintf(body, sizeof body,
                 "{\"path\": \"%s\", \"uptime_us\": %llu, \"ticks\": %llu, \"writes\": %llu, \"sums_ok\": %llu, "
                 "\"sums_bad\": %llu, \"versions_ok\": %llu, \"errors\": %llu}\n",
                 path, (unsigned long long)now_ns() / 1000, (unsigned long long)atomic_load(&g_ticks),
                 (unsigned long long)atomic_load(&g_writes), sums_ok, sums_bad,
                 (unsigned long long)atomic_load(&g_audits), (unsigned long long)atomic_load(&g_errors));
    fprintf(port, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", length, body);
    fflush(port);
}

// One line without its end, and without what is no text; of a line that is too long, its tail.
static void read_line(FILE *requests, char line[LINE_BYTES])
{
    size_t length = 0;
    for (;;) {
        int character = getc(requests);
        if (character == EOF) {
            // A hang-up of the line is not the end of it.
            clearerr(requests);
            sleep_until(now_ns() + TICK_NS);
        } else if (character == '\n') {
            line[length] = 0;
            return;
        } else if (character >= ' ' && character <= '~') {
            if (length == LINE_BYTES - 1) {
                length = LINE_BYTES / 2;
                memmove(line, line + LINE_BYTES - 1 - length, length);
            }
            line[length++] = (char)character;
        }
    }
}

static const char *last_request(const char *line)
{
    const char *last = NULL;
    while ((line = strstr(line, "GET /")))
        last = line++;
    return last;
}

// A port knows no connections: a request begins with its line, whatever was there before, and ends with an empty one.
static void serve_for_ever(const char *sums_file)
{
    struct termios raw;
    if (tcgetattr(STDIN_FILENO, &raw) < 0)
        die("the second serial port");
    cfmakeraw(&raw);
    raw.c_cflag |= CLOCAL;
    if (tcsetattr(STDIN_FILENO, TCSANOW, &raw) < 0)
        die("tcsetattr");
    int output = open("/dev/ttyS1", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    FILE *requests = fdopen(STDIN_FILENO, "r"), *port = output < 0 ? NULL : fdopen(output, "w");
    if (!requests || !port)
        die("/dev/ttyS1");
    char line[LINE_BYTES], path[LINE_BYTES] = "", found[LINE_BYTES];
    for (;;) {
        read_line(requests, line);
        const char *request = last_request(line);
        if (request && sscanf(request, "GET %63[A-Za-z0-9/_.?=-] HTTP", found) == 1) {
            strcpy(path, found);
        } else if (!line[0] && path[0]) {
            answer(port, path, sums_file);
            path[0] = 0;
        }
    }
}

static int run(const char *path, uint64_t file_bytes, uint64_t writes_per_s, const char *sums_file)
{
    static struct versions versions;
    pthread_t writer, ticker;
    versions.blocks = map_file(path, file_bytes);
    versions.block_count = file_bytes / BLOCK_BYTES;
    versions.writes_per_s = writes_per_s;
    versions.table = calloc(versions.block_count, sizeof *versions.table);
    if (!versions.table || !versions.block_count)
        die("the table of versions");
    for (uint64_t block = 0; block < versions.block_count; block++)
        write_block(&versions, block, 0);
    errno = pthread_create(&ticker, NULL, tick_for_ever, NULL);
    if (errno)
        die("pthread_create");
    errno = pthread_create(&writer, NULL, rewrite_for_ever, &versions);
    if (errno)
        die("pthread_create");
    serve_for_ever(sums_file);
    return 0;
}

int main(int count, char **words)
{
    if (count == 4 && !strcmp(words[1], "fill"))
        return fill(words[2], strtoull(words[3], NULL, 10) * MIB);
    if (count == 6 && !strcmp(words[1], "run"))
        return run(words[2], strtoull(words[3], NULL, 10) * MIB, strtoull(words[4], NULL, 10), words[5]);
    fprintf(stderr, "usage: guest_workload fill FILE MIB | run FILE MIB WRITES_PER_S SUMS_FILE\n");
    return 2;
}
