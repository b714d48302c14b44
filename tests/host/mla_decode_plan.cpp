// How MLA decoding shares keys, for many shapes: within the limits of the kernel and of the GPU, and as measured.
#include "launch/mla_decode_plan.h"

#include <algorithm>
#include <initializer_list>

#include "expect.h"

namespace {

long long num_plans = 0;

dso::MlaDecodeShape shape_of(int64_t batch, int64_t rows, int64_t keys, int64_t key_bytes = 1152) {
    return {batch, 1, rows, false, keys, key_bytes};
}

dso::MlaDecodePlan plan(const dso::MlaDecodeShape& shape, int num_sms) {
    ++num_plans;
    return dso::plan_mla_decode(shape, num_sms);
}

void check(const dso::MlaDecodeShape& shape, int num_sms) {
    const dso::MlaDecodePlan chosen = plan(shape, num_sms);
    const int size = chosen.cluster_size, parts = chosen.num_parts;
    const auto keys = static_cast<long long>(shape.max_keys);
    EXPECT(chosen.tile_rows == 16 || chosen.tile_rows == 64, "tiles of %d rows", chosen.tile_rows);
    EXPECT(shape.num_rows() > 16 || chosen.tile_rows == 16 || shape.key_bytes > 1000, "%d rows for few of an FP8 cache",
           chosen.tile_rows);
    EXPECT(size == 1 || size == 2 || size == 4 || size == 8, "clusters of %d", size);
    EXPECT(parts >= 1 && parts <= 192, "%d parts", parts);
    EXPECT(parts == 1 || shape.num_units(chosen.tile_rows) * size * parts <= num_sms, "%d x %d do not run at once",
           size, parts);
    EXPECT(size * parts == 1 || size * parts <= (keys + 63) / 64, "more shares than tiles of %lld keys", keys);
    EXPECT(keys > 256 || (size * parts == 1 && chosen.tile_rows == (shape.num_rows() <= 16 ? 16 : 64)),
           "the plan for %lld keys depends on more than the request", keys);
}

// The fastest of those measured on an H200, or within 3 % of it (docs/mla_decode.md).
void pin(int64_t batch, int64_t rows, int64_t keys, int size, int parts, int tile_rows, int64_t key_bytes = 1152) {
    const dso::MlaDecodePlan chosen = plan(shape_of(batch, rows, keys, key_bytes), 132);
    EXPECT(chosen.cluster_size == size && chosen.num_parts == parts && chosen.tile_rows == tile_rows,
           "%lld requests of %lld rows over %lld keys: %d x %d by %d rows, not %d x %d by %d",
           static_cast<long long>(batch), static_cast<long long>(rows), static_cast<long long>(keys),
           chosen.cluster_size, chosen.num_parts, chosen.tile_rows, size, parts, tile_rows);
}

bool operator==(const dso::MlaDecodePlan& x, const dso::MlaDecodePlan& y) {
    return x.cluster_size == y.cluster_size && x.num_parts == y.num_parts && x.tiles_per_part == y.tiles_per_part &&
           x.tile_rows == y.tile_rows;
}

// Ragged queries, of which each request has as many, get the plan that they get where they are not ragged.
void check_ragged(int64_t batch, int64_t num_queries, int64_t num_heads, int64_t keys, int64_t key_bytes, int num_sms) {
    const dso::MlaDecodeShape equal{batch, num_queries, num_heads, false, keys, key_bytes},
        ragged{batch, batch * num_queries, num_heads, true, keys, key_bytes};
    EXPECT(plan(ragged, num_sms) == plan(equal, num_sms), "ragged, %lld requests of %lld rows are planned otherwise",
           static_cast<long long>(batch), static_cast<long long>(equal.num_rows()));
    EXPECT(dso::plan_batch_invariant_mla_decode(ragged) == dso::plan_batch_invariant_mla_decode(equal),
           "batch-invariant, %lld heads are planned otherwise if ragged", static_cast<long long>(num_heads));
}

// The tiles of rows that are planned for are those that there are if queries are spread evenly, and one of each request
// without. There is room for those of any others: where one request has all, and where all have one but one, which has
// the rest; but not for many more, for they cost memory and CTAs.
void check_units(int64_t batch, int64_t num_queries, int64_t num_heads, int tile_rows) {
    const dso::MlaDecodeShape shape{batch, num_queries, num_heads, true, 1000, 1152};
    const auto tiles_of = [&](int64_t queries) { return (queries * num_heads + tile_rows - 1) / tile_rows; };
    int64_t spread = 0;
    for (int64_t i = 0; i < batch; ++i)
        spread += std::max<int64_t>(tiles_of(num_queries * (i + 1) / batch - num_queries * i / batch), 1);
    const int64_t with_one = std::min(batch + 1, num_queries),
                  crowded = with_one * tiles_of(1) + tiles_of(num_queries - with_one);
    const auto planned = static_cast<long long>(shape.num_units(tile_rows)),
               most = static_cast<long long>(shape.max_units(tile_rows));
    EXPECT(batch == 0 || planned == spread, "%lld tiles, not %lld", planned, static_cast<long long>(spread));
    EXPECT(most >= std::max<int64_t>({planned, tiles_of(num_queries), crowded}), "no room for more than %lld tiles",
           most);
    EXPECT(most <= 2 * planned + 1, "room for %lld tiles where %lld are planned for", most, planned);
}

// The parts that a request of `keys` has are those of the plan for a table that is just wide enough: any table has room
// for them.
void check_batch_invariant(int64_t keys) {
    const dso::MlaDecodePlan splits = dso::plan_batch_invariant_mla_decode(shape_of(1, 16, keys));
    const dso::MlaDecodePlan wide = dso::plan_batch_invariant_mla_decode(shape_of(70, 16, 2 * keys + 1000));
    EXPECT(splits.cluster_size == 2 && splits.tiles_per_part == 16, "%d, %d", splits.cluster_size,
           splits.tiles_per_part);
    EXPECT(splits.num_parts >= 1 && splits.num_parts <= 16, "%d parts", splits.num_parts);
    EXPECT(splits.num_parts == 16 || int64_t{splits.num_parts} * splits.tiles_per_part * 64 >= keys,
           "%d parts are too few for %lld keys", splits.num_parts, static_cast<long long>(keys));
    EXPECT(wide.tile_rows == splits.tile_rows, "tiles of %d rows in a batch", wide.tile_rows);
    EXPECT(wide.num_parts >= splits.num_parts, "%d parts in a wider table", wide.num_parts);
}

}  // namespace

