/*
 * What kernel and hardware allow for postcopy page fetching: raw TCP and UFFDIO_COPY in the product's access pattern,
 * with the bookkeeping that is needed to be right and nothing else.
 *
 *     limit serve --memfd FD --pages N [--port 0]
 *     limit fetch --uffd FD --hva H --pages N --port P [--run-pages 64] [--in-flight 8]
 *                 [--no-urgent | --no-background [--faults-max N]]
 *
 * `serve` prints its port and serves until it is killed. `fetch` prints "started" when its threads run, and one JSON
 * object once all pages are placed, or N faults settled. SIGALRM ends both after --deadline-s (120).
 */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_SHIFT = 12, PAGE_SIZE_BYTES = 1 << PAGE_SHIFT };
enum { RUN_PAGES_MAX = 512, IN_FLIGHT_MAX = 256, BULK_NICE = 10 };
enum { REQUEST_BATCH = 64, EVENT_BATCH = 64, REPLY_BATCH = 16, WAITERS_MAX = 1024, BACKLOG = 16 };

/* A request, and the head of its reply, which the data of its pages follows. */
struct run {
    uint64_t first_page;
    uint32_t page_count;
    uint32_t reserved;
};
_Static_assert(sizeof(struct run) == 16, "struct run is on the wire");

enum { URGENT_REPLY_BYTES = sizeof(struct run) + PAGE_SIZE_BYTES };

/* ---- what both roles need ---- */

static void check(bool is_well, const char *operation)
{
    if (is_well)
        return;
    fprintf(stderr, "limit: %s failed: %s\n", operation, strerror(errno));
    exit(1);
}

static void *allocate(uint64_t length_bytes)
{
    void *memory = aligned_alloc(PAGE_SIZE_BYTES, (length_bytes + PAGE_SIZE_BYTES - 1) & ~(PAGE_SIZE_BYTES - 1ull));

    check(memory != NULL, "aligned_alloc");
    return memset(memory, 0, length_bytes); /* and touch it before the clock runs */
}

static uint64_t page_offset(uint64_t page)
{
    return page << PAGE_SHIFT;
}

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/*
 * A socket of loopback: bound to the port, or connected to it. What is accepted from it inherits the options.
 * The host's default congestion control may be bbr, which is slower here.
 */
static int open_socket(uint16_t port, bool is_server)
{
    static const char congestion[] = "cubic";
    const struct sockaddr_in address = {AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {0}};
    const int socket_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int on = 1;

    check(setsockopt(socket_fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) == 0, "a TCP socket without delay");
    setsockopt(socket_fd, IPPROTO_TCP, TCP_CONGESTION, congestion, sizeof(congestion) - 1);
    check((is_server ? bind : connect)(socket_fd, (const struct sockaddr *)&address, sizeof(address)) == 0,
          is_server ? "bind" : "connect");
    return socket_fd;
}

static pthread_t start_thread(void *(*main)(void *), void *argument)
{
    pthread_t thread;

    check(pthread_create(&thread, NULL, main, argument) == 0, "pthread_create");
    return thread;
}

/* No signal is handled here, so that a blocking send takes all, as a pread or recv of MSG_WAITALL brings all. */
static bool send_all(int socket_fd, const void *data, size_t length_bytes)
{
    return send(socket_fd, data, length_bytes, MSG_NOSIGNAL) == (ssize_t)length_bytes;
}

/* ---- serve ---- */

struct connection {
    int memfd, socket_fd;
    uint64_t pages;
};

/* Head and data lie back to back, so that one send takes both. Returns whether the peer is still there. */
static bool answer(const struct connection *connection, const struct run *run, char *data)
{
    const size_t data_bytes = page_offset(run->page_count);
    char *head = data - sizeof(*run);

    check(run->page_count && run->page_count <= RUN_PAGES_MAX && run->first_page < connection->pages &&
              run->page_count <= connection->pages - run->first_page,
          "a request within the memory");
    check(pread(connection->memfd, data, data_bytes, (off_t)page_offset(run->first_page)) == (ssize_t)data_bytes,
          "pread");
    memcpy(head, run, sizeof(*run));
    return send_all(connection->socket_fd, head, sizeof(*run) + data_bytes);
}

