#include "patience.h"

#include <sys/random.h>

#include "units.h"

static const uint64_t PING_MAX_NS = 1000000000u, PROVEN_MAX_NS = 1000000000u;
static const uint64_t BACKOFF_FIRST_NS = 20000000u, BACKOFF_MAX_NS = 1000000000u;

struct mig_patience mig_patience_of(uint64_t peer_timeout_us)
{
    const uint64_t peer_timeout_ns = (peer_timeout_us ? peer_timeout_us : MIG_PEER_TIMEOUT_US) * 1000;

    return (struct mig_patience){
        .ping_ns = mig_smaller(peer_timeout_ns / 5, PING_MAX_NS),
        .silent_ns = peer_timeout_ns / 2,
        .unanswered_ns = peer_timeout_ns * 2,
        .lost_ns = peer_timeout_ns / 2,
        .proven_ns = mig_smaller(peer_timeout_ns / 5, PROVEN_MAX_NS),
        .connect_ns = peer_timeout_ns / 10,
    };
}

void mig_backoff_init(struct mig_backoff *backoff)
{
    mig_backoff_reset(backoff);
    if (getrandom(&backoff->random, sizeof(backoff->random), GRND_NONBLOCK) != (ssize_t)sizeof(backoff->random))
        backoff->random = mig_now_ns();
    backoff->random |= 1; /* xorshift never leaves 0 */
}

void mig_backoff_reset(struct mig_backoff *backoff)
{
    backoff->pause_ns = 0;
}

/* Marsaglia, Xorshift RNGs, 2003. */
static uint64_t next_random(struct mig_backoff *backoff)
{
    backoff->random ^= backoff->random << 13;
    backoff->random ^= backoff->random >> 7;
    backoff->random ^= backoff->random << 17;
    return backoff->random;
}

uint64_t mig_backoff_next_ns(struct mig_backoff *backoff)
{
    const uint64_t longest_ns = backoff->pause_ns;

    backoff->pause_ns = longest_ns ? mig_smaller(longest_ns * 2, BACKOFF_MAX_NS) : BACKOFF_FIRST_NS;
    return longest_ns - next_random(backoff) % (longest_ns / 2 + 1);
}
