/* TCP sockets of the page call. */
#ifndef MIG_TCP_H
#define MIG_TCP_H

#include <stdint.h>

/**
 * Set up a socket of the page call: no Nagle, cubic where the kernel has it, dead peers noticed.
 *
 * The receiver paces itself by what it asks for, so a sender that paces too (bbr) only adds its own delay; on loopback
 * cubic carries 1.4 to 2 times as much.
 */
void mig_tcp_tune(int fd);

/**
 * Connect to a numeric address. Returns 0 or -errno; -ETIMEDOUT after timeout_us; -EINVAL if the host is no address.
 * The socket is close-on-exec and blocking.
 */
int mig_tcp_connect(const char *host, uint16_t port, uint64_t timeout_us, int *ret_fd);

#endif
