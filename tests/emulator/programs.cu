// Small programs for the emulator, each right as it stands and wrong where it `is_broken`: what it must catch.
#include <cstdio>

#include "device/multiply.cuh"
#include "device/pipeline.cuh"
#include "launch/launch.h"
#include "launch/tensor_map.h"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace {

using namespace dso;

constexpr int kNumTiles = 6, kRows = 64, kTileBytes = kRows * kSwizzleBytes;
constexpr int kNumStages = 2;
constexpr float kOne = 1;
constexpr uint8_t kE4M3One = 0x38;

struct Arguments {
    TensorMap input, output;  // kNumTiles tiles of kRows rows of 128 bytes; the input's bytes are kE4M3One
    uint8_t* bytes;           // of the output
    float* floats;            // kNumTiles * kRows * 32
    bool is_broken;
};

struct Shared {
    alignas(kSwizzleAtomBytes) uint8_t tiles[kNumStages][kTileBytes];
    alignas(8) Pipeline<kNumStages> pipeline;
    uint64_t barrier;
};

DSO_DEVICE Shared& start(uint32_t num_producers, uint32_t num_consumers) {
    auto& shared = ptx::dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
        shared.pipeline.init(num_producers, num_consumers);
        ptx::mbarrier_init(&shared.barrier, 32);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    return shared;
}

/// By the lanes of one warp: all tiles through the ring.
DSO_DEVICE void load_tiles(Shared& shared, const Arguments& arguments) {
    PipelineState<kNumStages> state;
    for (int tile = 0; tile < kNumTiles; ++tile, state.advance()) {
        shared.pipeline.acquire(state);
        if (threadIdx.x % 32 != 0) continue;
        uint64_t* full = &shared.pipeline.full[state.stage];
        ptx::mbarrier_arrive_expect_tx(full, kTileBytes);
        ptx::tma_load_3d(shared.tiles[state.stage], &arguments.input, full, 0, tile * kRows, 0);
    }
}

/// A warp copies what another loads. Broken: it reads before the bytes are there.
void read_after_full(const Arguments arguments) {
    Shared& shared = start(1, 1);
    if (threadIdx.x >= 32) return load_tiles(shared, arguments);
    PipelineState<kNumStages> state;
    for (int tile = 0; tile < kNumTiles; ++tile, state.advance()) {
        if (!arguments.is_broken) shared.pipeline.wait(state);
        for (int i = threadIdx.x; i < kTileBytes; i += 32)
            arguments.bytes[tile * kTileBytes + i] = shared.tiles[state.stage][i];
        if (arguments.is_broken) shared.pipeline.wait(state);
        __syncwarp();
        if (threadIdx.x == 0) shared.pipeline.release(state);
    }
}

/// The same. Broken: lane 0 releases the stage while others may not have read it.
void release_after_every_lane(const Arguments arguments) {
    Shared& shared = start(1, 1);
    if (threadIdx.x >= 32) return load_tiles(shared, arguments);
    PipelineState<kNumStages> state;
    for (int tile = 0; tile < kNumTiles; ++tile, state.advance()) {
        shared.pipeline.wait(state);
        for (int i = threadIdx.x; i < kTileBytes; i += 32)
            arguments.bytes[tile * kTileBytes + i] = shared.tiles[state.stage][i];
        if (!arguments.is_broken) __syncwarp();
        if (threadIdx.x == 0) shared.pipeline.release(state);
    }
}

/// A warpgroup multiplies tiles with themselves. Broken: it releases a stage that WGMMA still reads.
void release_after_wgmma(const Arguments arguments) {
    Shared& shared = start(1, 4);
    if (threadIdx.x >= 128) return load_tiles(shared, arguments);
    PipelineState<kNumStages> state;
    const auto release = [&] {
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.pipeline.release(state);
    };
    for (int tile = 0; tile < kNumTiles; ++tile, state.advance()) {
        shared.pipeline.wait(state);
        float product[32];
        const uint64_t descriptor = wgmma_descriptor(shared.tiles[state.stage]);
        start_multiply<64>(product, descriptor, descriptor);
        if (arguments.is_broken) release();
        finish_multiply(product);
        if (!arguments.is_broken) release();
        for (int i = 0; i < 16; ++i)
            arguments.floats[(tile * 128 + threadIdx.x) * 16 + i] = product[i] / kSwizzleBytes + product[i + 16] * 0;
    }
}

