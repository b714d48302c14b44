// MLA decoding over a paged cache:   out = softmax(scale * q @ k.T) @ k[:, :512]   for each request
//
//   q              [b, s_q, heads, 576]         bf16 or f16      16-byte loads into swizzled tiles
//   kv_cache       [num_pages, page_size, 576]  the same         TMA, 128-byte swizzle; or cp.async, 16 bytes at a time
//   block_table    [b, max_pages]               int32            plain loads by the loading warps
//   cache_seqlens  [b]                          int32
//   out            [b, s_q, heads, 512]         the type of q    16-byte stores through shared memory
//   lse            [b, s_q, heads]              f32              natural logarithm; -inf where no key is visible
//
// Tile      64 rows, which are the (query, head) pairs of a request packed, and 64 keys at a time in a ring of two.
// Split     The keys of a tile of rows are shared by the CTAs of a cluster, and by num_parts clusters. A cluster adds
// up
//           through shared memory, each CTA its share of the columns; the last cluster of a tile of rows to come,
//           column share by column share, adds up the parts. All in one order, so the bits are the same on every run.
// Roles     warpgroup 0: scores, softmax, and columns 0 to 255 of the output ("left"). The scores of the next tile
//           are on the tensor core before the left product of this one, which covers the softmax of the next.
//           warpgroup 1: columns 256 to 511 ("right").   warpgroup 2: its four warps load.
// Barriers  left, right: the rings' full (the bytes of TMA, and one arrival of each loading thread; one more of right's
//           says that `exists` is written) and empty (one of each warp of the warpgroup that uses the columns last).
//           p_full, p_empty: the probabilities from warpgroup 0 to warpgroup 1.   named 1: warpgroup 0, 2: both.
// Shared    MlaDecodeShared below: 72 KiB q, 2 x 72 KiB keys, 8 KiB probabilities.
// Numerics  Scores and sums in float32. Probabilities are rounded to the type of q for the product with the values,
// which
//           is divided by the sum of the rounded ones; lse is that of the unrounded ones. The bits depend on how many
//           ways the keys are split.
// Limits    Rows of q and of the cache start at multiples of 16 bytes. A page that does not exist is not read, nor is a
//           key past the length: they are zeros, and masked. So a NaN there leaves no trace; neither does one in a key
//           that only later queries see.
// Source    DeepSeek-V2 report, arXiv:2405.04434, section 2.1.   Launched by launch/mla_decode.cu.   docs/mla_decode.md
#pragma once

#include "device/math.cuh"
#include "device/pipeline.cuh"
#include "device/softmax.cuh"
#include "device/tile.cuh"
#include "kernels/mla_decode_arguments.h"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dso {

inline constexpr int kMlaTile = 64;  // rows, and keys
inline constexpr int kMlaKeyDim = 576, kMlaValueDim = 512;
inline constexpr int kMlaBoxes = kMlaKeyDim / 64, kMlaSideBoxes = kMlaValueDim / 64 / 2;  // of 64 channels
inline constexpr int kMlaBoxBytes = kMlaTile * kSwizzleBytes, kMlaKeyTileBytes = kMlaBoxes * kMlaBoxBytes;
inline constexpr int kMlaRopeBox = kMlaBoxes - 1;
inline constexpr int kMlaMaxCluster = 8;
inline constexpr int kMlaMathThreads = 256, kMlaThreads = 384;
inline constexpr int kMlaGroups = kMlaValueDim / 8;  // of eight columns, as accumulators have them

struct MlaDecodeShared {
    union {
        alignas(kSwizzleAtomBytes) uint8_t q[kMlaBoxes][kMlaBoxBytes];
        // When the last scores are there:
        uint8_t panels[kMlaMathThreads / 32][kMlaSideBoxes][16 * kSwizzleBytes];  // of a warp: 16 rows, 256 columns
        SoftmaxPart received_rows[kMlaMaxCluster][kMlaTile];
    };
    union {
        alignas(kSwizzleAtomBytes) uint8_t kv[2][kMlaBoxes][kMlaBoxBytes];
        // When all CTAs of the cluster are through, [source][owned group][warp][lane][4]:
        float received[kMlaGroups * 4 * 32 * 4];
    };
    alignas(kSwizzleAtomBytes) uint8_t p[kMlaTile * kSwizzleBytes];
    float correction[kMlaTile];
    SoftmaxPart rows[kMlaTile];
    uint64_t exists[2];  // a bit for each key of a tile
    alignas(8) Pipeline<2> left, right;
    uint64_t p_full, p_empty, all_received;
    bool is_last;
};

using MlaRing = PipelineState<2>;

