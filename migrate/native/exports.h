/* Which memories are served now, to whom. Thread-safe. */
#ifndef MIG_EXPORTS_H
#define MIG_EXPORTS_H

#include "compress.h"
#include "page_source.h"

struct mig_exports;

/* One memory, served to the holder of one token while its migration lasts. Counted: a call holds it. */
struct mig_export;

/** Returns 0 or -errno. */
int mig_exports_create(struct mig_exports **ret);
/** All must have been withdrawn, and no call may hold one. */
void mig_exports_destroy(struct mig_exports *exports);

/**
 * Serve a memory from now on, its runs compressed as its reader understands it. Where readers prove who they are, only
 * to the host of that name or numeric address; "" is any host. With `times_replies`, each reply says how long it took.
 * Returns 0 or -errno; -EEXIST if the migration is served already.
 */
int mig_exports_publish(struct mig_exports *exports, const char *migration_id, const char *token,
                        struct mig_page_source *source, enum mig_compression compression, const char *peer_name,
                        bool times_replies);

/** What is read from now on was read in this generation of the dirty log. Returns 0 or -ENOENT. */
int mig_exports_set_generation(struct mig_exports *exports, const char *migration_id, uint64_t generation);

/** Serve it no longer. Returns once no reader is inside it, so that it may be freed. Idempotent. */
void mig_exports_withdraw(struct mig_exports *exports, const char *migration_id);

/**
 * The export that a call may read, from its metadata; either string may be NULL.
 * Returns 0, -ENOENT (no such migration serves pages now) or -EACCES (the token is not its).
 */
int mig_exports_find(struct mig_exports *exports, const char *migration_id, const char *authorization,
                     struct mig_export **ret);
/** Let go of an export. NULL is nothing. */
void mig_export_put(struct mig_export *export);

/** The host that it is for; "" is any. */
const char *mig_export_peer_name(const struct mig_export *export);

/** The memory's descriptor, the export's own: open as long as the export is held, whatever becomes of the source. */
int mig_export_memfd(const struct mig_export *export);

/** What its reader understands beside plain pages. */
enum mig_compression mig_export_compression(const struct mig_export *export);

/** Whether replies say how long they took. */
bool mig_export_times_replies(const struct mig_export *export);

/** The generation of what is read from now on: to be asked before the read. */
uint64_t mig_export_generation(const struct mig_export *export);

/** Begin to read; NULL if it was withdrawn meanwhile. Every success is paired with mig_export_leave. */
struct mig_page_source *mig_export_enter(struct mig_export *export);
void mig_export_leave(struct mig_export *export);

#endif
