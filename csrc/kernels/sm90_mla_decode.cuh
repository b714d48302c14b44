// MLA decoding of many rows over a paged cache:   out = softmax(scale * q @ k.T) @ k[:, :512]   for each request
//
//   q              [b, s_q, heads, 576]         bf16 or f16      16-byte loads into swizzled tiles
//   kv_cache       [num_pages, page_size, 576]  the same         TMA, 128-byte swizzle; or cp.async, 16 bytes at a time
//                  or rows of 512 e4m3 | 4 f32 scales | 64 bf16  TMA or cp.async, and from there converted to f16
//                  or rows of 576 e4m3, of one scale for all     likewise
//   block_table    [b, max_pages]               int32            plain loads by the loading warps
//   cache_seqlens  [b]                          int32
//   cu_seqlens_q   [b + 1], or none             int32            plain loads by every warp
//   out            [b, s_q, heads, 512]         the type of q    16-byte stores through shared memory
//   lse            [b, s_q, heads]              f32              natural logarithm; -inf where no key is visible
//
// With cu_seqlens_q the queries of request i are the rows cu_seqlens_q[i] up to cu_seqlens_q[i + 1] of q [s_q, heads,
// 576], and likewise of out and lse.
//
// Tile      64 rows, which are the (query, head) pairs of a request packed, and 64 keys at a time.
// Split     The keys of a tile of rows are shared by the CTAs of a cluster, and by num_parts clusters, which take its
//           tiles of keys in turn (mla_decode_work.cuh). Each CTA of a cluster adds up its share of the columns, and
//           the last cluster of a tile of rows to come the parts (mla_decode_combination.cuh). All in one order, so the
//           bits are the same on every run. With tiles_per_part, a request that has few tiles of keys has fewer parts,
//           as many as its own length says: then the bits do not depend on the batch.
// Ragged    A grid of as many tiles of rows as there can be; each CTA counts those of the requests up to its own, 32
//           requests at a time. The rows of no request are tiles that see no key. CTAs that are left over return.
// Roles     warpgroup 0: scores and softmax; the left 256 channels of its queries stay in registers.
//           warpgroup 1: columns 0 to 255 of the output ("left").   warpgroup 2: 256 to 511 ("right").
//           warpgroup 3: its four warps load.
//           The next tile's scores are begun under this one's softmax (not of FP8). The left product runs beside the
//           rest of them and the right one beside that tile's softmax, for which it waits until the scores are there:
//           so the tensor core has work at all times.
// Barriers  left, right: the rings' full (the bytes of TMA, and one arrival of each loading thread; one more of right's
//           says that `exists` is written) and empty (one of each warp that multiplies from there).
//           p_full: a tile's probabilities and corrections are written.   scored: its scores are there.
//           q_taken: the queries have left the ring.   rows_full: what lse needs is there.
//           raw_full: a loading warp's bytes of an FP8 side are there (TMA's, and an arrival of each lane for its own).
//           named 0: the barriers are initialised.   1: warpgroup 0.   2: all that compute.
// Shared    MlaDecodeShared below: keys in two rings, of their left 256 channels (2 x 32 KiB) and of the others (3 x 40
//           KiB; 2 x 40 of an FP8 cache, and 42 of one tile's bytes on their way), and 40 KiB of the queries. A tile's
//           probabilities take the place of its rotated channels, which only the scores need.
// FP8       Each loading warp converts a quarter of the keys, whose bytes it has asked for itself: the left side, then
//           the right one, each when its place is free, and scores begin with the left. The next tile's bytes of a side
//           are asked for as soon as this one's are converted. All products are float16. Scores are not begun ahead:
//           what the next tile's keys wait for is this one's probabilities.
// Registers 160 a thread of those that compute, 32 of those that load. With FP8 those that load have 64 while the
//           scores' warpgroup has 128, and give them to it when they are through.
// Numerics  Scores and sums in float32. Probabilities, at most 2^8 (device/softmax.cuh), are rounded to the type of
//           products for that with the values, which is divided by the sum of the rounded ones; lse is that of the
//           unrounded ones. The bits depend on how many ways the keys are split.
//           FP8: the type of products is float16. A row's scale is rounded to its 11 bits, and so is scale * e4m3; a
//           query and a rotated channel are exact where float16 has them. One scale for all is a factor of
//           softmax_scale and of the result, so that all keys are exact.
// Limits    FP8: queries and rotated channels beyond float16 count as +-65504, and a scale above 146.125 as that.
//           What is below 2^-25 counts as 0. NaN stays NaN.
//           Rows of q and of the cache start at multiples of 16 bytes. A page that does not exist is not read, nor is a
//           key past the length: they are zeros, and masked. So a NaN there leaves no trace; neither does one in a key
//           that only later queries see.
// Source    DeepSeek-V2 report, arXiv:2405.04434, section 2.1.   Launched by launch/mla_decode.cu.   docs/mla_decode.md
#pragma once

#include <type_traits>

#include "device/fp8_row.h"
#include "device/half.cuh"
#include "device/pipeline.cuh"
#include "device/softmax.cuh"
#include "device/tile.cuh"
#include "kernels/mla_decode_combination.cuh"
#include "kernels/mla_decode_work.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dso {

inline constexpr int kMlaTileRows = 64;
inline constexpr int kMlaMathWarps = 12, kMlaMathThreads = 32 * kMlaMathWarps, kMlaThreads = kMlaMathThreads + 128;
inline constexpr int kMlaBoxes = kMlaKeyDim / 64, kMlaSideBoxes = kMlaValueDim / 64 / 2;  // of 64 channels
inline constexpr int kMlaBoxBytes = kMlaTile * kSwizzleBytes;
inline constexpr int kMlaLeftStages = 2;
inline constexpr int kMlaRowWarps = kMlaTileRows / 16;  // sixteenths of the rows, as the warps of a warpgroup have them

