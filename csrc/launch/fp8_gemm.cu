// From a checked GEMM to a launched kernel: tensor maps, tile, instance.
#include "launch/fp8_gemm.h"

#include "device/math.cuh"
#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/fp8_gemm_checks.h"
#include "launch/fp8_gemm_config.h"
#include "launch/tensor_map.h"

namespace dso {

#define DSO_FP8_GEMM(num_math_warpgroups, block_n, num_stages) \
    extern template dso_status launch_fp8_gemm<num_math_warpgroups, block_n, num_stages>(const Fp8GemmLaunch&);
#include "launch/fp8_gemm_configs.def"
#undef DSO_FP8_GEMM

namespace {

using Launcher = dso_status (*)(const Fp8GemmLaunch&);
constexpr Launcher kLaunchers[] = {
#define DSO_FP8_GEMM(num_math_warpgroups, block_n, num_stages) \
    launch_fp8_gemm<num_math_warpgroups, block_n, num_stages>,
#include "launch/fp8_gemm_configs.def"
#undef DSO_FP8_GEMM
};

// An operand's tiles are rows of 128 bytes, under the swizzle that WGMMA reads.
TmaMatrix e4m3_tiles(const void* base, int64_t rows, int64_t k, int64_t stride, int box_rows) {
    return {base, rows, k, stride, 1, box_rows, 128, true};
}

// The epilogue stores a warpgroup's 64 rows in panels of 64 bfloat16 columns.
TmaMatrix bf16_panels(const dso_fp8_gemm& gemm) { return {gemm.d, gemm.m, gemm.n, gemm.d_stride, 2, 64, 64, true}; }

// A step's scales are a run of the rows of an MN-major sfa: a matrix of ceil(k / 128) rows of m.
TmaMatrix sfa_runs(const dso_fp8_gemm& gemm, int block_m) {
    return {gemm.sfa, ceil_div<int64_t>(gemm.k, 128), gemm.m, gemm.sfa_stride_k, 4, 1, block_m, false};
}

bool is_mn_major_tma_aligned(const dso_fp8_gemm& gemm) {
    return (gemm.sfa_stride_m == 1 || gemm.m == 1) && reinterpret_cast<uintptr_t>(gemm.sfa) % 16 == 0 &&
           (gemm.k <= 128 || (gemm.sfa_stride_k % 4 == 0 && gemm.sfa_stride_k >= gemm.m));
}

/// k = 0: the sum of nothing.
dso_status clear_output(const dso_fp8_gemm& gemm, dso_stream stream) {
    if (gemm.accumulate) return DSO_OK;
    const size_t element = gemm.d_dtype == DSO_BF16 ? 2 : 4;
    const size_t row_bytes = gemm.n * element;
    const size_t pitch = gemm.m > 1 ? gemm.d_stride * element : row_bytes;
    DSO_CUDA(cudaMemset2DAsync(gemm.d, pitch, 0, row_bytes, gemm.m, static_cast<cudaStream_t>(stream)));
    return DSO_OK;
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_fp8_gemm_nt(const dso_fp8_gemm* gemm, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_fp8_gemm(*gemm));
    if (gemm->m == 0 || gemm->n == 0) return DSO_OK;
    if (gemm->k == 0) return clear_output(*gemm, stream);

    Fp8GemmLaunch launch{};
    launch.stream = stream;
    DSO_TRY(current_device(&launch.device, &launch.num_sms));
    const int chosen = select_fp8_gemm_config(gemm->m, gemm->n, gemm->k, launch.num_sms);
    const Fp8GemmConfig& config = kFp8GemmConfigs[chosen];

    Fp8GemmMaps& maps = launch.maps;
    DSO_TRY(encode_tensor_map(e4m3_tiles(gemm->a, gemm->m, gemm->k, gemm->a_stride, config.block_m()), &maps.a));
    DSO_TRY(encode_tensor_map(e4m3_tiles(gemm->b, gemm->n, gemm->k, gemm->b_stride, config.block_n), &maps.b));
    launch.loads_scales_by_tma = is_mn_major_tma_aligned(*gemm);
    if (launch.loads_scales_by_tma) DSO_TRY(encode_tensor_map(sfa_runs(*gemm, config.block_m()), &maps.sfa));
    launch.stores_by_tma = gemm->d_dtype == DSO_BF16 && !gemm->accumulate;
    if (launch.stores_by_tma) DSO_TRY(encode_tensor_map(bf16_panels(*gemm), &maps.d));
    launch.arguments = {gemm->sfa,
                        gemm->sfb,
                        gemm->sfa_stride_m,
                        gemm->sfa_stride_k,
                        gemm->sfb_stride_n,
                        gemm->sfb_stride_k,
                        static_cast<int>(gemm->m),
                        static_cast<int>(gemm->n),
                        static_cast<int>(gemm->k)};
    launch.output = {gemm->d, gemm->d_stride, gemm->d_dtype == DSO_BF16, gemm->accumulate != 0};
    return kLaunchers[chosen](launch);
}