/// Broken: it looks at its accumulators before the wait.
void read_after_wgmma(const Arguments arguments) {
    Shared& shared = start(1, 4);
    if (threadIdx.x >= 128) return load_tiles(shared, arguments);
    PipelineState<kNumStages> state;
    for (int tile = 0; tile < kNumTiles; ++tile, state.advance()) {
        shared.pipeline.wait(state);
        float product[32];
        const uint64_t descriptor = wgmma_descriptor(shared.tiles[state.stage]);
        start_multiply<64>(product, descriptor, descriptor);
        if (!arguments.is_broken) finish_multiply(product);
        for (int i = 0; i < 16; ++i) arguments.floats[(tile * 128 + threadIdx.x) * 16 + i] = product[i] / kSwizzleBytes;
        if (arguments.is_broken) finish_multiply(product);
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.pipeline.release(state);
    }
}

/// Broken: WGMMA without wgmma.fence.
void fence_before_wgmma(const Arguments arguments) {
    Shared& shared = start(1, 4);
    if (threadIdx.x >= 128) return load_tiles(shared, arguments);
    PipelineState<kNumStages> state;
    for (int tile = 0; tile < kNumTiles; ++tile, state.advance()) {
        shared.pipeline.wait(state);
        float product[4] = {};
        const uint64_t descriptor = wgmma_descriptor(shared.tiles[state.stage]);
        if (!arguments.is_broken) ptx::wgmma_fence();
        ptx::WgmmaE4M3<8>::mma(product, descriptor, descriptor, true);
        ptx::wgmma_commit();
        finish_multiply(product);
        __syncwarp();
        if (threadIdx.x % 32 == 0) shared.pipeline.release(state);
    }
}

/// A warp stores tile after tile from one panel. Broken: the next overwrites it before the store has read it.
void overwrite_after_the_store_has_read(const Arguments arguments) {
    Shared& shared = start(1, 1);
    for (int tile = 0; tile < kNumTiles; ++tile) {
        if (threadIdx.x == 0 && !arguments.is_broken) ptx::tma_store_wait_read<0>();
        __syncwarp();
        const uint8_t value = tile + 1 == kNumTiles ? kE4M3One + 1 : kE4M3One;
        for (int i = threadIdx.x; i < kTileBytes; i += 32) shared.tiles[0][i] = value;
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (threadIdx.x != 0 || tile + 1 == kNumTiles) continue;
        ptx::tma_store_3d(&arguments.output, shared.tiles[0], 0, tile * kRows, 0);
        ptx::tma_store_commit();
    }
    if (threadIdx.x == 0) ptx::tma_store_wait_read<0>();
}

/// Broken: nobody waits before shared memory goes away.
void end_after_the_store_has_read(const Arguments arguments) {
    Shared& shared = start(1, 1);
    for (int i = threadIdx.x; i < kTileBytes; i += 32) shared.tiles[0][i] = kE4M3One;
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (threadIdx.x != 0) return;
    ptx::tma_store_3d(&arguments.output, shared.tiles[0], 0, 0, 0);
    ptx::tma_store_commit();
    if (!arguments.is_broken) ptx::tma_store_wait_read<0>();
}

/// Broken: one lane does not arrive.
void arrive_with_every_lane(const Arguments arguments) {
    Shared& shared = start(1, 1);
    if (!arguments.is_broken || threadIdx.x != 7) ptx::mbarrier_arrive(&shared.barrier);
    ptx::mbarrier_wait(&shared.barrier, 0);
}

