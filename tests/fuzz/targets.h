/*
 * The libFuzzer targets. Each is a program of its own, of all the files here: -DTARGET=fuzz_… says which one.
 * scripts/test builds and runs them. No Python, no threads; the peer is the other end of a socketpair.
 */
#ifndef FUZZ_TARGETS_H
#define FUZZ_TARGETS_H

#include <stddef.h>
#include <stdint.h>

/* fuzz_page_call.c */
int fuzz_wire(const uint8_t *data, size_t count_bytes);
int fuzz_server(const uint8_t *data, size_t count_bytes);
int fuzz_client(const uint8_t *data, size_t count_bytes);

/* fuzz_tls.c */
int fuzz_tls(const uint8_t *data, size_t count_bytes);
int fuzz_certificate(const uint8_t *data, size_t count_bytes);

#endif
