// MLA decoding of few rows over a paged cache:   out = softmax(scale * q @ k.T) @ k[:, :512]   for each request
//
// The tensors, how keys are shared and how the shares are added up are those of sm90_mla_decode.cuh, whose tile has 64
// rows. One query of 8 or 16 heads would leave most of such a tile empty.
//
// Tile      16 rows, which are the (query, head) pairs of a request packed, and 64 keys at a time.
// Products  mma.sync: a warp multiplies what is in its registers. So the bytes of an FP8 cache are converted on their
//           way from shared memory to the registers, and nothing is written back; and keys lie in shared memory row
//           after row, so that one of them, or 16 neighbours, come by one instruction. Which channel is where along a
//           product's K does not matter if q and the keys agree, nor does a key's place among eight if p and the values
//           do: so a lane takes 16 bytes of a key at a time for the scores, and 8 of an FP8 key for the values.
// Roles     warpgroup 0: scores and softmax; each warp has 16 of the keys, and all queries in registers.
//           warpgroups 1 and 2: the output; each warp has 64 of its columns.   warpgroup 3: its four warps load.
// Barriers  full[stage]: one arrival of each lane that loads, and the bytes. A lane that clears a key arrives itself.
//           The others are named and counted by whole warps: racecheck follows these, but not a lane that arrives at an
//           mbarrier for its warp.   0: the mbarriers are initialised.   1: warpgroup 0.   2: all that compute.
//           3: the warps that score have each other's largest scores, and those that multiply values have the tile
//           before's p in registers.   4: a tile's p is there.   5 + stage: nobody reads the stage any more.   10: nor
//           any of them.
//           of the cluster: all CTAs have begun, so that each can send the others its rows' softmax (all_sent: the
//           bytes of all); then those of mla_decode_combination.cuh.
// Shared    MlaFewRowsShared below: 3 tiles of keys, each nine lines of 128 bytes under the swizzle; or 5 of FP8, 16
//           bytes apart where their length is no odd multiple of 16. So a column of 16-byte pieces falls into
//           different banks.
// Numerics  As sm90_mla_decode.cuh, but an FP8 cache's keys are not rounded: scores are sums of products with the very
//           e4m3 values and, if q is bfloat16, rotated channels, times the scale of a key's 128 channels in float32.
//           For the values probabilities are multiplied by these scales, both rounded to float16's 11 bits, and so is
//           that.
// Limits    As sm90_mla_decode.cuh, but scales and, if q is bfloat16, rotated channels are not limited. A scale below
//           2^-38 of the largest before it counts as 0.
// Source    DeepSeek-V2 report, arXiv:2405.04434, section 2.1.   Launched by launch/mla_decode.cu.   docs/mla_decode.md
#pragma once

#include "device/fp8_row.h"
#include "device/half.cuh"
#include "device/pipeline.cuh"
#include "device/softmax.cuh"
#include "device/tile.cuh"
#include "kernels/mla_decode_combination.cuh"
#include "kernels/mla_decode_work.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared_memory.cuh"

namespace dso {

inline constexpr int kMlaFewRows = 16;
inline constexpr int kMlaScoreWarps = 4, kMlaValueWarps = 8, kMlaValueColumns = kMlaValueDim / kMlaValueWarps;
inline constexpr int kMlaFewRowsMathWarps = kMlaScoreWarps + kMlaValueWarps;
inline constexpr int kMlaFewRowsThreads = 32 * (kMlaFewRowsMathWarps + kMlaLoadWarps);
inline constexpr int kMlaFewRowsMathThreads = 32 * kMlaFewRowsMathWarps;
inline constexpr int kMlaSteps = kMlaKeyDim / 16;  // along the channels

/// The named barriers of the loop over tiles. Who waits at one is let go before anybody arrives for its next phase.
enum MlaFewRowsBarrier : uint32_t {
    kMlaPIsFree = 3,       // and largest scores are shared: values arrive, scores wait
    kMlaPIsThere = 4,      // scores arrive, values wait
    kMlaStageIsEmpty = 5,  // of the first stage: scores and values arrive, loaders wait
    kMlaKeysAreRead = 10,  // for good, by those who multiply values; the scores, which these came after, have read them
};

/// What the kernel is compiled for.
template <ptx::HalfType query, LatentFormat format>
struct MlaFewRowsTypes {
    static constexpr int kTileRows = kMlaFewRows, kMathWarps = kMlaFewRowsMathWarps;
    static constexpr bool kSendsRows = true;
    static constexpr ptx::HalfType kQuery = query;  // and of the output
    static constexpr LatentFormat kFormat = format;
    static constexpr bool kIsFp8 = kFormat != LatentFormat::kPlain;                  // the cache
    static constexpr bool kHasScales = kFormat == LatentFormat::kFp8Blocks;          // of a key's own
    static constexpr ptx::HalfType kOperand = kIsFp8 ? ptx::HalfType::kF16 : query;  // of products
    static constexpr ptx::HalfType kRotated = kHasScales ? query : kOperand;         // of those of rotated channels
    static constexpr int kKeyBytes = kHasScales ? kFp8RowBytes : kIsFp8 ? kMlaKeyDim : 2 * kMlaKeyDim;
    static constexpr int kPitch = kIsFp8 && kKeyBytes % 32 == 0 ? kKeyBytes + 16 : kKeyBytes;
    static constexpr int kLines = kKeyBytes / kSwizzleBytes;  // of a key of 16 bits, each of 64 channels
    static constexpr int kStages = kIsFp8 ? 5 : 3;