/* Answers requests in order until the peer goes. */
static void *serve_connection(void *argument)
{
    struct connection *connection = argument;
    char *buffer = allocate(PAGE_SIZE_BYTES + page_offset(RUN_PAGES_MAX));
    struct run requests[REQUEST_BATCH];
    size_t held_bytes = 0;
    bool is_bulk = false, is_open = true;
    ssize_t count;

    while (is_open &&
           (count = recv(connection->socket_fd, (char *)requests + held_bytes, sizeof(requests) - held_bytes, 0)) > 0) {
        held_bytes += (size_t)count;
        const size_t whole = held_bytes / sizeof(*requests);
        for (size_t i = 0; is_open && i < whole; i++) {
            if (requests[i].page_count > 1 && !is_bulk) {
                is_bulk = true;
                setpriority(PRIO_PROCESS, 0, BULK_NICE); /* of this thread alone, on Linux */
            }
            is_open = answer(connection, &requests[i], buffer + PAGE_SIZE_BYTES);
        }
        held_bytes -= whole * sizeof(*requests);
        memmove(requests, requests + whole, held_bytes);
    }
    close(connection->socket_fd);
    free(buffer);
    free(connection);
    return NULL;
}

static _Noreturn void serve(int memfd, uint64_t pages, uint16_t port)
{
    struct sockaddr_in address;
    socklen_t address_bytes = sizeof(address);
    const int listen_fd = open_socket(port, true);

    check(listen(listen_fd, BACKLOG) == 0, "listen");
    check(getsockname(listen_fd, (struct sockaddr *)&address, &address_bytes) == 0, "getsockname");
    printf("%u\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct connection *connection = allocate(sizeof(*connection));
        *connection = (struct connection){memfd, accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC), pages};
        check(connection->socket_fd >= 0, "accept");
        pthread_detach(start_thread(serve_connection, connection));
    }
}

/* ---- fetch: shared by both threads ---- */

enum page_state { PAGE_MISSING, PAGE_ASKED, PAGE_PLACED };

/* A fault whose page has not come. */
struct waiter {
    uint64_t page;
    uint64_t event_ns;
};

struct fetch {
    int uffd;
    uint64_t region_hva;
    uint64_t pages;
    uint32_t run_pages, in_flight_max;
    uint64_t faults_max; /* 0: no limit */
    int urgent_fd, background_fd;

    _Atomic uint8_t *page_states; /* who moves a page from MISSING to ASKED asks for it */
    atomic_bool is_done;

    pthread_mutex_t mutex; /* guards all below and the step to PLACED; never held across a system call but the last */
    struct waiter waiters[WAITERS_MAX];
    uint32_t waiter_count;
    uint64_t placed_pages, background_pages;
    uint64_t last_placed_ns;
    uint32_t *latencies_ns;
    uint64_t latency_count, latency_capacity;
};

static bool claim(struct fetch *fetch, uint64_t page)
{
    uint8_t expected = PAGE_MISSING;

    return atomic_compare_exchange_strong(&fetch->page_states[page], &expected, PAGE_ASKED);
}

static void settle(struct fetch *fetch, uint64_t first_page, uint32_t page_count, bool is_urgent)
{
    pthread_mutex_lock(&fetch->mutex);
    const uint64_t placed_ns = clock_ns(CLOCK_MONOTONIC);
    for (uint32_t i = 0; i < page_count; i++)
        atomic_store_explicit(&fetch->page_states[first_page + i], PAGE_PLACED, memory_order_relaxed);
    for (uint32_t i = fetch->waiter_count; i-- > 0;) {
        if (fetch->waiters[i].page - first_page >= page_count)
            continue;
        check(fetch->latency_count < fetch->latency_capacity, "room for a latency");
        fetch->latencies_ns[fetch->latency_count++] = (uint32_t)(placed_ns - fetch->waiters[i].event_ns);
        fetch->waiters[i] = fetch->waiters[--fetch->waiter_count];
    }
    fetch->placed_pages += page_count;
    fetch->background_pages += is_urgent ? 0 : page_count;
    fetch->last_placed_ns = placed_ns;
    if (fetch->placed_pages == fetch->pages || (fetch->faults_max && fetch->latency_count >= fetch->faults_max)) {
        fetch->is_done = true;
        shutdown(fetch->urgent_fd, SHUT_RD); /* ends the urgent thread's poll */
    }
    pthread_mutex_unlock(&fetch->mutex);
}

