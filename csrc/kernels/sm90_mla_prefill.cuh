// Attention of a batch of sequences, each head with keys of its own:   out = softmax(scale * q @ k.T) @ v
//
//   q              [total_q, heads, 192]   bf16 or f16      TMA, 128-byte swizzle
//   k              [total_k, heads, 192]   the same         likewise
//   v              [total_k, heads, 128]   the same         likewise, multiplied MN-major
//   cu_seqlens_q   [b + 1]                 int32            plain loads by the producer warp
//   cu_seqlens_k   [b + 1]                 int32            likewise
//   out            [total_q, heads, 128]   the type of q    16-byte stores through shared memory
//   lse            [total_q, heads]        f32              natural logarithm; -inf where no key is visible
//
// Tile      128 queries of one head and sequence, 128 keys at a time in rings of two. Persistent: a CTA takes the next
//           tile from a counter. Within a sequence the heads whose keys fit in L2 together go first, of them the last
//           queries, which see the most keys.
// Roles     warpgroups 0, 1: 64 queries each. The scores of the next keys are on the tensor core before the product
//           with the values of these, which covers the softmax of the next. The two take turns at giving it work.
//           warp 8: finds tiles and loads by TMA.   warps 9, 10: clear values that are not finite, see below.
// Barriers  queue: tiles from warp 8 to the others.   q_full, q_empty; k, v: rings' full (the bytes) and empty (one
//           arrival of each math warp).   v_loaded: the bytes of values that are to be cleared; the two clearing warps
//           then make the two arrivals of v's full, which otherwise the producer makes.   turn: the math warpgroups'.
// Shared    MlaPrefillShared below: 48 KiB q, 2 x 48 KiB k, 2 x 32 KiB v, 16 KiB outputs.
// Numerics  Scores, sums and probabilities in float32; probabilities are rounded to the type of q for the product with
//           the values. The bits of a row depend on its own sequence alone.
// Limits    Rows start at multiples of 16 bytes. Offsets are clamped, and each counts as the largest so far: whatever
//           they are, rows are stored once, and those of no sequence get 0 and -inf.
//           A key that a query does not see leaves no trace, though it be NaN: its score is masked; and where some
//           of the tile's queries do not see a value that is not finite, it is taken as 0, and its channel made NaN for
//           those who see it.
// Source    DeepSeek-V2 report, arXiv:2405.04434, section 2.1; the schedule, FlashAttention-3, arXiv:2407.08608,
//           section 3.   Launched by launch/mla_prefill.cu.   docs/mla_prefill.md
#pragma once

#include "device/math.cuh"
#include "device/pipeline.cuh"
#include "device/segments.cuh"
#include "device/softmax.cuh"
#include "device/tile.cuh"
#include "device/tile_queue.cuh"
#include "kernels/mla_prefill_arguments.h"
#include "ptx/matrix.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace dso {

inline constexpr int kPrefillTile = 128;  // queries, and keys
inline constexpr int kPrefillKeyDim = 192, kPrefillValueDim = 128;
inline constexpr int kPrefillKeyBoxes = kPrefillKeyDim / 64, kPrefillValueBoxes = kPrefillValueDim / 64;
inline constexpr int kPrefillBoxBytes = kPrefillTile * kSwizzleBytes;  // of 64 channels
inline constexpr int kPrefillMathWarps = 8, kPrefillCleaningWarps = kPrefillValueBoxes;
inline constexpr int kPrefillProducerWarp = kPrefillMathWarps;
inline constexpr int kPrefillThreads = 384;
inline constexpr int kNoKey = 0x7FFFFFFF;

/// Keys and values of this many tokens, all heads counted, stay in L2 while tiles that need them are computed.
inline constexpr int kPrefillTokensInL2 = (32 << 20) / (2 * (kPrefillKeyDim + kPrefillValueDim));