    /// The first of a lane's two columns of a group of sums. An FP8 value's warp has the columns 8 * g + i in column g
    /// of its accumulator i, and takes the same column of two accumulators for neighbours.
    DSO_DEVICE static int column_of(int group, int lane) {
        if (!kIsFp8) return group * 8 + lane % 4 * 2;
        return group / 8 * kMlaValueColumns + lane % 4 * 16 + group % 8 * 2;
    }
};

/// A tile's probabilities, and what goes with them.
struct alignas(16) MlaFewRowsProbabilities {
    static constexpr int kPitch = kMlaTile + 8;

    uint16_t rows[kMlaFewRows][kPitch];
    float correction[kMlaFewRows];
};

template <typename Types>
struct MlaFewRowsShared {
    union {
        alignas(kSwizzleAtomBytes) uint8_t keys[Types::kStages][kMlaTile][Types::kPitch];
        MlaDecodeSums<kMlaFewRows> sums;  // when all products are there
    };
    MlaFewRowsProbabilities p;
    alignas(16) float tops[2][kMlaFewRows][kMlaScoreWarps];  // each warp's largest scores, of even and of odd tiles
    SoftmaxPart warp_rows[kMlaScoreWarps][kMlaFewRows];
    SoftmaxPart rows[kMlaFewRows];
    SoftmaxPart sent_rows[kMlaMaxCluster][kMlaFewRows];  // by the other CTAs of the cluster
    uint16_t exists[Types::kStages][kMlaLoadWarps];      // a bit for each key of a tile
    uint64_t full[Types::kStages], all_sent;
    bool is_last;
};

// ---------------------------------------------------------------------------------------------------- loading

/// How TMA loads keys of 16 bits, as [pages, rows of a page, lines of 64 channels, 64]. Those of FP8 need no map, and a
/// launch takes longer for each that it hands over.
template <LatentFormat kFormat>
struct MlaFewRowsMaps {};
template <>
struct MlaFewRowsMaps<LatentFormat::kPlain> {
    TensorMap quarter, key;  // 16 rows, and one
};

/// A loading warp's quarter of the keys. Each of the first 16 lanes looks for one and copies it; or the first lane all
/// of them, where they are neighbours.
template <typename Types>
class MlaFewRowsLoader {
  public:
    using Maps = MlaFewRowsMaps<Types::kFormat>;

    DSO_DEVICE MlaFewRowsLoader(MlaFewRowsShared<Types>& shared, const Maps& maps, const MlaDecodeArguments& arguments,
                                const MlaDecodeRows& rows, int share, int warp)
        : shared_(shared),
          maps_(maps),
          arguments_(arguments),
          table_(arguments.block_table + rows.request * arguments.table_stride),
          first_key_(warp * kMlaQuarter),
          warp_(warp),
          lane_(threadIdx.x % 32),
          are_neighbours_(
              arguments.page_size % kMlaQuarter == 0 &&
              (!Types::kIsFp8 || (Types::kPitch == Types::kKeyBytes && arguments.key_stride == Types::kKeyBytes))),
          first_(find(share, room_of(arguments, rows))) {}

    DSO_DEVICE void run(const MlaDecodeKeys& range) const {
        if (range.num_tiles == 0) return;
        MlaKey key = first_;
        if (key_of(range.first_tile) >= range.some_see) key.page = -1;
        int64_t place = key.place(arguments_);
        PipelineState<Types::kStages> state;
        for (int i = 0; i < range.num_tiles; ++i, state.advance()) {
            const MlaKey next = find(range.tile(i + 1), range.some_see);  // long before it is needed
            const uint32_t exists = __ballot_sync(0xFFFFFFFF, place >= 0) & 0xFFFF;
            if (i >= Types::kStages) ptx::named_barrier_sync(kMlaStageIsEmpty + state.stage, kMlaFewRowsThreads);
            if (lane_ == 0) shared_.exists[state.stage][warp_] = static_cast<uint16_t>(exists);
            if (are_neighbours_ && exists == 0xFFFF) {
                if (lane_ == 0) load_quarter(state.stage, key, place);
            } else if (lane_ < kMlaQuarter) {
                load(state.stage, key, place);
            }
            key = next;
            place = key.place(arguments_);  // here, where there is time to wait for its page
        }
    }