static void wake(const struct fetch *fetch, uint64_t page)
{
    struct uffdio_range range = {.start = fetch->region_hva + page_offset(page), .len = PAGE_SIZE_BYTES};

    check(ioctl(fetch->uffd, UFFDIO_WAKE, &range) == 0, "UFFDIO_WAKE");
}

static void place(struct fetch *fetch, const struct run *run, const char *data, bool is_urgent)
{
    const uint64_t length_bytes = page_offset(run->page_count);

    for (uint64_t done = 0; done < length_bytes;) {
        struct uffdio_copy copy = {
            .dst = fetch->region_hva + page_offset(run->first_page) + done,
            .src = (uintptr_t)data + done,
            .len = length_bytes - done,
        };
        if (ioctl(fetch->uffd, UFFDIO_COPY, &copy) == 0)
            break;
        if (copy.copy > 0) {
            done += (uint64_t)copy.copy;
        } else if (errno == EEXIST) {
            wake(fetch, run->first_page + (done >> PAGE_SHIFT)); /* EEXIST wakes nobody */
            done += PAGE_SIZE_BYTES;
        } else {
            check(errno == EAGAIN, "UFFDIO_COPY"); /* the address space is changing: again */
            sched_yield();
        }
    }
    settle(fetch, run->first_page, run->page_count, is_urgent);
}

/* ---- fetch: urgent ---- */

struct reply_buffer {
    char data[REPLY_BATCH * URGENT_REPLY_BYTES];
    size_t held_bytes;
};

/* Whether the page must be asked for: it is missing, and nobody has asked. */
static bool on_fault(struct fetch *fetch, uint64_t page, uint64_t event_ns)
{
    pthread_mutex_lock(&fetch->mutex);
    const bool is_placed = fetch->page_states[page] == PAGE_PLACED;
    check(fetch->waiter_count < WAITERS_MAX, "room for a waiter");
    if (!is_placed)
        fetch->waiters[fetch->waiter_count++] = (struct waiter){page, event_ns};
    pthread_mutex_unlock(&fetch->mutex);
    if (is_placed)
        wake(fetch, page);
    return !is_placed && claim(fetch, page);
}

static void read_faults(struct fetch *fetch)
{
    struct uffd_msg events[EVENT_BATCH];
    struct run requests[EVENT_BATCH];
    size_t request_count = 0;
    const ssize_t got = read(fetch->uffd, events, sizeof(events));
    const uint64_t event_ns = clock_ns(CLOCK_MONOTONIC);

    check(got >= 0 || errno == EAGAIN, "read of the userfaultfd");
    for (ssize_t i = 0; i < got / (ssize_t)sizeof(*events); i++) {
        const uint64_t page = (events[i].arg.pagefault.address - fetch->region_hva) >> PAGE_SHIFT;
        check(events[i].event == UFFD_EVENT_PAGEFAULT && page < fetch->pages, "an event within the region");
        if (on_fault(fetch, page, event_ns))
            requests[request_count++] = (struct run){.first_page = page, .page_count = 1};
    }
    check(!request_count || send_all(fetch->urgent_fd, requests, request_count * sizeof(*requests)), "urgent send");
}

static void take_urgent_replies(struct fetch *fetch, struct reply_buffer *buffer)
{
    const ssize_t got = recv(fetch->urgent_fd, buffer->data + buffer->held_bytes,
                             sizeof(buffer->data) - buffer->held_bytes, MSG_DONTWAIT);
    size_t used_bytes = 0;

    check(got > 0 || (got < 0 && errno == EAGAIN) || fetch->is_done, "urgent recv");
    buffer->held_bytes += got < 0 ? 0 : (size_t)got;
    for (; buffer->held_bytes - used_bytes >= URGENT_REPLY_BYTES; used_bytes += URGENT_REPLY_BYTES) {
        struct run run;
        memcpy(&run, buffer->data + used_bytes, sizeof(run));
        check(run.page_count == 1 && run.first_page < fetch->pages, "an urgent reply of one page");
        place(fetch, &run, buffer->data + used_bytes + sizeof(run), true);
    }
    buffer->held_bytes -= used_bytes;
    memmove(buffer->data, buffer->data + used_bytes, buffer->held_bytes);
}