/// 128 queries or fewer of a head, and the keys that they see.
struct PrefillTile {
    int first_row, num_rows;  // of q; no rows: there is no further tile
    int head;
    int first_key;  // of the sequence, in k
    int visible;    // keys of the sequence that the first row sees, if positive
    int num_key_tiles;
    int first_cut;  // tile of keys that not all rows see whole; those before it are seen by all
};

struct MlaPrefillShared {
    alignas(kSwizzleAtomBytes) uint8_t q[kPrefillKeyBoxes][kPrefillBoxBytes];
    alignas(kSwizzleAtomBytes) uint8_t k[2][kPrefillKeyBoxes][kPrefillBoxBytes];
    alignas(kSwizzleAtomBytes) uint8_t v[2][kPrefillValueBoxes][kPrefillBoxBytes];
    alignas(kSwizzleAtomBytes) uint8_t panels[kPrefillMathWarps][16 * kSwizzleBytes];  // of outputs on their way
    int first_poison[2][kPrefillValueDim];  // the first key of a tile whose value in this channel is not finite
    bool is_poisoned[2][kPrefillValueBoxes];
    alignas(8) Pipeline<2> keys, values;
    uint64_t q_full, q_empty;
    uint64_t v_loaded[2];
    uint64_t turn[2];
    WorkQueue<PrefillTile> queue;
};

using PrefillRing = PipelineState<2>;

// ------------------------------------------------------------------------------------------------------ tiles

/// Counts the tiles of all segments, and gives this CTA those that it draws. By all lanes of one warp. The rows of no
/// sequence see no key.
class PrefillScheduler {
  public:
    DSO_DEVICE explicit PrefillScheduler(const MlaPrefillArguments& arguments)
        : arguments_(arguments),
          rows_(arguments.cu_seqlens_q, arguments.b, arguments.total_q),
          keys_(arguments.cu_seqlens_k, arguments.b, arguments.total_k) {
        load();
    }

    DSO_DEVICE PrefillTile next() {
        const int lane = threadIdx.x % 32;
        const int index = is_first_ ? static_cast<int>(blockIdx.x) : __shfl_sync(0xFFFFFFFF, drawn_, 0);
        is_first_ = false;
        // The one after it is drawn now, and looked at when this one is loaded.
        if (lane == 0) drawn_ = static_cast<int>(gridDim.x) + atomicAdd(arguments_.num_taken, 1);

        while (index - counted_ >= __shfl_sync(0xFFFFFFFF, tiles_, 31)) {
            counted_ += __shfl_sync(0xFFFFFFFF, tiles_, 31);
            first_segment_ += 32;
            if (first_segment_ > arguments_.b + 1) return {};
            load();
        }
        // The first lane with tiles beyond the index has it.
        const int owner = __ffs(static_cast<int>(__ballot_sync(0xFFFFFFFF, index - counted_ < tiles_))) - 1;
        const int start_q = __shfl_sync(0xFFFFFFFF, rows_.start, owner),
                  end_q = __shfl_sync(0xFFFFFFFF, rows_.end, owner);
        const int start_k = __shfl_sync(0xFFFFFFFF, keys_.start, owner),
                  end_k = __shfl_sync(0xFFFFFFFF, keys_.end, owner);
        const int segment = first_segment_ + owner;
        const bool is_sequence = segment >= 1 && segment <= arguments_.b;
        const int num_blocks = num_blocks_of(end_q - start_q);
        const int past = index - counted_ - __shfl_sync(0xFFFFFFFF, tiles_, owner) + num_blocks * arguments_.num_heads;
        return tile_of(start_q, end_q - start_q, start_k, is_sequence ? end_k - start_k : 0, num_blocks, past);
    }

  private:
    DSO_DEVICE static int num_blocks_of(int s_q) { return s_q > 0 ? (s_q - 1) / kPrefillTile + 1 : 0; }