/// What the kernel is compiled for.
template <ptx::HalfType query, LatentFormat format>
struct MlaDecodeTypes {
    static constexpr int kTileRows = kMlaTileRows, kMathWarps = kMlaMathWarps;
    static constexpr bool kSendsRows = false;
    static constexpr ptx::HalfType kQuery = query;  // and of the output
    static constexpr LatentFormat kFormat = format;
    static constexpr bool kIsFp8 = kFormat != LatentFormat::kPlain;                  // the cache
    static constexpr ptx::HalfType kOperand = kIsFp8 ? ptx::HalfType::kF16 : query;  // of products
    static constexpr int kRightStages = kIsFp8 ? 2 : 3;
    static constexpr int kLoadRegisters = kIsFp8 ? 64 : 32;
    static constexpr int kLeftArrivals = kIsFp8 ? kMlaLoadWarps : 32 * kMlaLoadWarps;  // that make a stage full
    static constexpr int kRightArrivals = kIsFp8 ? kMlaLoadWarps : 32 * kMlaLoadWarps + 1;

    /// The first of a lane's two columns of a group of sums.
    DSO_DEVICE static int column_of(int group, int lane) { return group * 8 + lane % 4 * 2; }
};

/// A loading warp's keys of an FP8 cache as the cache has them, in boxes of 128 bytes of each. The sides come and go by
/// themselves.
struct alignas(128) MlaRawKeys {
    using Box = uint8_t[kMlaQuarter][kSwizzleBytes];

    Box latents[2][kMlaSideBoxes / 2];
    Box rotated;
    float scales[2][32];  // of a side, for each lane: of its key's 128 latents of one box; where keys have scales
};

/// What lies before the tiles. The last raw keys are tiles by the time that the first sums of rows are there.
template <LatentFormat kFormat>
struct MlaDecodeStaging {
    union {
        SoftmaxPart rows[kMlaTileRows];
        MlaRawKeys raw[kMlaLoadWarps];
    };
};
template <>
struct MlaDecodeStaging<LatentFormat::kPlain> {
    SoftmaxPart rows[kMlaTileRows];
};

template <int kRightStages>
struct MlaDecodeTiles {
    alignas(kSwizzleAtomBytes) uint8_t left[kMlaLeftStages][kMlaSideBoxes][kMlaBoxBytes];
    alignas(kSwizzleAtomBytes) uint8_t right[kRightStages][kMlaSideBoxes + 1][kMlaBoxBytes];  // and rotated channels
    alignas(kSwizzleAtomBytes) uint8_t q[kMlaSideBoxes + 1][kMlaBoxBytes];  // of the right channels, and rotated ones

    /// The left channels of the queries, on their way to registers.
    DSO_DEVICE uint8_t* q_left(int box) { return right[kRightStages - 1][box]; }
    /// A tile's probabilities take the place of its rotated channels.
    DSO_DEVICE uint8_t* probabilities(uint32_t stage) { return right[stage][kMlaSideBoxes]; }
};

template <typename Types>
struct MlaDecodeShared : MlaDecodeStaging<Types::kFormat> {
    union {
        MlaDecodeTiles<Types::kRightStages> tiles;
        // When all products are there: what a warp stores, 16 rows by 256 columns; or what it lets the cluster read.
        uint8_t panels[2 * kMlaRowWarps][kMlaSideBoxes][16 * kSwizzleBytes];
        MlaDecodeSums<kMlaTileRows> sums;
    };
    float correction[Types::kRightStages][kMlaTileRows];
    uint64_t exists[Types::kRightStages];  // a bit for each key of a tile
    alignas(8) Pipeline<kMlaLeftStages> left;
    Pipeline<Types::kRightStages> right;
    uint64_t p_full[Types::kRightStages], scored[Types::kRightStages], q_taken, rows_full;
    uint64_t raw_full[kMlaLoadWarps][2];  // of an FP8 cache: a loading warp's bytes of a side are there
    bool is_last;
};

/// Where a tile lies.
template <typename Types>
struct MlaRing {
    PipelineState<kMlaLeftStages> left;
    PipelineState<Types::kRightStages> right;

    DSO_DEVICE void advance() {
        left.advance();
        right.advance();
    }
};

/// The keys of a tile as the lanes of a warp know them: lane i has keys i and i + 32.
struct MlaTileKeys {
    int page[2], row[2];

    DSO_DEVICE MlaTileKeys(const MlaDecodeArguments& arguments, const int32_t* table, int tile, int num_keys,
                           int lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const MlaKey key(arguments, table, tile * kMlaTile + 32 * half + lane, num_keys);
            page[half] = key.page;
            row[half] = key.row;
        }
    }

    /// When the length is known: the page of a key that does not exist becomes -1. Returns a bit for each that does.
    DSO_DEVICE uint64_t hide(const MlaDecodeArguments& arguments, int num_keys, int tile, int lane) {
        uint32_t exists[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool is_seen = tile * kMlaTile + 32 * half + lane < num_keys;
            if (!is_seen || page[half] < 0 || page[half] >= arguments.num_pages) page[half] = -1;
            exists[half] = __ballot_sync(0xFFFFFFFF, page[half] >= 0);
        }
        return uint64_t{exists[1]} << 32 | exists[0];
    }
};

/// A loading warp's share of a tile: one box of 64 channels of each side, and the first warp has the rotated ones.
template <typename Types>
class MlaDecodeLoader {
  public:
    DSO_DEVICE MlaDecodeLoader(MlaDecodeShared<Types>& shared, const TensorMap* map,
                               const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int share, int warp)
        : shared_(shared),
          map_(map),
          arguments_(arguments),
          table_(arguments.block_table + rows.request * arguments.table_stride),
          warp_(warp),
          lane_(threadIdx.x % 32),
          first_(arguments, table_, share, room_of(arguments, rows), lane_) {}

