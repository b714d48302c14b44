// Which tile of a GEMM of one or more groups a CTA computes next, from a layout that lies on the device.
//
// Layouts are not trusted: counts and offsets are clamped to the rows there are, and an index that is no group's is
// nobody's. So no value of theirs leads out of bounds.
//
// A CTA starts with the tile of its number. Then it has every so-manieth, or, where groups make tiles of unequal
// height, the first that nobody has drawn: who is done early takes more.
#pragma once

#include "device/counter.cuh"
#include "device/math.cuh"
#include "device/row_layout.h"
#include "device/scheduler.cuh"
#include "device/tile_queue.cuh"

namespace dso {

/// The tiles of this CTA, or cluster, in order. All lanes of one warp ask together, and all get the answer.
/// A tile has up to kMaxRows rows of A, a multiple of kRowStep except at the end of a group, and BLOCK_N columns of D;
/// half as many, among the last ones, where kColumnStep allows; or kMostColumns, where a run of rows ends low.
template <int kMaxRows, int kRowStep, int BLOCK_N, int kColumnStep = BLOCK_N, int kMostColumns = BLOCK_N>
class RowScheduler {
    static constexpr bool kHasWideTiles = kMostColumns > BLOCK_N;
    static_assert(!kHasWideTiles || kMostColumns == kWideBlocks * BLOCK_N, "as scheduler.cuh counts them");

  public:
    DSO_DEVICE RowScheduler(const RowSchedule& schedule, int cta, int num_ctas)
        : schedule_(schedule), num_n_blocks_(ceil_div(schedule.n, BLOCK_N)), next_(cta), step_(num_ctas) {}

    DSO_DEVICE bool next(GemmTile& tile) {
        if (has_tile_) next_ = schedule_.counter ? draw() : next_ + step_;
        has_tile_ = true;
        return schedule_.row_layout == RowLayout::kDense ? next_dense(tile) : next_grouped(tile);
    }

    /// After the last tile of offsets: the first row that is somebody's, and one past the last. Those between are, too.
    DSO_DEVICE int first_owned_row() const { return clamp_row(schedule_.layout[0]); }
    DSO_DEVICE int owned_rows_end() const { return rows_end_; }

  private:
    DSO_DEVICE bool next_dense(GemmTile& tile) {
        if (next_ >= ceil_div(schedule_.m, kMaxRows) * num_n_blocks_) return false;
        tile = tile_at(place(next_, schedule_.m, kMaxRows), schedule_.m, kMaxRows);
        return true;
    }

    /// Where many rows meet b, a block of fewer comes last; where few do, all blocks that need the same b are
    /// neighbours.
    DSO_DEVICE Tile place(int index, int num_rows, int height) const {
        if constexpr (kRowStep >= 64) return rasterize_low_block_last(index, num_rows, height, num_n_blocks_);
        return rasterize(index, ceil_div(num_rows, height), num_n_blocks_);
    }

    /// Of a run of rows in blocks of `height`, as if row and matrix 0 were its first.
    DSO_DEVICE static GemmTile tile_at(const Tile& at, int num_rows, int height) {
        const int first_row = at.m_block * height;
        return {first_row, min(num_rows - first_row, height), 0, 0, at.n_block * BLOCK_N, BLOCK_N};
    }

    /// Only where CTAs draw their tiles. In a fixed order, after one that takes another time than its neighbours', a
    /// CTA is no longer at the same step as those with which it shares what L2 delivers.
    DSO_DEVICE bool makes_wide_tiles(int num_rows) const {
        return kHasWideTiles && schedule_.counter && ends_low(num_rows, kMaxRows);
    }

    DSO_DEVICE int num_tiles_of_run(int num_rows) const {
        if (makes_wide_tiles(num_rows)) return LowEndedGrid{num_rows / kMaxRows, num_n_blocks_}.num_tiles();
        return ceil_div(num_rows, kMaxRows) * num_n_blocks_;
    }

