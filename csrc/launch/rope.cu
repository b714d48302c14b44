#include "kernels/rope.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/patch_grid.h"
#include "launch/rope_checks.h"
#include "launch/row_checks.h"
#include "launch/row_threads.h"

namespace dso {
namespace {

/// Heads of a thread, where there are enough: 64 bytes in flight.
template <typename T>
constexpr int kManyHeads = static_cast<int>(64 / (kChunk * sizeof(T)));

template <typename T, bool kInterleaved, int kHeads, bool kVectorized>
dso_status launch_rope(const RopeArguments& arguments, dso_stream stream) {
    const int64_t places = ceil_div(arguments.d / 2, kRotaryPairs);
    const dim3 threads =
        threads_of_rows(places, ceil_div<int64_t>(arguments.num_heads, kHeads), arguments.t, kRopeThreads);
    const dim3 grid = grid_of(ceil_div<int64_t>(arguments.t, threads.z),
                              ceil_div<int64_t>(arguments.num_heads, threads.y * kHeads), 1);
    return launch_kernel(rope_kernel<T, kInterleaved, kHeads, kVectorized>, {grid, threads, 0, stream, 1, true},
                         arguments);
}

template <typename T, bool kInterleaved>
dso_status launch_rope(const RopeArguments& arguments, bool vectorized, int num_sms, dso_stream stream) {
    if (!vectorized) return launch_rope<T, kInterleaved, 1, false>(arguments, stream);
    // One head a thread, where several would leave SMs idle.
    const bool many =
        arguments.num_heads >= kManyHeads<T> &&
        arguments.t * arguments.num_heads * arguments.d >= int64_t{2} * num_sms * kRopeThreads * kManyHeads<T> * kChunk;
    return many ? launch_rope<T, kInterleaved, kManyHeads<T>, true>(arguments, stream)
                : launch_rope<T, kInterleaved, 1, true>(arguments, stream);
}

template <typename T>
dso_status launch_rope(const RopeArguments& arguments, bool interleaved, bool vectorized, int num_sms,
                       dso_stream stream) {
    return interleaved ? launch_rope<T, true>(arguments, vectorized, num_sms, stream)
                       : launch_rope<T, false>(arguments, vectorized, num_sms, stream);
}

/// Whether the grid has a thread for all, and rows, and the halves of those not interleaved, can be taken in vectors.
bool can_be_vectorized(const dso_rotation& rotation) {
    return rotation.d % kChunk == 0 && rotation.d <= kRopeThreads * kChunk && rotation.num_heads <= kMaxGridY &&
           rows_are_aligned(rotation.x, rotation.dtype, rotation.x_stride_t, rotation.x_stride_head) &&
           rows_are_aligned(rotation.y, rotation.dtype, 0, 0) &&
           rows_are_aligned(rotation.cos_sin, DSO_F32, 0, rotation.cos_sin_stride);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_rope(const dso_rotation* rotation, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_rope(*rotation));
    if (rotation->t == 0 || rotation->num_heads == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const RopeArguments arguments{rotation->x,
                                  rotation->y,
                                  rotation->cos_sin,
                                  {rotation->positions, rotation->positions_are_64_bit != 0},
                                  rotation->x_stride_t,
                                  rotation->x_stride_head,
                                  rotation->cos_sin_stride,
                                  rotation->t,
                                  rotation->num_heads,
                                  rotation->max_position,
                                  static_cast<int>(rotation->d)};
    const bool interleaved = rotation->interleaved != 0, vectorized = can_be_vectorized(*rotation);
    switch (rotation->dtype) {
        case DSO_BF16:
            return launch_rope<__nv_bfloat16>(arguments, interleaved, vectorized, num_sms, stream);
        case DSO_F16:
            return launch_rope<__half>(arguments, interleaved, vectorized, num_sms, stream);
        default:
            return launch_rope<float>(arguments, interleaved, vectorized, num_sms, stream);
    }
}
