#include "ptx/tma.cuh"

#include <algorithm>
#include <cstring>
#include <vector>

#include "mbarrier.h"
#include "tensor_map.h"

namespace emulator {
namespace {

int bytes_of(CUtensorMapDataType type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8:
            return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
            return 2;
        case CU_TENSOR_MAP_DATA_TYPE_INT32:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
            return 4;
        default:
            return 0;
    }
}

TiledTensor decode(const dso::TensorMap* map, const char* instruction) {
    TiledTensor tensor;
    memcpy(&tensor, map, sizeof(tensor));
    if (tensor.mark != TiledTensor::kMark) fail("%s: its tensor map was never encoded", instruction);
    return tensor;
}

uint32_t box_bytes(const TiledTensor& tensor) {
    return tensor.box[0] * tensor.box[1] * tensor.box[2] * tensor.box[3] * tensor.element_bytes;
}

/// A tensor's box at some coordinates, and where it lies in shared memory.
struct Box {
    TiledTensor tensor;
    int64_t at[4];
    Place place;

    /// Calls `move(shared, global)` for each element; `global` is null where the tensor has none.
    template <typename Move>
    void for_each_element(const Move& move) const {
        uint32_t linear = 0;
        for (uint32_t i = 0; i < tensor.box[1] * tensor.box[2] * tensor.box[3]; ++i) {
            const uint32_t of_row[4] = {0, i % tensor.box[1], i / tensor.box[1] % tensor.box[2],
                                        i / tensor.box[1] / tensor.box[2]};
            uint8_t* row = tensor.base;
            for (int dimension = 1; dimension < 4 && row; ++dimension) {
                const uint32_t at_box = of_row[dimension];
                row = exists(dimension, at_box) ? row + (at[dimension] + at_box) * tensor.strides[dimension] : nullptr;
            }
            for (uint32_t x = 0; x < tensor.box[0]; ++x, linear += tensor.element_bytes) {
                uint8_t* global = row && exists(0, x) ? row + (at[0] + x) * tensor.strides[0] : nullptr;
                move(place.bytes + shared_offset(linear), global);
            }
        }
    }

  private:
    bool exists(int dimension, uint32_t i) const {
        const int64_t coordinate = at[dimension] + i;
        return coordinate >= 0 && coordinate < static_cast<int64_t>(tensor.extents[dimension]);
    }

    /// The swizzle goes by the address: bits 4 to 6 are combined with bits 7 to 9.
    uint32_t shared_offset(uint32_t linear) const {
        if (!tensor.is_swizzled) return linear;
        const uint32_t address = place.offset + linear;
        return (address ^ (address >> 7 & 7) << 4) - place.offset;
    }
};

using Coordinates = std::vector<int>;  // the innermost first

Box box_of(const dso::TensorMap* map, const void* shared, const Coordinates& at, const char* name) {
    Box box{decode(map, name), {}, {}};
    if (box.tensor.rank != at.size()) fail("%s: %zu coordinates of %u", name, at.size(), box.tensor.rank);
    std::copy(at.begin(), at.end(), box.at);
    const int column = at[0];
    const uint32_t address = address_of(shared);
    if (address % 128 != 0) fail("%s: 0x%x is not aligned to 128 bytes", name, address);
    if (column * static_cast<int64_t>(box.tensor.element_bytes) % 16 != 0)
        fail("%s: column %d is at no multiple of 16 bytes", name, column);
    box.place = place_of(address, box_bytes(box.tensor), name);
    return box;
}

}  // namespace

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    TiledTensor tensor{};
    tensor.mark = TiledTensor::kMark;
    tensor.base = static_cast<uint8_t*>(base);
    tensor.element_bytes = bytes_of(type);
    tensor.is_swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    tensor.rank = rank;
    for (int i = 0; i < 4; ++i) tensor.extents[i] = tensor.box[i] = 1;
    bool is_possible = tensor.element_bytes != 0 && (rank == 3 || rank == 4) &&
                       reinterpret_cast<uintptr_t>(base) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                       fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                       (tensor.is_swizzled || swizzle == CU_TENSOR_MAP_SWIZZLE_NONE);
    for (cuuint32_t i = 0; is_possible && i < rank; ++i) {
        tensor.extents[i] = extents[i];
        tensor.strides[i] = i == 0 ? tensor.element_bytes : strides[i - 1];
        tensor.box[i] = box[i];
        is_possible = extents[i] >= 1 && extents[i] <= uint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256 &&
                      element_strides[i] == 1 &&
                      (i == 0 || (tensor.strides[i] % 16 == 0 && tensor.strides[i] < uint64_t{1} << 40));
    }
    const uint32_t row_bytes = tensor.box[0] * tensor.element_bytes;
    is_possible = is_possible && row_bytes % 16 == 0 && (!tensor.is_swizzled || row_bytes <= 128);
    if (!is_possible) return CUDA_ERROR_INVALID_VALUE;
    memcpy(map, &tensor, sizeof(tensor));
    return CUDA_SUCCESS;
}

}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