int main() {
    for (const int64_t keys : {0, 1, 64, 1024, 1025, 2048, 16'384, 16'385, 1'000'000}) check_batch_invariant(keys);
    for (const int num_sms : {1, 2, 78, 114, 132})
        for (const int64_t rows : {1, 8, 16, 17, 63, 64, 65, 128, 256, 1024})
            for (const int64_t batch : {0, 1, 2, 3, 7, 16, 33, 64, 100, 128, 1000, 70'000})
                for (const int64_t keys : {0, 1, 64, 256, 257, 512, 1000, 4096, 65'536, 1'000'000, 2'147'483'647}) {
                    check(shape_of(batch, rows, keys), num_sms);
                    check(shape_of(batch, rows, keys, 656), num_sms);
                    check({batch, batch * 2, (rows + 1) / 2, true, keys, 1152}, num_sms);
                }
    for (const int64_t batch : {1, 2, 3, 16, 64, 100, 1000})
        for (const int64_t num_queries : {1, 2, 5})
            for (const int64_t num_heads : {1, 8, 16, 40, 64, 128})
                for (const int64_t keys : {64, 1024, 8192, 65'536})
                    for (const int64_t key_bytes : {1152, 656})
                        check_ragged(batch, num_queries, num_heads, keys, key_bytes, 132);
    for (const int64_t batch : {0, 1, 2, 7, 64})
        for (const int64_t num_queries : {0, 1, 3, 7, 65, 200})
            for (const int64_t num_heads : {1, 16, 40, 128})
                for (const int tile_rows : {16, 64}) check_units(batch, num_queries, num_heads, tile_rows);
    pin(64, 16, 8192, 2, 1, 64);
    pin(8, 16, 32768, 2, 8, 64);
    pin(16, 16, 65536, 2, 4, 64);
    pin(8, 16, 4096, 8, 1, 16);
    pin(1, 8, 512, 8, 1, 16);
    pin(1, 16, 1024, 8, 1, 16);
    pin(1, 16, 2048, 8, 4, 16);
    pin(1, 16, 8192, 8, 8, 16);
    pin(16, 16, 1024, 4, 1, 16);
    pin(16, 16, 8192, 2, 2, 16);
    pin(4, 16, 32768, 2, 8, 16);
    pin(32, 16, 4096, 2, 1, 16);
    pin(2, 16, 2048, 8, 4, 16);
    pin(64, 16, 8192, 2, 1, 16, 656);
    pin(1, 8, 512, 8, 1, 16, 656);
    pin(1, 16, 1024, 8, 1, 16, 656);
    pin(1, 16, 2048, 8, 4, 16, 656);
    pin(1, 16, 8192, 8, 8, 16, 656);
    pin(16, 16, 1024, 4, 1, 16, 656);
    pin(16, 16, 8192, 2, 4, 16, 656);
    pin(32, 16, 4096, 2, 2, 16, 656);
    pin(2, 16, 2048, 8, 4, 16, 656);
    pin(64, 16, 8192, 2, 1, 16, 576);
    pin(1, 8, 512, 8, 1, 16, 576);
    pin(1, 16, 1024, 8, 1, 16, 576);
    pin(1, 16, 2048, 8, 4, 16, 576);
    pin(1, 16, 8192, 8, 8, 16, 576);
    pin(16, 16, 1024, 4, 1, 16, 576);
    pin(16, 16, 8192, 2, 4, 16, 576);
    pin(32, 16, 4096, 2, 2, 16, 576);
    pin(2, 16, 2048, 8, 4, 16, 576);
    pin(1, 128, 512, 8, 1, 16);
    pin(1, 128, 1024, 8, 1, 16);
    pin(1, 128, 2048, 8, 1, 16);
    pin(1, 128, 8192, 2, 8, 16);
    pin(1, 128, 32768, 8, 7, 64);
    pin(2, 128, 512, 4, 1, 16);
    pin(2, 128, 1024, 4, 1, 16);
    pin(4, 128, 512, 2, 1, 16);
    pin(8, 128, 1024, 2, 1, 16);
    pin(1, 64, 65536, 8, 15, 64);
    pin(16, 64, 1024, 2, 1, 16);
    pin(64, 64, 1024, 2, 1, 64);
    pin(16, 128, 8192, 2, 2, 64);
    pin(128, 128, 4096, 1, 1, 64);
    pin(64, 32, 8192, 2, 1, 64);
    pin(1, 128, 512, 8, 1, 16, 656);
    pin(1, 128, 1024, 8, 1, 16, 656);
    pin(1, 128, 2048, 8, 1, 16, 656);
    pin(1, 128, 8192, 2, 8, 16, 656);
    pin(1, 128, 32768, 8, 7, 64, 656);
    pin(2, 128, 512, 4, 1, 16, 656);
    pin(2, 128, 1024, 4, 1, 16, 656);
    pin(4, 128, 512, 2, 1, 16, 656);
    pin(8, 128, 1024, 2, 1, 16, 656);
    pin(1, 64, 65536, 8, 15, 64, 656);
    pin(16, 64, 1024, 2, 1, 16, 656);
    pin(64, 64, 1024, 2, 1, 64, 656);
    pin(16, 32, 8192, 2, 2, 16, 656);
    pin(64, 32, 8192, 2, 1, 64, 656);
    std::printf("%lld plans, %lld checks\n", num_plans, num_checked);
}
