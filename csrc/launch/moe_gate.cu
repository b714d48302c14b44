#include "kernels/moe_gate.cuh"

#include <algorithm>

#include "device/math.cuh"
#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/moe_gate_checks.h"

extern "C" dso_status dso_moe_gate(const dso_gate* gate, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_moe_gate(*gate));
    if (gate->t == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const MoeGateArguments arguments{gate->logits,
                                     gate->bias,
                                     gate->topk_weights,
                                     gate->topk_idx,
                                     gate->t,
                                     gate->logits_stride,
                                     static_cast<int>(gate->num_experts),
                                     static_cast<int>(gate->num_groups),
                                     static_cast<int>(gate->num_experts / gate->num_groups),
                                     static_cast<int>(gate->num_topk),
                                     static_cast<int>(gate->num_topk_groups),
                                     gate->normalizes != 0,
                                     gate->scale};
    // Few tokens want a CTA each, so that all SMs have some; and large ones have no room for several.
    constexpr int kWarps = kGateThreads / 32, kMaxBytes = 48 * 1024;
    const int bytes = 4 * gate_words(arguments.num_experts, arguments.num_groups, arguments.num_topk);
    const int tokens = gate->t >= int64_t{2} * kWarps * num_sms ? std::min(kWarps, kMaxBytes / bytes) : 1;
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(gate->t, tokens)));
    return launch_kernel(gate->is_softmax ? moe_gate_kernel<true> : moe_gate_kernel<false>,
                         {grid, dim3(32, static_cast<unsigned>(tokens)), tokens * bytes, stream, 1, true}, arguments);
}
