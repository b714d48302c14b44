// MLA decoding over a paged cache:   out = softmax(scale * q @ k.T) @ k[:, :512]   for each request
//
//   q              [b, s_q, heads, 576]         bf16 or f16      16-byte loads into swizzled tiles
//   kv_cache       [num_pages, page_size, 576]  the same         TMA, 128-byte swizzle; or cp.async, 16 bytes at a time
//                  or rows of 512 e4m3 | 4 f32 scales | 64 bf16  cp.async, and from there converted to f16 tiles
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
// Split     The keys of a tile of rows are shared by the CTAs of a cluster, and by num_parts clusters. Each CTA of a
//           cluster adds up its share of the columns, reading the others' sums from their shared memory; the last
//           cluster of a tile of rows to come, column share by column share, adds up the parts. All in one order, so
//           the bits are the same on every run. With tiles_per_part, a request that has few tiles of keys has fewer
//           parts, as many as its own length says: then the bits do not depend on the batch.
// Ragged    A grid of as many tiles of rows as there can be; each CTA counts those of the requests up to its own, 32
//           requests at a time. The rows of no request are tiles that see no key. CTAs that are left over return.
// Roles     warpgroup 0: scores and softmax; the left 256 channels of its queries stay in registers.
//           warpgroup 1: columns 0 to 255 of the output ("left").   warpgroup 2: 256 to 511 ("right").
//           warpgroup 3: its four warps load.
//           The left product runs beside the next tile's scores and the right one beside that tile's softmax, for
//           which it waits until the scores are there: so the tensor core has work at all times.
// Barriers  left, right: the rings' full (the bytes of TMA, and one arrival of each loading thread; one more of right's
//           says that `exists` is written) and empty (one of each warp that multiplies from there).
//           p_full: a tile's probabilities and corrections are written.   scored: its scores are there.
//           q_taken: the queries have left the ring.   rows_full: what lse needs is there.
//           named 0: the barriers are initialised.   1: warpgroup 0.   2: all that compute.
// Shared    MlaDecodeShared below: keys in two rings, of their left 256 channels (2 x 32 KiB) and of the others (3 x 40
//           KiB; 2 x 40 of an FP8 cache, and 42 of one tile's bytes on their way), and 40 KiB of the queries. A tile's
//           probabilities take the place of its rotated channels, which only the scores need.
// FP8       Each loading warp converts a quarter of the keys, whose bytes it has asked for itself: the left side, then
//           the right one, each when its place is free, and scores begin with the left. The next tile's bytes of a side
//           are asked for as soon as this one's are converted. All products are float16.
// Numerics  Scores and sums in float32. Probabilities are rounded to the type of products for that with the values,
//           which is divided by the sum of the rounded ones; lse is that of the unrounded ones. The bits depend on how
//           many ways the keys are split.
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
#include "device/math.cuh"
#include "device/pipeline.cuh"
#include "device/segments.cuh"
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
inline constexpr int kMlaLeftStages = 2, kMlaMaxCluster = 8;
inline constexpr int kMlaMathWarps = 12, kMlaMathThreads = 32 * kMlaMathWarps, kMlaThreads = kMlaMathThreads + 128;
inline constexpr int kMlaLoadWarps = 4, kMlaQuarter = kMlaTile / kMlaLoadWarps;  // a loading warp's keys, if gathered
inline constexpr int kMlaGroups = kMlaValueDim / 8;  // of eight columns, as accumulators have them
inline constexpr int kMlaRowWarps = kMlaTile / 16;   // sixteenths of the rows, as the warps of a warpgroup have them

inline constexpr int kMlaPartialSums = kMlaGroups * kMlaRowWarps * 32;  // of a part, four at a time
inline constexpr int kMlaMaxParts = 192, kMlaLoadsAtOnce = 8;

/// What counts the parts that have come, in memory that nobody clears before: the upper bits say that it counts.
inline constexpr unsigned long long kMlaCounts = 0x5F8E'3C21'D7A4ull << 16;

/// What the kernel is compiled for.
template <ptx::HalfType query, LatentFormat format>
struct MlaDecodeTypes {
    static constexpr ptx::HalfType kQuery = query;  // and of the output
    static constexpr LatentFormat kFormat = format;
    static constexpr bool kIsFp8 = kFormat != LatentFormat::kPlain;                  // the cache
    static constexpr ptx::HalfType kOperand = kIsFp8 ? ptx::HalfType::kF16 : query;  // of products
    static constexpr int kRightStages = kIsFp8 ? 2 : 3;
    static constexpr int kLeftArrivals = kIsFp8 ? kMlaLoadWarps : 32 * kMlaLoadWarps;  // that make a stage full
    static constexpr int kRightArrivals = kIsFp8 ? kMlaLoadWarps : 32 * kMlaLoadWarps + 1;
};

/// A loading warp's keys of an FP8 cache as the cache has them. The sides come and go by themselves.
template <LatentFormat kFormat>
struct MlaRawKeys;
template <>
struct MlaRawKeys<LatentFormat::kFp8Blocks> {
    uint8_t latents[2][kMlaQuarter][kMlaValueDim / 2];
    float scales[32][2];  // of each lane's key and half of a side
    uint8_t rotated[kMlaQuarter][2 * (kMlaKeyDim - kMlaValueDim)];
};
template <>
struct MlaRawKeys<LatentFormat::kFp8> {
    uint8_t latents[2][kMlaQuarter][kMlaValueDim / 2];
    uint8_t rotated[kMlaQuarter][kMlaKeyDim - kMlaValueDim];
};

