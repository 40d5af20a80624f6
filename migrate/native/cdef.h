/* All that Python may see of the C core. Declarations repeat the headers; cffi checks them when it compiles. */

/* ---- paging: uffd.h, bitmap.h, pager.h, page_source.h, digest.h ---- */
enum { MIG_PAGE_SHIFT, MIG_PAGE_SIZE_BYTES, ... };

uint64_t mig_digest_page(const void *page);
uint64_t mig_digest_run(const uint64_t *page_digests, uint64_t count_pages);
uint64_t mig_digest_memory_term(uint64_t page, uint64_t page_digest);

extern const uint64_t MIG_UFFD_FEATURES;
extern const uint64_t MIG_UFFD_WP_FEATURES;
enum mig_uffd_mode { MIG_UFFD_MISSING, MIG_UFFD_WP, ... };
int mig_uffd_shake_hands(int uffd, uint64_t required_features);
int mig_uffd_register(int uffd, uint64_t hva, uint64_t length_bytes, uint32_t modes);
int mig_uffd_open(uint64_t required_features, bool user_mode_only, int *ret_fd);
int mig_uffd_register_missing(int uffd, uint64_t hva, uint64_t length_bytes);
int mig_uffd_unregister(int uffd, uint64_t hva, uint64_t length_bytes);
int mig_uffd_poison(int uffd, uint64_t hva, uint64_t length_bytes, uint64_t *ret_bytes);
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
void mig_page_source_digest_replies(struct mig_page_source *source);
int mig_page_source_take_digests(struct mig_page_source *source, uint64_t *ret_memory_digest);
int mig_page_source_read(struct mig_page_source *source, uint64_t first_page, uint32_t count_pages, void *buffer,
                         struct mig_run *runs);

enum mig_page_kind { MIG_KIND_ZERO, MIG_KIND_URGENT, MIG_KIND_BACKGROUND, MIG_KIND_PRESENT };
struct mig_pager_counters {
    uint64_t total_pages;
    uint64_t missing_pages;
    uint64_t deferred_pages;
    uint64_t zero_pages;
    uint64_t precopy_pages;
    uint64_t urgent_pages;
    uint64_t background_pages;
    uint64_t duplicate_pages;
    uint64_t stale_pages;
    uint64_t verified_pages;
    uint64_t faults;
    uint64_t lost_records;
    uint64_t memory_digest;
};
struct mig_fault_record {
    uint64_t page;
    uint64_t event_ns;
    uint64_t taken_ns;
    uint64_t sent_ns;
    uint64_t read_ns;
    uint64_t replied_ns;
    uint64_t placed_ns;
    uint32_t thread_id;
    uint32_t kind;
};
struct mig_pager;
enum mig_order_kind { MIG_ORDER_PRECOPY, MIG_ORDER_FOLLOW, MIG_ORDER_BUBBLE, MIG_ORDER_SUGGESTED };
enum { MIG_ORDER_SUGGESTIONS, MIG_ORDER_HOLD_US_MAX, ... };
struct mig_page_run {
    uint64_t first_page, count_pages;
};
struct mig_fault_note {
    uint64_t page;
    uint64_t event_ns;
    uint32_t thread_id;
    uint32_t was_requested;
};
int mig_pager_create(int uffd, uint64_t region_hva, uint64_t pages, enum mig_order_kind order, struct mig_pager **ret);
void mig_pager_destroy(struct mig_pager *pager);
void mig_pager_stop(struct mig_pager *pager);
void mig_pager_begin_precopy(struct mig_pager *pager, int memfd, bool verify);
int mig_pager_invalidate(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                         const uint8_t *stale, bool defer);
void mig_pager_go_live(struct mig_pager *pager);
bool mig_pager_is_complete(const struct mig_pager *pager);
int mig_pager_start_fault_thread(struct mig_pager *pager);
int mig_pager_claim_urgent(struct mig_pager *pager, uint64_t *pages, uint32_t max_pages, uint64_t timeout_us);
void mig_pager_note_sent(struct mig_pager *pager, uint64_t sent_ns);
void mig_pager_note_read(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages, uint64_t read_ns);
int mig_pager_give_back(struct mig_pager *pager, uint64_t first_page, uint64_t count_pages);
uint32_t mig_pager_claim_run(struct mig_pager *pager, uint32_t max_pages, uint64_t *ret_first_page);
int mig_pager_wait_faults(struct mig_pager *pager, struct mig_fault_note *notes, uint32_t max_notes,
                          uint64_t timeout_us, uint64_t *ret_lost, uint32_t *ret_queued);