    DSO_DEVICE void load() {
        const int segment = first_segment_ + static_cast<int>(threadIdx.x % 32);
        rows_.load(segment);
        keys_.load(segment);
        tiles_ = scan_lanes(num_blocks_of(rows_.end - rows_.start) * arguments_.num_heads,
                            [](int x, int y) { return x + y; });
    }

    DSO_DEVICE PrefillTile tile_of(int start_q, int s_q, int start_k, int s_k, int num_blocks, int index) const {
        // As many heads as L2 has the keys of, or as it takes to employ all CTAs; then in even shares.
        const int most = max(kPrefillTokensInL2 / max(1, s_k), ceil_div(static_cast<int>(gridDim.x), num_blocks));
        const int heads_at_once = ceil_div(arguments_.num_heads, ceil_div(arguments_.num_heads, most));
        const int first_head = index / (heads_at_once * num_blocks) * heads_at_once;
        const int num_heads = min(heads_at_once, arguments_.num_heads - first_head);
        const int place = index - first_head * num_blocks;
        const int row = (num_blocks - 1 - place / num_heads) * kPrefillTile;

        PrefillTile tile;
        tile.first_row = start_q + row;
        tile.num_rows = min(kPrefillTile, s_q - row);
        tile.head = first_head + place % num_heads;
        tile.first_key = start_k;
        tile.visible = arguments_.is_causal ? s_k - s_q + row + 1 : s_k;
        const int last_visible = arguments_.is_causal ? tile.visible + tile.num_rows - 1 : s_k;
        tile.num_key_tiles = last_visible > 0 ? (last_visible - 1) / kPrefillTile + 1 : 0;
        tile.first_cut = max(0, tile.visible) / kPrefillTile;
        return tile;
    }

    const MlaPrefillArguments& arguments_;
    Segments rows_, keys_;  // of this lane's segment
    int tiles_ = 0;         // of the segments up to this lane's
    int first_segment_ = 0, counted_ = 0;
    int drawn_ = 0;  // lane 0's
    bool is_first_ = true;
};

// ---------------------------------------------------------------------------------------------------- loading

struct PrefillMaps {
    const TensorMap *q, *k, *v;
};

/// Warp 8.
class PrefillProducer {
  public:
    DSO_DEVICE PrefillProducer(MlaPrefillShared& shared, const PrefillMaps& maps, const MlaPrefillArguments& arguments)
        : shared_(shared), maps_(maps), arguments_(arguments), scheduler_(arguments) {}

    DSO_DEVICE void run() {
        uint32_t num_pushed = 0;
        for (;;) {
            const PrefillTile tile = scheduler_.next();
            if (tile.num_rows > 0 && tile.num_key_tiles == 0) {
                store_nothing(tile);
                continue;
            }
            shared_.queue.push(num_pushed, tile);
            if (tile.num_rows == 0) return;
            if (ptx::elect_one()) load(tile);
            __syncwarp();
        }
    }

  private:
    /// A tile that sees no key is done with at once.
    DSO_DEVICE void store_nothing(const PrefillTile& tile) {
        const int lane = threadIdx.x % 32;
        auto* out = static_cast<uint16_t*>(arguments_.out);
        for (int i = lane / 16; i < tile.num_rows; i += 2) {
            const int64_t row = int64_t{tile.first_row + i} * arguments_.num_heads + tile.head;
            *reinterpret_cast<uint4*>(out + row * kPrefillValueDim + lane % 16 * 8) = uint4{};
            if (lane % 16 == 0) arguments_.lse[row] = kMinusInfinity;
        }
        __syncwarp();
    }

