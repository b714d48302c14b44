// Every step of every tile is some CTA's, once, and whoever adds a tile up waits for the right ones, for many shapes.
#include "device/stream_k.cuh"

#include <vector>

#include "expect.h"

namespace {

long long num_shapes = 0;

struct Step {
    int cta = -1;
    bool ends_tile = false;  // its piece has the tile's last step
};

void enumerate(int num_tiles, int num_steps, int num_ctas) {
    const int num_shared = num_tiles % num_ctas;
    if (!dso::StreamKShape::fits(num_shared, num_steps, num_ctas)) return;
    const dso::StreamKShape shape{num_tiles, num_steps, num_shared, num_ctas};
    std::vector<Step> steps(static_cast<size_t>(num_tiles) * num_steps);
    for (int cta = 0; cta < num_ctas; ++cta) {
        bool has_left = false;
        for (int i = cta; i < shape.num_pieces(); i += num_ctas) {
            const dso::StreamKPiece piece = dso::stream_k_piece(shape, i);
            if (piece.first_step == piece.last_step) continue;
            EXPECT(piece.tile >= 0 && piece.tile < num_tiles && piece.first_step >= 0 &&
                       piece.first_step < piece.last_step && piece.last_step <= num_steps,
                   "piece %d of %d x %d on %d: tile %d, steps %d to %d", i, num_tiles, num_steps, num_ctas, piece.tile,
                   piece.first_step, piece.last_step);
            const bool ends_tile = piece.last_step == num_steps;
            // A CTA has room for one piece's sums, and leaves them before it waits for others'.
            EXPECT(ends_tile || !has_left, "CTA %d of %d leaves two pieces", cta, num_ctas);
            has_left |= !ends_tile;
            for (int step = piece.first_step; step < piece.last_step; ++step) {
                Step& x = steps[static_cast<size_t>(piece.tile) * num_steps + step];
                EXPECT(x.cta == -1, "step %d of tile %d is CTA %d's and %d's", step, piece.tile, x.cta, cta);
                x = {cta, ends_tile};
            }
        }
    }
    for (int cta = 0; cta < num_ctas; ++cta) {
        for (int i = cta; i < shape.num_pieces(); i += num_ctas) {
            const dso::StreamKPiece piece = dso::stream_k_piece(shape, i);
            if (piece.first_step == piece.last_step || piece.last_step < num_steps) continue;
            // The steps before its own are those of the CTAs before it, each of which leaves them.
            int other = cta;
            for (int step = piece.first_step - 1; step >= 0; --step) {
                const Step& x = steps[static_cast<size_t>(piece.tile) * num_steps + step];
                EXPECT(x.cta == other || x.cta == other - 1, "step %d of tile %d is CTA %d's, and the next %d's", step,
                       piece.tile, x.cta, other);
                EXPECT(!x.ends_tile, "CTA %d has two pieces of tile %d", x.cta, piece.tile);
                other = x.cta;
            }
            EXPECT(cta - other == piece.num_before, "CTA %d of %d waits for %d of %d others", cta, num_ctas,
                   piece.num_before, cta - other);
        }
    }
    for (size_t i = 0; i < steps.size(); ++i)
        EXPECT(steps[i].cta >= 0, "step %zu of %d x %d on %d is nobody's", i, num_tiles, num_steps, num_ctas);
    ++num_shapes;
}

}  // namespace

int main() {
    for (int num_ctas = 1; num_ctas <= 24; ++num_ctas)
        for (int num_tiles = 1; num_tiles <= 3 * num_ctas; ++num_tiles)
            for (int num_steps = 1; num_steps <= 40; num_steps += num_steps < 8 ? 1 : 5)
                enumerate(num_tiles, num_steps, num_ctas);
    for (int num_tiles = 1; num_tiles < 3 * 132; ++num_tiles)
        for (const int num_steps : {1, 4, 12, 16, 56, 128, 256}) enumerate(num_tiles, num_steps, 132);
    std::printf("%lld shapes, %lld checks\n", num_shapes, num_checked);
}
