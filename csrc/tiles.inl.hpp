// Tiles of bfloat16 for a CPU's matrix units (AMX): how they lie in memory, and their product.
#pragma once

#include "common.inl.hpp"

namespace oats::OATS_ISA {

// A tile of weights holds 16 rows of 32 columns; one of inputs the same columns, in 16 pairs, of 16 tokens; one of
// sums 16 rows of 16 tokens. Each takes 1 KB without gaps. A step is 32 columns. 32 rows of a block of steps (16 KB)
// stay in the first-level cache for as long as the inputs of some tokens go by.
constexpr int64_t tile = 16, depth = 32, tile_values = tile * depth, tile_sums = tile * tile;
constexpr int64_t block_steps = 8;

// Inputs of many tiles of tokens lie in the order in which they are read: [block of steps][tile of tokens][step].
struct Inputs {
    bfloat16 *data;
    int64_t tiles, first;  // tiles of tokens in all, and where these begin

    bfloat16 *at(int64_t token_tile, int64_t step) const {
        const int64_t block = step / block_steps * tiles + first + token_tile;
        return data + (block * block_steps + step % block_steps) * tile_values;
    }
    Inputs from(int64_t token_tile) const { return {data, tiles, first + token_tile}; }
    static int64_t size(int64_t tiles, int64_t steps) { return round_up(steps, block_steps) * tiles * tile_values; }
};

// The units' settings for one task: all tiles are full.
class Tiles {
  public:
    Tiles() {
        alignas(64) Settings settings{};
        settings.palette = 1;
        for (int i = 0; i < 8; i++) settings.bytes[i] = 64, settings.rows[i] = 16;
        _tile_loadconfig(&settings);
    }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;
    ~Tiles() { _tile_release(); }

  private:
    struct Settings {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
};

// sums (2 x T tiles, rows of tiles `stride` apart) += 2 rows of tiles of weights . T tiles of inputs
template <int T>
OATS_INLINE void multiply_tiles(const bfloat16 *w, int64_t w_stride, const bfloat16 *x, int64_t steps, float *sums,
                                int64_t stride, bool first) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (T == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + stride, 64);
        if constexpr (T == 2) {
            _tile_loadd(2, sums + tile_sums, 64);
            _tile_loadd(3, sums + stride + tile_sums, 64);
        }
    }
    for (int64_t s = 0; s < steps; s++) {
        _tile_loadd(4, w + s * tile_values, 64);
        _tile_loadd(6, x + s * tile_values, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, w + w_stride + s * tile_values, 64);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (T == 2) {
            _tile_loadd(7, x + (block_steps + s) * tile_values, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + stride, 64);
    if constexpr (T == 2) {
        _tile_stored(2, sums + tile_sums, 64);
        _tile_stored(3, sums + stride + tile_sums, 64);
    }
}

// sums (rows, tokens) (+)= weights . inputs, in tiles; those of the weights are [tile of rows][step].
inline void product(const bfloat16 *weights, int64_t rows, int64_t steps, const Inputs &inputs, int64_t token_tiles,
                    bool add, float *sums) {
    const int64_t stride = token_tiles * tile_sums, w_stride = steps * tile_values;
    for (int64_t begin = 0; begin < steps; begin += block_steps)
        for (int64_t r = 0; r < rows / tile; r += 2)
            for (int64_t t = 0; t < token_tiles; t += 2) {
                const bfloat16 *w = weights + r * w_stride + begin * tile_values, *x = inputs.at(t, begin);
                const int64_t count = least(block_steps, steps - begin);
                float *to = sums + r * stride + t * tile_sums;
                if (t + 1 < token_tiles)
                    multiply_tiles<2>(w, w_stride, x, count, to, stride, !add && begin == 0);
                else
                    multiply_tiles<1>(w, w_stride, x, count, to, stride, !add && begin == 0);
            }
}

}  // namespace oats::OATS_ISA