static void *urgent_thread(void *argument)
{
    struct fetch *fetch = argument;
    struct reply_buffer buffer = {.held_bytes = 0};
    struct pollfd fds[2] = {{.fd = fetch->uffd, .events = POLLIN}, {.fd = fetch->urgent_fd, .events = POLLIN}};

    while (!fetch->is_done) {
        check(poll(fds, 2, -1) > 0, "poll");
        if (fds[0].revents)
            read_faults(fetch);
        if (fds[1].revents)
            take_urgent_replies(fetch, &buffer);
    }
    return NULL;
}

/* ---- fetch: background ---- */

struct window {
    struct run runs[IN_FLIGHT_MAX]; /* a ring, oldest at head: replies come in order */
    uint32_t head, count;
    uint64_t next_page;
};

/* The next run of pages that nobody has asked for; page_count 0 when there is none. */
static struct run claim_run(struct fetch *fetch, uint64_t *next_page)
{
    struct run run = {0};

    for (; *next_page < fetch->pages && run.page_count < fetch->run_pages; ++*next_page) {
        if (claim(fetch, *next_page))
            run.page_count++;
        else if (run.page_count)
            break;
    }
    run.first_page = *next_page - run.page_count;
    return run;
}

static void top_up(struct fetch *fetch, struct window *window)
{
    struct run requests[IN_FLIGHT_MAX];
    uint32_t request_count = 0;

    while (window->count < fetch->in_flight_max) {
        const struct run run = claim_run(fetch, &window->next_page);
        if (!run.page_count)
            break;
        window->runs[(window->head + window->count++) % IN_FLIGHT_MAX] = run;
        requests[request_count++] = run;
    }
    check(!request_count || send_all(fetch->background_fd, requests, request_count * sizeof(*requests)), "bulk send");
}

static void *background_thread(void *argument)
{
    struct fetch *fetch = argument;
    struct window window = {.count = 0};
    char *data = (char *)allocate(PAGE_SIZE_BYTES + page_offset(fetch->run_pages)) + PAGE_SIZE_BYTES;
    char *reply = data - sizeof(struct run);

    setpriority(PRIO_PROCESS, 0, BULK_NICE); /* so that bulk work gives way to urgent pages */
    top_up(fetch, &window);
    while (window.count) {
        const struct run run = window.runs[window.head];
        const size_t reply_bytes = sizeof(run) + page_offset(run.page_count);
        check(recv(fetch->background_fd, reply, reply_bytes, MSG_WAITALL) == (ssize_t)reply_bytes, "bulk recv");
        check(memcmp(reply, &run, sizeof(run)) == 0, "the run that was asked for");
        window.head = (window.head + 1) % IN_FLIGHT_MAX;
        window.count--;
        top_up(fetch, &window); /* the source reads the next run while this one is placed */
        place(fetch, &run, data, false);
    }
    free(data - PAGE_SIZE_BYTES);
    return NULL;
}

/* ---- fetch: the whole ---- */

static int compare_latencies(const void *left, const void *right)
{
    const uint32_t left_ns = *(const uint32_t *)left, right_ns = *(const uint32_t *)right;

    return (left_ns > right_ns) - (left_ns < right_ns);
}