int mig_pager_suggest(struct mig_pager *pager, const struct mig_page_run *runs, uint32_t count, uint64_t hold_us);
uint64_t mig_pager_held_ns(struct mig_pager *pager);
int mig_pager_place_data(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages,
                         const void *data, enum mig_page_kind kind, bool verify, uint64_t digest);
int mig_pager_place_zero(struct mig_pager *pager, uint64_t generation, uint64_t first_page, uint64_t count_pages);
int mig_pager_find_present(struct mig_pager *pager, int memfd, uint64_t *ret_pages);
int mig_pager_ask_again(struct mig_pager *pager);
int mig_pager_poison_missing(struct mig_pager *pager, uint64_t *ret_pages);
int mig_pager_wait_done(struct mig_pager *pager, uint64_t timeout_us);
const struct mig_pager_counters *mig_pager_counters(const struct mig_pager *pager);
void mig_pager_missing_map(const struct mig_pager *pager, uint32_t cells, uint8_t *ret_shares);
void mig_pager_copy_map(struct mig_pager *pager, bool known_zero, uint8_t *ret);
uint32_t mig_pager_drain_records(struct mig_pager *pager, struct mig_fault_record *records, uint32_t max_records);

struct mig_bitmap {
    uint64_t *words;
    uint64_t bits;
};
const struct mig_bitmap *mig_pager_missing(const struct mig_pager *pager);
int mig_bitmap_init(struct mig_bitmap *bitmap, uint64_t bits);
void mig_bitmap_deinit(struct mig_bitmap *bitmap);
uint64_t mig_bitmap_set_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count);
uint64_t mig_bitmap_clear_range(struct mig_bitmap *bitmap, uint64_t first, uint64_t count);
uint64_t mig_bitmap_count(const struct mig_bitmap *bitmap, uint64_t first, uint64_t count);
uint64_t mig_bitmap_next_set(const struct mig_bitmap *bitmap, uint64_t from);
uint64_t mig_bitmap_next_clear(const struct mig_bitmap *bitmap, uint64_t from);
uint64_t mig_bitmap_next_set_without(const struct mig_bitmap *bitmap, const struct mig_bitmap *without, uint64_t from);

struct mig_order {
    enum mig_order_kind kind;
    uint32_t suggestion_head, suggestion_tail;
    ...;
};
void mig_order_on_fault(struct mig_order *order, uint64_t page);
void mig_order_on_more(struct mig_order *order, uint64_t first_page);
uint32_t mig_order_next(struct mig_order *order, const struct mig_bitmap *missing, const struct mig_bitmap *requested,
                        uint32_t max_pages, uint64_t now_ns, uint64_t *ret_first_page);
bool mig_order_suggest(struct mig_order *order, struct mig_page_run run);
void mig_order_hold(struct mig_order *order, uint64_t now_ns, uint64_t hold_us);

/* ---- other processes: inject.h, dirty_scan.h ---- */
enum mig_inject_outcome {
    MIG_INJECT_DONE,
    MIG_INJECT_GONE,
    MIG_INJECT_NOT_ALLOWED,
    MIG_INJECT_TRACED,
    MIG_INJECT_NOT_64_BIT,
    MIG_INJECT_NO_SYSCALL,
    MIG_INJECT_FILTERED,
    MIG_INJECT_NOT_STOPPED,
    MIG_INJECT_CALL_REFUSED,
    MIG_INJECT_CALL_UNENDING,
};
struct mig_inject_terms {
    uint64_t timeout_us;
    bool despite_seccomp;
};
struct mig_injected {
    int fd;
    int target_fd;
    int error;
    int tracer_pid;
    uint64_t stopped_ns;
};
int mig_inject_open_uffd(int pid, const struct mig_inject_terms *terms, struct mig_injected *ret);
int mig_inject_close_fd(int pid, int fd, int target_fd, const struct mig_inject_terms *terms, struct mig_injected *ret);
int mig_inject_probe(void);

struct mig_dirty_scan;
int mig_dirty_scan_start(int uffd, int pagemap_fd, uint64_t hva, uint64_t length_bytes, struct mig_dirty_scan **ret);
int64_t mig_dirty_scan_sync(struct mig_dirty_scan *scan, uint64_t *bitmap, bool keep);
int mig_dirty_scan_stop(struct mig_dirty_scan *scan);
int mig_dirty_scan_probe(void);

