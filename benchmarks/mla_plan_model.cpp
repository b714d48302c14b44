// What the planner of MLA decoding expects of a plan, with constants from outside: for benchmarks/sweep_mla_plans.py.
// This is the planner's own source, so that what is fitted is what plans.
#include "launch/mla_decode_plan.cpp"

#include <cmath>
#include <cstddef>
#include <cstring>
#include <iterator>

namespace {

constexpr size_t kConstantsAt = offsetof(dso::Kernel, cta), kConstantBytes = sizeof(dso::Kernel) - kConstantsAt;
constexpr int64_t kNumConstants = kConstantBytes / sizeof(double);  // of a kernel: all that follows its first members

/// A plan for a shape: a row of the script's array.
struct Case {
    int64_t num_requests, num_queries, max_keys, num_heads, key_bytes, num_sms, cluster_size, num_parts, tile_rows;

    dso::MlaDecodeShape shape() const { return {num_requests, num_queries, num_heads, false, max_keys, key_bytes}; }

    /// Whether this row of kKernels is the kernel that dso_mla_decode_by_plan launches.
    bool is_of(const dso::Kernel& kernel) const { return kernel.tile_rows == tile_rows; }
};

}  // namespace

extern "C" {

int64_t num_constants() { return kNumConstants * static_cast<int64_t>(std::size(dso::kKernels)); }

/// Those of kKernels, row by row.
void planner_constants(double* constants) {
    for (const dso::Kernel& kernel : dso::kKernels) {
        std::memcpy(constants, reinterpret_cast<const char*>(&kernel) + kConstantsAt, kConstantBytes);
        constants += kNumConstants;
    }
}

/// Microseconds; NaN where no kernel is for the case.
void estimate(const Case* cases, int64_t num_cases, const double* constants, double* times) {
    std::fill(times, times + num_cases, std::nan(""));
    for (dso::Kernel kernel : dso::kKernels) {
        std::memcpy(reinterpret_cast<char*>(&kernel) + kConstantsAt, constants, kConstantBytes);
        constants += kNumConstants;
        for (int64_t i = 0; i < num_cases; ++i) {
            const Case& x = cases[i];
            if (!x.is_of(kernel)) continue;
            times[i] = dso::cost(x.shape(), static_cast<int>(x.cluster_size), static_cast<int>(x.num_parts), kernel,
                                 static_cast<int>(x.num_sms));
        }
    }
}

/// Overwrites the plan by the planner's choice for the shape.
void choose(Case* x) {
    const dso::MlaDecodePlan plan = dso::plan_mla_decode(x->shape(), static_cast<int>(x->num_sms));
    x->cluster_size = plan.cluster_size, x->num_parts = plan.num_parts, x->tile_rows = plan.tile_rows;
}

}  // extern "C"
