#include "targets.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t count_bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t count_bytes)
{
    return TARGET(data, count_bytes);
}
