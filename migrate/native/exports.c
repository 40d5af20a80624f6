#include "exports.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char BEARER[] = "Bearer ";

struct mig_export {
    struct mig_exports *exports;
    struct mig_export *next;
    char *migration_id;
    char *authorization; /* as the caller must send it */
    char *peer_name;
    struct mig_page_source *source;
    int memfd;
    enum mig_compression compression;
    bool times_replies;
    uint64_t generation; /* read without the mutex */
    unsigned holders, readers;
    bool withdrawn;
};

struct mig_exports {
    pthread_mutex_t mutex; /* guards the list and every export in it */
    pthread_cond_t left;   /* a reader has left */
    struct mig_export *first;
};

int mig_exports_create(struct mig_exports **ret)
{
    struct mig_exports *exports = calloc(1, sizeof(*exports));
    if (!exports)
        return -ENOMEM;
    pthread_mutex_init(&exports->mutex, NULL);
    pthread_cond_init(&exports->left, NULL);
    *ret = exports;
    return 0;
}

void mig_exports_destroy(struct mig_exports *exports)
{
    if (!exports)
        return;
    pthread_cond_destroy(&exports->left);
    pthread_mutex_destroy(&exports->mutex);
    free(exports);
}

static void free_export(struct mig_export *export)
{
    if (export->memfd >= 0)
        close(export->memfd);
    free(export->migration_id);
    free(export->authorization);
    free(export->peer_name);
    free(export);
}

/* Under the mutex. The link that points to the export, or to the list's end. */
static struct mig_export **find_link(struct mig_exports *exports, const char *migration_id)
{
    struct mig_export **link = &exports->first;
    while (*link && strcmp((*link)->migration_id, migration_id) != 0)
        link = &(*link)->next;
    return link;
}

int mig_exports_publish(struct mig_exports *exports, const char *migration_id, const char *token,
                        struct mig_page_source *source, enum mig_compression compression, const char *peer_name,
                        bool times_replies)
{
    struct mig_export *export = calloc(1, sizeof(*export));
    if (!export)
        return -ENOMEM;
    *export = (struct mig_export){.exports = exports,
                                  .source = source,
                                  .memfd = fcntl(mig_page_source_memfd(source), F_DUPFD_CLOEXEC, 0),
                                  .compression = compression,
                                  .times_replies = times_replies,
                                  .holders = 1};
    export->migration_id = strdup(migration_id);
    export->peer_name = strdup(peer_name);
    export->authorization = malloc(strlen(BEARER) + strlen(token) + 1);
    if (!export->migration_id || !export->authorization || !export->peer_name || export->memfd < 0) {
        const int rc = export->memfd < 0 ? -errno : -ENOMEM;
        free_export(export);
        return rc;
    }
    strcpy(stpcpy(export->authorization, BEARER), token);

    pthread_mutex_lock(&exports->mutex);
    struct mig_export **link = find_link(exports, migration_id);
    const bool is_new = !*link;
    if (is_new)
        *link = export;
    pthread_mutex_unlock(&exports->mutex);
    if (!is_new)
        free_export(export);
    return is_new ? 0 : -EEXIST;
}

int mig_exports_set_generation(struct mig_exports *exports, const char *migration_id, uint64_t generation)
{
    pthread_mutex_lock(&exports->mutex);
    struct mig_export *export = *find_link(exports, migration_id);
    if (export)
        __atomic_store_n(&export->generation, generation, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&exports->mutex);
    return export ? 0 : -ENOENT;
}

enum mig_compression mig_export_compression(const struct mig_export *export)
{
    return export->compression;
}

bool mig_export_times_replies(const struct mig_export *export)
{
    return export->times_replies;
}

uint64_t mig_export_generation(const struct mig_export *export)
{
    return __atomic_load_n(&export->generation, __ATOMIC_SEQ_CST);
}

void mig_exports_withdraw(struct mig_exports *exports, const char *migration_id)
{
    pthread_mutex_lock(&exports->mutex);
    struct mig_export **link = find_link(exports, migration_id);
    struct mig_export *export = *link;
    if (export) {
        *link = export->next;
        export->withdrawn = true;
        while (export->readers)
            pthread_cond_wait(&exports->left, &exports->mutex);
    }
    pthread_mutex_unlock(&exports->mutex);
    mig_export_put(export);
}

/* Takes as long for a wrong token as for a right one of the same length. */
static bool is_equal(const char *secret, const char *claim)
{
    const size_t secret_bytes = strlen(secret), claim_bytes = strlen(claim);
    unsigned char difference = secret_bytes != claim_bytes;
    for (size_t i = 0; i < claim_bytes; i++)
        difference |= (unsigned char)(claim[i] ^ secret[i % (secret_bytes + 1)]);
    return !difference;
}

int mig_exports_find(struct mig_exports *exports, const char *migration_id, const char *authorization,
                     struct mig_export **ret)
{
    int rc = -ENOENT;

    pthread_mutex_lock(&exports->mutex);
    struct mig_export *export = *find_link(exports, migration_id ? migration_id : "");
    if (export) {
        rc = is_equal(export->authorization, authorization ? authorization : "") ? 0 : -EACCES;
        if (rc == 0) {
            export->holders++;
            *ret = export;
        }
    }
    pthread_mutex_unlock(&exports->mutex);
    return rc;
}

void mig_export_put(struct mig_export *export)
{
    if (!export)
        return;
    pthread_mutex_lock(&export->exports->mutex);
    const bool is_last = !--export->holders;
    pthread_mutex_unlock(&export->exports->mutex);
    if (is_last)
        free_export(export);
}

const char *mig_export_peer_name(const struct mig_export *export)
{
    return export->peer_name;
}

int mig_export_memfd(const struct mig_export *export)
{
    return export->memfd;
}

struct mig_page_source *mig_export_enter(struct mig_export *export)
{
    struct mig_page_source *source = NULL;

    pthread_mutex_lock(&export->exports->mutex);
    if (!export->withdrawn) {
        export->readers++;
        source = export->source;
    }
    pthread_mutex_unlock(&export->exports->mutex);
    return source;
}

void mig_export_leave(struct mig_export *export)
{
    pthread_mutex_lock(&export->exports->mutex);
    if (!--export->readers)
        pthread_cond_broadcast(&export->exports->left);
    pthread_mutex_unlock(&export->exports->mutex);
}
