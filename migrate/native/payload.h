/*
 * The workload of kinds kvm and process: touches pages, checks what it finds, times each touch.
 *
 * Every page of the working set has a version, kept in a table in guest RAM. A write stamps page and table together,
 * the page at four places with a mix of its number and its version: a page that was lost, zeroed, swapped, torn or is
 * stale does not match its table entry, and if both are stale, the sum of versions does not match the mailbox.
 * All that must survive a move lies in guest RAM or in the mailbox, never in a host's memory.
 */
#ifndef MIG_PAYLOAD_H
#define MIG_PAYLOAD_H

#include <stdint.h>

#include "mailbox.h"

enum mig_distribution { MIG_UNIFORM = 1, MIG_ZIPF = 2, MIG_SEQUENTIAL = 3 };

/* What mig_payload_step tells its caller; a sleep comes with its ticks above the low byte. */
enum mig_payload_code { MIG_PAYLOAD_STOPPED = 1, MIG_PAYLOAD_POPULATED = 2, MIG_PAYLOAD_SLEEP = 3 };

/* Lies in guest RAM at params_gpa; one for each guest, never written after creation. */
struct mig_payload_params {
    uint64_t distribution;
    uint64_t write_threshold; /* of 2^32 */
    uint64_t working_pages;
    uint64_t first_page;
    uint64_t table_gpa;
    uint64_t state_gpa; /* of vCPU 0's page; the others follow */
    uint64_t vcpus;
    uint64_t ticks_per_touch; /* 0: as fast as it goes */
    uint64_t checks_fpu;      /* keep a known value in a vector register, and look at it */
};

/* One page of guest RAM for each vCPU: the workload's memory of where it is. */
struct mig_payload_state {
    uint64_t random;
    uint64_t position;
    uint64_t next_touch_ticks;
    uint64_t populated_slots;
};

enum { MIG_PARAMS_GPA = 0x1000 };

/** Run the workload of one vCPU until there is something to tell. RAM is mapped at `ram`. */
uint64_t mig_payload_step(char *ram, struct mig_mailbox *mailbox, uint64_t vcpu);

/** The same, freestanding, for a guest: position-independent code that tells the doorbell and never returns. */
void mig_payload_guest_entry(char *ram, struct mig_mailbox *mailbox, uint64_t vcpu, volatile uint64_t *doorbell);

/** The section that holds the guest's code. */
extern const char __start_mig_guest[], __stop_mig_guest[];

#endif