    DSO_DEVICE void run(const MlaDecodeKeys& range) const {
        MlaTileKeys keys = first_;
        MlaRing<Types> state;
        for (int tile = range.first_tile; tile < range.end_tile; tile += range.tile_step, state.advance()) {
            if (state.right.stage == Types::kRightStages - 1) ptx::mbarrier_wait(&shared_.q_taken, 0);
            // Before the ring has room:
            if (tile != range.first_tile) keys = MlaTileKeys(arguments_, table_, tile, range.some_see, lane_);
            const uint64_t exists = keys.hide(arguments_, range.some_see, tile, lane_);
            const bool by_tma = range.comes_by_tma(arguments_, tile);

            shared_.right.acquire(state.right);
            uint64_t* full = &shared_.right.full[state.right.stage];
            if (warp_ == 0 && lane_ == 0) {
                shared_.exists[state.right.stage] = exists;
                ptx::mbarrier_arrive(full);
            }
            auto& right = shared_.tiles.right[state.right.stage];
            if (by_tma) {
                expect(full, warp_ == 0 ? 2 : 1);
                load(keys, full, right[warp_], kMlaSideBoxes + warp_);
                if (warp_ == 0) load(keys, full, right[kMlaSideBoxes], kMlaBoxes - 1);
            } else {
                gather<kMlaSideBoxes + 1>(keys, full, right[0], kMlaSideBoxes);
            }

            shared_.left.acquire(state.left);
            full = &shared_.left.full[state.left.stage];
            auto& left = shared_.tiles.left[state.left.stage];
            if (by_tma) {
                expect(full, 1);
                load(keys, full, left[warp_], warp_);
            } else {
                gather<kMlaSideBoxes>(keys, full, left[0], 0);
            }
        }
    }

  private:
    /// The warp's arrivals, for so many boxes of TMA.
    DSO_DEVICE void expect(uint64_t* full, int num_boxes) const {
        if (lane_ == 0) {
            ptx::mbarrier_arrive_expect_tx(full, num_boxes * kMlaBoxBytes);
            ptx::mbarrier_arrive_times(full, 31);
        }
        __syncwarp();
    }

    /// All keys' channels `64 * box` onward; each lane starts the copy of one page's rows.
    DSO_DEVICE void load(const MlaTileKeys& keys, uint64_t* full, uint8_t* destination, int box) const {
        const int first = lane_ * arguments_.box_rows % kMlaTile;
        const int page = held_by(keys.page, first), row = held_by(keys.row, first);
        if (lane_ * arguments_.box_rows < kMlaTile)
            ptx::tma_load_3d(destination + first * kSwizzleBytes, map_, full, box * 64, row, page);
    }

    DSO_DEVICE static int held_by(const int (&x)[2], int key) {
        const int low = __shfl_sync(0xFFFFFFFF, x[0], key % 32), high = __shfl_sync(0xFFFFFFFF, x[1], key % 32);
        return key < 32 ? low : high;
    }

    /// The warp's quarter of the keys, channels `64 * first_box` onward. Eight lanes copy 128 bytes of a key.
    template <int kNumBoxes>
    DSO_DEVICE void gather(const MlaTileKeys& keys, uint64_t* full, uint8_t* destination, int first_box) const {
        const int chunk = lane_ % 8;
        const auto* channels =
            static_cast<const uint8_t*>(arguments_.kv_cache) + first_box * kSwizzleBytes + chunk * 16;
#pragma unroll 1
        for (int i = 0; i < kMlaQuarter; i += 4) {
            const int key = warp_ * kMlaQuarter + i + lane_ / 8;
            const int page = held_by(keys.page, key), row = held_by(keys.row, key);
            const bool is_there = page >= 0;
            const int64_t offset = is_there ? page * arguments_.page_stride + row * arguments_.key_stride : 0;
#pragma unroll
            for (int box = 0; box < kNumBoxes; ++box)
                ptx::cp_async_16(destination + box * kMlaBoxBytes + swizzled_offset(key, chunk),
                                 channels + 2 * offset + box * kSwizzleBytes, is_there);
        }
        ptx::cp_async_mbarrier_arrive(full);
    }

    MlaDecodeShared<Types>& shared_;
    const TensorMap* map_;
    const MlaDecodeArguments& arguments_;
    const int32_t* table_;
    const int warp_, lane_;
    const MlaTileKeys first_;  // of the first tile
};

/// A loading warp's share of the tiles of an FP8 cache: a quarter of the keys, all the way from the cache to the tile,
/// so that no other warp is waited for. While one side is converted, the other is on its way, and so is the next tile's
/// as soon as there is room. Keys that all exist and are rows of one page come by TMA, others 16 bytes at a time.
template <typename Types>
class MlaFp8Loader {
  public:
    DSO_DEVICE MlaFp8Loader(MlaDecodeShared<Types>& shared, const TensorMap* map, const MlaDecodeArguments& arguments,
                            const MlaDecodeRows& rows, int share, int warp)
        : shared_(shared),
          map_(map),
          arguments_(arguments),
          table_(arguments.block_table + rows.request * arguments.table_stride),
          warp_(warp),
          lane_(threadIdx.x % 32),
          first_(find(share, room_of(arguments, rows))) {}

    DSO_DEVICE void run(const MlaDecodeKeys& range) const {
        if (range.first_tile >= range.end_tile) return;
        MlaKey key = first_;
        if (key_of(range.first_tile) >= range.some_see) key.page = -1;
        bool exists = key.place(arguments_) >= 0;
        request<0>(key);
        request<1>(key);
        uint32_t raw_phase = 0;
        MlaRing<Types> state;
        for (int tile = range.first_tile; tile < range.end_tile; tile += range.tile_step, state.advance()) {
            const int next = tile + range.tile_step;
            const bool has_next = next < range.end_tile;
            if (has_next) key = find(next, range.some_see);  // long before it is needed

            // The left product is through long before the right one, and scores begin with the left.
            ptx::mbarrier_wait(&shared_.raw_full[warp_][0], raw_phase);
            float scale = scale_of<0>();
            shared_.left.acquire(state.left);
            convert<0>(scale, shared_.tiles.left[state.left.stage]);
            finish(&shared_.left.full[state.left.stage]);
            if (has_next) request<0>(key);

            ptx::mbarrier_wait(&shared_.raw_full[warp_][1], raw_phase);
            scale = scale_of<1>();
            if (state.right.stage == Types::kRightStages - 1) ptx::mbarrier_wait(&shared_.q_taken, 0);
            shared_.right.acquire(state.right);
            auto& right = shared_.tiles.right[state.right.stage];
            convert<1>(scale, right);
            convert_rotated(right[kMlaSideBoxes]);
            const uint32_t which = __ballot_sync(0xFFFFFFFF, exists);
            if (lane_ == 0)
                reinterpret_cast<uint16_t*>(&shared_.exists[state.right.stage])[warp_] = static_cast<uint16_t>(which);
            finish(&shared_.right.full[state.right.stage]);
            if (has_next) {
                request<1>(key);
                exists = key.place(arguments_) >= 0;
            }
            raw_phase ^= 1;
        }
    }