static void report(struct fetch *fetch, double elapsed_s, double used_cpu_s)
{
    static const struct {
        const char *name;
        double rank;
    } quantiles[] = {{"p50_us", 0.5}, {"p90_us", 0.9}, {"p99_us", 0.99}, {"p999_us", 0.999}, {"max_us", 1}};
    const uint64_t faults = fetch->latency_count, background_bytes = page_offset(fetch->background_pages);
    const double placed_bytes = (double)page_offset(fetch->placed_pages);
    double sum_us = 0;

    qsort(fetch->latencies_ns, faults, sizeof(*fetch->latencies_ns), compare_latencies);
    for (uint64_t i = 0; i < faults; i++)
        sum_us += fetch->latencies_ns[i] / 1e3;
    printf("{\"faults\": %.0f, \"mean_us\": %.3f", (double)faults, faults ? sum_us / (double)faults : 0);
    for (size_t i = 0; faults && i < sizeof(quantiles) / sizeof(*quantiles); i++) {
        /* Nearest rank, as migrate.telemetry counts. */
        const double index = ceil(quantiles[i].rank * (double)faults) - 1;
        printf(", \"%s\": %.3f", quantiles[i].name, fetch->latencies_ns[(uint64_t)index] / 1e3);
    }
    printf(", \"placed_bytes\": %.0f, \"background_bytes\": %.0f", placed_bytes, (double)background_bytes);
    printf(", \"seconds\": %.6f, \"gb_per_s\": %.4f, \"cpu_s\": %.6f}\n", elapsed_s, placed_bytes / elapsed_s / 1e9,
           used_cpu_s);
}

static void fetch_all(struct fetch *fetch, uint16_t port, bool has_urgent, bool has_background)
{
    pthread_t urgent = 0, background = 0;

    pthread_mutex_init(&fetch->mutex, NULL);
    fetch->page_states = allocate(fetch->pages);
    fetch->latency_capacity = 2 * fetch->pages; /* more than one vCPU may wait for a page */
    fetch->latencies_ns = allocate(fetch->latency_capacity * sizeof(*fetch->latencies_ns));
    fetch->urgent_fd = open_socket(port, false);
    fetch->background_fd = open_socket(port, false);

    const uint64_t begin_ns = clock_ns(CLOCK_MONOTONIC);
    const uint64_t begin_cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    if (has_urgent)
        urgent = start_thread(urgent_thread, fetch);
    if (has_background)
        background = start_thread(background_thread, fetch);
    printf("started\n");
    fflush(stdout);
    if (has_background)
        pthread_join(background, NULL);
    if (has_urgent)
        pthread_join(urgent, NULL);
    report(fetch, (double)(fetch->last_placed_ns - begin_ns) / 1e9,
           (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - begin_cpu_ns) / 1e9);
}

/* ---- the command line ---- */

/* The value of an option, or 1 if it is one without a value. */
static uint64_t option_of(char **argv, const char *name, uint64_t otherwise)
{
    for (; *argv; argv++)
        if (strcmp(*argv, name) == 0)
            return argv[1] && argv[1][0] != '-' ? strtoull(argv[1], NULL, 0) : 1;
    return otherwise;
}

int main(int argc, char **argv)
{
    const char *role = argc > 1 ? argv[1] : "";
    const uint16_t port = (uint16_t)option_of(argv, "--port", 0);
    static struct fetch fetch;

    alarm((unsigned)option_of(argv, "--deadline-s", 120));
    fetch.uffd = (int)option_of(argv, "--uffd", 0);
    fetch.region_hva = option_of(argv, "--hva", 0);
    fetch.pages = option_of(argv, "--pages", 0);
    fetch.run_pages = (uint32_t)option_of(argv, "--run-pages", 64);
    fetch.in_flight_max = (uint32_t)option_of(argv, "--in-flight", 8);
    fetch.faults_max = option_of(argv, "--faults-max", 0);
    if (strcmp(role, "serve") == 0 && fetch.pages)
        serve((int)option_of(argv, "--memfd", 0), fetch.pages, port);
    if (strcmp(role, "fetch") == 0 && fetch.pages && fetch.run_pages - 1 < RUN_PAGES_MAX &&
        fetch.in_flight_max - 1 < IN_FLIGHT_MAX) {
        fetch_all(&fetch, port, !option_of(argv, "--no-urgent", 0), !option_of(argv, "--no-background", 0));
        return 0;
    }
    fprintf(stderr, "usage: see the head of limit.c\n");
    return 2;
}
