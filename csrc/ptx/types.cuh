// Fixed-width integers and the qualifiers of functions, the same under nvcc, NVRTC and a host compiler.
#pragma once

#ifdef __CUDACC_RTC__
#include <cuda/std/cstdint>
using cuda::std::int32_t, cuda::std::int64_t, cuda::std::uint16_t, cuda::std::uint32_t, cuda::std::uint64_t,
    cuda::std::uint8_t;
#else
#include <cstdint>
#endif

#ifdef __CUDACC__
#define DSO_DEVICE __device__ __forceinline__
#define DSO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DSO_HOST_DEVICE inline
#endif

namespace dso {

/// A TMA descriptor as the kernels see it: opaque, passed by value as a __grid_constant__ parameter.
struct alignas(128) TensorMap {
    unsigned char opaque[128];
};

namespace ptx {

/// The 16-bit types that tensor cores multiply.
enum class HalfType { kBF16, kF16 };

}  // namespace ptx

}  // namespace dso