  private:
    static constexpr bool kHasScales = Types::kFormat == LatentFormat::kFp8Blocks;
    static constexpr int kRotated = kHasScales ? kFp8RowKey : kMlaValueDim;  // the byte of a row where they begin
    static constexpr int kSideLatents = kMlaValueDim / 2;

    /// Key `lane % 16` of the warp's.
    DSO_DEVICE int key_of(int tile) const { return tile * kMlaTile + warp_ * kMlaQuarter + lane_ % kMlaQuarter; }
    DSO_DEVICE MlaKey find(int tile, int num_keys) const { return MlaKey(arguments_, table_, key_of(tile), num_keys); }

    /// Starts the copies of a side of the warp's keys: 0 is left, 1 right and the rotated channels. What does not exist
    /// is zeros.
    template <int kSide>
    DSO_DEVICE void request(const MlaKey& key) const {
        auto& raw = shared_.raw[warp_];
        uint64_t* full = &shared_.raw_full[warp_][kSide];
        const int64_t place = key.place(arguments_);
        if (arguments_.box_rows != 0 && __all_sync(0xFFFFFFFF, place >= 0)) {
            const int row = __shfl_sync(0xFFFFFFFF, key.row, 0), page = __shfl_sync(0xFFFFFFFF, key.page, 0);
            if (ptx::elect_one()) {
                constexpr int kBoxes = kMlaSideBoxes / 2 + kSide;
                ptx::mbarrier_arrive_expect_tx(full, kBoxes * sizeof(MlaRawKeys::Box));
                for (int box = 0; box < kMlaSideBoxes / 2; ++box)
                    ptx::tma_load_3d(raw.latents[kSide][box], map_, full, kSide * kSideLatents + box * kSwizzleBytes,
                                     row, page);
                if (kSide == 1) ptx::tma_load_3d(raw.rotated, map_, full, kRotated, row, page);
            }
            __syncwarp();
        } else {
            if (lane_ == 0) ptx::mbarrier_arrive(full);
            for (int box = 0; box < kMlaSideBoxes / 2; ++box)
                gather<kSwizzleBytes>(raw.latents[kSide][box], kSide * kSideLatents + box * kSwizzleBytes, place);
            if (kSide == 1) gather<kHasScales ? 128 : 64>(raw.rotated, kRotated, place);
        }
        if constexpr (kHasScales) {
            const int block = 2 * kSide + lane_ / kMlaQuarter;
            ptx::cp_async_4(&raw.scales[kSide][lane_], source(place) + kFp8RowScales + 4 * block, place >= 0);
        }
        ptx::cp_async_mbarrier_arrive(full);
    }

    /// `kBytes` of each key from its byte `first` onward.
    template <int kBytes>
    DSO_DEVICE void gather(MlaRawKeys::Box& to, int first, int64_t place) const {
        constexpr int kLanes = kBytes / 16, kKeys = 32 / kLanes;  // of a key, at a time
        const int chunk = lane_ % kLanes * 16;
#pragma unroll 1
        for (int i = 0; i < kMlaQuarter; i += kKeys) {
            const int key = i + lane_ / kLanes;
            const int64_t from = __shfl_sync(0xFFFFFFFF, place, key);
            ptx::cp_async_16(to[key] + chunk, source(from) + first + chunk, from >= 0);
        }
    }

    DSO_DEVICE const uint8_t* source(int64_t place) const {
        return static_cast<const uint8_t*>(arguments_.kv_cache) + (place >= 0 ? place : 0);
    }

    /// The scale of one key's 128 latents of a side; a lane hands it round.
    template <int kSide>
    DSO_DEVICE float scale_of() const {
        return kHasScales ? shared_.raw[warp_].scales[kSide][lane_] : 1.f;
    }

    template <int kSide>
    DSO_DEVICE void convert(float scale, uint8_t (*boxes)[kMlaBoxBytes]) const {
        if (!kHasScales || __all_sync(0xFFFFFFFF, scale >= kLeastNormalF16)) {
            convert<kSide, 1>(scale, boxes);
        } else {
            convert<kSide, kSmallScaleUnits>(scale, boxes);
        }
    }

    /// Latents of a side; a lane has eight channels of every key. All are read before any is converted.
    template <int kSide, int kUnits>
    DSO_DEVICE void convert(float scale, uint8_t (*boxes)[kMlaBoxBytes]) const {
        const auto& raw = shared_.raw[warp_];
        const uint32_t to = chunk_of(boxes[lane_ / 8]), own_scale = scale_to_f16x2<kUnits>(scale);
        uint2 latents[kMlaQuarter];
#pragma unroll
        for (int key = 0; key < kMlaQuarter; ++key)
            latents[key] = *reinterpret_cast<const uint2*>(raw.latents[kSide][lane_ / 16][key] + lane_ % 16 * 8);
#pragma unroll
        for (int i = 0; i < kMlaQuarter; ++i) {
            const int key = i / 2 + i % 2 * (kMlaQuarter / 2);  // the swizzle treats those eight apart alike
            uint4 values = e4m3_to_f16(latents[key]);
            if constexpr (kHasScales)
                values = multiply_by_scale<kUnits>(values, __shfl_sync(0xFFFFFFFF, own_scale, key, kMlaQuarter));
            store(to, key, values);
        }
    }

    DSO_DEVICE void convert_rotated(uint8_t* box) const {
        const uint32_t to = chunk_of(box + lane_ / 8 * kSwizzleBytes) ^ lane_ / 8 * 16;
        using Eight = std::conditional_t<kHasScales, uint4, uint2>;  // channels, as the cache has them
        const auto& rotated = shared_.raw[warp_].rotated;
#pragma unroll
        for (int i = 0; i < kMlaQuarter; i += 4) {
            const auto channels = reinterpret_cast<const Eight*>(rotated[i + lane_ / 8])[lane_ % 8];
            if constexpr (kHasScales) {
                store(to, i, bf16_to_f16(channels));
            } else {
                store(to, i, e4m3_to_f16(channels));
            }
        }
    }

