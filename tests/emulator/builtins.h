// Built-in functions of a thread or of its warp. All warp functions want all 32 lanes.
#pragma once

namespace emulator {

uint32_t lane_index();
const uint32_t* meet_in_full(const char* instruction, uint32_t mask, uint32_t value);

template <typename To, typename From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "only of one size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

template <typename T>
T shuffle(const char* instruction, uint32_t mask, T value, uint32_t source) {
    if constexpr (sizeof(T) == 8) {  // two instructions, as on a GPU
        const uint64_t bits = bits_as<uint64_t>(value);
        const uint32_t low = shuffle(instruction, mask, static_cast<uint32_t>(bits), source);
        return bits_as<T>(uint64_t{shuffle(instruction, mask, static_cast<uint32_t>(bits >> 32), source)} << 32 | low);
    } else {
        const uint32_t* values = meet_in_full(instruction, mask, bits_as<uint32_t>(value));
        return bits_as<T>(values[source]);
    }
}

}  // namespace emulator

void __syncthreads();
inline void __syncwarp(uint32_t mask = 0xFFFFFFFF) { emulator::meet_in_full("__syncwarp", mask, 0); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
    const uint32_t lane = emulator::lane_index();
    return emulator::shuffle("__shfl_sync", mask, value, lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
    return emulator::shuffle("__shfl_xor_sync", mask, value, (emulator::lane_index() ^ distance) % 32);
}
inline int __reduce_max_sync(uint32_t mask, int value) {
    const uint32_t* values = emulator::meet_in_full("__reduce_max_sync", mask, static_cast<uint32_t>(value));
    int largest = value;
    for (int lane = 0; lane < 32; ++lane) largest = std::max(largest, static_cast<int>(values[lane]));
    return largest;
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t distance) {
    const uint32_t lane = emulator::lane_index();
    return emulator::shuffle("__shfl_up_sync", mask, value, lane >= distance ? lane - distance : lane);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t distance) {
    const uint32_t lane = emulator::lane_index();
    return emulator::shuffle("__shfl_down_sync", mask, value, lane + distance < 32 ? lane + distance : lane);
}

uint32_t __ballot_sync(uint32_t mask, bool vote);
inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) == 0xFFFFFFFF; }

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
    const uint32_t* values = emulator::meet_in_full("__reduce_max_sync", mask, value);
    return *std::max_element(values, values + 32);
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
    const uint32_t* values = emulator::meet_in_full("__reduce_min_sync", mask, value);
    return *std::min_element(values, values + 32);
}

inline uint32_t __match_any_sync(uint32_t mask, int value) {
    const uint32_t* values = emulator::meet_in_full("__match_any_sync", mask, static_cast<uint32_t>(value));
    uint32_t alike = 0;
    for (int lane = 0; lane < 32; ++lane) alike |= uint32_t{values[lane] == static_cast<uint32_t>(value)} << lane;
    return alike;
}

// Fibers are not interrupted: what a function does is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address += value;
    return old;
}
template <typename T>
T atomicMax(T* address, T value) {
    const T old = *address;
    *address = std::max(old, value);
    return old;
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}
inline void __threadfence() {}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = uint64_t{y} << 32 | x;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return picked;
}
inline float __uint_as_float(uint32_t x) { return emulator::bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits_as<uint32_t>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
using std::max;
using std::min;