/// What lies before the tiles. The last raw keys are tiles by the time that the first sums of rows are there.
template <LatentFormat kFormat>
struct MlaDecodeStaging {
    union {
        SoftmaxPart rows[kMlaTile];
        MlaRawKeys<kFormat> raw[kMlaLoadWarps];
    };
};
template <>
struct MlaDecodeStaging<LatentFormat::kPlain> {
    SoftmaxPart rows[kMlaTile];
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

struct MlaDecodeSums {
    float4 groups[kMlaGroups][kMlaRowWarps][32];  // as the lanes of the warps have them, for the cluster to read
    float weights[kMlaMaxCluster][kMlaTile];      // of each CTA's, for the CTA that reads them
    float part_weights[kMlaMaxParts][kMlaTile];
};

template <typename Types>
struct MlaDecodeShared : MlaDecodeStaging<Types::kFormat> {
    union {
        MlaDecodeTiles<Types::kRightStages> tiles;
        // When all products are there: what a warp stores, 16 rows by 256 columns; or what it lets the cluster read.
        uint8_t panels[2 * kMlaRowWarps][kMlaSideBoxes][16 * kSwizzleBytes];
        MlaDecodeSums sums;
    };
    float correction[Types::kRightStages][kMlaTile];
    uint64_t exists[Types::kRightStages];  // a bit for each key of a tile
    alignas(8) Pipeline<kMlaLeftStages> left;
    Pipeline<Types::kRightStages> right;
    uint64_t p_full[Types::kRightStages], scored[Types::kRightStages], q_taken, rows_full;
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

/// The rows that a CTA has to do with, and which of the shares of their keys. Reads no length, so that the queries can
/// be asked for before it is there, and is had again where registers are few. By all lanes of a warp.
struct MlaDecodeRows {
    static constexpr int kNobody = -1;

    int unit;               // the tile of rows, of all requests
    int part;               // of the keys: the cluster's
    int request = kNobody;  // whose rows see no key
    int first_query = 0;    // of the request, where the queries of all are counted together
    int s_q = 0;            // of the request
    int first_row = 0;      // of the tile, among the request's
    int num_rows = 0;       // 0: there is no such tile

    DSO_DEVICE explicit MlaDecodeRows(const MlaDecodeArguments& arguments)
        : unit(static_cast<int>(ptx::cluster_index_x())), part(static_cast<int>(ptx::cta_index_y())) {
        if (arguments.cu_seqlens_q != nullptr) {
            find(arguments);
        } else {
            request = arguments.num_row_tiles > 1 ? unit / arguments.num_row_tiles : unit;
            s_q = arguments.s_q;
            take_tile(arguments, arguments.num_row_tiles > 1 ? unit % arguments.num_row_tiles : 0);
        }
    }

    DSO_DEVICE int query_of(const MlaDecodeArguments& arguments, int row) const {
        return (first_row + row) / arguments.num_heads;
    }
    DSO_DEVICE int head_of(const MlaDecodeArguments& arguments, int row) const {
        return (first_row + row) % arguments.num_heads;
    }
    /// Where a row of the tile lies in `q` or `out`, in elements.
    DSO_DEVICE int64_t offset(const MlaDecodeArguments& arguments, int row, int64_t stride_b, int64_t stride_s,
                              int64_t stride_h) const {
        const int64_t query = first_query + query_of(arguments, row);
        return (arguments.cu_seqlens_q ? 0 : request * stride_b) + query * stride_s +
               head_of(arguments, row) * stride_h;
    }

  private:
    DSO_DEVICE static int num_tiles_of(int rows) { return rows > 0 ? (rows - 1) / kMlaTile + 1 : 0; }

    DSO_DEVICE void take_tile(const MlaDecodeArguments& arguments, int tile) {
        first_row = tile * kMlaTile;
        num_rows = min(kMlaTile, s_q * arguments.num_heads - first_row);
    }

    /// The tiles of ragged queries are numbered request by request.
    DSO_DEVICE void find(const MlaDecodeArguments& arguments) {
        Segments queries(arguments.cu_seqlens_q, arguments.b, arguments.s_q);
        int num_counted = 0;
        for (int first = 0; first <= arguments.b + 1; first += 32) {
            queries.load(first + static_cast<int>(threadIdx.x % 32));
            const int tiles = scan_lanes(num_tiles_of((queries.end - queries.start) * arguments.num_heads),
                                         [](int x, int y) { return x + y; });
            const uint32_t beyond = __ballot_sync(0xFFFFFFFF, num_counted + tiles > unit);
            if (beyond != 0) {
                const int owner = __ffs(static_cast<int>(beyond)) - 1, segment = first + owner;
                request = segment >= 1 && segment <= arguments.b ? segment - 1 : kNobody;
                first_query = __shfl_sync(0xFFFFFFFF, queries.start, owner);
                s_q = __shfl_sync(0xFFFFFFFF, queries.end, owner) - first_query;
                const int past = num_counted + __shfl_sync(0xFFFFFFFF, tiles, owner) - unit;  // tiles from this one on
                take_tile(arguments, num_tiles_of(s_q * arguments.num_heads) - past);
                return;
            }
            num_counted += __shfl_sync(0xFFFFFFFF, tiles, 31);
        }
    }
};

/// The keys that those rows see, and the CTA's tiles of them.
struct MlaDecodeKeys {
    int length;             // of the request
    int some_see, all_see;  // keys that the last of the rows sees, and the first
    int first_tile, num_tiles;
    int num_whole_tiles;  // tiles before this one have all their keys, if their pages exist
    int num_parts;        // that the keys are shared by