    /// Where the lane's chunk of the warp's first key lies in shared memory, from its start, if `box` is the tile's.
    DSO_DEVICE uint32_t chunk_of(const uint8_t* box) const {
        const auto offset = static_cast<uint32_t>(box - reinterpret_cast<const uint8_t*>(&shared_));
        return offset + warp_ * kMlaQuarter * kSwizzleBytes + lane_ % 8 * 16;
    }

    /// The chunk of the warp's key `i`, `swizzled_offset` in one instruction: the swizzle turns over bits of the place.
    DSO_DEVICE void store(uint32_t first, int i, uint4 values) const {
        *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(&shared_) + (first ^ i % 8 * 16) + i * kSwizzleBytes) =
            values;
    }

    /// The warp's part of a side of a tile is written, and the raw keys are read.
    DSO_DEVICE void finish(uint64_t* full) const {
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(full);
    }

    MlaDecodeShared<Types>& shared_;
    const TensorMap* map_;
    const MlaDecodeArguments& arguments_;
    const int32_t* table_;
    const int warp_, lane_;
    const MlaKey first_;  // of the first tile
};

/// The rows of q to shared memory, by the computing threads, six of them a row; zeros where there are none.
template <typename Types>
DSO_DEVICE void load_queries(MlaDecodeShared<Types>& shared, const MlaDecodeArguments& arguments,
                             const MlaDecodeRows& rows) {
    constexpr int kThreadsOfRow = kMlaMathThreads / kMlaTileRows, kChunks = kMlaKeyDim / 8 / kThreadsOfRow;
    const int row = threadIdx.x / kThreadsOfRow, first_chunk = threadIdx.x % kThreadsOfRow;
    uint4 values[kChunks] = {};
    if (row < rows.num_rows) {
        const auto* q = static_cast<const uint16_t*>(arguments.q) +
                        rows.offset(arguments, row, arguments.q_stride_b, arguments.q_stride_s, arguments.q_stride_h);
#pragma unroll
        for (int i = 0; i < kChunks; ++i)
            values[i] = reinterpret_cast<const uint4*>(q)[first_chunk + i * kThreadsOfRow];
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
        if constexpr (Types::kOperand != Types::kQuery) values[i] = bf16_to_f16(values[i]);
        const int chunk = first_chunk + i * kThreadsOfRow, box = chunk / 8;
        uint8_t* tile = box < kMlaSideBoxes ? shared.tiles.q_left(box) : shared.tiles.q[box - kMlaSideBoxes];
        *reinterpret_cast<uint4*>(tile + swizzled_offset(row, chunk % 8)) = values[i];
    }
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_sync(2, kMlaMathThreads);
}

// ------------------------------------------------------------------------------------------------------- math

/// Warpgroup 0: scores and softmax.
template <typename Types>
class MlaDecodeScores {
  public:
    DSO_DEVICE MlaDecodeScores(MlaDecodeShared<Types>& shared, const MlaDecodeArguments& arguments,
                               const MlaDecodeRows& rows, const MlaDecodeKeys& keys, int warp)
        : shared_(shared),
          scale_log2_(arguments.scale_log2),
          first_tile_(keys.first_tile),
          tile_step_(keys.tile_step),
          num_tiles_(keys.num_tiles),
          num_tiles_by_tma_(keys.num_tiles_by_tma(arguments)),
          all_see_(keys.all_see),
          differ_(keys.all_see < keys.some_see),
          warp_(warp),
          lane_(threadIdx.x % 32) {
#pragma unroll
        for (int i = 0; i < 2; ++i) visible_[i] = keys.visible(arguments, rows, row(i));
    }

