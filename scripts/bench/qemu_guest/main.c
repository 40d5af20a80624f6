/*
 * Runs the workload of migrate/native/payload.c in a guest of QEMU, at CPL 3.
 *
 * Names in GUEST_ come from the compiler's command line. The workload's RAM begins at GUEST_RAM_GPA; its mailbox is
 * ordinary memory, which QMP's pmemsave reads at the address of the symbol `mailbox`.
 */
#include "payload.h"
#include "units.h"

_Alignas(MIG_PAGE_SIZE_BYTES) struct mig_mailbox mailbox;

void guest_main(void)
{
    char *ram = (char *)GUEST_RAM_GPA;
    struct mig_payload_params *params = (void *)(ram + MIG_PARAMS_GPA);
    *params = (struct mig_payload_params){
        .distribution = MIG_UNIFORM,
        .write_threshold = GUEST_WRITE_THRESHOLD,
        .working_pages = GUEST_WORKING_PAGES,
        .first_page = GUEST_FIRST_PAGE,
        .table_gpa = GUEST_TABLE_OFFSET,
        .state_gpa = GUEST_STATE_OFFSET,
        .vcpus = 1,
        .checks_fpu = 1,
    };
    struct mig_payload_state *state = (void *)(ram + GUEST_STATE_OFFSET);
    state->random = GUEST_SEED;
    for (;;)
        mig_payload_step(ram, &mailbox, 0);
}