namespace {

void load(void* destination, const TensorMap* map, uint64_t* barrier, const Coordinates& at_tensor) {
    maybe_pause();
    const char* const name = "a TMA load";
    const Box box = box_of(map, destination, at_tensor, name);
    const Place at = asynchronous_mbarrier(address_of(barrier), name);
    memset(box.place.bytes, kPoison, box_bytes(box.tensor));
    start(name, box.place.cta, [=] {
        const size_t size = box.tensor.element_bytes;
        box.for_each_element([size](uint8_t* shared, const uint8_t* global) {
            if (global) {
                memcpy(shared, global, size);
            } else {
                memset(shared, 0, size);
            }
        });
        complete_bytes(at, box_bytes(box.tensor), name);
    });
}

}  // namespace

void tma_load_3d(void* destination, const TensorMap* map, uint64_t* barrier, int column, int row, int matrix) {
    load(destination, map, barrier, {column, row, matrix});
}

void tma_load_4d(void* destination, const TensorMap* map, uint64_t* barrier, int x0, int x1, int x2, int x3) {
    load(destination, map, barrier, {x0, x1, x2, x3});
}

void copy_from_global_async(void* destination, const void* source, uint32_t num_bytes, uint64_t* barrier) {
    maybe_pause();
    const char* const name = "cp.async.bulk";
    const uint32_t to = address_of(destination);
    if (to % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || num_bytes % 16 != 0 || num_bytes == 0)
        fail("%s: %u bytes from %p to 0x%x, not all multiples of 16", name, num_bytes, source, to);
    const Place place = place_of(to, num_bytes, name);
    const Place at = asynchronous_mbarrier(address_of(barrier), name);
    memset(place.bytes, kPoison, num_bytes);
    start(name, place.cta, [=] {
        memcpy(place.bytes, source, num_bytes);
        complete_bytes(at, num_bytes, name);
    });
}

void prefetch_to_l2(const void* source, uint32_t num_bytes) {
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0 || num_bytes % 16 != 0)
        fail("cp.async.bulk.prefetch.L2: %u bytes from %p, not both multiples of 16", num_bytes, source);
}

void tma_store_3d(const TensorMap* map, const void* source, int column, int row, int matrix) {
    maybe_pause();
    const char* const name = "a TMA store";
    const Box box = box_of(map, source, {column, row, matrix}, name);
    current->stores.add(start(name, box.place.cta, [=] {
        const size_t size = box.tensor.element_bytes;
        box.for_each_element([size](const uint8_t* shared, uint8_t* global) {
            if (global) memcpy(global, shared, size);
        });
    }));
}

void tma_store_commit() {
    maybe_pause();
    current->stores.commit();
}

void tma_store_wait(size_t num_pending) {
    maybe_pause();
    current->stores.wait_for_all_but(num_pending);
}

}  // namespace dso::ptx
