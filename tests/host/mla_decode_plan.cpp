// How MLA decoding shares keys, for many shapes: within the limits of the kernel and of the GPU, and as measured.
#include "launch/mla_decode_plan.h"

#include <algorithm>
#include <initializer_list>

#include "expect.h"

namespace {

long long num_plans = 0;

dso::MlaDecodeSplits plan(int64_t batch, int64_t rows, int64_t keys, int num_sms) {
    const int64_t row_tiles = (rows + 63) / 64;
    ++num_plans;
    return dso::plan_mla_decode(batch * row_tiles, row_tiles, std::min<int64_t>(rows, 64), keys, 1152, num_sms);
}

void check(int64_t batch, int64_t rows, int64_t keys, int num_sms) {
    const dso::MlaDecodeSplits splits = plan(batch, rows, keys, num_sms);
    const int size = splits.cluster_size, parts = splits.num_parts;
    const int64_t num_units = batch * ((rows + 63) / 64);
    EXPECT(size == 1 || size == 2 || size == 4 || size == 8, "clusters of %d", size);
    EXPECT(parts >= 1 && parts <= 192, "%d parts", parts);
    EXPECT(parts == 1 || num_units * size * parts <= num_sms, "%d x %d do not run at once", size, parts);
    EXPECT(size * parts == 1 || size * parts <= (keys + 63) / 64, "more shares than tiles of %lld keys",
           static_cast<long long>(keys));
    EXPECT(keys > 256 || size * parts == 1, "%lld keys are shared", static_cast<long long>(keys));
}

// The fastest of those measured on an H200, or within 3 % of it (docs/mla_decode.md).
void pin(int64_t batch, int64_t rows, int64_t keys, int size, int parts) {
    const dso::MlaDecodeSplits splits = plan(batch, rows, keys, 132);
    EXPECT(splits.cluster_size == size && splits.num_parts == parts,
           "%lld requests of %lld rows over %lld keys: %d x %d, not %d x %d", static_cast<long long>(batch),
           static_cast<long long>(rows), static_cast<long long>(keys), splits.cluster_size, splits.num_parts, size,
           parts);
}

// The parts that a request of `keys` has are those of the plan for a table that is just wide enough: any table has room
// for them.
void check_batch_invariant(int64_t keys) {
    const dso::MlaDecodeSplits splits = dso::plan_batch_invariant_mla_decode(keys);
    const dso::MlaDecodeSplits wide = dso::plan_batch_invariant_mla_decode(2 * keys + 1000);
    EXPECT(splits.cluster_size == 2 && splits.tiles_per_part == 16, "%d, %d", splits.cluster_size,
           splits.tiles_per_part);
    EXPECT(splits.num_parts >= 1 && splits.num_parts <= 16, "%d parts", splits.num_parts);
    EXPECT(splits.num_parts == 16 || int64_t{splits.num_parts} * splits.tiles_per_part * 64 >= keys,
           "%d parts are too few for %lld keys", splits.num_parts, static_cast<long long>(keys));
    EXPECT(wide.num_parts >= splits.num_parts, "%d parts in a wider table", wide.num_parts);
}

}  // namespace

int main() {
    for (const int64_t keys : {0, 1, 64, 1024, 1025, 2048, 16'384, 16'385, 1'000'000}) check_batch_invariant(keys);
    for (const int num_sms : {1, 2, 78, 114, 132})
        for (const int64_t rows : {1, 8, 16, 17, 63, 64, 65, 128, 256, 1024})
            for (const int64_t batch : {0, 1, 2, 3, 7, 16, 33, 64, 100, 128, 1000, 70'000})
                for (const int64_t keys : {0, 1, 64, 256, 257, 512, 1000, 4096, 65'536, 1'000'000, 2'147'483'647})
                    check(batch, rows, keys, num_sms);
    pin(1, 16, 512, 8, 1);
    pin(1, 16, 1024, 8, 1);
    pin(1, 16, 2048, 8, 4);
    pin(1, 16, 8192, 8, 8);
    pin(1, 128, 8192, 8, 6);
    pin(2, 16, 32'768, 8, 7);
    pin(16, 16, 1024, 4, 1);
    pin(16, 16, 8192, 2, 4);
    pin(16, 128, 8192, 2, 2);
    pin(32, 16, 2048, 2, 2);
    pin(64, 16, 8192, 2, 1);
    pin(128, 128, 4096, 1, 1);
    std::printf("%lld plans, %lld checks\n", num_plans, num_checked);
}
