// Adds up what the CTAs of a cluster, and several clusters, have of a tile of rows. All in one order, so the bits are
// the same on every run.
//
// Each CTA of a cluster owns some columns. It reads the others' sums of these from their shared memory, where they lie
// as accumulators have them: a lane's four are two neighbouring columns of row lane / 4 and the same of row lane / 4 +
// 8 of a sixteenth of the rows. Of several parts it leaves what it has in global memory, and the last to come for these
// columns adds up all parts.
#pragma once

#include "device/counter.cuh"
#include "device/half.cuh"
#include "kernels/mla_decode_work.cuh"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kMlaGroups = kMlaValueDim / 8;  // of eight columns, two in each of four lanes
inline constexpr int kMlaMaxCluster = 8, kMlaMaxParts = 192, kMlaLoadsAtOnce = 8;

/// Of a part of a tile of rows, four at a time.
DSO_HOST_DEVICE constexpr int num_partial_sums(int tile_rows) { return kMlaGroups * (tile_rows / 16) * 32; }

template <int kTileRows>
struct MlaDecodeSums {
    float4 groups[kMlaGroups][kTileRows / 16][32];  // as the lanes of the warps have them, for the cluster to read
    float weights[kMlaMaxCluster][kTileRows];       // of each CTA's, for the CTA that reads them
    float part_weights[kMlaMaxParts][kTileRows];
};

/// What counts the parts of the columns that are this CTA's in its cluster.
DSO_DEVICE Counter* counter_of(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int cluster_size,
                               int rank) {
    return arguments.counters + int64_t{rows.unit} * cluster_size + rank;
}

/// By all warps that compute: adds up the cluster's sums, and the parts if this is the last of them to come. `Shared`
/// has `sums`, the `rows` that go with them, and `is_last`; where Types::kSendsRows, also `sent_rows`, which come from
/// the other CTAs of the cluster, and the mbarrier `all_sent` for them.
template <typename Types, typename Shared>
class MlaDecodeCombination {
  public:
    DSO_DEVICE MlaDecodeCombination(Shared& shared, const MlaDecodeArguments& arguments, int warp)
        : shared_(shared),
          arguments_(arguments),
          size_(static_cast<int>(ptx::cluster_size())),
          rank_(static_cast<int>(ptx::cluster_rank())),
          rows_(arguments, kTileRows),
          num_parts_(arguments.tiles_per_part != 0 ? MlaDecodeKeys(arguments, rows_, size_, rank_).num_parts
                                                   : arguments.num_parts),
          warp_(warp),
          lane_(threadIdx.x % 32) {}

    DSO_DEVICE void run() {
        ptx::fence_release_shared_to_cluster();
        ptx::cluster_arrive();
        const Out out(*this);  // found while others are waited for
        ptx::cluster_wait();
        combine_cluster(out);
        if (size_ > 1) ptx::cluster_arrive();  // this thread has read what it needs
        if (num_parts_ > 1 && is_last_part()) combine_parts(out);
        if (size_ > 1) ptx::cluster_wait();  // the others read from here
    }

  private:
    static constexpr int kTileRows = Types::kTileRows, kRowWarps = kTileRows / 16, kSums = num_partial_sums(kTileRows);
    static constexpr int kMathThreads = 32 * Types::kMathWarps;

    DSO_DEVICE int num_row_warps() const { return ceil_div(rows_.num_rows, 16); }
    DSO_DEVICE int num_groups() const { return kMlaGroups / size_; }  // of the CTA's own
    /// Each warp has one sixteenth of the rows, and some groups of the CTA's own.
    DSO_DEVICE int group_step() const { return Types::kMathWarps / num_row_warps(); }
    DSO_DEVICE int row_warp() const { return warp_ / group_step(); }
    DSO_DEVICE int first_group() const { return warp_ % group_step(); }
    DSO_DEVICE int row(int h) const { return row_warp() * 16 + lane_ / 4 + 8 * h; }

    /// The lane's rows of the output; null where there is none.
    struct Out {
        uint16_t* rows[2];
        int lane;

        DSO_DEVICE explicit Out(const MlaDecodeCombination& of) : lane(of.lane_) {
#pragma unroll
            for (int h = 0; h < 2; ++h)
                rows[h] = of.row(h) < of.rows_.num_rows ? out_of(of.arguments_, of.rows_, of.row(h)) : nullptr;
        }