  private:
    DSO_DEVICE int key_of(int tile) const { return tile * kMlaTile + first_key_ + lane_ % kMlaQuarter; }
    DSO_DEVICE MlaKey find(int tile, int num_keys) const { return MlaKey(arguments_, table_, key_of(tile), num_keys); }

    /// All of the warp's keys, of which this is the first.
    DSO_DEVICE void load_quarter(uint32_t stage, const MlaKey& key, int64_t place) const {
        uint64_t* full = &shared_.full[stage];
        ptx::mbarrier_arrive_expect_tx(full, kMlaQuarter * Types::kKeyBytes);
        copy<kMlaQuarter>(shared_.keys[stage][first_key_], full, key, place);
        ptx::mbarrier_arrive_times(full, kMlaQuarter - 1);
    }

    /// The lane's key; zeros where there is none.
    DSO_DEVICE void load(uint32_t stage, const MlaKey& key, int64_t place) const {
        uint8_t* to = shared_.keys[stage][first_key_ + lane_];
        uint64_t* full = &shared_.full[stage];
        if (place >= 0) {
            ptx::mbarrier_arrive_expect_tx(full, Types::kKeyBytes);
            copy<1>(to, full, key, place);
        } else {
#pragma unroll 1
            for (int byte = 0; byte < Types::kKeyBytes; byte += 16) *reinterpret_cast<uint4*>(to + byte) = uint4{};
            ptx::fence_proxy_async_shared();  // before the copies that come here later
            ptx::mbarrier_arrive(full);
        }
    }

    template <int kKeys>
    DSO_DEVICE void copy(uint8_t* to, uint64_t* full, const MlaKey& key, int64_t place) const {
        if constexpr (Types::kIsFp8) {
            ptx::copy_from_global_async(to, static_cast<const uint8_t*>(arguments_.kv_cache) + place,
                                        kKeys * Types::kKeyBytes, full);
        } else {
            ptx::tma_load_4d(to, kKeys == 1 ? &maps_.key : &maps_.quarter, full, 0, 0, key.row, key.page);
        }
    }

    MlaFewRowsShared<Types>& shared_;
    const Maps& maps_;
    const MlaDecodeArguments& arguments_;
    const int32_t* table_;
    const int first_key_, warp_, lane_;
    const bool are_neighbours_;  // the warp's keys, in the cache, as they are in shared memory
    const MlaKey first_;         // of the first tile
};

/// Where 16 bytes of a key of 16 bits lie, from a key on whose number is a multiple of 8.
template <typename Types>
DSO_DEVICE uint32_t place_of(int key, int sixteen) {
    return swizzled_offset(key * Types::kLines + sixteen / 8, sixteen % 8);
}

// ----------------------------------------------------------------------------------------------------- scores

/// A warp of warpgroup 0: the scores of its 16 keys, as two accumulators of eight; and the softmax, with the others.
/// Column n of an accumulator is its key n / 2 + 4 * (n % 2): so the eight lanes that read at a time find two rows of
/// 64 bytes in different banks.
template <typename Types>
class MlaFewRowsScores {
  public:
    DSO_DEVICE MlaFewRowsScores(MlaFewRowsShared<Types>& shared, const MlaDecodeArguments& arguments,
                                const MlaDecodeRows& rows, const MlaDecodeKeys& keys, int warp)
        : shared_(shared),
          scale_log2_(arguments.scale_log2),
          first_key_(keys.first_tile * kMlaTile + warp * kMlaQuarter),
          key_step_(keys.tile_step * kMlaTile),
          num_tiles_(keys.num_tiles),
          all_see_(keys.all_see),
          differ_(keys.all_see < keys.some_see),
          warp_(warp),
          lane_(threadIdx.x % 32) {
#pragma unroll
        for (int i = 0; i < 2; ++i) visible_[i] = keys.visible(arguments, rows, row(i));
    }

