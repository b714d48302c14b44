// A token's row in the FP8 format of the latent cache: 512 e4m3 latents | 4 float32 scales | 64 bfloat16 rotated
// channels.
#pragma once

namespace dso {

/// Where its parts begin, in bytes.
inline constexpr int kFp8RowScales = 512, kFp8RowKey = kFp8RowScales + 4 * sizeof(float);

inline constexpr int kFp8RowBytes = 656;
inline constexpr int kFp8RowChannels = 576;
inline constexpr int kFp8RowBlock = 128;  // latents of a scale

}  // namespace dso