    /// Leaves what lse needs in `shared.rows`.
    DSO_DEVICE void run() {
        take_queries();
        if (num_tiles_ > 0) compute();
        rows_.finish();
        if (lane_ % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                SoftmaxPart& part = shared_.rows[row(i)];
                part.base = rows_.sum[i] == 0.f ? kMinusInfinity : rows_.base(i, scale_log2_);
                part.sum = rows_.sum[i];
            }
            ptx::mbarrier_arrive(&shared_.rows_full);
        }
    }

  private:
    using Ring = MlaRing<Types>;
    static constexpr ptx::HalfType kType = Types::kOperand;
    using Wgmma = ptx::WgmmaHalf<kType, 64>;

    DSO_DEVICE int row(int i) const { return warp_ * 16 + lane_ / 4 + 8 * i; }

    DSO_DEVICE void take_queries() {
#pragma unroll
        for (int i = 0; i < kMlaSideBoxes * 4; ++i) {
            const uint32_t offset = swizzled_offset(warp_ * 16 + lane_ % 16, i % 4 * 2 + lane_ / 16);
            ptx::ldmatrix_x4(q_[i], shared_.tiles.q_left(i / 4) + offset);
        }
        ptx::fence_proxy_async_shared();  // these reads before TMA's writes
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(&shared_.q_taken);
    }

    /// A tile's 36 products of 16 channels, in the order in which its sides come, to be started by and by.
    class Products {
      public:
        DSO_DEVICE Products(MlaDecodeScores& of, float (&scores)[32], int i, const Ring& state)
            : of_(of),
              scores_(scores),
              state_(state),
              needs_fence_(!Types::kIsFp8 && i >= of.num_tiles_by_tma_),  // warps that convert have done it themselves
              // 20 descriptors of q, the same for every tile: not to be kept in registers.
              q_(wgmma_descriptor(of.shared_.tiles.q[0] + ptx::compute_here(0))),
              left_(wgmma_descriptor(of.shared_.tiles.left[state.left.stage])),
              right_(wgmma_descriptor(of.shared_.tiles.right[state.right.stage])) {}

        /// Those from number `first` up to `end`, which must be constants to the compiler.
        DSO_DEVICE void start(int first, int end) {
#pragma unroll
            for (int j = first; j < end; ++j) {
                if (j == 0 || j == kFirstSide) enter(kLeftIsFirst == (j == 0));
                if (j == 0) {
                    ptx::keep_in_order(scores_);
                    ptx::wgmma_fence();
                }
                const int of_side = j < kFirstSide ? j : j - kFirstSide;
                if (kLeftIsFirst == (j < kFirstSide)) {
                    multiply_left(of_side, j != 0);
                } else {
                    multiply_right(of_side, j != 0);
                }
            }
        }

        /// Those from number `first` on, and waits for the scores.
        DSO_DEVICE void finish(int first) {
            start(first, kCount);
            ptx::wgmma_commit();
            ptx::keep_in_order(scores_);
            ptx::wgmma_wait<0>();
            ptx::keep_in_order(scores_);
            if (of_.lane_ == 0) ptx::mbarrier_arrive(&of_.shared_.scored[state_.right.stage]);
        }

      private:
        static constexpr int kLeft = 4 * kMlaSideBoxes, kRight = kLeft + 4, kCount = kLeft + kRight;
        // TMA loads the right side first, for it is free first; warps that convert do the left one first.
        static constexpr bool kLeftIsFirst = Types::kIsFp8;
        static constexpr int kFirstSide = kLeftIsFirst ? kLeft : kRight;

        DSO_DEVICE void enter(bool left) {
            if (left) {
                of_.shared_.left.wait(state_.left);
            } else {
                of_.shared_.right.wait(state_.right);
            }
            if (needs_fence_) ptx::fence_proxy_async_shared();
        }

        DSO_DEVICE void multiply_left(int j, bool adds) {
            Wgmma::mma_registers(scores_, of_.q_[j], advance_descriptor(left_, offset_of(j)), adds);
        }
        DSO_DEVICE void multiply_right(int j, bool adds) {
            Wgmma::mma(scores_, advance_descriptor(q_, offset_of(j)), advance_descriptor(right_, offset_of(j)), adds);
        }
        /// Of 16 channels in the boxes of a side.
        DSO_DEVICE static uint32_t offset_of(int j) { return j / 4 * kMlaBoxBytes + j % 4 * 32; }

        MlaDecodeScores& of_;
        float (&scores_)[32];
        const Ring state_;
        const bool needs_fence_;
        const uint64_t q_, left_, right_;
    };

    DSO_DEVICE void compute() {
        float scores[32];
        Ring state;
        if constexpr (Types::kIsFp8) {
            // The next tile is waited for, and gets its room from this one's probabilities.
            for (int i = 0; i < num_tiles_; ++i, state.advance()) {
                Products(*this, scores, i, state).finish(0);
                mask(scores, i, state);
                send_probabilities(scores, state, [](int) {});
            }
        } else {
            // The next tile's scores under this one's softmax. A warp that starts a product waits while the tensor core
            // is behind, so a few at a time: enough that it has work, and the probabilities are not late.
            Products(*this, scores, 0, state).finish(0);
            for (int i = 0; i + 1 < num_tiles_; ++i) {
                float next_scores[32];
                Ring next = state;
                next.advance();
                mask(scores, i, state);
                Products products(*this, next_scores, i + 1, next);
                ptx::keep_in_order(scores);
                products.start(0, 2);
                send_probabilities(scores, state, [&products](int k) { products.start(2 + k, 3 + k); });
                products.finish(2 + SoftmaxRows::kCallsBetween);
#pragma unroll
                for (int j = 0; j < 32; ++j) scores[j] = next_scores[j];
                state = next;
            }
            mask(scores, num_tiles_ - 1, state);
            send_probabilities(scores, state, [](int) {});
        }
    }

    /// Turns scores into probabilities, for the values' warpgroups.
    template <typename Between>
    DSO_DEVICE void send_probabilities(float (&scores)[32], const Ring& state, const Between& between) {
        float correction[2];
        rows_.add_tile(scores, scale_log2_, correction, between);
        send(scores, correction, state);
    }

    /// Scores of keys that a row does not see become -inf.
    DSO_DEVICE void mask(float (&scores)[32], int i, const Ring& state) {
        const int first_key = (first_tile_ + i * tile_step_) * kMlaTile;
        const uint64_t exists = shared_.exists[state.right.stage];
        const bool all_see_all = first_key <= all_see_ - kMlaTile;
        if (exists == ~uint64_t{0} && all_see_all) return;
        const uint64_t seen[2] = {seen_by(0, exists, first_key), seen_by(1, exists, first_key)};
        if (!all_see_all && differ_) remove_poison(scores, seen, state);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            if (!sees(seen, i)) scores[i] = kMinusInfinity;
        }
    }

    /// The key within the tile that a lane's element belongs to, after that of its first.
    DSO_DEVICE static constexpr int key_of(int element) { return element / 4 * 8 + element % 2; }

    /// A bit for each key, from the lane's first one on, that exists and that row `i` sees.
    DSO_DEVICE uint64_t seen_by(int i, uint64_t exists, int first_key) const {
        const int count = visible_[i] - first_key;
        const uint64_t before = count >= kMlaTile ? ~uint64_t{0} : count > 0 ? (uint64_t{1} << count) - 1 : 0;
        return (exists & before) >> (lane_ % 4 * 2);
    }

    DSO_DEVICE static bool sees(const uint64_t (&seen)[2], int element) {
        return seen[element / 2 % 2] >> key_of(element) & 1;
    }

    /// A key that some rows see and others do not may hold NaN, and 0 * NaN is NaN: its value is cleared. The rows that
    /// see it have a NaN score by then, or an infinite one.
    DSO_DEVICE void remove_poison(const float (&scores)[32], const uint64_t (&seen)[2], const Ring& state) {
        ptx::named_barrier_sync(1, 128);  // all warps have their scores
        uint32_t poisoned = 0;            // a bit for each element
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const bool is_finite = fabsf(scores[i]) < -kMinusInfinity;
            poisoned |= uint32_t{!is_finite && !sees(seen, i)} << i;
        }
        for (; poisoned != 0; poisoned &= poisoned - 1) {
            const int key = lane_ % 4 * 2 + key_of(__ffs(static_cast<int>(poisoned)) - 1);
            for (int chunk = 0; chunk < kMlaValueDim / 8; ++chunk) {
                const int box = chunk / 8;
                uint8_t* tile = box < kMlaSideBoxes ? shared_.tiles.left[state.left.stage][box]
                                                    : shared_.tiles.right[state.right.stage][box - kMlaSideBoxes];
                uint8_t* row = tile + key * kSwizzleBytes;
                *reinterpret_cast<uint4*>(row + chunk % 8 * 16) = uint4{};
            }
        }
    }

    DSO_DEVICE void send(const float (&scores)[32], const float (&correction)[2], const Ring& state) {
        // When all warps have their scores the rotated channels are not needed any more.
        ptx::mbarrier_wait(&shared_.scored[state.right.stage], state.right.phase);
        uint8_t* tile = shared_.tiles.probabilities(state.right.stage);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float* x = &scores[8 * k];
            ptx::stmatrix_x4(tile + swizzled_offset(warp_ * 16 + lane_ % 16, 2 * k + lane_ / 16),
                             pack_half<kType>(x[0], x[1]), pack_half<kType>(x[2], x[3]), pack_half<kType>(x[4], x[5]),
                             pack_half<kType>(x[6], x[7]));
        }
        if (lane_ % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) shared_.correction[state.right.stage][row(i)] = correction[i];
        }
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (lane_ % 4 == 0) ptx::mbarrier_arrive(&shared_.p_full[state.right.stage]);  // each for its corrections
    }

    MlaDecodeShared<Types>& shared_;
    const float scale_log2_;
    const int first_tile_, tile_step_, num_tiles_, num_tiles_by_tma_;
    const int all_see_;
    const bool differ_;  // some rows see fewer keys than others
    const int warp_, lane_;
    uint32_t q_[kMlaSideBoxes * 4][4];  // the left channels
    int visible_[2];
    SoftmaxRows rows_;
};

