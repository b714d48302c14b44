// RMSNorm:   y = T(x * rsqrt(mean(x^2) + eps) * weight);   x = T(x + residual) before, or q, sf = y quantized after
//
//   x, residual       [groups, m, d]            bf16, f16 or f32, rows contiguous    16-byte loads where aligned
//   weight            [d]                       the type of x, or f32
//   y, residual_out   [groups, m, d]            the type of x, contiguous            16-byte stores
//   q                 [groups, m, d]            e4m3, contiguous                     8-byte stores
//   sf                [groups, m, ceil(d/128)]  f32, any strides                     one store a block of 128
//
// Work      blockDim.x threads a row, blockDim.y rows a CTA. A thread has kChunks chunks of eight elements, two of them
//           in one block of 128 (one, if it has no more), as in device/patch.cuh. They stay in registers from the sum
//           to the output: x is read once, unless the row is longer than the CTA's registers (then again, from the
//           cache). Of many long rows a CTA takes several in turn, and loads the next before it sums the one it has;
//           many rows that two or three warps would share have one warp each.
// Numerics  float32, one rounding to T at the end; the mean is the sum times 1 / d rounded. The order of the sum
//           depends on d alone (rms_norm_shape): by element within a thread, then over the lanes of a warp, then over
//           warps. So neither other rows, nor strides, nor what is fused with it change a row's bits; and the fused ops
//           give the bits of the separate ones.
// Limits    any m, d >= 0, d < 2^30; rows that are not aligned are taken one element at a time.
// Source    Zhang and Sennrich, arXiv:1910.07467, equation 4.   Launched by launch/rms_norm.cu
#pragma once

#include "device/cast_blocks.cuh"
#include "device/cast_output.h"
#include "kernels/rms_norm_arguments.h"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kNormMaxThreads = 512;  // a row, and a CTA
inline constexpr int kNormMaxWarps = kNormMaxThreads / 32;
inline constexpr int kNormMaxChunks = 4;  // of a thread

struct NormSums {
    float of_warp[2][kNormMaxWarps][kNormMaxWarps];  // [buffer][row of the CTA][warp of the row]
};

/// The sum of a value over the threads of a row, to all of them, in one order. Rows that a CTA takes in turn take turns
/// in two buffers, too: who writes to one has waited, for the row before, until it was read.
DSO_DEVICE float sum_over_row(float x, int buffer) {
    auto& of_warp = ptx::static_shared<NormSums>().of_warp[buffer];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, offset);
    if (blockDim.x == 32) return x;
    const uint32_t num_warps = blockDim.x / 32, warp = threadIdx.x % kNormMaxWarps;
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.y][threadIdx.x / 32] = x;
    __syncthreads();
    x = warp < num_warps ? of_warp[threadIdx.y][warp] : 0.f;
#pragma unroll
    for (int offset = kNormMaxWarps / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, offset);
    return x;
}

/// The columns of a thread's chunks, in a panel: what the threads of a row hold at once, from column `panel` on.
/// kThreads of a row, or 0 where the launch says it; the first kSure chunks are known to be within the row.
template <int kChunks_, int kThreads = 0, int kSure = 0>
struct NormColumns {
    static constexpr int kChunks = kChunks_;
    static constexpr int kParts = kChunks == 1 ? 1 : 2;  // chunks of a thread in a block of 128
    static constexpr int kLanes = kQuantizeBlock / kChunk / kParts;
    static constexpr int kBlocks = kChunks / kParts;  // of which a thread has chunks

    int first;

    DSO_DEVICE explicit NormColumns(int panel)
        : first(panel + threadIdx.x / kLanes * kQuantizeBlock + threadIdx.x % kLanes * kChunk) {}
    /// How far chunk i is from the first: a constant, if kThreads is one, which a load or store then has for nothing.
    DSO_DEVICE int step(int i) const {
        const int threads = kThreads ? kThreads : static_cast<int>(blockDim.x);
        return i / kParts * threads * (kChunk * kParts) + i % kParts * (kLanes * kChunk);
    }
    DSO_DEVICE int operator()(int i) const { return first + step(i); }
    /// How many elements of chunk i, or more, a row has that ends at column `end`.
    DSO_DEVICE int left(int i, int end) const { return i < kSure ? kChunk : end - first - step(i); }
};

/// A thread's chunks of the row at `source`, which ends at column `end`.
template <bool kVectorized, typename T, int kChunks>
DSO_DEVICE void load_columns(Chunk<T> (&chunks)[kChunks], const T* source, const NormColumns<kChunks>& columns,
                             int end) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunks[i] = load_chunk<kVectorized>(source + columns(i), end - columns(i));
}

/// `sum` and the squares of a thread's elements.
template <typename T, int kChunks>
DSO_DEVICE float add_squares(float sum, const Chunk<T> (&x)[kChunks]) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        float values[kChunk];
        to_floats(x[i], values);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sum = __fmaf_rn(values[j], values[j], sum);
    }
    return sum;
}

