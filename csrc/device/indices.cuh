// Arrays of indices, which callers have in 32 or in 64 bits.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct Indices {
    const void* data;
    bool is_64_bit;

    DSO_DEVICE int64_t operator[](int64_t i) const {
        return is_64_bit ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

}  // namespace dso
