// An op's kernel on the GPUs, and for the arguments, that it was compiled for; its reference for all others.
#pragma once

#include <cstdio>

#include "torch/tensor.h"

namespace dso {

using BoxedKernel = void (*)(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs);

/// Calls `deepseek_ops::<name>_reference`, which deepseek_ops/registry.py registers beside each op with a kernel, with
/// the arguments on the stack; the results take their place.
inline void call_reference(const char* name, StableIValue* stack) {
    char qualified[128];
    snprintf(qualified, sizeof(qualified), "deepseek_ops::%s_reference", name);
    require(torch_call_dispatcher(qualified, "", stack, TORCH_ABI_VERSION) == 0, "the reference failed");
}

inline bool always(const StableIValue*) { return true; }

/// The boxed function to register for op `name`, whose first argument must be a tensor. The kernel
/// is for the arguments that `is_for` takes, and the reference for all others.
template <const char* name, BoxedKernel kernel, bool (*is_for)(const StableIValue* stack) = always>
void kernel_or_reference(StableIValue* stack, uint64_t num_arguments, uint64_t num_outputs) {
    int32_t device;
    const auto first = torch::stable::detail::to<AtenTensorHandle>(stack[0]);  // borrowed: the callee takes it over
    require(aoti_torch_get_device_index(first, &device) == 0, "could not get a tensor's device");
    if (dso_has_kernels_for(device) && is_for(stack)) {
        kernel(stack, num_arguments, num_outputs);
    } else {
        call_reference(name, stack);
    }
}

}  // namespace dso