    /// Leaves what lse needs in `shared.rows`.
    DSO_DEVICE void run(const uint32_t (&q)[kMlaSteps][4]) {
        PipelineState<Types::kStages> state;
        for (int i = 0; i < num_tiles_; ++i, state.advance()) {
            float scores[8];
            ptx::mbarrier_wait(&shared_.full[state.stage], state.phase);
            uint8_t (*keys)[Types::kPitch] = &shared_.keys[state.stage][warp_ * kMlaQuarter];
            score(scores, q, keys);
            hide(scores, first_key_ + i * key_step_, state.stage, keys);
            // Rounded before the largest is subtracted: there are no limits to how large they may be.
            for (float& score : scores) score *= scale_log2_;
            float largest[2], correction[2];
            rows_.find_largest(scores, largest);
            share_largest(largest, i % 2);
            rows_.exponentiate(scores, 1.f, largest, correction);
            send(scores, correction, shared_.p);
            ptx::named_barrier_arrive(kMlaPIsThere, kMlaFewRowsMathThreads);
            if (i + Types::kStages < num_tiles_)
                ptx::named_barrier_arrive(kMlaStageIsEmpty + state.stage, kMlaFewRowsThreads);
        }
        finish();
    }

    /// To the other CTAs of the cluster, by the warp that has them, while values are still multiplied. By copies that
    /// count themselves: ordinary stores would need a fence, which waits for them. A launch without clusters has no
    /// such copy.
    DSO_DEVICE void send_rows() const {
        if (warp_ != 0 || ptx::cluster_size() == 1) return;
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (!ptx::elect_one()) return;
        const SoftmaxPart* place = shared_.sent_rows[ptx::cluster_rank()];
        for (uint32_t i = 0; i < ptx::cluster_size(); ++i) {
            if (i == ptx::cluster_rank()) continue;
            ptx::copy_to_cluster_async(ptx::cluster_address(place, i), shared_.rows, sizeof(shared_.rows),
                                       ptx::cluster_address(&shared_.all_sent, i));
        }
    }

  private:
    static constexpr int kAccumulators = kMlaQuarter / 8;
    /// Sums of steps in turn, for each product waits for the one before that adds to the same.
    template <int kChains>
    using Parts = float[kAccumulators][kChains][4];

    DSO_DEVICE int row(int i) const { return lane_ / 4 + 8 * i; }
    DSO_DEVICE static int key_of_column(int column) { return column / 2 + 4 * (column % 2); }
    /// The key, among the warp's, that an element of the lane's scores belongs to.
    DSO_DEVICE int key_of(int element) const { return element / 4 * 8 + element % 2 * 4 + lane_ % 4; }

    DSO_DEVICE void score(float (&scores)[8], const uint32_t (&q)[kMlaSteps][4],
                          const uint8_t (*keys)[Types::kPitch]) const {
        const int row = key_of_column(lane_ / 4);
        const uint8_t* piece = keys[row] + lane_ % 4 * 16;
        if constexpr (Types::kHasScales) {
            Parts<1> rotated = {};
            add_half(rotated, q, 32, piece + kFp8RowKey);
            add_half(rotated, q, 34, piece + kFp8RowKey + 64);
#pragma unroll
            for (int i = 0; i < 8; ++i) scores[i] = rotated[i / 4][0][i % 4];
            const uint8_t* scales = keys[key_of(0)] + kFp8RowScales;
#pragma unroll
            for (int block = 0; block < kMlaValueDim / kFp8RowBlock; ++block) {
                Parts<1> parts = {};
                add_e4m3(parts, q, 8 * block, piece + block * kFp8RowBlock);
                add_e4m3(parts, q, 8 * block + 4, piece + block * kFp8RowBlock + 64);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float scale = *reinterpret_cast<const float*>(
                        scales + (i / 4 * 8 + i % 2 * 4) * Types::kPitch + block * sizeof(float));
                    scores[i] = __fmaf_rn(parts[i / 4][0][i % 4], scale, scores[i]);
                }
            }
        } else {
            Parts<2> parts = {};
#pragma unroll
            for (int i = 0; i < Types::kKeyBytes / 64; ++i) {
                if constexpr (Types::kIsFp8) {
                    add_e4m3(parts, q, 4 * i, piece + i * 64);
                } else {
                    add_half(parts, q, 2 * i, keys[0] + place_of<Types>(row, 4 * i + lane_ % 4));
                }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) scores[i] = parts[i / 4][0][i % 4] + parts[i / 4][1][i % 4];
        }
    }