/* ---- the page call: wire.h, compress.h, reply_order.h, pacing.h, patience.h, tls.h, exports.h, pageserver.h, fetch.h ---- */
struct mig_fetch_request {
    uint64_t request_id;
    uint32_t region;
    uint64_t first_page;
    uint32_t page_count;
};
enum mig_content { MIG_CONTENT_NONE, MIG_CONTENT_DATA, MIG_CONTENT_ZERO, MIG_CONTENT_COMPRESSED };
struct mig_fetch_response {
    uint64_t request_id;
    uint32_t region;
    uint64_t first_page;
    uint32_t page_count;
    uint64_t generation;
    uint64_t digest;
    uint64_t read_ns;
    enum mig_content content;
    int32_t compression;
    const uint8_t *data;
    uint64_t data_bytes;
};
enum { MIG_PREFIX_BYTES, MIG_WIRE_HEADER_BYTES_MAX, ... };
size_t mig_wire_encode_request(const struct mig_fetch_request *request, uint8_t *header);
size_t mig_wire_encode_response(const struct mig_fetch_response *response, uint8_t *header);
int mig_wire_decode_request(const uint8_t *message, size_t message_bytes, struct mig_fetch_request *ret);
int mig_wire_decode_response(const uint8_t *message, size_t message_bytes, struct mig_fetch_response *ret);

enum mig_compression { MIG_COMPRESSION_UNSPECIFIED, MIG_COMPRESSION_NONE, MIG_COMPRESSION_ZSTD };
struct mig_compressor;
struct mig_decompressor;
int mig_compressor_create(struct mig_compressor **ret);
void mig_compressor_destroy(struct mig_compressor *compressor);
uint32_t mig_compress_run(struct mig_compressor *compressor, uint8_t *pages, uint64_t count_pages);
int mig_decompressor_create(struct mig_decompressor **ret);
void mig_decompressor_destroy(struct mig_decompressor *decompressor);
int mig_decompress_run(struct mig_decompressor *decompressor, const uint8_t *data, uint64_t data_bytes,
                       uint64_t count_pages, const uint8_t **ret_pages);
const char *mig_decompressor_flaw(const struct mig_decompressor *decompressor);

struct mig_asked {
    uint64_t request_id;
    uint64_t next_page;
    uint64_t end_page;
    uint64_t asked_ns;
    uint64_t count_pages;
};
struct mig_reply_order {
    struct mig_asked *asked;
    uint64_t head, count, capacity;
    uint64_t open_pages;
    uint64_t last_request_id;
    char flaw[160];
};
void mig_reply_order_deinit(struct mig_reply_order *order);
uint64_t mig_reply_order_ask(struct mig_reply_order *order, uint64_t first_page, uint64_t count_pages,
                             uint64_t now_ns);
int mig_reply_order_answer(struct mig_reply_order *order, uint64_t request_id, uint64_t first_page,
                           uint64_t count_pages, bool is_zero, struct mig_asked *ret_done);

struct mig_window {
    uint64_t bytes;
    uint64_t kept_bytes;
    uint32_t run_pages;
    uint64_t base_rtt_ns;
    uint64_t queue_ns;
    uint64_t foreign_ns;
    uint64_t rate_bytes_per_s;
    ...;
};
void mig_window_init(struct mig_window *window, uint64_t now_ns, uint64_t base_rtt_ns);
void mig_window_on_delivery(struct mig_window *window, uint64_t bytes);
struct mig_rtts {
    uint64_t count;
    uint64_t smallest_ns;
};
bool mig_window_is_due(const struct mig_window *window, uint64_t now_ns, uint64_t rtt_count);
void mig_window_tick(struct mig_window *window, uint64_t now_ns, struct mig_rtts rtts);
struct mig_cap {
    uint64_t bytes_per_s;
    uint64_t free_at_us;
};
enum { MIG_PEER_TIMEOUT_US, ... };
struct mig_patience {
    uint64_t ping_ns;
    uint64_t silent_ns;
    uint64_t unanswered_ns;
    uint64_t lost_ns;
    uint64_t proven_ns;
    uint64_t connect_ns;
};
struct mig_patience mig_patience_of(uint64_t peer_timeout_us);
struct mig_backoff {
    uint64_t pause_ns;
    uint64_t random;
};
void mig_backoff_init(struct mig_backoff *backoff);
void mig_backoff_reset(struct mig_backoff *backoff);
uint64_t mig_backoff_next_ns(struct mig_backoff *backoff);
uint64_t mig_cap_delay_us(struct mig_cap *cap, uint64_t now_us, uint64_t count_bytes);

enum { MIG_TLS_TEXT_BYTES, ... };
struct mig_tls;
int mig_tls_create(const char *ca_pem_path, const char *cert_pem_path, const char *key_pem_path, const char *peers_dir,
                   struct mig_tls **ret, char *text, size_t text_bytes);
int mig_tls_reload(struct mig_tls *tls, char *text, size_t text_bytes);
void mig_tls_put(struct mig_tls *tls);

