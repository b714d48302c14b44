// Tiles in shared memory under the 128-byte swizzle: how TMA lays them out, WGMMA reads them, and threads write them.
//
// A tile is rows of 128 bytes. Within each group of eight rows (1024 bytes, to which the tile must be aligned) the
// 16-byte chunk `c` of row `r` lies at chunk `c ^ (r % 8)`, so that a column of chunks falls into different banks.
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso {

inline constexpr int kSwizzleBytes = 128;  // bytes of a tile's row, and the swizzle's width
inline constexpr int kSwizzleAtomBytes = 8 * kSwizzleBytes;

/// The byte offset of 16-byte chunk `chunk` of row `row`.
DSO_DEVICE uint32_t swizzled_offset(uint32_t row, uint32_t chunk) {
    return row * kSwizzleBytes + ((chunk ^ (row % 8)) * 16);
}

DSO_DEVICE constexpr uint64_t wgmma_descriptor_high() { return (kSwizzleAtomBytes >> 4) | uint64_t{1} << 30; }

/// WGMMA's descriptor of a K-major tile that starts at `tile`: start address and stride between groups of eight rows,
/// in units of 16 bytes (bits 0 and 32), and the 128-byte swizzle (1 at bit 62). Bits 16 to 29 do not matter under it.
DSO_DEVICE uint64_t wgmma_descriptor(const void* tile) {
    return static_cast<uint64_t>((ptx::smem_addr(tile) & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
           wgmma_descriptor_high() << 32;
}

/// The descriptor of 16-bit elements whose rows run along K instead ("transposed", MN-major): a row of the tile has 64
/// of the N columns, and the next 64 lie in another tile, `tile_bytes` further.
DSO_DEVICE uint64_t wgmma_transposed_descriptor(const void* tile, uint32_t tile_bytes) {
    return static_cast<uint64_t>((ptx::smem_addr(tile) & 0x3FFFF) >> 4) | static_cast<uint64_t>(tile_bytes >> 4) << 16 |
           wgmma_descriptor_high() << 32;
}

/// The descriptors of one tile in each stage of a ring, one after the other. Carried from step to step, so that nothing
/// is left to compute between the wait for a stage and its first WGMMA. Of every kStride-th stage, as PipelineState.
template <int kNumStages, int kStageBytes, int kStride = 1>
class RingDescriptor {
  public:
    DSO_DEVICE explicit RingDescriptor(const void* first) : low_(static_cast<uint32_t>(wgmma_descriptor(first))) {}

    DSO_DEVICE uint64_t get() const { return low_ | (wgmma_descriptor_high() << 32); }

    /// `stage` is the one before.
    DSO_DEVICE void advance(uint32_t stage) {
        constexpr uint32_t kStep = kStageBytes >> 4;
        low_ += (stage + kStride >= kNumStages ? kStride - kNumStages : kStride) * kStep;
    }

  private:
    uint32_t low_;
};

/// The descriptor `num_bytes` further on: along K within the swizzled row, or by whole atoms.
DSO_DEVICE uint64_t advance_descriptor(uint64_t descriptor, uint32_t num_bytes) {
    return descriptor + (num_bytes >> 4);
}

}  // namespace dso