    /// Four steps, 16 channels of e4m3 a lane.
    template <int kChains>
    DSO_DEVICE static void add_e4m3(Parts<kChains>& parts, const uint32_t (&q)[kMlaSteps][4], int step,
                                    const uint8_t* piece) {
#pragma unroll
        for (int j = 0; j < kAccumulators; ++j) {
            const auto bytes = *reinterpret_cast<const uint4*>(piece + 8 * j * Types::kPitch);
            const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t b0, b1;
                ptx::unpack_e4m3x4(words[i], b0, b1);
                ptx::mma_16x8x16<Types::kOperand>(parts[j][i % kChains], q[step + i], b0, b1);
            }
        }
    }

    /// Two steps, 8 channels of 16 bits a lane.
    template <int kChains>
    DSO_DEVICE static void add_half(Parts<kChains>& parts, const uint32_t (&q)[kMlaSteps][4], int step,
                                    const uint8_t* piece) {
#pragma unroll
        for (int j = 0; j < kAccumulators; ++j) {
            auto channels = *reinterpret_cast<const uint4*>(piece + 8 * j * Types::kPitch);
            if constexpr (Types::kIsFp8 && Types::kRotated == ptx::HalfType::kF16) channels = bf16_to_f16(channels);
            ptx::mma_16x8x16<Types::kRotated>(parts[j][0], q[step], channels.x, channels.y);
            ptx::mma_16x8x16<Types::kRotated>(parts[j][kChains - 1], q[step + 1], channels.z, channels.w);
        }
    }

    /// Scores of keys that do not exist, or that a row does not see, become -inf.
    DSO_DEVICE void hide(float (&scores)[8], int first_key, uint32_t stage, uint8_t (*keys)[Types::kPitch]) {
        const uint32_t exists = shared_.exists[stage][warp_];
        const bool all_see_all = first_key <= all_see_ - kMlaQuarter;
        if (exists == 0xFFFF && all_see_all) return;
        uint32_t seen = 0;  // a bit for each element
#pragma unroll
        for (int i = 0; i < 8; ++i)
            seen |= uint32_t{(exists >> key_of(i) & 1) != 0 && key_of(i) < visible_[i / 2 % 2] - first_key} << i;
        if (!all_see_all && differ_) remove_poison(scores, seen, keys);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if ((seen >> i & 1) == 0) scores[i] = kMinusInfinity;
        }
    }

    /// A key that some rows see and others do not may hold NaN, and 0 * NaN is NaN: its value is cleared. The rows that
    /// see it have a NaN score by then, or an infinite one.
    DSO_DEVICE void remove_poison(const float (&scores)[8], uint32_t seen, uint8_t (*keys)[Types::kPitch]) const {
        __syncwarp();  // all lanes have their scores
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool is_finite = fabsf(scores[i]) < -kMinusInfinity;
            if (is_finite || (seen >> i & 1) != 0) continue;
#pragma unroll 1
            for (int byte = 0; byte < Types::kKeyBytes; byte += 16)
                *reinterpret_cast<uint4*>(keys[key_of(i)] + byte) = uint4{};
        }
        ptx::fence_proxy_async_shared();  // before the copies that come here later
        __syncwarp();
    }

    /// Makes the largest scores those of all warps. Then p may be written, too: one wait for both.
    DSO_DEVICE void share_largest(float (&largest)[2], int parity) {
        if (lane_ % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) shared_.tops[parity][row(i)][warp_] = largest[i];
        }
        ptx::named_barrier_sync(kMlaPIsFree, kMlaFewRowsMathThreads);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto x = *reinterpret_cast<const float4*>(shared_.tops[parity][row(i)]);
            largest[i] = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
        }
    }

    DSO_DEVICE void send(const float (&p)[8], const float (&correction)[2], MlaFewRowsProbabilities& to) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = 0.f;
            uint16_t* tile_row = to.rows[row(i)] + warp_ * kMlaQuarter;
#pragma unroll
            for (int j = 0; j < kAccumulators; ++j) {
                const int element = 4 * j + 2 * i;
                const uint32_t pair = pack_half<Types::kOperand>(p[element], p[element + 1]);
                const float2 rounded = unpack_half<Types::kOperand>(pair);
                sum += rounded.x + rounded.y;
                tile_row[key_of(element)] = static_cast<uint16_t>(pair);
                tile_row[key_of(element + 1)] = static_cast<uint16_t>(pair >> 16);
            }
            rounded_sum_[i] = __fmaf_rn(rounded_sum_[i], correction[i], sum);
            if (warp_ == 0 && lane_ % 4 == 0) to.correction[row(i)] = correction[i];
        }
    }

    /// All warps' sums of a row are relative to the same score.
    DSO_DEVICE void finish() {
        rows_.finish();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2)
                rounded_sum_[i] += __shfl_xor_sync(0xFFFFFFFF, rounded_sum_[i], distance);
            if (lane_ % 4 == 0) shared_.warp_rows[warp_][row(i)] = {rows_.base(i, 1.f), rows_.sum[i], rounded_sum_[i]};
        }
        ptx::named_barrier_sync(1, 32 * kMlaScoreWarps);
        if (threadIdx.x >= kMlaFewRows) return;
        SoftmaxPart total = shared_.warp_rows[0][threadIdx.x];