        /// Two neighbours of each.
        DSO_DEVICE void store(int group, float4 x) const {
            const int column = Types::column_of(group, lane);
            const uint32_t pairs[2] = {pack_half<Types::kQuery>(x.x, x.y), pack_half<Types::kQuery>(x.z, x.w)};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (rows[h] != nullptr) *reinterpret_cast<uint32_t*>(rows[h] + column) = pairs[h];
            }
        }
    };

    DSO_DEVICE void combine_cluster(const Out& out) {
        float4 sources[kMlaMaxCluster];
        int owned = first_group();
        if (owned < num_groups()) read_sources(sources, rank_ * num_groups() + owned);
        float weights[kMlaMaxCluster][2];
        take_weights(weights);
        while (owned < num_groups()) {
            float4 sum{};
#pragma unroll
            for (int source = 0; source < kMlaMaxCluster; ++source) {
                sum.x += weights[source][0] * sources[source].x;
                sum.y += weights[source][0] * sources[source].y;
                sum.z += weights[source][1] * sources[source].z;
                sum.w += weights[source][1] * sources[source].w;
            }
            const int group = rank_ * num_groups() + owned;
            owned += group_step();
            if (owned < num_groups()) read_sources(sources, rank_ * num_groups() + owned);
            if (num_parts_ > 1) {
                *partial_sums(rows_.part, group) = sum;
            } else {
                out.store(group, sum);
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

    /// What each CTA's sums of the lane's two rows are to be multiplied by. A thread weighs a row for all: code that
    /// runs once takes longer to fetch than to run, and that of two rows a lane took a microsecond more.
    DSO_DEVICE void take_weights(float (&weights)[kMlaMaxCluster][2]) {
        if (threadIdx.x < kTileRows) weigh(static_cast<int>(threadIdx.x));
        ptx::named_barrier_sync(2, kMathThreads);
#pragma unroll
        for (int source = 0; source < kMlaMaxCluster; ++source) {
#pragma unroll
            for (int h = 0; h < 2; ++h) weights[source][h] = shared_.sums.weights[source][row(h)];
        }
    }

    DSO_DEVICE void wait_for_sent_rows() const {
        if constexpr (Types::kSendsRows) ptx::mbarrier_wait(&shared_.all_sent, 0);
    }

    /// The softmax of a row over the keys of CTA `source`. A copy to the CTA itself would be one more to wait for, and
    /// memcheck takes it for one out of bounds.
    DSO_DEVICE SoftmaxPart part_of(int row, int source) const {
        if constexpr (Types::kSendsRows) {
            return source == rank_ ? shared_.rows[row] : shared_.sent_rows[source][row];
        } else {
            const float4 x = ptx::load_from_cluster(ptx::cluster_address(&shared_.rows[row], source));
            return {x.x, x.y, x.z};
        }
    }

    /// What each CTA's sums of a row are to be multiplied by; and the row's logarithm.
    DSO_DEVICE void weigh(int row) {
        SoftmaxPart parts[kMlaMaxCluster];
        if (Types::kSendsRows && size_ > 1) wait_for_sent_rows();
#pragma unroll
        for (int source = 0; source < kMlaMaxCluster; ++source) {
            parts[source] = {kMinusInfinity, 0.f, 0.f};
            if (source < size_) parts[source] = part_of(row, source);
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
        ptx::named_barrier_sync(2, kMathThreads);
        if (threadIdx.x == 0) {
            Counter* counter = counter_of(arguments_, rows_, size_, rank_);
            __threadfence();
            shared_.is_last = count(counter) == num_parts_ - 1;
            __threadfence();
            if (shared_.is_last) close_counter(counter);
        }
        ptx::named_barrier_sync(2, kMathThreads);
        return shared_.is_last;
    }

    DSO_DEVICE void combine_parts(const Out& out) {
        if (num_parts_ <= 2) {
            add_parts<2>(out);
        } else if (num_parts_ <= 4) {
            add_parts<4>(out);
        } else {
            add_parts<kMlaLoadsAtOnce>(out);
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

    /// `kParts` parts of several groups at a time: as many loads are on their way at once. The first are while the
    /// weights are computed.
    template <int kParts>
    DSO_DEVICE void add_parts(const Out& out) {
        constexpr int kItems = kMlaLoadsAtOnce / kParts;
        float4 x[kItems][kParts];
        load_parts(x, first_group(), 0);
        if (threadIdx.x < 4 * kTileRows)
            weigh_parts(static_cast<int>(threadIdx.x) / 4, static_cast<int>(threadIdx.x) % 4);
        ptx::named_barrier_sync(2, kMathThreads);
        for (int owned = first_group(); owned < num_groups(); owned += kItems * group_step()) {
            float4 sums[kItems] = {};
            for (int first = 0; first < num_parts_; first += kParts) {
                if (owned != first_group() || first != 0) load_parts(x, owned, first);
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
                const int group = owned + item * group_step();
                if (group < num_groups()) out.store(rank_ * num_groups() + group, sums[item]);
            }
        }
    }

    /// Parts from `first` on of groups from `owned` on; zeros of those that there are not.
    template <int kItems, int kParts>
    DSO_DEVICE void load_parts(float4 (&x)[kItems][kParts], int owned, int first) const {
        const float4* places = partial_sums(first, rank_ * num_groups() + owned);
#pragma unroll
        for (int item = 0; item < kItems; ++item) {
#pragma unroll
            for (int i = 0; i < kParts; ++i) {
                const bool exists = owned + item * group_step() < num_groups() && first + i < num_parts_;
                x[item][i] = exists ? __ldcg(places + i * kSums) : float4{};
            }
            places += group_step() * kRowWarps * 32;
        }
    }

    DSO_DEVICE float4* partial_sums(int part, int group) const {
        const int64_t place = int64_t{rows_.unit} * arguments_.num_parts + part;
        return arguments_.partial_sums + place * kSums + (group * kRowWarps + row_warp()) * 32 + lane_;
    }
    /// Those of a row's parts follow one another.
    DSO_DEVICE float* partial_lse(int part, int row) const {
        const int64_t place = (int64_t{rows_.unit} * size_ + rank_) * kTileRows + row;
        return arguments_.partial_lse + place * arguments_.num_parts + part;
    }

    Shared& shared_;
    const MlaDecodeArguments& arguments_;
    const int size_, rank_;
    const MlaDecodeRows rows_;
    const int num_parts_;
    const int warp_, lane_;
};

}  // namespace dso