/// The sum of half a row of p.
template <ptx::HalfType type>
DSO_DEVICE float sum_probabilities(const uint8_t* p, int row, int half) {
    float sum = 0.f;
#pragma unroll 1  // there are few registers beside the sums
    for (int chunk = 0; chunk < 4; ++chunk) {
        const auto pairs = *reinterpret_cast<const uint4*>(p + swizzled_offset(row, 4 * half + chunk));
        for (const uint32_t pair : {pairs.x, pairs.y, pairs.z, pairs.w}) {
            const float2 x = unpack_half<type>(pair);
            sum += x.x + x.y;
        }
    }
    return sum;
}

/// The sums of a values' warpgroup, 64 x 256, by halves of the columns: a launch of 512 threads has 128 registers for
/// each at first, too few for an instruction of 256 columns.
using MlaValueSums = float[2][64];

/// Warpgroups 1 and 2: `sums` = p @ v, of the left columns or the right ones. The right one adds up the
/// probabilities, too, and leaves their sums in `shared.rows`.
template <typename Types, bool kIsRight>
DSO_DEVICE void compute_values(MlaDecodeShared<Types>& shared, int num_tiles, int num_tiles_by_tma,
                               MlaValueSums& sums) {
    const int thread = threadIdx.x % 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
    float row_sum = 0.f;  // of half of row thread / 2
    for (auto& half : sums)
        for (float& x : half) x = 0.f;
    MlaRing<Types> state;
    for (int i = 0; i < num_tiles; ++i) {
        ptx::mbarrier_wait(&shared.p_full[state.right.stage], state.right.phase);
        const float* correction = shared.correction[state.right.stage];
        const uint8_t* p = shared.tiles.probabilities(state.right.stage);
        MlaRing<Types> next = state;
        next.advance();
        for (auto& half : sums) scale_rows(half, correction[row], correction[row + 8]);
        if constexpr (kIsRight) {
            row_sum = row_sum * correction[thread / 2] + sum_probabilities<Types::kOperand>(p, thread / 2, thread % 2);
            if (i + 1 < num_tiles) ptx::mbarrier_wait(&shared.scored[next.right.stage], next.right.phase);
        }
        // Full long since, but it orders these reads after TMA's writes.
        const uint8_t* values;
        if constexpr (kIsRight) {
            shared.right.wait(state.right);
            values = shared.tiles.right[state.right.stage][0];
        } else {
            shared.left.wait(state.left);
            values = shared.tiles.left[state.left.stage][0];
        }
        if (!Types::kIsFp8 && i >= num_tiles_by_tma) ptx::fence_proxy_async_shared();
        const uint64_t a = wgmma_descriptor(p);
        const uint64_t v = wgmma_transposed_descriptor(values, kMlaBoxBytes);
        for (auto& half : sums) ptx::keep_in_order(half);
        ptx::wgmma_fence();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                ptx::WgmmaHalf<Types::kOperand, 128>::mma_transposed(
                    sums[half], advance_descriptor(a, 32 * k),
                    advance_descriptor(v, half * 2 * kMlaBoxBytes + k * 16 * kSwizzleBytes), true);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        for (auto& half : sums) ptx::keep_in_order(half);
        __syncwarp();  // every lane has read its corrections
        if (lane == 0) {
            if (!kIsRight) shared.left.release(state.left);
            shared.right.release(state.right);
        }
        state = next;
    }
    if constexpr (kIsRight) {
        row_sum += __shfl_xor_sync(0xFFFFFFFF, row_sum, 1);
        if (thread % 2 == 0) shared.rows[thread / 2].rounded_sum = row_sum;
    }
}

// --------------------------------------------------------------------------------------------------- epilogue