template <ptx::HalfType type>
DSO_DEVICE uint32_t pack_half(float low, float high) {
    return type == ptx::HalfType::kBF16 ? ptx::pack_bf16x2(low, high) : ptx::pack_f16x2(low, high);
}

template <ptx::HalfType type>
DSO_DEVICE float2 unpack_half(uint32_t pair) {
    if constexpr (type == ptx::HalfType::kBF16) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    } else {
        return ptx::unpack_f16x2(pair);
    }
}

// ------------------------------------------------------------------------------------------------------- work

/// What a CTA has to do: some tiles of the keys of a tile of rows.
struct MlaDecodeWork {
    int unit;  // the tile of rows, of all requests
    int request, first_row, num_rows;
    int part;
    int length;                 // of the request
    int some_see, all_see;      // keys that the last of the rows sees, and the first
    int first_tile, last_tile;  // of keys

    /// Keys that row `row` of the tile sees.
    DSO_DEVICE int visible(const MlaDecodeArguments& arguments, int row) const {
        if (!arguments.is_causal) return length;
        const int query = (first_row + row) / arguments.num_heads;
        return length - (arguments.s_q - 1 - min(query, arguments.s_q - 1));
    }
};

DSO_DEVICE MlaDecodeWork find_work(const MlaDecodeArguments& arguments, int cluster_size, int rank) {
    MlaDecodeWork work;
    const int cluster = static_cast<int>(blockIdx.x) / cluster_size, num_parts = arguments.num_parts;
    work.part = cluster % num_parts;
    work.unit = cluster / num_parts;
    work.request = work.unit / arguments.num_row_tiles;
    work.first_row = work.unit % arguments.num_row_tiles * kMlaTile;
    work.num_rows = min(kMlaTile, arguments.s_q * arguments.num_heads - work.first_row);
    work.length = max(0, min(arguments.cache_seqlens[work.request], arguments.max_keys));
    work.some_see = work.visible(arguments, work.num_rows - 1);
    work.all_see = work.visible(arguments, 0);
    const int64_t num_tiles = work.some_see > 0 ? (work.some_see - 1) / kMlaTile + 1 : 0;
    const int split = work.part * cluster_size + rank, num_splits = num_parts * cluster_size;
    work.first_tile = static_cast<int>(num_tiles * split / num_splits);
    work.last_tile = static_cast<int>(num_tiles * (split + 1) / num_splits);
    return work;
}

/// Whether the keys of a tile come by TMA. Pages whose rows are none of the request's are not loaded whole.
DSO_DEVICE bool comes_by_tma(const MlaDecodeArguments& arguments, const MlaDecodeWork& work, int tile) {
    return arguments.box_rows != 0 && tile * kMlaTile <= work.some_see - kMlaTile;
}

/// Where a row of the tile lies in `out`, in elements.
DSO_DEVICE int64_t out_offset(const MlaDecodeArguments& arguments, const MlaDecodeWork& work, int row) {
    const int query = (work.first_row + row) / arguments.num_heads;
    const int head = (work.first_row + row) % arguments.num_heads;
    return work.request * arguments.out_stride_b + query * arguments.out_stride_s + head * arguments.out_stride_h;
}

DSO_DEVICE void store_lse(const MlaDecodeArguments& arguments, const MlaDecodeWork& work, int row, float lse_log2) {
    const int64_t first = int64_t{work.request} * arguments.s_q * arguments.num_heads;
    arguments.lse[first + work.first_row + row] = lse_log2 * kLn2;
}

// ---------------------------------------------------------------------------------------------------- loading

/// The keys of a tile as the lanes of a warp know them: lane i has keys i and i + 32.
struct MlaTileKeys {
    int page[2], row[2];  // page -1: there is no such key

    DSO_DEVICE uint64_t exists() const {
        const uint64_t high = __ballot_sync(0xFFFFFFFF, page[1] >= 0);
        return high << 32 | __ballot_sync(0xFFFFFFFF, page[0] >= 0);
    }
};

DSO_DEVICE MlaTileKeys find_keys(const MlaDecodeArguments& arguments, const MlaDecodeWork& work, int tile, int lane) {
    const int32_t* table = arguments.block_table + work.request * arguments.table_stride;
    MlaTileKeys keys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = tile * kMlaTile + 32 * half + lane, column = key / arguments.page_size;
        const int page = key >= 0 && key < work.some_see ? table[column] : -1;  // beyond 2^31 keys are none
        keys.page[half] = page < arguments.num_pages ? max(page, -1) : -1;
        keys.row[half] = key - column * arguments.page_size;
    }
    return keys;
}

