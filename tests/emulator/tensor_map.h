// What the emulated cuTensorMapEncodeTiled puts into a tensor map.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace emulator {

struct TiledTensor {
    uint64_t mark;
    uint8_t* base;
    uint32_t rank;
    uint64_t extents[4];  // elements; the innermost first
    uint64_t strides[4];  // bytes
    uint32_t box[4];      // elements
    uint32_t element_bytes;
    bool is_swizzled;  // by the 128-byte swizzle

    static constexpr uint64_t kMark = 0x74696c6564206d61;
};
static_assert(sizeof(TiledTensor) <= sizeof(CUtensorMap), "it must fit where the hardware's does");

/// Has the signature of cuTensorMapEncodeTiled. Knows three and four dimensions, whole elements, and no interleaving.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

}  // namespace emulator