/// What a row is multiplied by, from a thread's squares.
DSO_DEVICE float norm_scale(const RmsNormArguments& arguments, float sum, int buffer) {
    return rsqrtf(__fmaf_rn(sum_over_row(sum, buffer), arguments.inverse_d, arguments.eps));
}

/// Stores x * scale * weight, quantized or as it is. Chunk i of a row and of the weights is x_of(i) and weight_of(i).
template <typename T, bool kCast, bool kVectorized, typename Columns, typename ChunkOfX, typename ChunkOfWeight>
DSO_DEVICE void store_normed(const RmsNormArguments& arguments, int64_t group, int64_t row, const Columns& columns,
                             int end, float scale, const ChunkOfX& x_of, const ChunkOfWeight& weight_of) {
    constexpr int kChunks = Columns::kChunks, kParts = Columns::kParts, kLanes = Columns::kLanes;
    constexpr int kBlocks = Columns::kBlocks;
    const int64_t out = (group * arguments.m + row) * static_cast<int>(arguments.d) + columns.first;
    Chunk<T> y[kBlocks][kParts];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        float values[kChunk], factors[kChunk];
        to_floats(x_of(i), values);
        to_floats(weight_of(i), factors);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) values[j] = values[j] * scale * factors[j];
        y[i / kParts][i % kParts] = round_to<T>(values);
    }
    if constexpr (kCast) {
        const CastOutput& output = arguments.output;
        const auto scales = scale_blocks<kLanes, kBlocks>(y, output.amax_floor, output.use_ue8m0);
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            store_e4m3<kVectorized>(output.q + out + columns.step(i),
                                    cast_chunk(y[i / kParts][i % kParts], scales.inverse[i / kParts]),
                                    columns.left(i, end));
        const int own = threadIdx.x % kLanes, column = columns(own * kParts) - own * kChunk;
        if (own < kBlocks && column < end) {
            output.sf[group * output.sf_stride_group + row * output.sf_stride_m +
                      static_cast<uint32_t>(column) / kQuantizeBlock * output.sf_stride_k] = scales.sf;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            store_chunk<kVectorized>(static_cast<T*>(arguments.y) + out + columns.step(i), y[i / kParts][i % kParts],
                                     columns.left(i, end));
    }
}

/// kOnePanel says that a panel is the whole row.
template <typename T, typename Weight, bool kAdd, bool kCast, int kChunks, bool kOnePanel, bool kVectorized>
__global__ void __launch_bounds__(kNormMaxThreads, 1)
    rms_norm_kernel(const __grid_constant__ RmsNormArguments arguments) {
    const int64_t m = arguments.m;
    const int d = static_cast<int>(arguments.d);
    const uint32_t group = arguments.num_groups == 1 ? 0 : blockIdx.x / arguments.ctas_per_group;
    const int64_t row = int64_t{blockIdx.x - group * arguments.ctas_per_group} * blockDim.y + threadIdx.y;
    const T* x_row = static_cast<const T*>(arguments.x) + group * arguments.x_stride_group + row * arguments.x_stride_m;
    const T* residual_row = static_cast<const T*>(arguments.residual) + group * arguments.residual_stride_group +
                            row * arguments.residual_stride_m;
    T* sum_row = static_cast<T*>(arguments.residual_out) + (group * m + row) * d;
    const auto* weight = static_cast<const Weight*>(arguments.weight);

    constexpr bool kWeightsEarly = kOnePanel && kVectorized;  // they wait in registers while the row is summed
    const int panels_end = kOnePanel ? 1 : d;
    const int panel_step = kOnePanel ? 1 : static_cast<int>(blockDim.x) * (kChunk * kChunks);
    const int end = row < m ? d : 0;  // what is beyond the last row takes part in barriers only
    Chunk<T> x[kChunks];
    Chunk<Weight> weights[kChunks];

    ptx::grid_dependency_wait();  // the row's place is found meanwhile
    ptx::grid_launch_dependents();
    float sum = 0.f;
    for (int panel = 0; panel < panels_end; panel += panel_step) {
        const NormColumns<kChunks> columns(panel);
        Chunk<T> residual[kChunks];
        load_columns<kVectorized>(x, x_row, columns, end);
        if constexpr (kAdd) load_columns<kVectorized>(residual, residual_row, columns, end);
        if constexpr (kWeightsEarly) load_columns<kVectorized>(weights, weight, columns, end);
        if constexpr (kAdd) {
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                float values[kChunk], others[kChunk];
                to_floats(x[i], values);
                to_floats(residual[i], others);
#pragma unroll
                for (int j = 0; j < kChunk; ++j) values[j] += others[j];
                x[i] = round_to<T>(values);
                store_chunk<kVectorized>(sum_row + columns(i), x[i], end - columns(i));
            }
        }
        sum = add_squares(sum, x);
    }
    const float scale = norm_scale(arguments, sum, 0);

    for (int panel = 0; panel < panels_end; panel += panel_step) {
        const NormColumns<kChunks> columns(panel);
        if (!kOnePanel && panel_step < d) load_columns<kVectorized>(x, kAdd ? sum_row : x_row, columns, end);
        if constexpr (!kWeightsEarly) load_columns<kVectorized>(weights, weight, columns, end);
        store_normed<T, kCast, kVectorized>(
            arguments, group, row, columns, end, scale, [&](int i) { return x[i]; }, [&](int i) { return weights[i]; });
    }
}

