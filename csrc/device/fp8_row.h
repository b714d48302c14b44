// What a token's row in the latent cache consists of: 512 latents and 64 rotated channels, in one of three formats.
#pragma once

namespace dso {

enum class LatentFormat {
    kPlain,      // elements of the model's type; other extents than 512 and 64, too
    kFp8Blocks,  // 512 e4m3 | 4 float32 scales, each of 128 of them | 64 bfloat16: 656 bytes
    kFp8,        // 576 e4m3, of one scale for the whole cache: 576 bytes
};

/// Where the parts of a row of kFp8Blocks begin, in bytes.
inline constexpr int kFp8RowScales = 512, kFp8RowKey = kFp8RowScales + 4 * sizeof(float);

inline constexpr int kFp8RowBytes = 656;
inline constexpr int kFp8RowChannels = 576;
inline constexpr int kFp8RowBlock = 128;  // latents of a scale

}  // namespace dso
