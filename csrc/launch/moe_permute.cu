#include "kernels/moe_permute.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/moe_permute_checks.h"
#include "launch/patch_grid.h"
#include "launch/row_threads.h"

namespace dso {
namespace {

template <typename Element>
dso_status launch_moe_permute(const MoePermuteArguments& arguments, dso_stream stream) {
    const int64_t places = even_share(ceil_div<int64_t>(arguments.d, kPermuteElements), kPermuteThreads);
    const dim3 threads = threads_of_rows(places, arguments.num_rows, 1, kPermuteThreads);
    const dim3 grid = grid_of(ceil_div<int64_t>(arguments.num_rows, threads.y),
                              ceil_div<int64_t>(arguments.d, threads.x * kPermuteElements), 1);
    return launch_kernel(moe_permute_kernel<Element>, {grid, threads, 0, stream, 1, true}, arguments);
}

/// An element of sixteen bytes that is aligned to eight, as complex numbers are.
struct Pair {
    uint64_t parts[2];
};

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0; }

/// Takes rows that consist of whole vectors as such, and says whether they do.
bool become_vectors(MoePermuteArguments& arguments, int64_t element_bytes) {
    const int64_t per_vector = sizeof(uint4) / element_bytes;
    if ((arguments.d > 1 && arguments.x_stride_d != 1) || arguments.d % per_vector != 0 ||
        arguments.x_stride_t % per_vector != 0 || !is_aligned(arguments.x) || !is_aligned(arguments.out))
        return false;
    arguments.d /= per_vector;
    arguments.x_stride_t /= per_vector;
    arguments.x_stride_d = 1;
    return true;
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_moe_permute(const dso_row_gather* gather, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_moe_permute(*gather));
    if (gather->num_rows == 0 || gather->d == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    MoePermuteArguments arguments{gather->x, gather->token_idx, gather->out,        gather->t,
                                  gather->d, gather->num_rows,  gather->x_stride_t, gather->x_stride_d};
    if (become_vectors(arguments, gather->element_bytes)) return launch_moe_permute<uint4>(arguments, stream);
    switch (gather->element_bytes) {
        case 1:
            return launch_moe_permute<uint8_t>(arguments, stream);
        case 2:
            return launch_moe_permute<uint16_t>(arguments, stream);
        case 4:
            return launch_moe_permute<uint32_t>(arguments, stream);
        case 8:
            return launch_moe_permute<uint64_t>(arguments, stream);
        default:
            return launch_moe_permute<Pair>(arguments, stream);
    }
}
