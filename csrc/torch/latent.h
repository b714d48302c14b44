// The format of a latent cache, which its dtype says.
#pragma once

#include "torch/tensor.h"

namespace dso {

inline dso_latent_format latent_format(const Tensor& kv_cache) {
    switch (kv_cache.scalar_type()) {
        case ScalarType::Byte:
            return DSO_LATENT_FP8_BLOCKS;
        case ScalarType::Float8_e4m3fn:
            return DSO_LATENT_FP8;
        default:
            return DSO_LATENT_PLAIN;
    }
}

}  // namespace dso
