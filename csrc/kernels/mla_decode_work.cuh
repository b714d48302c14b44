// What the MLA decoding kernels share: which rows and which of their keys a CTA has, where keys lie, where results go.
//
// A tile of rows is some (query, head) pairs of a request, packed: 64 of them for sm90_mla_decode.cuh, 16 for
// sm90_mla_decode_few_rows.cuh. Its keys are shared, in tiles of 64, by the CTAs of a cluster and by clusters
// ("parts"); mla_decode_combination.cuh adds their results up.
#pragma once

#include "device/math.cuh"
#include "device/segments.cuh"
#include "device/softmax.cuh"
#include "kernels/mla_decode_arguments.h"
#include "ptx/cluster.cuh"
#include "ptx/matrix.cuh"
#include "ptx/tma.cuh"

namespace dso {

inline constexpr int kMlaTile = 64;  // keys
inline constexpr int kMlaKeyDim = 576, kMlaValueDim = 512;
inline constexpr int kMlaLoadWarps = 4, kMlaQuarter = kMlaTile / kMlaLoadWarps;

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

    /// A tile has up to `tile_rows` rows.
    DSO_DEVICE MlaDecodeRows(const MlaDecodeArguments& arguments, int tile_rows)
        : unit(static_cast<int>(ptx::cluster_index_x())), part(static_cast<int>(ptx::cta_index_y())) {
        if (arguments.cu_seqlens_q != nullptr) {
            // Where all tiles have as many parts, those that there are not come last: the others would wait for a place
            // until these have ended.
            if (arguments.num_parts > 1 && arguments.tiles_per_part == 0) {
                const int index = part * arguments.num_row_tiles + unit;
                unit = index / arguments.num_parts;
                part = index % arguments.num_parts;
            }
            find(arguments, tile_rows);
        } else {
            request = arguments.num_row_tiles > 1 ? unit / arguments.num_row_tiles : unit;
            s_q = arguments.s_q;
            take_tile(arguments, tile_rows, arguments.num_row_tiles > 1 ? unit % arguments.num_row_tiles : 0);
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
    DSO_DEVICE static int num_tiles_of(int rows, int tile_rows) { return rows > 0 ? (rows - 1) / tile_rows + 1 : 0; }

    DSO_DEVICE void take_tile(const MlaDecodeArguments& arguments, int tile_rows, int tile) {
        first_row = tile * tile_rows;
        num_rows = min(tile_rows, s_q * arguments.num_heads - first_row);
    }

    /// The tiles of ragged queries are numbered request by request.
    DSO_DEVICE void find(const MlaDecodeArguments& arguments, int tile_rows) {
        Segments queries(arguments.cu_seqlens_q, arguments.b, arguments.s_q);
        int num_counted = 0;
        for (int first = 0; first <= arguments.b + 1; first += 32) {
            queries.load(first + static_cast<int>(threadIdx.x % 32));
            const int tiles = scan_lanes(num_tiles_of((queries.end - queries.start) * arguments.num_heads, tile_rows),
                                         [](int x, int y) { return x + y; });
            const uint32_t beyond = __ballot_sync(0xFFFFFFFF, num_counted + tiles > unit);
            if (beyond != 0) {
                const int owner = __ffs(static_cast<int>(beyond)) - 1, segment = first + owner;
                request = segment >= 1 && segment <= arguments.b ? segment - 1 : kNobody;
                first_query = __shfl_sync(0xFFFFFFFF, queries.start, owner);
                s_q = __shfl_sync(0xFFFFFFFF, queries.end, owner) - first_query;
                const int past = num_counted + __shfl_sync(0xFFFFFFFF, tiles, owner) - unit;  // tiles from this one on
                take_tile(arguments, tile_rows, num_tiles_of(s_q * arguments.num_heads, tile_rows) - past);
                return;
            }
            num_counted += __shfl_sync(0xFFFFFFFF, tiles, 31);
        }
    }
};

/// Which of the shares of a request's keys is this CTA's. Its first tile has the same number, whatever the length, so
/// that it can be looked for while the length is on its way.
DSO_DEVICE int share_of(const MlaDecodeRows& rows, int cluster_size, int rank) {
    return rows.part * cluster_size + rank;
}

/// The keys that those rows see, and the CTA's tiles of them.
struct MlaDecodeKeys {
    int length;                // of the request
    int some_see, all_see;     // keys that the last of the rows sees, and the first
    int first_tile, end_tile;  // of the CTA's, and of all
    int tile_step;             // from one of the CTA's tiles to its next
    int num_tiles;             // of the CTA's
    int num_whole_tiles;       // tiles before this one have all their keys, if their pages exist
    int num_parts;             // that the keys are shared by

    /// The shares take tiles in turn.
    DSO_DEVICE MlaDecodeKeys(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int cluster_size,
                             int rank) {
        length = rows.request == MlaDecodeRows::kNobody
                     ? 0
                     : max(0, min(arguments.cache_seqlens[rows.request], arguments.max_keys));
        some_see = visible(arguments, rows, rows.num_rows - 1);
        all_see = visible(arguments, rows, 0);
        num_whole_tiles = max(some_see, 0) / kMlaTile;
        end_tile = ceil_div(max(some_see, 0), kMlaTile);
        num_parts = arguments.num_parts;
        if (arguments.tiles_per_part != 0)
            num_parts = max(1, min(num_parts, ceil_div(end_tile, arguments.tiles_per_part)));
        first_tile = share_of(rows, cluster_size, rank);
        tile_step = num_parts * cluster_size;
        num_tiles = num_tiles_before(end_tile);
    }

    /// How many of the CTA's tiles are among the first `end` of the request.
    DSO_DEVICE int num_tiles_before(int end) const {
        return end > first_tile ? (end - first_tile - 1) / tile_step + 1 : 0;
    }
    DSO_DEVICE int tile(int i) const { return first_tile + i * tile_step; }

    /// Keys that row `row` of the tile sees.
    DSO_DEVICE int visible(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int row) const {
        if (!arguments.is_causal) return length;
        return length - (rows.s_q - 1 - min(rows.query_of(arguments, row), rows.s_q - 1));
    }

    /// Which tiles come by TMA, before those that are gathered: pages whose rows are none of the request's are not
    /// loaded whole.
    DSO_DEVICE bool comes_by_tma(const MlaDecodeArguments& arguments, int tile) const {
        return arguments.box_rows != 0 && tile < num_whole_tiles;
    }
    /// How many of the CTA's tiles do.
    DSO_DEVICE int num_tiles_by_tma(const MlaDecodeArguments& arguments) const {
        return arguments.box_rows != 0 ? num_tiles_before(num_whole_tiles) : 0;
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

/// A row of the output.
DSO_DEVICE uint16_t* out_of(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int row) {
    return static_cast<uint16_t*>(arguments.out) +
           rows.offset(arguments, row, arguments.out_stride_b, arguments.out_stride_s, arguments.out_stride_h);
}

DSO_DEVICE void store_lse(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows, int row, float lse_log2) {
    const int64_t offset =
        rows.offset(arguments, row, int64_t{arguments.s_q} * arguments.num_heads, arguments.num_heads, 1);
    arguments.lse[offset] = lse_log2 * kLn2;
}

// ---------------------------------------------------------------------------------------------------- loading

/// Where a key of a request lies in the cache. May be asked for before the request's length is known.
struct MlaKey {
    int page, row;  // page -1, or another that there is not: there is no such key

    /// Of `num_keys` that there are; where the length is not known yet, that the table has room for. Past the length it
    /// holds anything.
    DSO_DEVICE MlaKey(const MlaDecodeArguments& arguments, const int32_t* table, int key, int num_keys) {
        const int column = key / arguments.page_size;
        page = key >= 0 && key < num_keys ? table[column] : -1;  // beyond 2^31 keys are none
        row = key - column * arguments.page_size;
    }

    /// Where it begins, in units of the strides; negative: there is no such key.
    DSO_DEVICE int64_t place(const MlaDecodeArguments& arguments) const {
        const bool exists = page >= 0 && page < arguments.num_pages;
        return exists ? page * arguments.page_stride + row * arguments.key_stride : -1;
    }
};

/// For how many keys a request's row of the table has room; none for nobody's rows, which have no such row.
DSO_DEVICE int room_of(const MlaDecodeArguments& arguments, const MlaDecodeRows& rows) {
    return rows.request == MlaDecodeRows::kNobody ? 0 : arguments.max_keys;
}

}  // namespace dso
