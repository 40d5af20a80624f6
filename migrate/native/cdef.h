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

/* ---- machines: mailbox.h, payload.h, kvm.h, vcpu.h ---- */