#pragma unroll
        for (int warp = 1; warp < kMlaScoreWarps; ++warp) {
            total.sum += shared_.warp_rows[warp][threadIdx.x].sum;
            total.rounded_sum += shared_.warp_rows[warp][threadIdx.x].rounded_sum;
        }
        if (total.sum == 0.f) total.base = kMinusInfinity;
        shared_.rows[threadIdx.x] = total;
    }

    MlaFewRowsShared<Types>& shared_;
    const float scale_log2_;
    const int first_key_, key_step_, num_tiles_;
    const int all_see_;
    const bool differ_;  // some rows see fewer keys than others
    const int warp_, lane_;
    int visible_[2];
    SoftmaxRows rows_;
    float rounded_sum_[2] = {};
};

/// The rows of q as the first operand of products, eight channels of two rows at a time; zeros where there are none.
template <typename Types>
DSO_DEVICE void load_queries(uint32_t (&q)[kMlaSteps][4], const MlaDecodeArguments& arguments,
                             const MlaDecodeRows& rows) {
    const int lane = threadIdx.x % 32;
    const uint16_t* places[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
        places[i] =
            static_cast<const uint16_t*>(arguments.q) +
            rows.offset(arguments, lane / 4 + 8 * i, arguments.q_stride_b, arguments.q_stride_s, arguments.q_stride_h);
#pragma unroll
    for (int eight = 0; eight < kMlaSteps / 2; ++eight) {
        // 16 bytes of a key are 8 channels of 16 bits, or 16 of e4m3.
        const bool is_e4m3 = Types::kIsFp8 && !(Types::kHasScales && eight >= kMlaValueDim / 32);
        const int channel = is_e4m3 ? eight / 2 * 64 + lane % 4 * 16 + eight % 2 * 8 : eight * 32 + lane % 4 * 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint4 values{};
            if (lane / 4 + 8 * i < rows.num_rows) values = *reinterpret_cast<const uint4*>(places[i] + channel);
            if ((is_e4m3 ? Types::kOperand : Types::kRotated) != Types::kQuery) values = bf16_to_f16(values);
            q[2 * eight][i] = values.x;
            q[2 * eight][2 + i] = values.y;
            q[2 * eight + 1][i] = values.z;
            q[2 * eight + 1][2 + i] = values.w;
        }
    }
}

// ----------------------------------------------------------------------------------------------------- values

/// The sums of a warp that multiplies values: 16 rows by 64 columns.
using MlaFewRowsSums = float[kMlaValueColumns / 8][4];

/// A warp of warpgroups 1 and 2: `sums` = p @ v, of the warp's columns. Where keys have scales of their own, p is
/// multiplied by those of the warp's block, which are relative to the power of two of the largest so far.
template <typename Types>
class MlaFewRowsValues {
  public:
    DSO_DEVICE MlaFewRowsValues(MlaFewRowsShared<Types>& shared, int warp)
        : shared_(shared), warp_(warp), lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run(MlaFewRowsSums& sums, int num_tiles) {
#pragma unroll
        for (auto& tile : sums)
            for (float& x : tile) x = 0.f;
        PipelineState<Types::kStages> state;
        if (num_tiles > 0) ptx::named_barrier_arrive(kMlaPIsFree, kMlaFewRowsMathThreads);
        for (int i = 0; i < num_tiles; ++i, state.advance()) {
            uint32_t p[kMlaTile / 16][4];
            ptx::named_barrier_sync(kMlaPIsThere, kMlaFewRowsMathThreads);
#pragma unroll
            for (int j = 0; j < kMlaTile / 16; ++j)
                ptx::ldmatrix_x4(p[j], &shared_.p.rows[lane_ % 16][16 * j + lane_ / 16 * 8]);
            float upper = shared_.p.correction[lane_ / 4], lower = shared_.p.correction[lane_ / 4 + 8];
            if (i + 1 < num_tiles) ptx::named_barrier_arrive(kMlaPIsFree, kMlaFewRowsMathThreads);

            // Full long since, but it orders these reads after the copies' writes.
            ptx::mbarrier_wait(&shared_.full[state.stage], state.phase);
            Keys& keys = shared_.keys[state.stage];
            if constexpr (Types::kHasScales) {
                const float change = multiply_by_scales(p, keys);
                upper *= change;
                lower *= change;
            }
            multiply(sums, upper, lower);
#pragma unroll
            for (int j = 0; j < kMlaTile / 16; ++j) {
                if constexpr (Types::kIsFp8) {
                    add_e4m3(sums, p[j], keys, 16 * j);
                } else {
                    add_half(sums, p[j], keys, 16 * j);
                }
            }
            if (i + Types::kStages < num_tiles)
                ptx::named_barrier_arrive(kMlaStageIsEmpty + state.stage, kMlaFewRowsThreads);
        }
        if constexpr (Types::kHasScales) {
            const float unit = power_of_two(exponent_ - kScaleExponent);
            multiply(sums, unit, unit);
        }
    }