/// Broken: one lane arrives twice, in a phase that has its arrivals but not its bytes.
void arrive_once(const Arguments arguments) {
    Shared& shared = start(1, 1);
    if (threadIdx.x != 0) {
        ptx::mbarrier_arrive(&shared.barrier);
        if (arguments.is_broken && threadIdx.x == 1) ptx::mbarrier_arrive(&shared.barrier);
    } else {
        ptx::mbarrier_arrive_expect_tx(&shared.barrier, kTileBytes);
        ptx::tma_load_3d(shared.tiles[0], &arguments.input, &shared.barrier, 0, 0, 0);
    }
    ptx::mbarrier_wait(&shared.barrier, 0);
}

/// Broken: a barrier expects fewer bytes than come.
void expect_all_bytes(const Arguments arguments) {
    Shared& shared = start(1, 1);
    if (threadIdx.x == 0) {
        uint64_t* full = &shared.pipeline.full[0];
        ptx::mbarrier_arrive_expect_tx(full, arguments.is_broken ? kTileBytes - 16 : kTileBytes);
        ptx::tma_load_3d(shared.tiles[0], &arguments.input, full, 0, 0, 0);
    }
    ptx::mbarrier_wait(&shared.pipeline.full[0], 0);
}

/// Broken: a barrier is used that nobody has initialised.
void initialise_first(const Arguments arguments) {
    Shared& shared = start(1, 1);
    uint64_t* uninitialised = reinterpret_cast<uint64_t*>(shared.tiles[0]);
    if (threadIdx.x == 0) ptx::mbarrier_arrive(arguments.is_broken ? uninitialised : &shared.barrier);
}

/// Broken: a barrier is written over.
void keep_off_barriers(const Arguments arguments) {
    Shared& shared = start(1, 1);
    if (threadIdx.x == 3) shared.tiles[kNumStages - 1][kTileBytes - 1 + 8 * arguments.is_broken] = 0;
    __syncwarp();
    if (threadIdx.x == 0) ptx::mbarrier_arrive(&shared.pipeline.full[0]);
}

/// Broken: half a warp shuffles, the other half synchronises.
void stay_together(const Arguments arguments) {
    if (arguments.is_broken && threadIdx.x < 16) {
        __syncwarp();
    } else {
        __shfl_sync(0xFFFFFFFF, threadIdx.x, 0);
    }
}

/// Broken: it reads beyond shared memory.
void stay_in_shared_memory(const Arguments arguments) {
    Shared& shared = start(1, 1);
    const size_t first = arguments.is_broken ? sizeof(Shared) + 4096 : 0;
    arguments.bytes[0] = reinterpret_cast<const uint8_t*>(&shared)[first] == 0xFF ? kE4M3One : 0;
}

/// Copies by cp.async. Broken: read without the barrier.
void wait_for_cp_async(const Arguments arguments) {
    Shared& shared = start(1, 1);
    auto* values = reinterpret_cast<float*>(shared.tiles[0]);
    const float one = kOne;
    ptx::cp_async_4(&values[threadIdx.x], &one, true);
    ptx::cp_async_mbarrier_arrive(&shared.barrier);
    if (!arguments.is_broken) ptx::mbarrier_wait(&shared.barrier, 0);
    arguments.floats[threadIdx.x] = values[threadIdx.x];
    ptx::mbarrier_wait(&shared.barrier, 0);
}

/// The CTAs of a cluster send each other 512 bytes. Broken: before they know that the other runs.
void send_when_the_other_runs(const Arguments arguments) {
    auto& shared = ptx::dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.barrier, 1);
        ptx::fence_mbarrier_init();
    }
    auto* sent = reinterpret_cast<float (*)[4]>(shared.tiles[0]);
    auto* received = reinterpret_cast<float (*)[4]>(shared.tiles[1]);
    for (float& x : sent[threadIdx.x]) x = kOne;
    ptx::fence_proxy_async_shared();
    __syncwarp();
    ptx::cluster_arrive();
    if (!arguments.is_broken) ptx::cluster_wait();
    const uint32_t other = 1 - ptx::cluster_rank();
    const uint32_t barrier = ptx::cluster_address(&shared.barrier, other);
    if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(&shared.barrier, 32 * sizeof(float[4]));
    if (threadIdx.x == 0)
        ptx::copy_to_cluster_async(ptx::cluster_address(received, other), sent, 32 * sizeof(float[4]), barrier);
    ptx::mbarrier_wait(&shared.barrier, 0);
    arguments.floats[ptx::cluster_rank() * 32 + threadIdx.x] = received[threadIdx.x][1];
    if (arguments.is_broken) return;
    ptx::cluster_arrive();  // the other may still read what this CTA sends
    ptx::cluster_wait();
}

