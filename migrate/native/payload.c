#include "payload.h"

#include "units.h"

/* The code runs in a guest without a kernel: no vector registers, no helpers, no data outside its section. */
#pragma GCC target("general-regs-only")
#pragma GCC optimize("no-stack-protector", "no-jump-tables", "no-tree-loop-distribute-patterns", "omit-frame-pointer")

#define GUEST_INLINE static inline __attribute__((always_inline, no_sanitize("address", "undefined")))

static const uint64_t FPU_PATTERN = 0x6d69677261746521;
enum { STAMP_STRIDE_WORDS = 170, STAMPS = 4, FPU_CHECK_MASK = 0xff };

GUEST_INLINE uint64_t read_tsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/* SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). */
GUEST_INLINE uint64_t scramble(uint64_t value)
{
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

GUEST_INLINE uint64_t next_random(struct mig_payload_state *state)
{
    state->random += 0x9e3779b97f4a7c15;
    return scramble(state->random);
}

/* What a page holds in version `version`: zero before its first write, never zero after it. */
GUEST_INLINE uint64_t stamp_of(uint64_t page, uint64_t version)
{
    return version ? scramble(page * 0x9e3779b97f4a7c15 + version) | 1ull << 63 : 0;
}

/* First and last word are among the four, so that half a page shows. */
GUEST_INLINE volatile uint64_t *stamp_place(char *page_start, uint64_t index)
{
    return (volatile uint64_t *)page_start + index * STAMP_STRIDE_WORDS + (index == STAMPS - 1);
}

GUEST_INLINE void note_error(struct mig_mailbox *mailbox, uint64_t page, uint64_t expected, uint64_t found)
{
    if (!mailbox->errors++) {
        mailbox->first_error_page = page;
        mailbox->first_error_expected = expected;
        mailbox->first_error_found = found;
    }
}

GUEST_INLINE void check_page(char *page_start, struct mig_mailbox *mailbox, uint64_t page, uint64_t version)
{
    const uint64_t expected = stamp_of(page, version);
    for (uint64_t i = 0; i < STAMPS; i++) {
        const uint64_t found = *stamp_place(page_start, i);
        if (found != expected) {
            note_error(mailbox, page, expected, found);
            return;
        }
    }
}

GUEST_INLINE void write_page(char *page_start, struct mig_mailbox *mailbox, uint64_t page, volatile uint64_t *version)
{
    const uint64_t next = *version + 1;
    const uint64_t stamp = stamp_of(page, next);
    for (uint64_t i = 0; i < STAMPS; i++)
        *stamp_place(page_start, i) = stamp;
    *version = next;
    mailbox->writes++;
}

GUEST_INLINE void note_stall(struct mig_mailbox *mailbox, uint64_t ticks)
{
    if (ticks > mailbox->stall_max_ticks)
        mailbox->stall_max_ticks = ticks;
    if (ticks < 1ull << MIG_STALL_OCTAVE_MIN)
        return;
    const uint64_t octave = 63 - (uint64_t)__builtin_clzll(ticks);
    const uint64_t sub = ticks >> (octave - 5) & (MIG_STALL_SUB_BUCKETS - 1);
    const uint64_t bucket = (octave - MIG_STALL_OCTAVE_MIN) * MIG_STALL_SUB_BUCKETS + sub;
    mailbox->stall_histogram[bucket < MIG_STALL_BUCKETS ? bucket : MIG_STALL_BUCKETS - 1]++;
}

/* Density 1/rank: an octave of ranks is chosen uniformly, then a rank in it; an affine map scatters the ranks. */
GUEST_INLINE uint64_t zipf_slot(uint64_t random, uint64_t slots)
{
    const uint64_t octaves = 64 - (uint64_t)__builtin_clzll(slots);
    const uint64_t octave = (random >> 32) % octaves;
    const uint64_t mask = (1ull << octaves) - 1;
    uint64_t slot = ((1ull << octave) - 1 + (random & ((1ull << octave) - 1))) % slots;
    do
        slot = (slot * 0x9e3779b97f4a7c15 + 0x7f4a7c15) & mask;
    while (slot >= slots);
    return slot;
}

GUEST_INLINE uint64_t choose_slot(const struct mig_payload_params *params, struct mig_payload_state *state,
                                  uint64_t slots)
{
    if (params->distribution == MIG_SEQUENTIAL) {
        const uint64_t slot = state->position;
        state->position = slot + 1 < slots ? slot + 1 : 0;
        return slot;
    }
    const uint64_t random = next_random(state);
    return params->distribution == MIG_ZIPF ? zipf_slot(random, slots) : random % slots;
}

GUEST_INLINE void set_fpu(void)
{
    __asm__ volatile("movq %0, %%xmm15" : : "r"(FPU_PATTERN));
}

GUEST_INLINE uint64_t get_fpu(void)
{
    uint64_t value;
    __asm__ volatile("movq %%xmm15, %0" : "=r"(value));
    return value;
}

struct view {
    char *ram;
    const struct mig_payload_params *params;
    struct mig_payload_state *state;
    volatile uint64_t *versions;
    uint64_t slots;
    uint64_t vcpu;
};

GUEST_INLINE uint64_t slot_page(const struct view *view, uint64_t slot)
{
    return slot * view->params->vcpus + view->vcpu;
}

GUEST_INLINE char *page_start(const struct view *view, uint64_t page)
{
    return view->ram + ((view->params->first_page + page) << MIG_PAGE_SHIFT);
}

GUEST_INLINE void touch(const struct view *view, struct mig_mailbox *mailbox)
{
    const uint64_t page = slot_page(view, choose_slot(view->params, view->state, view->slots));
    const uint64_t is_write = (next_random(view->state) & 0xffffffff) < view->params->write_threshold;
    const uint64_t begin = read_tsc();
    volatile uint64_t *version = view->versions + page;
    check_page(page_start(view, page), mailbox, page, *version);
    if (is_write)
        write_page(page_start(view, page), mailbox, page, version);
    note_stall(mailbox, read_tsc() - begin);
    mailbox->touches++;
}

/* Compares every page of the vCPU, and the sum of their versions. False: told to stop before the end. */
GUEST_INLINE uint64_t audit(const struct view *view, struct mig_mailbox *mailbox)
{
    uint64_t sum = 0;
    for (uint64_t slot = 0; slot < view->slots; slot++) {
        if (*(volatile uint64_t *)&mailbox->stop)
            return 0;
        const uint64_t page = slot_page(view, slot);
        check_page(page_start(view, page), mailbox, page, view->versions[page]);
        sum += view->versions[page];
    }
    if (sum != mailbox->writes)
        note_error(mailbox, ~0ull, mailbox->writes, sum);
    return 1;
}

GUEST_INLINE uint64_t payload_step(char *ram, struct mig_mailbox *mailbox, uint64_t vcpu)
{
    const struct mig_payload_params *params = (const void *)(ram + MIG_PARAMS_GPA);
    const struct view view = {
        .ram = ram,
        .params = params,
        .state = (void *)(ram + params->state_gpa + (vcpu << MIG_PAGE_SHIFT)),
        .versions = (void *)(ram + params->table_gpa),
        .slots = (params->working_pages - vcpu + params->vcpus - 1) / params->vcpus,
        .vcpu = vcpu,
    };
    volatile uint64_t *stop = &mailbox->stop;
    volatile uint64_t *audit_requested = &mailbox->audit_requested;

    while (!mailbox->populated) {
        if (*stop)
            return MIG_PAYLOAD_STOPPED;
        if (view.state->populated_slots == view.slots) {
            if (params->checks_fpu)
                set_fpu();
            mailbox->populated = 1;
            return MIG_PAYLOAD_POPULATED;
        }
        const uint64_t page = slot_page(&view, view.state->populated_slots);
        write_page(page_start(&view, page), mailbox, page, view.versions + page);
        view.state->populated_slots++;
    }
    for (;;) {
        if (*stop)
            return MIG_PAYLOAD_STOPPED;
        const uint64_t requested = *audit_requested;
        if (requested != mailbox->audit_done && audit(&view, mailbox))
            mailbox->audit_done = requested;
        if (params->ticks_per_touch) {
            const uint64_t now = read_tsc();
            if (now < view.state->next_touch_ticks && view.state->next_touch_ticks - now <= params->ticks_per_touch)
                return MIG_PAYLOAD_SLEEP | (view.state->next_touch_ticks - now) << 8;
            view.state->next_touch_ticks = now + params->ticks_per_touch;
        }
        touch(&view, mailbox);
        if (params->checks_fpu && !(mailbox->touches & FPU_CHECK_MASK) && get_fpu() != FPU_PATTERN) {
            note_error(mailbox, ~0ull, FPU_PATTERN, get_fpu());
            set_fpu();
        }
    }
}

__attribute__((no_sanitize("address", "undefined"))) uint64_t mig_payload_step(char *ram, struct mig_mailbox *mailbox,
                                                                               uint64_t vcpu)
{
    return payload_step(ram, mailbox, vcpu);
}

__attribute__((section("mig_guest"), used, noinline, no_sanitize("address", "undefined"))) void
mig_payload_guest_entry(char *ram, struct mig_mailbox *mailbox, uint64_t vcpu, volatile uint64_t *doorbell)
{
    for (;;)
        *doorbell = payload_step(ram, mailbox, vcpu);
}