    DSO_DEVICE GemmTile tile_of_run(int index, int num_rows) const {
        if (makes_wide_tiles(num_rows)) {
            const Tile at = rasterize_wide_last(index, {num_rows / kMaxRows, num_n_blocks_});
            GemmTile tile = tile_at(at, num_rows, kMaxRows);
            if (tile.num_rows <= kLowRows)
                tile.num_columns = min(kMostColumns, num_n_blocks_ * BLOCK_N - tile.first_column);
            return tile;
        }
        // Blocks of equal height, as far as the step allows: of up to 64 rows, 70 are 40 and 30, not 64 and 6.
        const int num_blocks = ceil_div(num_rows, kMaxRows);
        const int height = align_up(ceil_div(num_rows, num_blocks), kRowStep);
        // Two are neighbours, so that b is read once.
        const Tile at = num_blocks == 2 ? rasterize(index, 2, num_n_blocks_) : place(index, num_rows, height);
        return tile_at(at, num_rows, height);
    }

    /// Each CTA draws until there are no more tiles: all together as often as there are tiles.
    DSO_DEVICE int draw() {
        int num_drawn = 0;
        if (threadIdx.x % 32 == 0) {
            if (!has_drawn_) open_counter(schedule_.counter);
            num_drawn = count(schedule_.counter);
        }
        has_drawn_ = true;
        return step_ + __shfl_sync(0xFFFFFFFF, num_drawn, 0);
    }

    DSO_DEVICE void close_after_last_draw() {
        const bool was_last = next_ - step_ == chunk_end_ - 1;
        if (schedule_.counter && was_last && threadIdx.x % 32 == 0) close_counter(schedule_.counter);
    }

    /// Runs of rows that meet the same matrix are looked at 32 at a time, a lane each; tiles are numbered run by run.
    DSO_DEVICE bool next_grouped(GemmTile& tile) {
        while (next_ >= chunk_end_) {
            if (load_chunk(threadIdx.x % 32)) continue;
            close_after_last_draw();
            return false;
        }
        const int half = next_ - first_half_, index = half < 0 ? next_ : first_half_ + half / 2;
        const int owner = __ffs(__ballot_sync(0xFFFFFFFF, last_tile_ > index)) - 1;
        const int num_rows = __shfl_sync(0xFFFFFFFF, num_rows_, owner);
        const int first_row = __shfl_sync(0xFFFFFFFF, first_row_, owner);
        const int last_tile = __shfl_sync(0xFFFFFFFF, last_tile_, owner);
        const int group = __shfl_sync(0xFFFFFFFF, group_, owner);
        tile = tile_of_run(index - (last_tile - num_tiles_of_run(num_rows)), num_rows);
        tile.first_row += first_row;
        tile.a_matrix = schedule_.row_layout == RowLayout::kMasked ? group : 0;
        tile.b_matrix = group;
        if (half >= 0) {
            tile.num_columns = BLOCK_N / 2;
            tile.first_column += half % 2 * tile.num_columns;
        }
        return true;
    }