    DSO_DEVICE void load(const PrefillTile& tile) {
        for (int i = 0; i < tile.num_key_tiles; ++i) {
            const int key = tile.first_key + i * kPrefillTile;
            shared_.keys.acquire(k_);
            load_boxes(shared_.k[k_.stage], maps_.k, &shared_.keys.full[k_.stage], key, tile.head);
            k_.advance();
            // After the first keys, for which there is room earlier.
            if (i == 0) {
                ptx::mbarrier_wait(&shared_.q_empty, q_phase_ ^ 1);
                q_phase_ ^= 1;
                load_boxes(shared_.q, maps_.q, &shared_.q_full, tile.first_row, tile.head);
            }
            shared_.values.acquire(v_);
            uint64_t* full = &shared_.values.full[v_.stage];
            if (i < tile.first_cut) ptx::mbarrier_arrive_times(full, kPrefillCleaningWarps - 1);
            load_boxes(shared_.v[v_.stage], maps_.v, i < tile.first_cut ? full : &shared_.v_loaded[v_.stage], key,
                       tile.head);
            v_.advance();
        }
    }

    template <int kBoxes>
    DSO_DEVICE static void load_boxes(uint8_t (&boxes)[kBoxes][kPrefillBoxBytes], const TensorMap* map, uint64_t* full,
                                      int row, int head) {
        ptx::mbarrier_arrive_expect_tx(full, kBoxes * kPrefillBoxBytes);
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) ptx::tma_load_3d(boxes[box], map, full, box * 64, row, head);
    }

    MlaPrefillShared& shared_;
    const PrefillMaps maps_;
    const MlaPrefillArguments& arguments_;
    PrefillScheduler scheduler_;
    PrefillRing k_, v_;
    uint32_t q_phase_ = 0;
};

// --------------------------------------------------------------------------------------------------- clearing

/// Which halves of a pair of 16-bit numbers are not finite: bits 15 and 31.
template <ptx::HalfType type>
DSO_DEVICE uint32_t not_finite(uint32_t pair) {
    // An exponent of ones carries into the sign's place.
    constexpr uint32_t kExponent = type == ptx::HalfType::kBF16 ? 0x7F80 : 0x7C00;
    constexpr uint32_t kOne = type == ptx::HalfType::kBF16 ? 0x0080 : 0x0400;
    return ((pair & (kExponent << 16 | kExponent)) + (kOne << 16 | kOne)) & 0x80008000u;
}

/// A warp's box of 64 channels of values in tiles that not all queries see whole: a weight of 0 does not make NaN
/// vanish. The values of other sequences, behind the last key, are among them.
template <ptx::HalfType type>
class PrefillCleaner {
  public:
    DSO_DEVICE PrefillCleaner(MlaPrefillShared& shared, int box)
        : shared_(shared), box_(box), lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run() {
        uint32_t num_popped = 0, num_tiles = 0, phases = 0;
        for (;; shared_.queue.pop(num_popped)) {
            const PrefillTile tile = shared_.queue.front(num_popped);
            if (tile.num_rows == 0) return;
            for (int i = tile.first_cut; i < tile.num_key_tiles; ++i) {
                const uint32_t stage = (num_tiles + i) % 2;
                ptx::mbarrier_wait(&shared_.v_loaded[stage], phases >> stage & 1);
                phases ^= 1u << stage;
                clean(stage);
                ptx::fence_proxy_async_shared();
                __syncwarp();
                if (lane_ == 0) ptx::mbarrier_arrive(&shared_.values.full[stage]);
            }
            num_tiles += tile.num_key_tiles;
        }
    }

  private:
    DSO_DEVICE void clean(uint32_t stage) {
        const uint8_t* values = shared_.v[stage][box_];
        uint32_t found = 0;
#pragma unroll 8
        for (int i = 0; i < kPrefillTile; i += 4) {
            const auto x = *reinterpret_cast<const uint4*>(values + swizzled_offset(i + lane_ / 8, lane_ % 8));
            found |= not_finite<type>(x.x) | not_finite<type>(x.y) | not_finite<type>(x.z) | not_finite<type>(x.w);
        }
        const bool is_poisoned = __any_sync(0xFFFFFFFF, found != 0);
        if (lane_ == 0) shared_.is_poisoned[stage][box_] = is_poisoned;
        if (is_poisoned) clear(stage);
    }