/// A loading warp's share of a tile: one box of 64 channels of each side, and the first warp has the rotated ones.
class MlaDecodeLoader {
  public:
    DSO_DEVICE MlaDecodeLoader(MlaDecodeShared& shared, const TensorMap* map, const MlaDecodeArguments& arguments,
                               const MlaDecodeWork& work, int warp)
        : shared_(shared), map_(map), arguments_(arguments), work_(work), warp_(warp), lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run() {
        MlaRing state;
        for (int tile = work_.first_tile; tile < work_.last_tile; ++tile, state.advance()) {
            const MlaTileKeys keys = find_keys(arguments_, work_, tile, lane_);  // before the ring has room
            const uint64_t exists = keys.exists();
            const bool by_tma = comes_by_tma(arguments_, work_, tile);
            uint8_t* boxes = shared_.kv[state.stage][0];
            const int num_right = warp_ == 0 ? 2 : 1;

            shared_.right.acquire(state);
            uint64_t* full = &shared_.right.full[state.stage];
            if (warp_ == 0 && lane_ == 0) {
                shared_.exists[state.stage] = exists;
                ptx::mbarrier_arrive(full);
            }
            load(keys, by_tma, full, boxes, kMlaSideBoxes + warp_, num_right);
            shared_.left.acquire(state);
            load(keys, by_tma, &shared_.left.full[state.stage], boxes, warp_, 1);
        }
    }

  private:
    /// Box `box`, and the one with the rotated channels if there are to be two.
    DSO_DEVICE void load(const MlaTileKeys& keys, bool by_tma, uint64_t* full, uint8_t* boxes, int box, int count) {
        if (by_tma) {
            if (lane_ == 0) {
                ptx::mbarrier_arrive_expect_tx(full, count * kMlaBoxBytes);
                ptx::mbarrier_arrive_times(full, 31);
            }
            // Each lane starts the copy of one page's rows.
            const int first = lane_ * arguments_.box_rows % kMlaTile;
            const int page = held_by(keys.page, first), row = held_by(keys.row, first);
            if (lane_ * arguments_.box_rows >= kMlaTile) return;
            uint8_t* rows = boxes + first * kSwizzleBytes;
            ptx::tma_load_3d(rows + box * kMlaBoxBytes, map_, full, box * 64, row, page);
            if (count > 1) ptx::tma_load_3d(rows + kMlaRopeBox * kMlaBoxBytes, map_, full, kMlaRopeBox * 64, row, page);
        } else {
            gather(keys, boxes, box);
            if (count > 1) gather(keys, boxes, kMlaRopeBox);
            ptx::cp_async_mbarrier_arrive(full);
        }
    }

    DSO_DEVICE static int held_by(const int (&x)[2], int key) {
        const int low = __shfl_sync(0xFFFFFFFF, x[0], key % 32), high = __shfl_sync(0xFFFFFFFF, x[1], key % 32);
        return key < 32 ? low : high;
    }

    /// Eight lanes a key: 128 bytes.
    DSO_DEVICE void gather(const MlaTileKeys& keys, uint8_t* boxes, int box) {
        const int chunk = lane_ % 8;
        const auto* channels = static_cast<const uint8_t*>(arguments_.kv_cache) + box * kSwizzleBytes + chunk * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll 4
            for (int i = 0; i < 32; i += 4) {
                const int page = __shfl_sync(0xFFFFFFFF, keys.page[half], i + lane_ / 8);
                const int row = __shfl_sync(0xFFFFFFFF, keys.row[half], i + lane_ / 8);
                const bool is_there = page >= 0;
                const int64_t offset = is_there ? page * arguments_.page_stride + row * arguments_.key_stride : 0;
                ptx::cp_async_16(boxes + box * kMlaBoxBytes + swizzled_offset(32 * half + i + lane_ / 8, chunk),
                                 channels + 2 * offset, is_there);
            }
        }
    }

    MlaDecodeShared& shared_;
    const TensorMap* map_;
    const MlaDecodeArguments& arguments_;
    const MlaDecodeWork& work_;
    const int warp_, lane_;
};

/// The rows of q to shared memory, by the math threads; zeros where there are none.
DSO_DEVICE void load_queries(MlaDecodeShared& shared, const MlaDecodeArguments& arguments, const MlaDecodeWork& work) {
    constexpr int kChunks = kMlaKeyDim / 8;
#pragma unroll 6
    for (int i = threadIdx.x; i < kMlaTile * kChunks; i += kMlaMathThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        uint4 value{};
        if (row < work.num_rows) {
            const int query = (work.first_row + row) / arguments.num_heads;
            const int head = (work.first_row + row) % arguments.num_heads;
            const int64_t offset =
                work.request * arguments.q_stride_b + query * arguments.q_stride_s + head * arguments.q_stride_h;
            value = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(arguments.q) + offset + 8 * chunk);
        }
        *reinterpret_cast<uint4*>(shared.q[chunk / 8] + swizzled_offset(row, chunk % 8)) = value;
    }
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_sync(2, kMlaMathThreads);
}