/// Warps of an SM that go from row to row: with 72 registers a thread, for two rows. As many as fit: where the
/// registers left room for one more CTA, some SMs would take it, and others be without.
inline constexpr int kNormAheadWarps = 28;

/// The same for many long rows of 16-bit elements without an addition, in one group. A row is a chain from its load to
/// its store, of which only the first link keeps memory busy: so a CTA loads its next row before it sums this one. The
/// weights wait in shared memory, each thread's own.
template <typename T, bool kCast>
__global__ void __launch_bounds__(32 * kNormAheadWarps, 1)
    rms_norm_ahead_kernel(const __grid_constant__ RmsNormArguments arguments) {
    const uint32_t m = static_cast<uint32_t>(arguments.m);
    const int d = static_cast<int>(arguments.d);
    const NormColumns<kNormMaxChunks> columns(0);
    Chunk<T> next[kNormMaxChunks], weights[kNormMaxChunks];
    Chunk<T>* own_weights = &ptx::dynamic_shared<Chunk<T>>() + threadIdx.x;  // blockDim.x apart
    const auto load_next = [&](uint32_t row) {
        const T* source = static_cast<const T*>(arguments.x) + row * arguments.x_stride_m;
        load_columns<true>(next, source, columns, row < m ? d : 0);
    };

    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    load_next(blockIdx.x);
    load_columns<true>(weights, static_cast<const T*>(arguments.weight), columns, d);
#pragma unroll
    for (int i = 0; i < kNormMaxChunks; ++i) own_weights[i * blockDim.x] = weights[i];
    int buffer = 0;
    for (uint32_t row = blockIdx.x; row < m; row += gridDim.x, buffer ^= 1) {
        Chunk<T> x[kNormMaxChunks];
#pragma unroll
        for (int i = 0; i < kNormMaxChunks; ++i) x[i] = next[i];
        load_next(row + gridDim.x);
        const float scale = norm_scale(arguments, add_squares(0.f, x), buffer);
#pragma unroll
        for (int i = 0; i < kNormMaxChunks; ++i) weights[i] = own_weights[i * blockDim.x];
        store_normed<T, kCast, true>(
            arguments, 0, row, columns, d, scale, [&](int i) { return x[i]; }, [&](int i) { return weights[i]; });
    }
}

inline constexpr int kNormWarpThreads = 256;  // of a CTA whose warps have a row each

template <typename T, int kWarps>
struct NormWeights {
    Chunk<T> chunks[64 * kWarps];
};

/// The same for many rows of 16-bit elements, without an addition, that kWarps warps of two chunks a thread would
/// share: a warp has a row to itself. It adds up as those would, so the bits are the same, but waits for no other, and
/// what is done once for a row is done by one. The rows of a CTA share the weights: in registers, beside the row, they
/// would leave room for few warps.
template <typename T, bool kCast, int kWarps>
__global__ void __launch_bounds__(kNormWarpThreads, 4)
    rms_norm_by_warp_kernel(const __grid_constant__ RmsNormArguments arguments) {
    static_assert(kWarps <= 4,
                  "sums are added as sum_over_row does with up to four, and a CTA loads 64 chunks for each");
    constexpr int kParts = 2, kChunks = kParts * kWarps;
    const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y, thread = threadIdx.y * 32 + threadIdx.x;
    const int d = static_cast<int>(arguments.d);
    const NormColumns<kChunks, 32, kChunks - kParts> columns(0);
    const T* source = static_cast<const T*>(arguments.x) + row * arguments.x_stride_m + columns.first;
    const T* weight = static_cast<const T*>(arguments.weight);
    auto& weights = ptx::static_shared<NormWeights<T, kWarps>>().chunks;

    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    Chunk<T> x[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
        x[i] = load_chunk<true>(source + columns.step(i), row < arguments.m ? columns.left(i, d) : 0);
    if (thread < 64 * kWarps)
        weights[thread] = load_chunk<true>(weight + thread * kChunk, d - static_cast<int>(thread * kChunk));
    __syncthreads();
    if (row >= arguments.m) return;

    float sums[4] = {};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
        const Chunk<T> part[kParts] = {x[kParts * warp], x[kParts * warp + 1]};
        sums[warp] = add_squares(0.f, part);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) sums[warp] += __shfl_xor_sync(0xFFFFFFFF, sums[warp], offset);
    }
    const float sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
    const float scale = rsqrtf(__fmaf_rn(sum, arguments.inverse_d, arguments.eps));
#pragma unroll
    for (int i = 0; i < kChunks * 4; ++i)  // kept as floats since the sum, the row would not fit
        x[i / 4].word(i % 4) = ptx::compute_here(x[i / 4].word(i % 4));
    store_normed<T, kCast, true>(
        arguments, 0, row, columns, d, scale, [&](int i) { return x[i]; },
        [&](int i) { return weights[columns(i) / kChunk]; });
}

}  // namespace dso