    /// Each lane has two channels.
    DSO_DEVICE void clear(uint32_t stage) {
        int first[2] = {kNoKey, kNoKey};
#pragma unroll 1
        for (int key = 0; key < kPrefillTile; ++key) {
            auto* pair =
                reinterpret_cast<uint32_t*>(shared_.v[stage][box_] + swizzled_offset(key, lane_ / 4) + lane_ % 4 * 4);
            const uint32_t found = not_finite<type>(*pair);
            if (found == 0) continue;
            if (found & 0x8000u) first[0] = min(first[0], key);
            if (found >> 31) first[1] = min(first[1], key);
            *pair &= (found & 0x8000u ? 0 : 0xFFFFu) | (found >> 31 ? 0 : 0xFFFF0000u);
        }
        shared_.first_poison[stage][box_ * 64 + 2 * lane_] = first[0];
        shared_.first_poison[stage][box_ * 64 + 2 * lane_ + 1] = first[1];
    }

    MlaPrefillShared& shared_;
    const int box_, lane_;
};

// ------------------------------------------------------------------------------------------------------- math

template <ptx::HalfType type>
DSO_DEVICE uint32_t pack_pair(float low, float high) {
    return type == ptx::HalfType::kBF16 ? ptx::pack_bf16x2(low, high) : ptx::pack_f16x2(low, high);
}

/// A warpgroup's 64 queries of each tile.
template <ptx::HalfType type>
class PrefillMath {
  public:
    DSO_DEVICE PrefillMath(MlaPrefillShared& shared, const MlaPrefillArguments& arguments, int warp)
        : shared_(shared), arguments_(arguments), warp_(warp), lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run() {
        PrefillTile tile = next_tile();
        if (tile.num_rows == 0) return;
        float scores[64], sums[64] = {};
        start_tile(scores);
        ptx::wgmma_wait<0>();
        ptx::keep_in_order(scores);
        for (;;) {
            SoftmaxRows rows;
            uint32_t p[8][4];
            compute(tile, rows, scores, sums, p);
            const PrefillTile next = next_tile();
            // (No branch between the start of a product and its end: ptxas would serialize.)
            if (next.num_rows == 0) {
                start_values(sums, p, tile.num_key_tiles > 1);
                ptx::wgmma_wait<0>();
                finish_tile(tile, rows, sums, p);
                return;
            }
            // The first scores of the next tile run under this one's epilogue.
            start_values(sums, p, tile.num_key_tiles > 1);
            start_tile(scores);
            ptx::wgmma_wait<1>();
            finish_tile(tile, rows, sums, p);
            ptx::wgmma_wait<0>();
            ptx::keep_in_order(scores);
            tile = next;
        }
    }

  private:
    DSO_DEVICE int group() const { return warp_ / 4; }
    DSO_DEVICE int row(int i) const { return warp_ * 16 + lane_ / 4 + 8 * i; }

    /// Keys that row `row(i)` sees; of a row that is not the tile's own, any number.
    DSO_DEVICE int visible(const PrefillTile& tile, int i) const {
        return arguments_.is_causal ? tile.visible + row(i) : tile.visible;
    }

    /// The one before is given back: what was read of it has been used by now.
    DSO_DEVICE PrefillTile next_tile() {
        if (has_tile_) shared_.queue.pop(num_popped_);
        has_tile_ = true;
        return shared_.queue.front(num_popped_);
    }

    /// Starts the scores of the tile that came last from the queue.
    DSO_DEVICE void start_tile(float (&scores)[64]) {
        ptx::mbarrier_wait(&shared_.q_full, q_phase_);
        q_phase_ ^= 1;
        take_turn();
        start_scores(scores);
        pass_turn();
    }

