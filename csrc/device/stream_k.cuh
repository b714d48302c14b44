// Stream-K: how CTAs share the tiles that make no full wave, step by step. Pure arithmetic: the host enumerates it in
// tests/host.
//
// Tiles are computed whole, wave after wave, but for the last `num_shared`, fewer than there are CTAs. The steps of
// those, laid end to end, are cut into equal parts, one for each CTA, so that a part may begin and end within a tile:
//
//   tiles    |------------- t -------------|----------- t + 1 ...
//   parts    |---- c - 1 ----|------ c ------|---- c + 1 ----|
//   pieces           a       |     b     | d |
//
// A part lies in two tiles at most, and is two pieces: first d, which may be the only one, then b. A piece without its
// tile's last step (a, d) leaves its sums to the CTA that has that step (b), and this one adds them to its own. So it
// waits for CTAs of lower numbers only, which start no later than it does, and for pieces that these begin with.
//
// Source: "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU",
// arXiv:2301.03598.
#pragma once

#include "device/math.cuh"

namespace dso {

struct StreamKShape {
    int num_tiles, num_steps;  // of all, of a tile
    int num_shared;            // none, or the remainder of num_tiles by the CTAs, with a step for each CTA at least
    int num_ctas;

    DSO_HOST_DEVICE int num_whole() const { return num_tiles - num_shared; }

    /// A CTA's pieces are those of its number, and every num_ctas further, below this. Some are empty.
    DSO_HOST_DEVICE int num_pieces() const { return num_whole() + (num_shared > 0 ? 2 * num_ctas : 0); }

    /// So that 32 bits are enough.
    DSO_HOST_DEVICE static constexpr bool fits(int64_t num_shared, int64_t num_steps, int64_t num_ctas) {
        return num_shared * num_steps >= num_ctas && (num_shared * num_steps + 1) * num_ctas < int64_t{1} << 32;
    }
};

struct StreamKPiece {
    int tile, first_step, last_step;
    int num_before;  // CTAs, those of the numbers before its own, that have the steps before these, if these are the
                     // last
};

/// A function of the index alone, and not the next of a sequence: so the compiler sees that all lanes have the same.
DSO_HOST_DEVICE StreamKPiece stream_k_piece(const StreamKShape& shape, int index) {
    if (index < shape.num_whole()) return {index, 0, shape.num_steps, 0};
    const uint32_t num_ctas = shape.num_ctas, num_steps = shape.num_steps, total = shape.num_shared * num_steps;
    const uint32_t in_parts = index - shape.num_whole();
    const bool is_second = in_parts >= num_ctas;
    const uint32_t cta = is_second ? in_parts - num_ctas : in_parts;
    const uint32_t begin = total * cta / num_ctas, end = total * (cta + 1) / num_ctas;
    const uint32_t first_tile = begin / num_steps, last_tile = (end - 1) / num_steps;
    const uint32_t tile = is_second ? first_tile : last_tile, begin_of_tile = tile * num_steps;
    const uint32_t first = begin > begin_of_tile ? begin - begin_of_tile : 0;
    const uint32_t last = end - begin_of_tile < num_steps ? end - begin_of_tile : num_steps;
    const bool is_empty = is_second && first_tile == last_tile;
    const uint32_t first_cta = ((begin_of_tile + 1) * num_ctas - 1) / total;  // the last that begins no later than it
    return {shape.num_whole() + static_cast<int>(tile), static_cast<int>(first),
            static_cast<int>(is_empty ? first : last), static_cast<int>(cta - first_cta)};
}

}  // namespace dso
