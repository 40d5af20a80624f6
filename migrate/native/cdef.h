/* All that Python may see of the C core. Declarations repeat the headers; cffi checks them when it compiles. */

/* ---- paging: uffd.h, bitmap.h, pager.h, pageserver.h, digest.h ---- */
enum { MIG_PAGE_SHIFT, MIG_PAGE_SIZE_BYTES, ... };

uint64_t mig_digest_page(const void *page);
uint64_t mig_digest_run(const uint64_t *page_digests, uint64_t count_pages);
uint64_t mig_digest_memory_term(uint64_t page, uint64_t page_digest);

extern const uint64_t MIG_UFFD_FEATURES;
int mig_uffd_open(uint64_t required_features, bool user_mode_only, int *ret_fd);
int mig_uffd_register_missing(int uffd, uint64_t hva, uint64_t length_bytes);
int mig_uffd_unregister(int uffd, uint64_t hva, uint64_t length_bytes);
int mig_uffd_wake(int uffd, uint64_t hva, uint64_t length_bytes);

struct mig_run {
    uint64_t first_page;
    uint64_t count_pages;
    uint64_t digest;
    bool is_zero;
};
struct mig_page_source;
int mig_page_source_create(int memfd, uint64_t pages, struct mig_page_source **ret);
void mig_page_source_destroy(struct mig_page_source *source);
int mig_page_source_take_digests(struct mig_page_source *source, uint64_t *ret_memory_digest);
int mig_page_source_read(struct mig_page_source *source, uint64_t first_page, uint32_t count_pages, void *buffer,
                         struct mig_run *runs);

enum mig_page_kind { MIG_KIND_ZERO, MIG_KIND_URGENT, MIG_KIND_BACKGROUND, MIG_KIND_PRESENT };
struct mig_pager_counters {
    uint64_t total_pages;
    uint64_t missing_pages;
    uint64_t zero_pages;
    uint64_t urgent_pages;
    uint64_t background_pages;
    uint64_t duplicate_pages;
    uint64_t verified_pages;
    uint64_t faults;
    uint64_t lost_records;
    uint64_t memory_digest;
};
struct mig_fault_record {
    uint64_t page;
    uint64_t event_ns;
    uint64_t placed_ns;
    uint32_t thread_id;
    uint32_t kind;
};
struct mig_pager;
int mig_pager_create(int uffd, uint64_t region_hva, uint64_t pages, struct mig_pager **ret);
void mig_pager_destroy(struct mig_pager *pager);
void mig_pager_stop(struct mig_pager *pager);
int mig_pager_claim_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages, uint64_t timeout_us);
uint32_t mig_pager_claim_run(struct mig_pager *pager, uint32_t max_pages, uint64_t *ret_first_page);
int mig_pager_place_data(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages, const void *data,
                         enum mig_page_kind kind, bool verify, uint64_t digest);
int mig_pager_place_zero(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages);
int mig_pager_wait_done(struct mig_pager *pager, uint64_t timeout_us);
void mig_pager_read_counters(struct mig_pager *pager, struct mig_pager_counters *ret);
uint32_t mig_pager_drain_records(struct mig_pager *pager, struct mig_fault_record *records, uint32_t max_records);

struct mig_bitmap {
    uint64_t *words;
    uint64_t bits;
};
int mig_bitmap_init(struct mig_bitmap *bitmap, uint64_t bits);
void mig_bitmap_deinit(struct mig_bitmap *bitmap);
uint64_t mig_bitmap_set_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count);
uint64_t mig_bitmap_clear_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count);
uint64_t mig_bitmap_next_set(const struct mig_bitmap *bitmap, uint64_t from);
uint64_t mig_bitmap_next_clear(const struct mig_bitmap *bitmap, uint64_t from);

/* ---- machines: mailbox.h, payload.h, machine.h ---- */
enum { MIG_STALL_BUCKETS = 1024, MIG_STALL_OCTAVE_MIN = 10, MIG_STALL_SUB_BUCKETS = 32, MIG_VCPUS_MAX = 8 };

struct mig_mailbox {
    uint64_t touches;
    uint64_t writes; 
    uint64_t errors;
    uint64_t first_error_page;
    uint64_t first_error_expected;
    uint64_t first_error_found;
    uint64_t stall_max_ticks;
    uint64_t populated;
    uint64_t audit_requested;
    uint64_t audit_done;
    uint64_t stop; 
    uint64_t reserved[501];
    uint32_t stall_histogram[1024];
};

struct mig_payload_params {
    uint64_t distribution;
    uint64_t write_threshold;
    uint64_t working_pages;
    uint64_t first_page;
    uint64_t table_gpa;
    uint64_t state_gpa;
    uint64_t vcpus;
    uint64_t ticks_per_touch;
    uint64_t checks_fpu;
};
struct mig_payload_state {
    uint64_t random;
    uint64_t position;
    uint64_t next_touch_ticks;
    uint64_t populated_slots;
};
enum { MIG_PARAMS_GPA = 0x1000, MIG_PAGE_TABLE_GPA = 0x2000 };
struct mig_machine;
struct mig_cpuid_entry {
    uint32_t function, index, flags, eax, ebx, ecx, edx;
};

int mig_kvm_supported_cpuid(struct mig_cpuid_entry *entries, uint32_t max_entries);

int mig_machine_create(char *ram, uint64_t ram_bytes, struct mig_mailbox *mailboxes, uint32_t vcpus,
                       const struct mig_cpuid_entry *cpuid, uint32_t cpuid_count, struct mig_machine **ret,
                       const char **ret_operation);

int mig_machine_boot(struct mig_machine *machine, uint64_t code_gpa, uint64_t stack_gpa);

void mig_machine_resume(struct mig_machine *machine);

int mig_machine_pause(struct mig_machine *machine, uint64_t timeout_us);

const char *mig_machine_failure(const struct mig_machine *machine);

uint64_t mig_machine_tsc_khz(const struct mig_machine *machine);

uint32_t mig_vcpu_item_count(void);
const char *mig_vcpu_item_name(uint32_t item);
uint32_t mig_vcpu_item_bytes(uint32_t item);
int mig_vcpu_get_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, void *data);
int mig_vcpu_set_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, const void *data);