    /// All of a tile whose first scores are there, but for the product with the last values.
    DSO_DEVICE void compute(const PrefillTile& tile, SoftmaxRows& rows, float (&scores)[64], float (&sums)[64],
                            uint32_t (&p)[8][4]) {
        float correction[2];
        finish_scores(scores, tile, 0);
        take_probabilities(scores, correction, rows, tile, 0);
        pack(p, scores);
        const int num_whole = num_whole_tiles(tile);
        for (int i = 1; i < num_whole; ++i) step(tile, i, rows, scores, sums, p);
        if (num_whole < tile.num_key_tiles) {
            float half[32];
            step(tile, num_whole, rows, half, sums, p);
        }
    }

    /// How many of the tiles of keys are taken whole: of the last no row of the warpgroup may see more than half. (The
    /// first always is: its scores were started before.)
    DSO_DEVICE int num_whole_tiles(const PrefillTile& tile) const {
        const int last = tile.num_key_tiles - 1, last_row = min(group() * 64 + 63, tile.num_rows - 1);
        const int seen = arguments_.is_causal ? tile.visible + last_row : tile.visible;
        return last > 0 && seen - last * kPrefillTile <= kPrefillTile / 2 ? last : last + 1;
    }

    /// The scores of tile `i` of keys, or of its first half, to probabilities; and the product with the values before.
    template <int kCount>
    DSO_DEVICE void step(const PrefillTile& tile, int i, SoftmaxRows& rows, float (&scores)[kCount], float (&sums)[64],
                         uint32_t (&p)[8][4]) {
        float correction[2];
        take_turn();
        start_scores(scores);
        start_values(sums, p, i > 1);
        pass_turn();
        ptx::wgmma_wait<1>();
        finish_scores(scores, tile, i);
        take_probabilities(scores, correction, rows, tile, i);
        // They are there long since. But ptxas moves the wait for WGMMA up to the last branch, before a softmax that is
        // to run meanwhile.
        shared_.values.wait(v_);
        ptx::wgmma_wait<0>();
        ptx::keep_in_order(sums);
        ptx::keep_in_order(p);
        finish_values(sums, tile, i - 1);
        scale_rows(sums, correction[0], correction[1]);
        pack(p, scores);
    }

    /// One warpgroup's softmax runs under the other's products, not beside its softmax. Group 0 begins.
    DSO_DEVICE void take_turn() {
        ptx::mbarrier_wait(&shared_.turn[group()], turn_phase_ ^ (group() == 0 ? 1u : 0u));
        turn_phase_ ^= 1;
    }
    DSO_DEVICE void pass_turn() {
        if (lane_ == 0) ptx::mbarrier_arrive(&shared_.turn[group() ^ 1]);
    }

    template <int kCount>
    DSO_DEVICE void start_scores(float (&scores)[kCount]) {
        // Twelve descriptors of q, the same for every tile of keys: not to be kept in registers.
        const uint64_t q = wgmma_descriptor(shared_.q[0] + group() * 64 * kSwizzleBytes + ptx::compute_here(0));
        const uint64_t k = wgmma_descriptor(shared_.k[k_.stage][0]);
        shared_.keys.wait(k_);
        ptx::keep_in_order(scores);
        ptx::wgmma_fence();
#pragma unroll
        for (int box = 0; box < kPrefillKeyBoxes; ++box) {
#pragma unroll
            for (int byte = 0; byte < kSwizzleBytes; byte += 32) {
                const int offset = box * kPrefillBoxBytes + byte;
                ptx::WgmmaHalf<type, 2 * kCount>::mma(scores, advance_descriptor(q, offset),
                                                      advance_descriptor(k, offset), offset != 0);
            }
        }
        ptx::wgmma_commit();
        ptx::keep_in_order(scores);
    }

    /// After the wait for them: lets the producer have the keys' place, and after the tile's last that of the queries.
    template <int kCount>
    DSO_DEVICE void finish_scores(float (&scores)[kCount], const PrefillTile& tile, int i) {
        ptx::keep_in_order(scores);
        __syncwarp();
        if (lane_ == 0) {
            shared_.keys.release(k_);
            if (i + 1 == tile.num_key_tiles) ptx::mbarrier_arrive(&shared_.q_empty);
        }
        k_.advance();
    }