// ------------------------------------------------------------------------------------------------------- math

/// `sums` (64 x 256) += p @ v over the 64 keys of a tile. `start(k, v)` multiplies 16 of them.
template <typename Start>
DSO_DEVICE void start_values(float (&sums)[128], const uint8_t* v, const Start& start) {
    const uint64_t descriptor = wgmma_transposed_descriptor(v, kMlaBoxBytes);
    ptx::keep_in_order(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) start(k, advance_descriptor(descriptor, k * 16 * kSwizzleBytes));
    ptx::wgmma_commit();
    ptx::keep_in_order(sums);
}

/// Warpgroup 0: scores, softmax, and the left half of the columns.
template <ptx::HalfType type>
class MlaDecodeLeft {
  public:
    DSO_DEVICE MlaDecodeLeft(MlaDecodeShared& shared, const MlaDecodeArguments& arguments, const MlaDecodeWork& work)
        : shared_(shared), arguments_(arguments), work_(work), warp_(threadIdx.x / 32), lane_(threadIdx.x % 32) {
#pragma unroll
        for (int i = 0; i < 2; ++i) visible_[i] = work.visible(arguments, row(i));
    }

    /// Leaves what lse needs in `shared.rows`.
    DSO_DEVICE void run(float (&sums)[128]) {
        if (work_.first_tile < work_.last_tile) compute(sums);
        rows_.finish();
        if (lane_ % 4 != 0) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            SoftmaxPart& part = shared_.rows[row(i)];
            part.base = rows_.sum[i] == 0.f ? kMinusInfinity : rows_.base(i, arguments_.scale_log2);
            part.sum = rows_.sum[i];
        }
    }

  private:
    DSO_DEVICE int row(int i) const { return warp_ * 16 + lane_ / 4 + 8 * i; }

    DSO_DEVICE void compute(float (&sums)[128]) {
        float scores[32], correction[2];
        uint32_t p[4][4];
        MlaRing state, next;
        start_scores(scores, work_.first_tile, state);
        ptx::wgmma_wait<0>();
        ptx::keep_in_order(scores);
        take_probabilities(scores, correction, work_.first_tile, state);
        send(scores, correction);
        pack(p, scores);

        for (int tile = work_.first_tile + 1; tile < work_.last_tile; ++tile) {
            next.advance();
            start_scores(scores, tile, next);
            start_left(sums, p, state);
            ptx::wgmma_wait<1>();
            ptx::keep_in_order(scores);
            take_probabilities(scores, correction, tile, next);
            send(scores, correction);
            finish_left(sums, p, state);
            scale_rows(sums, correction[0], correction[1]);
            pack(p, scores);
            state = next;
        }
        start_left(sums, p, state);
        finish_left(sums, p, state);
    }

    DSO_DEVICE void start_scores(float (&scores)[32], int tile, const MlaRing& state) {
        const bool gathered = !comes_by_tma(arguments_, work_, tile);
        // 36 descriptors of q, the same for every tile: not to be kept in registers.
        const uint64_t q = wgmma_descriptor(shared_.q[0] + ptx::compute_here(0));
        const uint64_t k = wgmma_descriptor(shared_.kv[state.stage][0]);
        const auto multiply = [&](int box, bool is_first) {
#pragma unroll
            for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
                const int offset = box * kMlaBoxBytes + byte;
                ptx::WgmmaHalf<type, 64>::mma(scores, advance_descriptor(q, offset), advance_descriptor(k, offset),
                                              !is_first || byte != 0);
            }
        };
        shared_.right.wait(state);
        if (gathered) ptx::fence_proxy_async_shared();
        ptx::keep_in_order(scores);
        ptx::wgmma_fence();
        multiply(kMlaRopeBox, true);
#pragma unroll
        for (int box = kMlaSideBoxes; box < 2 * kMlaSideBoxes; ++box) multiply(box, false);
        shared_.left.wait(state);
        if (gathered) ptx::fence_proxy_async_shared();