/// Of a CTA that has all keys: by the values' warps, `warp` the place among them, straight to the caller.
template <typename Types>
DSO_DEVICE void store_values(MlaDecodeShared<Types>& shared, const MlaDecodeArguments& arguments,
                             const MlaDecodeRows& rows, const MlaValueSums& sums, int warp) {
    const int lane = threadIdx.x % 32;
    const int side = warp / kMlaRowWarps, first_row = warp % kMlaRowWarps * 16;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + lane / 4 + 8 * i;
        const SoftmaxPart part = shared.rows[row];
        inverse[i] = inverse_of(part.rounded_sum) * arguments.value_scale;
        if (side == 0 && lane % 4 == 0 && row < rows.num_rows)
            store_lse(arguments, rows, row, log2_sum(part.base, part.sum));
    }
    // Through shared memory, so that a warp stores 512 neighbouring bytes at a time.
    auto& panels = shared.panels[warp];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const float* x = &sums[j / 8][j % 8 * 8];
        ptx::stmatrix_x4(panels[j / 4] + swizzled_offset(lane % 16, j % 4 * 2 + lane / 16),
                         pack_half<Types::kQuery>(x[0] * inverse[0], x[1] * inverse[0]),
                         pack_half<Types::kQuery>(x[2] * inverse[1], x[3] * inverse[1]),
                         pack_half<Types::kQuery>(x[4] * inverse[0], x[5] * inverse[0]),
                         pack_half<Types::kQuery>(x[6] * inverse[1], x[7] * inverse[1]));
    }
    __syncwarp();
    const int num_rows = min(16, rows.num_rows - first_row);
    for (int row = 0; row < num_rows; ++row) {
        *reinterpret_cast<uint4*>(out_of(arguments, rows, first_row + row) + side * 256 + lane * 8) =
            *reinterpret_cast<const uint4*>(panels[lane / 8] + swizzled_offset(row, lane % 8));
    }
}

/// Of a CTA that shares keys: by the values' warps likewise, as they lie in registers, for the cluster to read.
template <typename Types>
DSO_DEVICE void lay_out_values(MlaDecodeShared<Types>& shared, const MlaDecodeRows& rows, const MlaValueSums& sums,
                               int warp) {
    const int lane = threadIdx.x % 32;
    const int side = warp / kMlaRowWarps, row_warp = warp % kMlaRowWarps;
    if (row_warp * 16 >= rows.num_rows) return;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        const float* x = &sums[j / 16][j % 16 * 4];
        shared.sums.groups[32 * side + j][row_warp][lane] = {x[0], x[1], x[2], x[3]};
    }
}

// ----------------------------------------------------------------------------------------------------- kernel

template <typename Types>
__global__ void __launch_bounds__(kMlaThreads, 1)
    sm90_mla_decode_kernel(const __grid_constant__ TensorMap map_kv,
                           const __grid_constant__ MlaDecodeArguments arguments) {
    static_assert(sizeof(MlaDecodeShared<Types>) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<MlaDecodeShared<Types>>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
    const int cluster_size = static_cast<int>(ptx::cluster_size()), rank = static_cast<int>(ptx::cluster_rank());

    if (warp == kMlaMathWarps) {
        if (threadIdx.x % 32 == 0) {
            shared.left.init(Types::kLeftArrivals, 4);
            shared.right.init(Types::kRightArrivals, 8);
            if (arguments.box_rows != 0) ptx::prefetch_tensor_map(&map_kv);
            for (int stage = 0; stage < Types::kRightStages; ++stage) {
                ptx::mbarrier_init(&shared.p_full[stage], kMlaTileRows / 2);
                ptx::mbarrier_init(&shared.scored[stage], 4);
            }
            for (int i = 0; i < 2 * kMlaLoadWarps; ++i) ptx::mbarrier_init(&shared.raw_full[i / 2][i % 2], 33);
            ptx::mbarrier_init(&shared.q_taken, 4);
            ptx::mbarrier_init(&shared.rows_full, kMlaTileRows / 2);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
        ptx::named_barrier_arrive(0, kMlaThreads);  // it need not wait for the others
    } else {
        ptx::named_barrier_sync(0, kMlaThreads);
    }
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
    const MlaDecodeRows rows(arguments, kMlaTileRows);
    if (has_no_work(arguments, rows, cluster_size, rank)) return;
    if (warp >= kMlaMathWarps) {
        ptx::setmaxnreg_dec<Types::kLoadRegisters>();
        const int share = share_of(rows, cluster_size, rank), loader = warp - kMlaMathWarps;
        if constexpr (Types::kIsFp8) {
            const MlaFp8Loader<Types> load(shared, &map_kv, arguments, rows, share, loader);
            load.run(MlaDecodeKeys(arguments, rows, cluster_size, rank));
            ptx::setmaxnreg_dec<32>();  // for the scores' warpgroup
        } else {
            const MlaDecodeLoader<Types> load(shared, &map_kv, arguments, rows, share, loader);
            load.run(MlaDecodeKeys(arguments, rows, cluster_size, rank));
        }
        return;
    }
    if (threadIdx.x == 0 && arguments.num_parts > 1) open_counter(counter_of(arguments, rows, cluster_size, rank));
    load_queries(shared, arguments, rows);
    const MlaDecodeKeys keys(arguments, rows, cluster_size, rank);
    MlaValueSums sums;
    if (warp < 4) {
        if constexpr (!Types::kIsFp8) ptx::setmaxnreg_inc<160>();
        MlaDecodeScores<Types>(shared, arguments, rows, keys, warp).run();
        if constexpr (Types::kIsFp8) ptx::setmaxnreg_inc<160>();  // that the loading warps have left
    } else {
        ptx::setmaxnreg_inc<160>();
        const int num_tiles_by_tma = keys.num_tiles_by_tma(arguments);
        if (warp < 8) {
            compute_values<Types, false>(shared, keys.num_tiles, num_tiles_by_tma, sums);
        } else {
            compute_values<Types, true>(shared, keys.num_tiles, num_tiles_by_tma, sums);
        }
    }
    ptx::named_barrier_sync(2, kMlaMathThreads);  // shared.rows are there, and no product is running
    if (warp >= 4) {
        ptx::mbarrier_wait(&shared.rows_full, 0);
        const MlaDecodeRows rows_again(arguments, kMlaTileRows);
        if (is_alone(arguments)) {
            store_values(shared, arguments, rows_again, sums, warp - 4);
        } else {
            lay_out_values(shared, rows_again, sums, warp - 4);
        }
    }
    if (!is_alone(arguments)) MlaDecodeCombination<Types, MlaDecodeShared<Types>>(shared, arguments, warp).run();
}

}  // namespace dso