    /// The next 32 candidates: groups, or segments of the contiguous layout.
    DSO_DEVICE bool load_chunk(int lane) {
        const int candidate = chunk_ + lane;
        chunk_ += 32;
        if (schedule_.row_layout == RowLayout::kContiguous) {
            if (chunk_ - 32 >= ceil_div(schedule_.m, kSegmentRows)) return false;
            load_segment(candidate, lane);
        } else {
            if (chunk_ - 32 >= schedule_.num_groups) return false;
            group_ = candidate;
            if (schedule_.row_layout == RowLayout::kMasked) {
                num_rows_ = candidate < schedule_.num_groups ? clamp_row(schedule_.layout[candidate]) : 0;
            } else {
                load_offsets(candidate, lane);
            }
        }
        last_tile_ = num_tiles_of_run(num_rows_);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xFFFFFFFF, last_tile_, distance);
            if (lane >= distance) last_tile_ += other;
        }
        last_tile_ += chunk_end_;
        chunk_end_ = __shfl_sync(0xFFFFFFFF, last_tile_, 31);
        if constexpr (kColumnStep < BLOCK_N) halve_last_tiles();
        return true;
    }

    /// Of a mask, the tiles that make no full wave, where half the columns each make nearly one: CTAs that have none
    /// would leave the others to read alone, more slowly. A half is read with half as many bytes on their way, so that
    /// where there are few of them they take longer.
    DSO_DEVICE void halve_last_tiles() {
        const int num_left = chunk_end_ % step_;
        const bool can_halve = schedule_.row_layout == RowLayout::kMasked && schedule_.counter;
        if (!can_halve || schedule_.num_groups > 32 || 2 * num_left > step_ || 8 * num_left < 3 * step_) return;
        first_half_ = chunk_end_ - num_left;
        chunk_end_ += num_left;
    }

    /// Offsets never decrease: each counts as the largest so far.
    DSO_DEVICE void load_offsets(int group, int lane) {
        const bool exists = group < schedule_.num_groups;
        const int begin = exists ? clamp_row(schedule_.layout[group]) : 0;
        int end = exists ? max(begin, clamp_row(schedule_.layout[group + 1])) : 0;
        if (lane == 0) end = max(end, rows_end_);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xFFFFFFFF, end, distance);
            if (lane >= distance) end = max(end, other);
        }
        const int before = __shfl_up_sync(0xFFFFFFFF, end, 1);
        first_row_ = max(begin, lane == 0 ? rows_end_ : before);
        num_rows_ = exists ? end - first_row_ : 0;
        rows_end_ = __shfl_sync(0xFFFFFFFF, end, 31);
    }

    /// Neighbouring segments of one group are one run, which its first segment's lane has.
    DSO_DEVICE void load_segment(int segment, int lane) {
        first_row_ = segment * kSegmentRows;
        group_ = group_of_segment(first_row_);
        const int before = __shfl_up_sync(0xFFFFFFFF, group_, 1);
        const bool is_first = lane == 0 || before != group_;
        const uint32_t firsts = __ballot_sync(0xFFFFFFFF, is_first);
        const uint32_t later = lane == 31 ? 0 : firsts >> (lane + 1);
        int num_segments = later == 0 ? 32 - lane : __ffs(later);
        const int num_more = segments_behind_chunk(__shfl_sync(0xFFFFFFFF, group_, 31));
        if (later == 0) num_segments += num_more;
        chunk_ += num_more;
        num_rows_ = is_first && group_ >= 0 ? min(num_segments * kSegmentRows, schedule_.m - first_row_) : 0;
    }

    /// How many go on with this chunk's last run: a run that ended with the chunk would end in a low tile.
    DSO_DEVICE int segments_behind_chunk(int group) const {
        int num_segments = 0;
        for (int num_equal = 32; num_equal == 32; num_segments += num_equal) {
            const int first_row = (chunk_ + num_segments + static_cast<int>(threadIdx.x % 32)) * kSegmentRows;
            const bool differs = first_row >= schedule_.m || group_of_segment(first_row) != group;
            const uint32_t others = __ballot_sync(0xFFFFFFFF, differs);
            num_equal = others == 0 ? 32 : __ffs(others) - 1;
        }
        return num_segments;
    }

    /// That of its first row which has one, or -1.
    DSO_DEVICE int group_of_segment(int first_row) const {
        for (int row = first_row; row < min(first_row + kSegmentRows, schedule_.m); ++row) {
            const int group = schedule_.layout[row];
            if (group >= 0 && group < schedule_.num_groups) return group;
        }
        return -1;
    }

    DSO_DEVICE int clamp_row(int row) const { return min(max(row, 0), schedule_.m); }

    const RowSchedule& schedule_;
    int num_n_blocks_, next_, step_;
    bool has_tile_ = false, has_drawn_ = false;
    int chunk_ = 0, chunk_end_ = 0,
        rows_end_ = 0;             // the next chunk's first candidate; the ends of this one's tiles, rows
    int first_half_ = 0x7FFFFFFF;  // each tile from here on is two, of half as many columns
    int group_ = 0, first_row_ = 0, num_rows_ = 0, last_tile_ = 0;  // of this lane's run; one past its last tile
};

}  // namespace dso