#pragma unroll
        for (int box = 0; box < kMlaSideBoxes; ++box) multiply(box, false);
        ptx::wgmma_commit();
        ptx::keep_in_order(scores);
    }

    /// The probabilities as they are multiplied. Nobody may touch these registers while a WGMMA is in flight, and so
    /// the compiler must not take them from what is sent.
    DSO_DEVICE static void pack(uint32_t (&p)[4][4], float (&scores)[32]) {
        ptx::keep_in_order(scores);
#pragma unroll
        for (int i = 0; i < 16; ++i) p[i / 4][i % 4] = pack_half<type>(scores[2 * i], scores[2 * i + 1]);
        ptx::keep_in_order(p);
    }

    /// Scores to probabilities.
    DSO_DEVICE void take_probabilities(float (&scores)[32], float (&correction)[2], int tile, const MlaRing& state) {
        const uint64_t exists = shared_.exists[state.stage];
        const int first_key = tile * kMlaTile;
        if (first_key > work_.all_see - kMlaTile && work_.all_see < work_.some_see)
            remove_poison(scores, exists, first_key, state);
        if (exists != ~uint64_t{0} || first_key > work_.all_see - kMlaTile) {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                if (!sees(exists, first_key, i)) scores[i] = kMinusInfinity;
            }
        }
        rows_.add_tile(scores, arguments_.scale_log2, correction);
    }

    /// The key within the tile that a lane's element belongs to.
    DSO_DEVICE int key_of(int element) const { return element / 4 * 8 + lane_ % 4 * 2 + element % 2; }

    DSO_DEVICE bool sees(uint64_t exists, int first_key, int element) const {
        return (exists >> key_of(element) & 1) && first_key + key_of(element) < visible_[element / 2 % 2];
    }

    /// A key that some rows see and others do not may hold NaN, and 0 * NaN is NaN: its value is cleared. The rows that
    /// see it have a NaN score by then, or an infinite one.
    DSO_DEVICE void remove_poison(const float (&scores)[32], uint64_t exists, int first_key, const MlaRing& state) {
        ptx::named_barrier_sync(1, 128);  // all warps have their scores
        uint32_t poisoned = 0;            // a bit for each element
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const bool is_finite = fabsf(scores[i]) < -kMinusInfinity;
            poisoned |= uint32_t{!is_finite && !sees(exists, first_key, i)} << i;
        }
        for (; poisoned != 0; poisoned &= poisoned - 1) {
            const int key = key_of(__ffs(static_cast<int>(poisoned)) - 1);
            for (int chunk = 0; chunk < kMlaValueDim / 8; ++chunk) {
                uint8_t* row = shared_.kv[state.stage][chunk / 8] + key * kSwizzleBytes;
                *reinterpret_cast<uint4*>(row + chunk % 8 * 16) = uint4{};
            }
        }
        ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(1, 128);
    }

    DSO_DEVICE void send(const float (&scores)[32], const float (&correction)[2]) {
        ptx::mbarrier_wait(&shared_.p_empty, num_sent_ % 2 ^ 1);
        ++num_sent_;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float* x = &scores[8 * k];
            ptx::stmatrix_x4(shared_.p + swizzled_offset(warp_ * 16 + lane_ % 16, 2 * k + lane_ / 16),
                             pack_half<type>(x[0], x[1]), pack_half<type>(x[2], x[3]), pack_half<type>(x[4], x[5]),
                             pack_half<type>(x[6], x[7]));
        }
        if (lane_ % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) shared_.correction[row(i)] = correction[i];
        }
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(&shared_.p_full);
    }

    DSO_DEVICE void start_left(float (&sums)[128], uint32_t (&p)[4][4], const MlaRing& state) {
        start_values(sums, shared_.kv[state.stage][0], [&](int k, uint64_t v) {
            ptx::WgmmaHalf<type, 256>::mma_registers_transposed(sums, p[k], v, true);
        });
    }

    DSO_DEVICE void finish_left(float (&sums)[128], uint32_t (&p)[4][4], const MlaRing& state) {
        ptx::wgmma_wait<0>();
        ptx::keep_in_order(sums);
        ptx::keep_in_order(p);
        if (lane_ == 0) shared_.left.release(state);
    }

    MlaDecodeShared& shared_;
    const MlaDecodeArguments& arguments_;
    const MlaDecodeWork& work_;
    const int warp_, lane_;
    int visible_[2];
    SoftmaxRows rows_;
    uint32_t num_sent_ = 0;
};

/// The sum of half a row of p.
template <ptx::HalfType type>
DSO_DEVICE float sum_probabilities(const uint8_t* p, int row, int half) {
    float sum = 0.f;
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
        const auto pairs = *reinterpret_cast<const uint4*>(p + swizzled_offset(row, 4 * half + chunk));
        for (const uint32_t pair : {pairs.x, pairs.y, pairs.z, pairs.w}) {
            const float2 x = unpack_half<type>(pair);
            sum += x.x + x.y;
        }
    }
    return sum;
}