    /// The key within the tile, and the channel of the output, that a lane's element belongs to.
    DSO_DEVICE int column_of(int element) const { return element / 4 * 8 + lane_ % 4 * 2 + element % 2; }

    /// Scores to probabilities, relative to the largest score so far.
    template <int kCount>
    DSO_DEVICE void take_probabilities(float (&scores)[kCount], float (&correction)[2], SoftmaxRows& rows,
                                       const PrefillTile& tile, int i) {
        if (i >= tile.first_cut) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                if (column_of(j) >= visible(tile, j / 2 % 2) - i * kPrefillTile) scores[j] = kMinusInfinity;
            }
        }
        rows.add_tile(scores, arguments_.scale_log2, correction, [](int) {});
        ptx::keep_in_order(scores);
    }

    /// Nobody may touch these registers while a WGMMA that reads them is in flight, so they are not packed earlier.
    template <int kCount>
    DSO_DEVICE static void pack(uint32_t (&p)[8][4], float (&scores)[kCount]) {
        ptx::keep_in_order(scores);
#pragma unroll
        for (int i = 0; i < 32; ++i)
            p[i / 4][i % 4] = 2 * i < kCount ? pack_pair<type>(scores[2 * i], scores[2 * i + 1]) : 0;
        ptx::keep_in_order(p);
    }

    /// The sums are not cleared for a tile's first product: nothing but WGMMA may write them while scores are in
    /// flight.
    DSO_DEVICE void start_values(float (&sums)[64], uint32_t (&p)[8][4], bool accumulate) {
        const uint64_t v = wgmma_transposed_descriptor(shared_.v[v_.stage][0], kPrefillBoxBytes);
        shared_.values.wait(v_);
        ptx::keep_in_order(sums);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 8; ++k)
            ptx::WgmmaHalf<type, 128>::mma_registers_transposed(
                sums, p[k], advance_descriptor(v, k * 16 * kSwizzleBytes), accumulate || k > 0);
        ptx::wgmma_commit();
        ptx::keep_in_order(sums);
    }

    /// After the wait for them: a channel becomes NaN where a value was cleared, and the producer has the values'
    /// place.
    DSO_DEVICE void finish_values(float (&sums)[64], const PrefillTile& tile, int i) {
        if (i >= tile.first_cut) {
            if (shared_.is_poisoned[v_.stage][0] || shared_.is_poisoned[v_.stage][1]) poison(sums, tile, i);
            __syncwarp();
        }
        if (lane_ == 0) shared_.values.release(v_);
        v_.advance();
    }

    /// For the rows that see the value.
    DSO_DEVICE void poison(float (&sums)[64], const PrefillTile& tile, int i) const {
#pragma unroll
        for (int j = 0; j < 64; ++j) {
            const int box = j / 32, key = shared_.first_poison[v_.stage][column_of(j)];
            if (shared_.is_poisoned[v_.stage][box] && key < visible(tile, j / 2 % 2) - i * kPrefillTile)
                sums[j] = __uint_as_float(0x7FFFFFFFu);
        }
    }

    /// When the last product is there.
    DSO_DEVICE void finish_tile(const PrefillTile& tile, SoftmaxRows& rows, float (&sums)[64], uint32_t (&p)[8][4]) {
        ptx::keep_in_order(sums);
        ptx::keep_in_order(p);
        rows.finish();
        float inverse[2], results[64];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            inverse[i] = inverse_of(rows.sum[i]);
            if (lane_ % 4 == 0 && row(i) < tile.num_rows)
                arguments_.lse[int64_t{tile.first_row + row(i)} * arguments_.num_heads + tile.head] =
                    log2_sum(rows.base(i, arguments_.scale_log2), rows.sum[i]) * kLn2;
        }
        // What is infinite, for a value was, becomes NaN.
