#include "ptx/shared_memory.cuh"

#include "machine.h"

namespace emulator {

void* dynamic_shared(size_t num_bytes) {
    const Cta& cta = *current->cta;
    if (num_bytes > cta.dynamic_bytes)
        fail("%zu bytes of dynamic shared memory are used, and %u were asked for", num_bytes, cta.dynamic_bytes);
    return cta.shared + kStaticBytes;
}

void* static_shared(const void* key, size_t num_bytes, size_t alignment) {
    Cta& cta = *current->cta;
    const auto found = cta.static_variables.find(key);
    if (found != cta.static_variables.end()) return cta.shared + found->second;
    const size_t offset = (cta.static_bytes + alignment - 1) / alignment * alignment;
    if (offset + num_bytes > kStaticBytes)
        fail("the emulator has no more than %u bytes of static memory", kStaticBytes);
    cta.static_bytes = static_cast<uint32_t>(offset + num_bytes);
    cta.static_variables[key] = static_cast<uint32_t>(offset);
    return cta.shared + offset;
}

}  // namespace emulator