/// Warpgroup 1: the right half of the columns. While they are multiplied it adds up the probabilities, and leaves their
/// sums in `shared.rows`.
template <ptx::HalfType type>
DSO_DEVICE void compute_right(MlaDecodeShared& shared, const MlaDecodeArguments& arguments, const MlaDecodeWork& work,
                              float (&sums)[128]) {
    const int thread = threadIdx.x % 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    float row_sum = 0.f;  // of half of row thread / 2
    MlaRing state;
    for (int tile = work.first_tile; tile < work.last_tile; ++tile, state.advance()) {
        ptx::mbarrier_wait(&shared.p_full, (tile - work.first_tile) % 2);
        scale_rows(sums, shared.correction[row], shared.correction[row + 8]);
        shared.right.wait(state);  // long since, but it orders these reads after TMA's writes
        if (!comes_by_tma(arguments, work, tile)) ptx::fence_proxy_async_shared();
        const uint64_t p = wgmma_descriptor(shared.p);
        start_values(sums, shared.kv[state.stage][kMlaSideBoxes], [&](int k, uint64_t v) {
            ptx::WgmmaHalf<type, 256>::mma_transposed(sums, advance_descriptor(p, 32 * k), v, true);
        });
        row_sum = row_sum * shared.correction[thread / 2] + sum_probabilities<type>(shared.p, thread / 2, thread % 2);
        ptx::wgmma_wait<0>();
        ptx::keep_in_order(sums);
        __syncwarp();  // every lane has read its corrections and probabilities
        if (lane == 0) {
            shared.right.release(state);
            ptx::mbarrier_arrive(&shared.p_empty);
        }
    }
    row_sum += __shfl_xor_sync(0xFFFFFFFF, row_sum, 1);
    if (thread % 2 == 0) shared.rows[thread / 2].rounded_sum = row_sum;
}

// --------------------------------------------------------------------------------------------------- epilogue

/// By the math threads, with their sums: 64 rows by 256 columns a warpgroup.
template <ptx::HalfType type>
class MlaDecodeEpilogue {
  public:
    DSO_DEVICE MlaDecodeEpilogue(MlaDecodeShared& shared, const MlaDecodeArguments& arguments,
                                 const MlaDecodeWork& work, int cluster_size, int rank)
        : shared_(shared),
          arguments_(arguments),
          work_(work),
          size_(cluster_size),
          rank_(rank),
          warp_(threadIdx.x / 32),
          lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run(const float (&sums)[128]) {
        if (size_ > 1) {
            exchange(sums);
        } else {
            ptx::named_barrier_sync(2, kMlaMathThreads);  // shared.rows are there, and q and p are not needed any more
            finish_alone(sums);
        }
        if (arguments_.num_parts > 1) combine_parts();
    }

  private:
    static constexpr int kWarpsOfSide = 4;

    DSO_DEVICE int64_t partial_row(int part, int row) const {
        return ((int64_t{work_.unit} * arguments_.num_parts + part) * kMlaTile + row) * kMlaValueDim;
    }
    DSO_DEVICE int64_t partial_lse_row(int part, int row) const {
        return ((int64_t{work_.unit} * arguments_.num_parts + part) * size_ + rank_) * kMlaTile + row;
    }

    /// A row's logarithm: to the caller, or to the part's place.
    DSO_DEVICE void store_log2(int row, float lse_log2) {
        if (arguments_.num_parts > 1) {
            arguments_.partial_lse[partial_lse_row(work_.part, row)] = lse_log2;
        } else if (rank_ == 0) {
            store_lse(arguments_, work_, row, lse_log2);
        }
    }

    /// Two neighbours of a row: to the caller, or to the part's place.
    DSO_DEVICE void store_two(int row, int column, float x, float y) {
        if (arguments_.num_parts > 1) {
            *reinterpret_cast<float2*>(arguments_.partial_out + partial_row(work_.part, row) + column) = float2{x, y};
        } else {
            store_half_pair(row, column, x, y);
        }
    }

    DSO_DEVICE void store_half_pair(int row, int column, float x, float y) {
        auto* out = static_cast<uint16_t*>(arguments_.out) + out_offset(arguments_, work_, row) + column;
        *reinterpret_cast<uint32_t*>(out) = pack_half<type>(x, y);
    }