struct mig_exports;
struct mig_export;
int mig_exports_create(struct mig_exports **ret);
void mig_exports_destroy(struct mig_exports *exports);
int mig_exports_publish(struct mig_exports *exports, const char *migration_id, const char *token,
                        struct mig_page_source *source, enum mig_compression compression, const char *peer_name,
                        bool times_replies);
int mig_exports_set_generation(struct mig_exports *exports, const char *migration_id, uint64_t generation);
void mig_exports_withdraw(struct mig_exports *exports, const char *migration_id);
int mig_exports_find(struct mig_exports *exports, const char *migration_id, const char *authorization,
                     struct mig_export **ret);
void mig_export_put(struct mig_export *export);
const char *mig_export_peer_name(const struct mig_export *export);
bool mig_export_times_replies(const struct mig_export *export);
uint64_t mig_export_generation(const struct mig_export *export);
struct mig_page_source *mig_export_enter(struct mig_export *export);
void mig_export_leave(struct mig_export *export);

enum { MIG_REQUEST_PAGES_MAX, MIG_EVENT_TEXT_BYTES, ... };
struct mig_page_server;
struct mig_page_server_counters {
    uint64_t connections_now;
    uint64_t connections;
    uint64_t connections_failed;
    uint64_t handshakes_failed;
    uint64_t calls;
    uint64_t calls_failed;
    uint64_t requests;
    uint64_t data_pages;
};
struct mig_page_server_patience {
    uint64_t handshake_ns;
    uint64_t idle_ns;
    uint64_t stuck_ns;
};
struct mig_page_server_patience mig_page_server_usual_patience(void);
int mig_page_server_create(int listen_fd, struct mig_exports *exports, struct mig_tls *tls,
                           struct mig_page_server_patience patience, struct mig_page_server **ret);
void mig_page_server_destroy(struct mig_page_server *server);
const struct mig_page_server_counters *mig_page_server_counters(const struct mig_page_server *server);
int mig_page_server_next_event(struct mig_page_server *server, char *text);
void mig_page_server_quiet(struct mig_page_server *server);

struct mig_fetch;
struct mig_fetch_terms {
    const char *host;
    uint16_t port;
    const char *migration_id;
    const char *token;
    bool verify;
    enum mig_compression compression;
    uint64_t max_bandwidth_bytes_per_s;
    uint64_t peer_timeout_us;
    struct mig_tls *tls;
    const char *server_name;
};
enum mig_fetch_reason {
    MIG_FETCH_FINE,
    MIG_FETCH_LINK,
    MIG_FETCH_STATUS,
    MIG_FETCH_PROTOCOL,
    MIG_FETCH_INTEGRITY,
    MIG_FETCH_GUEST,
    MIG_FETCH_LOCAL,
    MIG_FETCH_TLS,
};
struct mig_fetch_failure {
    int reason;
    int error;
    char text[320];
};
struct mig_fetch_counters {
    uint64_t urgent_wire_bytes;
    uint64_t background_wire_bytes;
    uint64_t urgent_requests;
    uint64_t background_requests;
    uint64_t reconnects;
    uint64_t window_bytes;
    uint64_t run_pages;
    uint64_t rate_bytes_per_s;
    uint64_t base_rtt_ns;
    uint64_t queue_ns;
};
int mig_fetch_create(const struct mig_fetch_terms *terms, struct mig_fetch **ret);
void mig_fetch_destroy(struct mig_fetch *fetch);
int mig_fetch_connect(struct mig_fetch *fetch, uint64_t timeout_us);
int mig_fetch_start(struct mig_fetch *fetch, struct mig_pager *pager);
int mig_fetch_wait(struct mig_fetch *fetch, uint64_t timeout_us);
void mig_fetch_stop(struct mig_fetch *fetch);
void mig_fetch_wake(struct mig_fetch *fetch);
void mig_fetch_read_failure(struct mig_fetch *fetch, struct mig_fetch_failure *ret);
const struct mig_fetch_counters *mig_fetch_counters(const struct mig_fetch *fetch);

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

int mig_machine_start_dirty_log(struct mig_machine *machine);
int64_t mig_machine_sync_dirty_log(struct mig_machine *machine, uint64_t *bitmap, bool keep);
int mig_machine_stop_dirty_log(struct mig_machine *machine);

const char *mig_machine_failure(const struct mig_machine *machine);

uint32_t mig_machine_thread_id(const struct mig_machine *machine, uint32_t vcpu);
uint64_t mig_machine_tsc_khz(const struct mig_machine *machine);

uint32_t mig_vcpu_item_count(void);
const char *mig_vcpu_item_name(uint32_t item);
uint32_t mig_vcpu_item_bytes(uint32_t item);
int mig_vcpu_get_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, void *data);
int mig_vcpu_set_item(struct mig_machine *machine, uint32_t vcpu, uint32_t item, const void *data);