  private:
    using Keys = const uint8_t[kMlaTile][Types::kPitch];
    static constexpr int kScaleExponent = 14;  // of the largest scale in float16, which ends at 2^16

    DSO_DEVICE static float power_of_two(int biased) { return __uint_as_float(max(0, min(biased, 254)) << 23); }

    DSO_DEVICE static void multiply(MlaFewRowsSums& sums, float upper, float lower) {
        if (!__any_sync(0xFFFFFFFF, upper != 1.f || lower != 1.f)) return;
#pragma unroll
        for (auto& tile : sums) {
            tile[0] *= upper;
            tile[1] *= upper;
            tile[2] *= lower;
            tile[3] *= lower;
        }
    }

    /// Returns what all sums so far are to be multiplied by.
    DSO_DEVICE float multiply_by_scales(uint32_t (&p)[kMlaTile / 16][4], Keys& keys) {
        const uint8_t* first = keys[lane_ % 4 * 2] + kFp8RowScales + warp_ * kMlaValueColumns / kFp8RowBlock * 4;
        float scales[kMlaTile / 8][2];
        int largest = 0;  // of the numbers' bits, which have the same order
#pragma unroll
        for (int i = 0; i < kMlaTile / 8; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                scales[i][j] = *reinterpret_cast<const float*>(first + (8 * i + j) * Types::kPitch);
                largest = max(largest, __float_as_int(scales[i][j]));
            }
        }
        const int old = exponent_;
        exponent_ = max(old, __reduce_max_sync(0xFFFFFFFF, largest) >> 23);
        const float factor = power_of_two(2 * 127 + kScaleExponent - exponent_);
#pragma unroll
        for (int i = 0; i < kMlaTile / 8; ++i) {
            const uint32_t pair = ptx::pack_f16x2(scales[i][0] * factor, scales[i][1] * factor);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t& x = p[i / 2][i % 2 * 2 + j];
                x = ptx::multiply_f16x2(x, pair);
            }
        }
        return power_of_two(127 + old - exponent_);
    }

    /// 16 keys, from `first` on.
    DSO_DEVICE void add_half(MlaFewRowsSums& sums, const uint32_t (&a)[4], Keys& keys, int first) const {
#pragma unroll
        for (int i = 0; i < kMlaValueColumns / 8; i += 2) {
            uint32_t b[4];
            ptx::ldmatrix_x4_trans(b, keys[first] + place_of<Types>(lane_ % 16, 8 * warp_ + i + lane_ / 16));
            ptx::mma_16x8x16<Types::kOperand>(sums[i], a, b[0], b[1]);
            ptx::mma_16x8x16<Types::kOperand>(sums[i + 1], a, b[2], b[3]);
        }
    }

    /// The same. The lane has eight channels of four keys, and column lane / 4 of eight products, one for each channel.
    DSO_DEVICE void add_e4m3(MlaFewRowsSums& sums, const uint32_t (&a)[4], Keys& keys, int first) const {
        const int key = first + lane_ % 4 * 2, channel = warp_ * kMlaValueColumns + lane_ / 4 * 8;
        uint2 bytes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) bytes[i] = *reinterpret_cast<const uint2*>(keys[key + i / 2 * 8 + i % 2] + channel);
#pragma unroll
        for (int word = 0; word < 2; ++word) {
            uint32_t b[2][4];  // of two pairs of keys, for four channels
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t upper = word == 0 ? bytes[2 * i].x : bytes[2 * i].y;
                const uint32_t lower = word == 0 ? bytes[2 * i + 1].x : bytes[2 * i + 1].y;
                ptx::unpack_e4m3x4(__byte_perm(upper, lower, 0x5140), b[i][0], b[i][1]);
                ptx::unpack_e4m3x4(__byte_perm(upper, lower, 0x7362), b[i][2], b[i][3]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) ptx::mma_16x8x16<Types::kOperand>(sums[4 * word + i], a, b[0][i], b[1][i]);
        }
    }

    MlaFewRowsShared<Types>& shared_;
    const int warp_, lane_;
    int exponent_ = 1;  // of the largest scale so far, as float32 has it
};

// --------------------------------------------------------------------------------------------------- epilogue

/// A group of the warp's sums: two neighbours of the lane's upper row, and of its lower one.
template <typename Types>
DSO_DEVICE float4 group_of(const MlaFewRowsSums& sums, int group) {
    if constexpr (!Types::kIsFp8) return {sums[group][0], sums[group][1], sums[group][2], sums[group][3]};
    const int column = group / 4, i = group % 4 * 2;
    return {sums[i][column], sums[i + 1][column], sums[i][2 + column], sums[i + 1][2 + column]};
}