#pragma unroll
        for (int i = 0; i < 64; ++i) results[i] = __fmaf_rn(sums[i], 0.f, sums[i] * inverse[i / 2 % 2]);
        finish_values(results, tile, tile.num_key_tiles - 1);
        // Through shared memory, so that eight lanes store 128 neighbouring bytes.
        uint8_t* panel = shared_.panels[warp_];
        auto* out = static_cast<uint16_t*>(arguments_.out);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float* x = &results[32 * half + 8 * j];
                ptx::stmatrix_x4(panel + swizzled_offset(lane_ % 16, 2 * j + lane_ / 16), pack_pair<type>(x[0], x[1]),
                                 pack_pair<type>(x[2], x[3]), pack_pair<type>(x[4], x[5]), pack_pair<type>(x[6], x[7]));
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int of_warp = 4 * i + lane_ / 8, of_tile = warp_ * 16 + of_warp;
                if (of_tile >= tile.num_rows) continue;
                const int64_t place = int64_t{tile.first_row + of_tile} * arguments_.num_heads + tile.head;
                *reinterpret_cast<uint4*>(out + place * kPrefillValueDim + 64 * half + lane_ % 8 * 8) =
                    *reinterpret_cast<const uint4*>(panel + swizzled_offset(of_warp, lane_ % 8));
            }
            __syncwarp();
        }
    }

    MlaPrefillShared& shared_;
    const MlaPrefillArguments& arguments_;
    const int warp_, lane_;
    PrefillRing k_, v_;
    bool has_tile_ = false;
    uint32_t num_popped_ = 0, q_phase_ = 0, turn_phase_ = 0;
};

// ---------------------------------------------------------------------------------------------------- kernels

/// Puts the counter of tiles to 0: one thread, before the kernel below. A memset would end the chain of kernels that
/// start while the one before them ends.
__global__ void __launch_bounds__(32, 1) mla_prefill_counter_kernel(int32_t* num_taken) {
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();
    if (threadIdx.x == 0) *num_taken = 0;
}

template <ptx::HalfType type>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    sm90_mla_prefill_kernel(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k,
                            const __grid_constant__ TensorMap map_v,
                            const __grid_constant__ MlaPrefillArguments arguments) {
    static_assert(sizeof(MlaPrefillShared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<MlaPrefillShared>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);

    if (threadIdx.x == kPrefillProducerWarp * 32) {
        shared.keys.init(1, kPrefillMathWarps);
        shared.values.init(kPrefillCleaningWarps, kPrefillMathWarps);
        ptx::prefetch_tensor_map(&map_q);
        if (arguments.total_k > 0) {
            ptx::prefetch_tensor_map(&map_k);
            ptx::prefetch_tensor_map(&map_v);
        }
        ptx::mbarrier_init(&shared.q_full, 1);
        ptx::mbarrier_init(&shared.q_empty, kPrefillMathWarps);
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(&shared.v_loaded[i], 1);
            ptx::mbarrier_init(&shared.turn[i], kPrefillMathWarps / 2);
        }
        shared.queue.init(kPrefillMathWarps + kPrefillCleaningWarps);
    }
    __syncthreads();
    ptx::grid_launch_dependents();
    ptx::grid_dependency_wait();

    if (warp >= kPrefillMathWarps) {
        ptx::setmaxnreg_dec<40>();
        if (warp == kPrefillProducerWarp) {
            PrefillProducer(shared, {&map_q, &map_k, &map_v}, arguments).run();
        } else if (warp <= kPrefillProducerWarp + kPrefillCleaningWarps) {
            PrefillCleaner<type>(shared, warp - kPrefillProducerWarp - 1).run();
        }
    } else {
        ptx::setmaxnreg_inc<232>();
        PrefillMath<type>(shared, arguments, warp).run();
    }
}

}  // namespace dso