/// The CTAs of a cluster read from each other. Broken: they end as soon as they have read.
void read_while_the_other_runs(const Arguments arguments) {
    auto& shared = ptx::dynamic_shared<Shared>();
    auto* own = reinterpret_cast<float4*>(shared.tiles[0]) + threadIdx.x;
    *own = {kOne, kOne, kOne, kOne};
    ptx::fence_release_shared_to_cluster();
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const float4 x = ptx::load_from_cluster(ptx::cluster_address(own, 1 - ptx::cluster_rank()));
    arguments.floats[ptx::cluster_rank() * 32 + threadIdx.x] = x.w;
    if (arguments.is_broken) return;
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

/// 16-bit WGMMA on tiles whose rows are 64 halves: d = a @ b.T with a in registers, and a transposed in shared memory,
/// must both be what plain loops make of it. Broken: a register changes before the wait.
void multiply_halves(const Arguments arguments) {
    using emulator::Element;
    auto& shared = ptx::dynamic_shared<Shared>();
    auto* a = reinterpret_cast<uint16_t*>(shared.tiles[0]);  // 64 x 64, K-major for a, MN-major for its transpose
    auto* b = reinterpret_cast<uint16_t*>(shared.tiles[1]);
    const auto place = [](int row, int column) { return swizzled_offset(row, column / 8) / 2 + column % 8; };
    const auto value_a = [](int row, int column) { return static_cast<float>((row * 7 + column * 3) % 11 - 5); };
    const auto value_b = [](int row, int column) { return static_cast<float>((row * 5 + column * 2) % 13 - 6); };
    const auto bits = [](float x) { return static_cast<uint16_t>(__float_as_uint(x) >> 16); };  // exact in bfloat16
    for (int i = threadIdx.x; i < 64 * 64; i += 128) {
        a[place(i / 64, i % 64)] = bits(value_a(i / 64, i % 64));
        b[place(i / 64, i % 64)] = bits(value_b(i / 64, i % 64));
    }
    ptx::fence_proxy_async_shared();
    __syncthreads();

    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
    float from_registers[32], from_shared[32], transposed[32];
    uint32_t fragments[4][4];
    for (int k = 0; k < 4; ++k) {
        for (int i = 0; i < 4; ++i) {
            const int r = row + i % 2 * 8, c = k * 16 + i / 2 * 8 + pair;
            fragments[k][i] = bits(value_a(r, c)) | uint32_t{bits(value_a(r, c + 1))} << 16;
        }
    }
    const uint64_t at_a = wgmma_descriptor(a), at_b = wgmma_descriptor(b);
    ptx::wgmma_fence();
    for (int k = 0; k < 4; ++k) {
        const uint64_t step_a = advance_descriptor(at_a, k * 32), step_b = advance_descriptor(at_b, k * 32);
        const uint64_t rows_a = advance_descriptor(at_a, k * 16 * kSwizzleBytes);
        const uint64_t rows_b = advance_descriptor(at_b, k * 16 * kSwizzleBytes);
        emulator::multiply_registers(from_registers, 64, Element::kBF16, fragments[k], {step_b}, k != 0);
        emulator::multiply(from_shared, 64, Element::kBF16, {step_a}, {step_b}, k != 0);
        emulator::multiply(transposed, 64, Element::kBF16, {rows_a, true}, {rows_b, true}, k != 0);
    }
    ptx::wgmma_commit();
    if (arguments.is_broken) fragments[2][1] = 0;
    ptx::wgmma_wait<0>();

    for (int i = 0; i < 32; ++i) {
        const int r = row + i / 2 % 2 * 8, c = i / 4 * 8 + pair + i % 2;
        float want = 0, want_transposed = 0;
        for (int k = 0; k < 64; ++k) {
            want += value_a(r, k) * value_b(c, k);
            want_transposed += value_a(k, r) * value_b(k, c);
        }
        const bool is_right = from_registers[i] == want && from_shared[i] == want && transposed[i] == want_transposed;
        arguments.floats[threadIdx.x * 32 + i] = is_right ? kOne : from_registers[i];
    }
}

struct Program {
    const char* name;
    void (*kernel)(Arguments);
    unsigned num_threads;
    int num_bytes, num_floats;  // of the output that are kE4M3One, and 1
    int cluster_size = 1;
};

#define PROGRAM(name, ...) {#name, name, __VA_ARGS__}
constexpr Program kPrograms[] = {
    PROGRAM(read_after_full, 64, kNumTiles* kTileBytes, 0),
    PROGRAM(release_after_every_lane, 64, kNumTiles* kTileBytes, 0),
    PROGRAM(release_after_wgmma, 160, 0, kNumTiles * 128 * 16),
    PROGRAM(read_after_wgmma, 160, 0, kNumTiles * 128 * 16),
    PROGRAM(multiply_halves, 128, 0, 128 * 32),
    PROGRAM(fence_before_wgmma, 160, 0, 0),
    PROGRAM(overwrite_after_the_store_has_read, 32, (kNumTiles - 1) * kTileBytes, 0),
    PROGRAM(end_after_the_store_has_read, 32, kTileBytes, 0),
    PROGRAM(arrive_with_every_lane, 32, 0, 0),
    PROGRAM(arrive_once, 32, 0, 0),
    PROGRAM(expect_all_bytes, 32, 0, 0),
    PROGRAM(initialise_first, 32, 0, 0),
    PROGRAM(keep_off_barriers, 32, 0, 0),
    PROGRAM(stay_together, 32, 0, 0),
    PROGRAM(stay_in_shared_memory, 32, 1, 0),
    PROGRAM(wait_for_cp_async, 32, 0, 32),
    PROGRAM(send_when_the_other_runs, 32, 0, 64, 2),
    PROGRAM(read_while_the_other_runs, 32, 0, 64, 2),
};

dso_status run(const Program& program, bool is_broken) {
    static uint8_t input[kNumTiles * kTileBytes], output[kNumTiles * kTileBytes];
    static float floats[kNumTiles * 128 * 16];
    memset(input, kE4M3One, sizeof(input));
    memset(output, 0xFF, sizeof(output));
    memset(floats, 0xFF, sizeof(floats));
    Arguments arguments{{}, {}, output, floats, is_broken};
    const auto encode = [](void* base, TensorMap* map) {
        return encode_tensor_map({base, 1, kNumTiles * kRows, 128, 0, 128, 1, kRows, 128, true}, map);
    };
    DSO_TRY(encode(input, &arguments.input));
    DSO_TRY(encode(output, &arguments.output));
    const LaunchShape shape{dim3(program.cluster_size), dim3(program.num_threads), sizeof(Shared), nullptr,
                            program.cluster_size};
    DSO_TRY(launch_kernel(program.kernel, shape, arguments));
    for (int i = 0; i < program.num_bytes; ++i) {
        if (output[i] != kE4M3One) return fail(DSO_INVALID, "wrong result: byte %d is 0x%02x", i, output[i]);
    }
    for (int i = 0; i < program.num_floats; ++i) {
        if (!(floats[i] == kOne)) return fail(DSO_INVALID, "wrong result: float %d is %g", i, floats[i]);
    }
    return DSO_OK;
}

}  // namespace

extern "C" DSO_API dso_status run_program(const char* name, int is_broken) {
    for (const Program& program : kPrograms) {
        if (strcmp(program.name, name) == 0) return run(program, is_broken != 0);
    }
    return fail(DSO_INVALID, "there is no program %s", name);
}