    DSO_DEVICE void finish_alone(const float (&sums)[128]) {
        const int side = warp_ / kWarpsOfSide, first_row = warp_ % kWarpsOfSide * 16;
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = first_row + lane_ / 4 + 8 * i;
            const SoftmaxPart part = shared_.rows[row];
            inverse[i] = inverse_of(part.rounded_sum);
            if (side == 0 && lane_ % 4 == 0 && row < work_.num_rows) store_log2(row, log2_sum(part.base, part.sum));
        }
        if (arguments_.num_parts > 1) {
#pragma unroll
            for (int i = 0; i < 64; ++i) {
                const int row = first_row + lane_ / 4 + i % 2 * 8, column = side * 256 + i / 2 * 8 + lane_ % 4 * 2;
                if (row < work_.num_rows)
                    store_two(row, column, sums[2 * i] * inverse[i % 2], sums[2 * i + 1] * inverse[i % 2]);
            }
            return;
        }
        // Through shared memory, so that a warp stores 512 neighbouring bytes at a time.
        auto& panels = shared_.panels[warp_];
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            const float* x = &sums[8 * j];
            ptx::stmatrix_x4(panels[j / 4] + swizzled_offset(lane_ % 16, j % 4 * 2 + lane_ / 16),
                             pack_half<type>(x[0] * inverse[0], x[1] * inverse[0]),
                             pack_half<type>(x[2] * inverse[1], x[3] * inverse[1]),
                             pack_half<type>(x[4] * inverse[0], x[5] * inverse[0]),
                             pack_half<type>(x[6] * inverse[1], x[7] * inverse[1]));
        }
        __syncwarp();
        const int num_rows = min(16, work_.num_rows - first_row);
        for (int row = 0; row < num_rows; ++row) {
            auto* out = static_cast<uint16_t*>(arguments_.out) + out_offset(arguments_, work_, first_row + row);
            *reinterpret_cast<uint4*>(out + side * 256 + lane_ * 8) =
                *reinterpret_cast<const uint4*>(panels[lane_ / 8] + swizzled_offset(row, lane_ % 8));
        }
    }

    /// Sums go to the CTAs that own their columns as they lie in registers, and are added up there in the order of
    /// the CTAs. Warps without a row of the caller's stay out of it.
    DSO_DEVICE void exchange(const float (&sums)[128]) {
        const int groups = kMlaGroups / size_, num_warps = ceil_div(work_.num_rows, 16);
        const int side = warp_ / kWarpsOfSide, row_warp = warp_ % kWarpsOfSide;
        ptx::named_barrier_sync(2, kMlaMathThreads);  // shared.rows are there
        ptx::cluster_arrive();
        ptx::cluster_wait();  // all are through with their keys, which lie where the sums go
        if (threadIdx.x == 0)
            ptx::mbarrier_arrive_expect_tx(&shared_.all_received,
                                           size_ * num_warps * (groups * 512 + 16 * int{sizeof(SoftmaxPart)}));
        if (row_warp < num_warps) {
#pragma unroll
            for (int j = 0; j < 32; ++j) {
                const int group = 32 * side + j, owner = group / groups, owned = group % groups;
                const float values[4] = {sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]};
                const float* place = received(rank_, owned, row_warp);
                ptx::store_to_cluster_async(ptx::cluster_address(place, owner), values,
                                            ptx::cluster_address(&shared_.all_received, owner));
            }
            if (side == 0 && lane_ < 16) {
                const int row = row_warp * 16 + lane_;
                const SoftmaxPart part = shared_.rows[row];
                const float values[4] = {part.base, part.sum, part.rounded_sum, 0.f};
                for (int owner = 0; owner < size_; ++owner)
                    ptx::store_to_cluster_async(ptx::cluster_address(&shared_.received_rows[rank_][row], owner), values,
                                                ptx::cluster_address(&shared_.all_received, owner));
            }
        }
        ptx::mbarrier_wait(&shared_.all_received, 0);

        for (int i = warp_; i < groups * num_warps; i += kMlaMathThreads / 32) {
            const int owned = i / num_warps, first_row = i % num_warps * 16 + lane_ / 4;
            float base[2], total[2] = {}, rounded_total[2] = {}, sum[4] = {};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                base[h] = kMinusInfinity;
                for (int source = 0; source < size_; ++source)
                    base[h] = fmaxf(base[h], shared_.received_rows[source][first_row + 8 * h].base);
            }
            for (int source = 0; source < size_; ++source) {
                const float* x = received(source, owned, i % num_warps);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const SoftmaxPart part = shared_.received_rows[source][first_row + 8 * h];
                    const float weight = weight_of(part, base[h]);
                    total[h] += weight * part.sum;
                    rounded_total[h] += weight * part.rounded_sum;
                    sum[2 * h] += weight * x[2 * h];
                    sum[2 * h + 1] += weight * x[2 * h + 1];
                }
            }
            const int column = (rank_ * groups + owned) * 8 + lane_ % 4 * 2;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = first_row + 8 * h;
                if (row >= work_.num_rows) continue;
                const float inverse = inverse_of(rounded_total[h]);
                store_two(row, column, sum[2 * h] * inverse, sum[2 * h + 1] * inverse);
                if (owned == 0 && lane_ % 4 == 0) store_log2(row, log2_sum(base[h], total[h]));
            }
        }
    }

    /// Where this lane's part of a group's sums from CTA `source` lies.
    DSO_DEVICE float* received(int source, int owned, int row_warp) {
        const int groups = kMlaGroups / size_;
        return shared_.received + (((source * groups + owned) * kWarpsOfSide + row_warp) * 32 + lane_) * 4;
    }

    /// The last to come adds up the parts of the columns that are this CTA's in its cluster.
    DSO_DEVICE void combine_parts() {
        __threadfence();
        ptx::named_barrier_sync(2, kMlaMathThreads);
        int32_t* arrivals = arguments_.arrivals + int64_t{work_.unit} * size_ + rank_;
        if (threadIdx.x == 0) shared_.is_last = atomicAdd(arrivals, 1) == arguments_.num_parts - 1;
        ptx::named_barrier_sync(2, kMlaMathThreads);
        if (!shared_.is_last) return;
        __threadfence();
        const int num_columns = kMlaValueDim / size_;
        for (int row = warp_; row < work_.num_rows; row += kMlaMathThreads / 32) {
            const float top = largest_of_parts(row);
            for (int column = lane_ * 2; column < num_columns; column += 64)
                combine_columns(row, rank_ * num_columns + column, top, column == 0 && rank_ == 0);
        }
    }

    DSO_DEVICE float largest_of_parts(int row) const {
        float top = kMinusInfinity;
        for (int part = lane_; part < arguments_.num_parts; part += 32)
            top = fmaxf(top, __ldcg(&arguments_.partial_lse[partial_lse_row(part, row)]));
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, distance));
        return top;
    }

    DSO_DEVICE void combine_columns(int row, int column, float top, bool has_lse) {
        float total = 0.f, x = 0.f, y = 0.f;
#pragma unroll 4
        for (int part = 0; part < arguments_.num_parts; ++part) {
            const float lse = __ldcg(&arguments_.partial_lse[partial_lse_row(part, row)]);
            const auto* place =
                reinterpret_cast<const float2*>(arguments_.partial_out + partial_row(part, row) + column);
            const float2 value = __ldcg(place);
            const float weight = lse == kMinusInfinity ? 0.f : ptx::exp2(lse - top);
            total += weight;
            x += weight * value.x;
            y += weight * value.y;
        }
        const float inverse = inverse_of(total);
        store_half_pair(row, column, x * inverse, y * inverse);
        if (has_lse) store_lse(arguments_, work_, row, log2_sum(top, total));
    }

    MlaDecodeShared& shared_;
    const MlaDecodeArguments& arguments_;
    const MlaDecodeWork& work_;
    const int size_, rank_, warp_, lane_;
};