    /// The keys are shared evenly: the first shares have one tile more than the others.
    DSO_DEVICE MlaDecodeKeys(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int cluster_size,
                             int rank) {
        length = rows.request == MlaDecodeRows::kNobody
                     ? 0
                     : max(0, min(arguments.cache_seqlens[rows.request], arguments.max_keys));
        some_see = visible(arguments, rows, rows.num_rows - 1);
        all_see = visible(arguments, rows, 0);
        num_whole_tiles = max(some_see, 0) / kMlaTile;
        const int total = ceil_div(max(some_see, 0), kMlaTile);
        num_parts = arguments.num_parts;
        if (arguments.tiles_per_part != 0)
            num_parts = max(1, min(num_parts, ceil_div(total, arguments.tiles_per_part)));
        const int share = rows.part * cluster_size + rank, num_shares = num_parts * cluster_size;
        const int each = total / num_shares, more = total % num_shares;
        first_tile = share * each + min(share, more);
        num_tiles = each + (share < more ? 1 : 0);
    }

    /// Keys that row `row` of the tile sees.
    DSO_DEVICE int visible(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int row) const {
        if (!arguments.is_causal) return length;
        return length - (rows.s_q - 1 - min(rows.query_of(arguments, row), rows.s_q - 1));
    }

    /// How many of the CTA's tiles come by TMA, before those that are gathered. Pages whose rows are none of the
    /// request's are not loaded whole.
    DSO_DEVICE int num_tiles_by_tma(const MlaDecodeArguments& arguments) const {
        return arguments.box_rows != 0 ? max(0, min(num_whole_tiles - first_tile, num_tiles)) : 0;
    }
};

/// Whether there is no such tile of rows, or no such part of its keys.
DSO_DEVICE bool has_no_work(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int cluster_size,
                            int rank) {
    if (rows.num_rows == 0) return true;
    return arguments.tiles_per_part != 0 && rows.part > 0 &&
           rows.part >= MlaDecodeKeys(arguments, rows, cluster_size, rank).num_parts;
}

/// Whether a CTA has all keys of its rows.
DSO_DEVICE bool is_alone(const MlaDecodeArguments& arguments) {
    return ptx::cluster_size() == 1 && arguments.num_parts == 1;
}

/// Two or eight elements of a row of the output, from `column` on.
template <typename Vector>
DSO_DEVICE void store_out(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int row, int column,
                          const Vector& values) {
    const int64_t offset =
        rows.offset(arguments, row, arguments.out_stride_b, arguments.out_stride_s, arguments.out_stride_h);
    *reinterpret_cast<Vector*>(static_cast<uint16_t*>(arguments.out) + offset + column) = values;
}

DSO_DEVICE void store_lse(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int row, float lse_log2) {
    const int64_t offset =
        rows.offset(arguments, row, int64_t{arguments.s_q} * arguments.num_heads, arguments.num_heads, 1);
    arguments.lse[offset] = lse_log2 * kLn2;
}

/// What counts the parts of the columns that are this CTA's in its cluster.
DSO_DEVICE unsigned long long* counter_of(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows,
                                          int cluster_size, int rank) {
    return arguments.counters + int64_t{rows.unit} * cluster_size + rank;
}

/// Every CTA does so long before it counts, and so it counts from zero whoever came first.
DSO_DEVICE void open_counter(unsigned long long* counter) {
    const unsigned long long old = __ldcg(counter);
    if (old >> 16 != kMlaCounts >> 16) atomicCAS(counter, old, kMlaCounts);
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

DSO_DEVICE MlaTileKeys find_keys(const MlaDecodeArguments& arguments, const int32_t* table, int num_keys, int tile,
                                 int lane) {
    MlaTileKeys keys;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int key = tile * kMlaTile + 32 * half + lane, column = key / arguments.page_size;
        const int page = key >= 0 && key < num_keys ? table[column] : -1;  // beyond 2^31 keys are none
        keys.page[half] = page < arguments.num_pages ? max(page, -1) : -1;
        keys.row[half] = key - column * arguments.page_size;
    }
    return keys;
}

/// Asks for the entries of the block table that this CTA begins with if the request is as long as it can be, while its
/// length is on its way.
DSO_DEVICE void prefetch_pages(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int cluster_size,
                               int rank) {
    const int share = rows.part * cluster_size + rank, num_shares = arguments.num_parts * cluster_size;
    const int first_key = arguments.max_keys / num_shares * share;
    if (arguments.max_keys > 0 && rows.request != MlaDecodeRows::kNobody)
        ptx::prefetch_line_to_l2(arguments.block_table + rows.request * arguments.table_stride +
                                 first_key / arguments.page_size);
}

/// A loading warp's share of a tile: one box of 64 channels of each side, and the first warp has the rotated ones.
template <typename Types>
class MlaDecodeLoader {
  public:
    DSO_DEVICE MlaDecodeLoader(MlaDecodeShared<Types>& shared, const TensorMap* map,
                               const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int warp)
        : shared_(shared),
          map_(map),
          arguments_(arguments),
          table_(arguments.block_table + rows.request * arguments.table_stride),
          warp_(warp),
          lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run(const MlaDecodeKeys& range) {
        const int num_tiles_by_tma = range.num_tiles_by_tma(arguments_);
        MlaRing<Types> state;
        for (int i = 0; i < range.num_tiles; ++i, state.advance()) {
            if (i == Types::kRightStages - 1) ptx::mbarrier_wait(&shared_.q_taken, 0);
            // Before the ring has room:
            const MlaTileKeys keys = find_keys(arguments_, table_, range.some_see, range.first_tile + i, lane_);
            const uint64_t exists = keys.exists();
            const bool by_tma = i < num_tiles_by_tma;

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
};

/// A scale as `dequantize` takes it: twice, times 2^8, so that those of small blocks are normal numbers. One whose
/// block may not fit counts as the largest that does.
DSO_DEVICE uint32_t scale_to_f16x2(float scale) {
    constexpr float kLargest = 146.125f;  // a float16 times 256, and 448 of it are one: 65504 / 448 would be rounded up
    const float factor = (scale > kLargest ? kLargest : scale) * 256.f;  // NaN stays NaN
    return ptx::pack_f16x2(factor, factor);
}

/// Eight e4m3 values in float16, which has them all.
DSO_DEVICE uint4 e4m3_to_f16(uint2 bytes) {
    uint4 pairs;
    ptx::unpack_e4m3x4(bytes.x, pairs.x, pairs.y);
    ptx::unpack_e4m3x4(bytes.y, pairs.z, pairs.w);
    return pairs;
}

/// Eight e4m3 values times a scale, in float16: the scale is rounded, and the product is.
DSO_DEVICE uint4 dequantize(uint2 bytes, uint32_t scale) {
    const uint4 exact = e4m3_to_f16(bytes);
    uint32_t pairs[4] = {exact.x, exact.y, exact.z, exact.w};
    constexpr uint32_t kInverse = 0x1C00'1C00;  // 2^-8, twice: exact, whatever the e4m3 value
#pragma unroll
    for (uint32_t& pair : pairs) pair = ptx::multiply_f16x2(ptx::multiply_f16x2(pair, kInverse), scale);
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

/// Eight bfloat16 values as float16, at most 65504.
DSO_DEVICE uint4 bf16_to_f16(uint4 values) {
    uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (uint32_t& pair : pairs) {
        const float2 x = unpack_half<ptx::HalfType::kBF16>(pair);
        pair = ptx::pack_f16x2_finite(x.x, x.y);
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

/// A loading warp's share of the tiles of an FP8 cache: a quarter of the keys, all the way from the cache to the tile,
/// so that no other warp is waited for. While one side is converted, the other is on its way, and so is the next tile's
/// as soon as there is room.
template <typename Types>
class MlaFp8Loader {
  public:
    DSO_DEVICE MlaFp8Loader(MlaDecodeShared<Types>& shared, const MlaDecodeArguments& arguments,
                            const MlaDecodeRows& rows, int warp)
        : shared_(shared),
          arguments_(arguments),
          table_(arguments.block_table + rows.request * arguments.table_stride),
          warp_(warp),
          lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run(const MlaDecodeKeys& range) {
        if (range.num_tiles == 0) return;
        Key key = find_key(range, 0);
        int64_t place = place_of(key);
        request<0>(place);
        ptx::cp_async_commit();
        request<1>(place);
        ptx::cp_async_commit();
        MlaRing<Types> state;
        for (int i = 0; i < range.num_tiles; ++i, state.advance()) {
            const bool is_last = i + 1 == range.num_tiles;
            const bool exists = place >= 0;
            if (!is_last) key = find_key(range, i + 1);  // long before it is needed

            // The left product is through long before the right one, and scores begin with the left.
            wait_for_older_request();
            shared_.left.acquire(state.left);
            convert<0>(shared_.tiles.left[state.left.stage]);
            finish(&shared_.left.full[state.left.stage]);
            place = place_of(key);
            if (!is_last) request<0>(place);
            ptx::cp_async_commit();

            wait_for_older_request();
            if (i == Types::kRightStages - 1) ptx::mbarrier_wait(&shared_.q_taken, 0);
            shared_.right.acquire(state.right);
            auto& right = shared_.tiles.right[state.right.stage];
            convert<1>(right);
            convert_rotated(right[kMlaSideBoxes]);
            const uint32_t which = __ballot_sync(0xFFFFFFFF, exists);
            if (lane_ == 0)
                reinterpret_cast<uint16_t*>(&shared_.exists[state.right.stage])[warp_] = static_cast<uint16_t>(which);
            finish(&shared_.right.full[state.right.stage]);
            if (!is_last) request<1>(place);
            ptx::cp_async_commit();
        }
    }

  private:
    static constexpr bool kHasScales = Types::kFormat == LatentFormat::kFp8Blocks;

    struct Key {
        int page, row;
    };

    /// Key `lane % 16` of the warp's.
    DSO_DEVICE Key find_key(const MlaDecodeKeys& range, int i) const {
        const int key = (range.first_tile + i) * kMlaTile + warp_ * kMlaQuarter + lane_ % kMlaQuarter;
        const int column = key / arguments_.page_size;
        const bool is_seen = key >= 0 && key < range.some_see;  // beyond 2^31 keys are none
        return {is_seen ? table_[column] : -1, key - column * arguments_.page_size};
    }

    /// Where the key begins in the cache; negative: there is no such key.
    DSO_DEVICE int64_t place_of(Key key) const {
        const bool exists = key.page >= 0 && key.page < arguments_.num_pages;
        return exists ? key.page * arguments_.page_stride + key.row * arguments_.key_stride : -1;
    }

    /// Starts the copies of a side of the warp's keys: 0 is left, 1 right and the rotated channels. What does not exist
    /// is zeros.
    template <int kSide>
    DSO_DEVICE void request(int64_t place) const {
        auto& raw = shared_.raw[warp_];
        copy<kMlaValueDim / 2>(raw.latents[kSide], kSide * kMlaValueDim / 2, place);
        if constexpr (kHasScales) {
            const int half = 2 * kSide + lane_ / kMlaQuarter;
            ptx::cp_async_4(&raw.scales[lane_][kSide], source(place) + kFp8RowScales + 4 * half, place >= 0);
        }
        if (kSide == 1) copy<sizeof(raw.rotated[0])>(raw.rotated, kHasScales ? kFp8RowKey : kMlaValueDim, place);
    }

    /// `kBytes` of each key from its byte `first` onward.
    template <int kBytes>
    DSO_DEVICE void copy(uint8_t (&to)[kMlaQuarter][kBytes], int first, int64_t place) const {
        constexpr int kLanes = kBytes / 16, kKeys = 32 / kLanes;  // of a key, at a time
        const int chunk = lane_ % kLanes * 16;
#pragma unroll 4  // there are few registers
        for (int i = 0; i < kMlaQuarter; i += kKeys) {
            const int key = i + lane_ / kLanes;
            const int64_t from = __shfl_sync(0xFFFFFFFF, place, key);
            ptx::cp_async_16(to[key] + chunk, source(from) + first + chunk, from >= 0);
        }
    }

    DSO_DEVICE const uint8_t* source(int64_t place) const {
        return static_cast<const uint8_t*>(arguments_.kv_cache) + (place >= 0 ? place : 0);
    }

    /// Until the older of two requests is there; by all lanes, each of which waits for its own copies.
    DSO_DEVICE static void wait_for_older_request() {
        ptx::cp_async_wait<1>();
        __syncwarp();
    }

    /// Latents of a side; a lane has eight channels of every key.
    template <int kSide>
    DSO_DEVICE void convert(uint8_t (*boxes)[kMlaBoxBytes]) const {
        const auto& raw = shared_.raw[warp_];
        const uint8_t* from = raw.latents[kSide][0] + lane_ * 8;
        const uint32_t to = chunk_of(boxes[lane_ / 8]);
        const auto read = [&](int key) { return *reinterpret_cast<const uint2*>(from + key * (kMlaValueDim / 2)); };
        if constexpr (kHasScales) {
            // A lane hands round the scale of one key's 128. Two keys at a time, whose chunks the swizzle treats alike,
            // and the bytes of the next two are read ahead.
            const uint32_t own_scale = scale_to_f16x2(raw.scales[lane_][kSide]);
            uint2 ahead[2] = {read(0), read(8)};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint2 latents[2] = {ahead[0], ahead[1]};
                if (i + 1 < 8) ahead[0] = read(i + 1), ahead[1] = read(i + 9);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const uint32_t scale = __shfl_sync(0xFFFFFFFF, own_scale, i + 8 * j, kMlaQuarter);
                    store(to, i + 8 * j, dequantize(latents[j], scale));
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint2 latents[2] = {read(i), read(i + 8)};
#pragma unroll
                for (int j = 0; j < 2; ++j) store(to, i + 8 * j, e4m3_to_f16(latents[j]));
            }
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
    const MlaDecodeArguments& arguments_;
    const int32_t* table_;
    const int warp_, lane_;
};

/// The rows of q to shared memory, by the computing threads, six of them a row; zeros where there are none.
template <typename Types>
DSO_DEVICE void load_queries(MlaDecodeShared<Types>& shared, const MlaDecodeArguments& arguments,
                             const MlaDecodeRows& rows) {
    constexpr int kThreadsOfRow = kMlaMathThreads / kMlaTile, kChunks = kMlaKeyDim / 8 / kThreadsOfRow;
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

    DSO_DEVICE void compute() {
        float scores[32], correction[2];
        Ring state;
        for (int i = 0; i < num_tiles_; ++i, state.advance()) {
            start_scores(scores, i, state);
            ptx::wgmma_wait<0>();
            ptx::keep_in_order(scores);
            if (lane_ == 0) ptx::mbarrier_arrive(&shared_.scored[state.right.stage]);
            take_probabilities(scores, correction, (first_tile_ + i) * kMlaTile, state);
            send(scores, correction, state);
        }
    }

    DSO_DEVICE void start_scores(float (&scores)[32], int i, const Ring& state) {
        // Loading warps that convert have fenced their writes themselves.
        const bool needs_fence = !Types::kIsFp8 && i >= num_tiles_by_tma_;
        // The side that is there first: TMA loads the right one first, for it is free first.
        if constexpr (Types::kIsFp8) {
            add_left(scores, needs_fence, state, true);
            add_right(scores, needs_fence, state, false);
        } else {
            add_right(scores, needs_fence, state, true);
            add_left(scores, needs_fence, state, false);
        }
        ptx::wgmma_commit();
        ptx::keep_in_order(scores);
    }

    DSO_DEVICE void add_right(float (&scores)[32], bool needs_fence, const Ring& state, bool is_first) {
        // 20 descriptors of q, the same for every tile: not to be kept in registers.
        const uint64_t q = wgmma_descriptor(shared_.tiles.q[0] + ptx::compute_here(0));
        const uint64_t right = wgmma_descriptor(shared_.tiles.right[state.right.stage]);
        shared_.right.wait(state.right);
        if (needs_fence) ptx::fence_proxy_async_shared();
        if (is_first) begin(scores);
#pragma unroll
        for (int j = 0; j < 4 * (kMlaSideBoxes + 1); ++j) {
            const int offset = j / 4 * kMlaBoxBytes + j % 4 * 32;
            Wgmma::mma(scores, advance_descriptor(q, offset), advance_descriptor(right, offset), !is_first || j != 0);
        }
    }

    DSO_DEVICE void add_left(float (&scores)[32], bool needs_fence, const Ring& state, bool is_first) {
        const uint64_t left = wgmma_descriptor(shared_.tiles.left[state.left.stage]);
        shared_.left.wait(state.left);
        if (needs_fence) ptx::fence_proxy_async_shared();
        if (is_first) begin(scores);
#pragma unroll
        for (int j = 0; j < 4 * kMlaSideBoxes; ++j)
            Wgmma::mma_registers(scores, q_[j], advance_descriptor(left, j / 4 * kMlaBoxBytes + j % 4 * 32),
                                 !is_first || j != 0);
    }

    DSO_DEVICE static void begin(float (&scores)[32]) {
        ptx::keep_in_order(scores);
        ptx::wgmma_fence();
    }

    /// Scores to probabilities.
    DSO_DEVICE void take_probabilities(float (&scores)[32], float (&correction)[2], int first_key, const Ring& state) {
        const uint64_t exists = shared_.exists[state.right.stage];
        const bool all_see_all = first_key <= all_see_ - kMlaTile;
        if (exists != ~uint64_t{0} || !all_see_all) {
            const uint64_t seen[2] = {seen_by(0, exists, first_key), seen_by(1, exists, first_key)};
            if (!all_see_all && differ_) remove_poison(scores, seen, state);
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                if (!sees(seen, i)) scores[i] = kMinusInfinity;
            }
        }
        rows_.add_tile(scores, scale_log2_, correction);
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
    const int first_tile_, num_tiles_, num_tiles_by_tma_;
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
        store_out(arguments, rows, first_row + row, side * 256 + lane * 8,
                  *reinterpret_cast<const uint4*>(panels[lane / 8] + swizzled_offset(row, lane % 8)));
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

/// By all warps that compute: adds up the cluster's sums, and the parts if this is the last of them to come.
template <typename Types>
class MlaDecodeCombination {
  public:
    DSO_DEVICE MlaDecodeCombination(MlaDecodeShared<Types>& shared, const MlaDecodeArguments& arguments, int warp)
        : shared_(shared),
          arguments_(arguments),
          size_(static_cast<int>(ptx::cluster_size())),
          rank_(static_cast<int>(ptx::cluster_rank())),
          rows_(arguments),
          num_parts_(arguments.tiles_per_part != 0 ? MlaDecodeKeys(arguments, rows_, size_, rank_).num_parts
                                                   : arguments.num_parts),
          warp_(warp),
          lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run() {
        ptx::fence_release_shared_to_cluster();
        ptx::cluster_arrive();
        ptx::cluster_wait();
        combine_cluster();
        if (size_ > 1) ptx::cluster_arrive();  // this thread has read what it needs
        if (num_parts_ > 1 && is_last_part()) combine_parts();
        if (size_ > 1) ptx::cluster_wait();  // the others read from here
    }

  private:
    DSO_DEVICE int num_row_warps() const { return ceil_div(rows_.num_rows, 16); }
    /// Each warp has one sixteenth of the rows, and some groups of the CTA's own.
    DSO_DEVICE int group_step() const { return kMlaMathWarps / num_row_warps(); }
    DSO_DEVICE int row_warp() const { return warp_ / group_step(); }
    DSO_DEVICE int first_group() const { return warp_ % group_step(); }
    DSO_DEVICE int row(int h) const { return row_warp() * 16 + lane_ / 4 + 8 * h; }

    DSO_DEVICE void combine_cluster() {
        const int num_groups = kMlaGroups / size_;
        float4 sources[kMlaMaxCluster];
        int owned = first_group();
        if (owned < num_groups) read_sources(sources, rank_ * num_groups + owned);
        if (threadIdx.x < kMlaTile) weigh_sources(static_cast<int>(threadIdx.x));
        ptx::named_barrier_sync(2, kMlaMathThreads);
        float weights[kMlaMaxCluster][2];
#pragma unroll
        for (int source = 0; source < kMlaMaxCluster; ++source) {
#pragma unroll
            for (int h = 0; h < 2; ++h) weights[source][h] = shared_.sums.weights[source][row(h)];
        }
        while (owned < num_groups) {
            float4 sum{};
#pragma unroll
            for (int source = 0; source < kMlaMaxCluster; ++source) {
                sum.x += weights[source][0] * sources[source].x;
                sum.y += weights[source][0] * sources[source].y;
                sum.z += weights[source][1] * sources[source].z;
                sum.w += weights[source][1] * sources[source].w;
            }
            const int group = rank_ * num_groups + owned;
            owned += group_step();
            if (owned < num_groups) read_sources(sources, rank_ * num_groups + owned);
            if (num_parts_ > 1) {
                *partial_sums(rows_.part, group) = sum;
            } else {
                store_group(group, sum);
            }
        }
    }

    /// What the CTAs of the cluster have of a group, and zeros of those that there are not.
    DSO_DEVICE void read_sources(float4 (&sources)[kMlaMaxCluster], int group) const {
#pragma unroll
        for (int source = 0; source < kMlaMaxCluster; ++source) {
            sources[source] = {};
            if (source < size_)
                sources[source] = ptx::load_from_cluster(
                    ptx::cluster_address(&shared_.sums.groups[group][row_warp()][lane_], source));
        }
    }

    /// What each CTA's sums of a row are to be multiplied by; and the row's logarithm.
    DSO_DEVICE void weigh_sources(int row) {
        SoftmaxPart parts[kMlaMaxCluster];
#pragma unroll
        for (int source = 0; source < kMlaMaxCluster; ++source) {
            parts[source] = {kMinusInfinity, 0.f, 0.f};
            if (source >= size_) continue;
            const float4 x = ptx::load_from_cluster(ptx::cluster_address(&shared_.rows[row], source));
            parts[source] = {x.x, x.y, x.z};
        }
        float base = kMinusInfinity, total = 0.f, rounded_total = 0.f, weights[kMlaMaxCluster];
#pragma unroll
        for (const SoftmaxPart& part : parts) base = fmaxf(base, part.base);
#pragma unroll
        for (int source = 0; source < kMlaMaxCluster; ++source) {
            weights[source] = weight_of(parts[source], base);
            total += weights[source] * parts[source].sum;
            rounded_total += weights[source] * parts[source].rounded_sum;
        }
        const float inverse = inverse_of(rounded_total) * arguments_.value_scale;
#pragma unroll
        for (int source = 0; source < kMlaMaxCluster; ++source)
            shared_.sums.weights[source][row] = weights[source] * inverse;
        const float lse_log2 = log2_sum(base, total);
        if (num_parts_ > 1) {
            *partial_lse(rows_.part, row) = lse_log2;
        } else if (rank_ == 0 && row < rows_.num_rows) {
            store_lse(arguments_, rows_, row, lse_log2);
        }
    }

    /// Whether all other parts of this CTA's columns have come.
    DSO_DEVICE bool is_last_part() {
        ptx::named_barrier_sync(2, kMlaMathThreads);
        if (threadIdx.x == 0) {
            unsigned long long* counter = counter_of(arguments_, rows_, size_, rank_);
            __threadfence();
            shared_.is_last = atomicAdd(counter, 1ull) == kMlaCounts + num_parts_ - 1;
            __threadfence();
            if (shared_.is_last) *counter = 0;  // what lies here next must not look like a counter
        }
        ptx::named_barrier_sync(2, kMlaMathThreads);
        return shared_.is_last;
    }

    DSO_DEVICE void combine_parts() {
        if (threadIdx.x < 4 * kMlaTile)
            weigh_parts(static_cast<int>(threadIdx.x) / 4, static_cast<int>(threadIdx.x) % 4);
        ptx::named_barrier_sync(2, kMlaMathThreads);
        if (num_parts_ <= 2) {
            add_parts<2>();
        } else if (num_parts_ <= 4) {
            add_parts<4>();
        } else {
            add_parts<kMlaLoadsAtOnce>();
        }
    }

    /// What each part's sums of a row are to be multiplied by, four lanes a row; and the row's logarithm.
    DSO_DEVICE void weigh_parts(int row, int lane) {
        if (row / 16 >= num_row_warps()) return;
        const float* lse = partial_lse(0, row);
        float top = kMinusInfinity, total = 0.f;
#pragma unroll 4
        for (int part = lane; part < num_parts_; part += 4) {
            const float x = __ldcg(lse + part);
            shared_.sums.part_weights[part][row] = x;
            top = fmaxf(top, x);
        }
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, distance));
        for (int part = lane; part < num_parts_; part += 4) {
            float& weight = shared_.sums.part_weights[part][row];
            weight = weight == kMinusInfinity ? 0.f : ptx::exp2(weight - top);
            total += weight;
        }
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) total += __shfl_xor_sync(0xFFFFFFFF, total, distance);
        const float inverse = inverse_of(total);
        for (int part = lane; part < num_parts_; part += 4) shared_.sums.part_weights[part][row] *= inverse;
        if (rank_ == 0 && lane == 0 && row < rows_.num_rows) store_lse(arguments_, rows_, row, log2_sum(top, total));
    }

    /// `kParts` parts of several groups at a time: as many loads are on their way at once.
    template <int kParts>
    DSO_DEVICE void add_parts() const {
        constexpr int kItems = kMlaLoadsAtOnce / kParts;
        const int num_groups = kMlaGroups / size_, step = group_step();
        for (int owned = first_group(); owned < num_groups; owned += kItems * step) {
            float4 sums[kItems] = {};
            for (int first = 0; first < num_parts_; first += kParts) {
                const float4* places = partial_sums(first, rank_ * num_groups + owned);
                float4 x[kItems][kParts];
#pragma unroll
                for (int item = 0; item < kItems; ++item) {
#pragma unroll
                    for (int i = 0; i < kParts; ++i) {
                        const bool exists = owned + item * step < num_groups && first + i < num_parts_;
                        x[item][i] = exists ? __ldcg(places + i * kMlaPartialSums) : float4{};
                    }
                    places += step * kMlaRowWarps * 32;
                }
#pragma unroll
                for (int i = 0; i < kParts; ++i) {
                    const float* weights = shared_.sums.part_weights[min(first + i, num_parts_ - 1)];
                    const float upper = weights[row(0)], lower = weights[row(1)];
#pragma unroll
                    for (int item = 0; item < kItems; ++item) {
                        sums[item].x += upper * x[item][i].x;
                        sums[item].y += upper * x[item][i].y;
                        sums[item].z += lower * x[item][i].z;
                        sums[item].w += lower * x[item][i].w;
                    }
                }
            }
#pragma unroll
            for (int item = 0; item < kItems; ++item) {
                if (owned + item * step < num_groups) store_group(rank_ * num_groups + owned + item * step, sums[item]);
            }
        }
    }

    DSO_DEVICE float4* partial_sums(int part, int group) const {
        const int64_t place = int64_t{rows_.unit} * arguments_.num_parts + part;
        return arguments_.partial_sums + place * kMlaPartialSums + (group * kMlaRowWarps + row_warp()) * 32 + lane_;
    }
    /// Those of a row's parts follow one another.
    DSO_DEVICE float* partial_lse(int part, int row) const {
        const int64_t place = (int64_t{rows_.unit} * size_ + rank_) * kMlaTile + row;
        return arguments_.partial_lse + place * arguments_.num_parts + part;
    }

    /// Two neighbours of each of this lane's rows, to the caller.
    DSO_DEVICE void store_group(int group, float4 x) const {
        const int column = group * 8 + lane_ % 4 * 2;
        const uint32_t pairs[2] = {pack_half<Types::kQuery>(x.x, x.y), pack_half<Types::kQuery>(x.z, x.w)};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (row(h) < rows_.num_rows) store_out(arguments_, rows_, row(h), column, pairs[h]);
        }
    }

    MlaDecodeShared<Types>& shared_;
    const MlaDecodeArguments& arguments_;
    const int size_, rank_;
    const MlaDecodeRows rows_;
    const int num_parts_;
    const int warp_, lane_;
};

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
                ptx::mbarrier_init(&shared.p_full[stage], kMlaTile / 2);
                ptx::mbarrier_init(&shared.scored[stage], 4);
            }
            ptx::mbarrier_init(&shared.q_taken, 4);
            ptx::mbarrier_init(&shared.rows_full, kMlaTile / 2);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
        ptx::named_barrier_arrive(0, kMlaThreads);  // it need not wait for the others
    } else {
        ptx::named_barrier_sync(0, kMlaThreads);
    }
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
    const MlaDecodeRows rows(arguments);
    if (has_no_work(arguments, rows, cluster_size, rank)) return;
    if (warp >= kMlaMathWarps) {
        ptx::setmaxnreg_dec<32>();
        const MlaDecodeKeys keys(arguments, rows, cluster_size, rank);
        if constexpr (Types::kIsFp8) {
            MlaFp8Loader<Types>(shared, arguments, rows, warp - kMlaMathWarps).run(keys);
        } else {
            MlaDecodeLoader<Types>(shared, &map_kv, arguments, rows, warp - kMlaMathWarps).run(keys);
        }
        return;
    }
    ptx::setmaxnreg_inc<160>();
    if (threadIdx.x == 0 && arguments.num_parts > 1) open_counter(counter_of(arguments, rows, cluster_size, rank));
    if (threadIdx.x == kMlaMathThreads - 1) prefetch_pages(arguments, rows, cluster_size, rank);
    load_queries(shared, arguments, rows);
    const MlaDecodeKeys keys(arguments, rows, cluster_size, rank);
    MlaValueSums sums;
    if (warp < 4) {
        MlaDecodeScores<Types>(shared, arguments, rows, keys, warp).run();
    } else {
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
        const MlaDecodeRows rows_again(arguments);
        if (is_alone(arguments)) {
            store_values(shared, arguments, rows_again, sums, warp - 4);
        } else {
            lay_out_values(shared, rows_again, sums, warp - 4);
        }
    }
    if (!is_alone(arguments)) MlaDecodeCombination<Types>(shared, arguments, warp).run();
}

}  // namespace dso