/// Of a CTA that has all keys: straight to the caller.
template <typename Types>
DSO_DEVICE void store_values(const MlaFewRowsShared<Types>& shared, const MlaDecodeArguments& arguments,
                             const MlaDecodeRows& rows, const MlaFewRowsSums& sums, int warp) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = lane / 4 + 8 * i;
        if (row >= rows.num_rows) continue;
        const SoftmaxPart part = shared.rows[row];
        const float inverse = inverse_of(part.rounded_sum) * arguments.value_scale;
        uint16_t* out = out_of(arguments, rows, row);
        if (warp == 0 && lane % 4 == 0) store_lse(arguments, rows, row, log2_sum(part.base, part.sum));
#pragma unroll
        for (int group = 0; group < 8; ++group) {
            const float4 x = group_of<Types>(sums, group);
            *reinterpret_cast<uint32_t*>(out + Types::column_of(8 * warp + group, lane)) =
                i == 0 ? pack_half<Types::kQuery>(x.x * inverse, x.y * inverse)
                       : pack_half<Types::kQuery>(x.z * inverse, x.w * inverse);
        }
    }
}

// ----------------------------------------------------------------------------------------------------- kernel

template <typename Types>
__global__ void __launch_bounds__(kMlaFewRowsThreads, 1)
    sm90_mla_decode_few_rows_kernel(const __grid_constant__ MlaFewRowsMaps<Types::kFormat> maps,
                                    const __grid_constant__ MlaDecodeArguments arguments) {
    using Shared = MlaFewRowsShared<Types>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<Shared>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
    const int cluster_size = static_cast<int>(ptx::cluster_size()), rank = static_cast<int>(ptx::cluster_rank());

    if (warp == kMlaFewRowsMathWarps) {
        if (threadIdx.x % 32 == 0) {
            if constexpr (!Types::kIsFp8) ptx::prefetch_tensor_map(&maps.quarter);
            for (uint64_t& full : shared.full) ptx::mbarrier_init(&full, kMlaTile);
            ptx::mbarrier_init(&shared.all_sent, 1);
            ptx::fence_mbarrier_init();
            ptx::mbarrier_arrive_expect_tx(&shared.all_sent, (cluster_size - 1) * sizeof(shared.rows));
        }
        __syncwarp();
        ptx::named_barrier_arrive(0, kMlaFewRowsThreads);  // it need not wait for the others
    } else {
        ptx::named_barrier_sync(0, kMlaFewRowsThreads);
    }
    if (!is_alone(arguments)) ptx::cluster_arrive();  // its shared memory can be written
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
    const MlaDecodeRows rows(arguments, kMlaFewRows);
    if (has_no_work(arguments, rows, cluster_size, rank)) return;
    if (warp >= kMlaFewRowsMathWarps) {
        ptx::setmaxnreg_dec<40>();
        const MlaFewRowsLoader<Types> load(shared, maps, arguments, rows, share_of(rows, cluster_size, rank),
                                           warp - kMlaFewRowsMathWarps);
        load.run(MlaDecodeKeys(arguments, rows, cluster_size, rank));
        return;
    }
    MlaFewRowsSums sums;
    if (warp < kMlaScoreWarps) {
        ptx::setmaxnreg_inc<240>();
        if (threadIdx.x == 0 && arguments.num_parts > 1) open_counter(counter_of(arguments, rows, cluster_size, rank));
        uint32_t q[kMlaSteps][4];
        load_queries<Types>(q, arguments, rows);
        const MlaDecodeKeys keys(arguments, rows, cluster_size, rank);
        MlaFewRowsScores<Types> scores(shared, arguments, rows, keys, warp);
        scores.run(q);
        if (!is_alone(arguments)) {
            ptx::cluster_wait();  // all have begun
            scores.send_rows();
        }
    } else {
        ptx::setmaxnreg_dec<112>();
        const MlaDecodeKeys keys(arguments, rows, cluster_size, rank);
        MlaFewRowsValues<Types>(shared, warp - kMlaScoreWarps).run(sums, keys.num_tiles);
        if (!is_alone(arguments)) ptx::cluster_wait();
    }
    const int values_warp = warp - kMlaScoreWarps;
    if (is_alone(arguments)) {
        ptx::named_barrier_sync(2, kMlaFewRowsMathThreads);  // shared.rows are there
        if (values_warp >= 0) store_values(shared, arguments, MlaDecodeRows(arguments, kMlaFewRows), sums, values_warp);
        return;
    }
    if (values_warp >= 0) {
        ptx::named_barrier_sync(kMlaKeysAreRead, 32 * kMlaValueWarps);
#pragma unroll
        for (int group = 0; group < 8; ++group)
            shared.sums.groups[8 * values_warp + group][0][threadIdx.x % 32] = group_of<Types>(sums, group);
    }
    MlaDecodeCombination<Types, Shared>(shared, arguments, warp).run();
}

}  // namespace dso