// ----------------------------------------------------------------------------------------------------- kernel

template <ptx::HalfType type>
__global__ void __launch_bounds__(kMlaThreads, 1)
    sm90_mla_decode_kernel(const __grid_constant__ TensorMap map_kv,
                           const __grid_constant__ MlaDecodeArguments arguments) {
    static_assert(sizeof(MlaDecodeShared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<MlaDecodeShared>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
    const int cluster_size = static_cast<int>(ptx::cluster_size()), rank = static_cast<int>(ptx::cluster_rank());

    if (warp == kMlaMathThreads / 32) {
        shared.left.init(threadIdx.x % 32, 128, 4);
        shared.right.init(threadIdx.x % 32, 128 + 1, 4);
        if (threadIdx.x % 32 == 0) {
            if (arguments.box_rows != 0) ptx::prefetch_tensor_map(&map_kv);
            ptx::mbarrier_init(&shared.p_full, 4);
            ptx::mbarrier_init(&shared.p_empty, 4);
            ptx::mbarrier_init(&shared.all_received, 1);
            ptx::fence_mbarrier_init();
        }
    }
    __syncthreads();
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
    const MlaDecodeWork work = find_work(arguments, cluster_size, rank);

    if (warp >= kMlaMathThreads / 32) {
        ptx::setmaxnreg_dec<40>();
        MlaDecodeLoader(shared, &map_kv, arguments, work, warp - kMlaMathThreads / 32).run();
        __syncwarp();
        if (cluster_size > 1) ptx::cluster_arrive();
    } else {
        ptx::setmaxnreg_inc<232>();
        load_queries(shared, arguments, work);
        float sums[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) sums[i] = 0.f;
        if (warp < 4) {
            MlaDecodeLeft<type>(shared, arguments, work).run(sums);
        } else {
            compute_right<type>(shared, arguments, work, sums);
        }
        MlaDecodeEpilogue<type>(shared, arguments, work, cluster_size, rank).run(sums);
    }
}

}  // namespace dso
