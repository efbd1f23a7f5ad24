// The sparse half of a round of alternating thresholding: the largest magnitudes of each row.
#pragma once

#include "common.inl.hpp"

namespace oats::OATS_ISA {

constexpr uint32_t above_all = 0x7fffffff;  // magnitudes, and the NaN that are met

inline int64_t count_at_least(const float *x, int64_t n, uint32_t bits) {
    constexpr int W = Vec::width;
    int64_t count = 0, i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        OATS_UNROLL for (int j = 0; j < 4; j++) count += popcount(Vec::load(x + i + j * W).at_least(bits));
    for (; i < n; i++) count += (to_bits(x[i]) & 0x7fffffff) >= bits;
    return count;
}

// The bits of the `keep`-th largest magnitude of x, 0 < keep <= n, found by bracketing: counting costs a pass over a
// row in the cache, and the last round's threshold is a good first guess.
inline uint32_t select(const float *x, int64_t n, int64_t keep, uint32_t guess) {
    uint32_t low = 0, high = above_all;  // at least `keep` are at least low, fewer are at least high
    int64_t at_low = n, at_high = 0;
    float spread = 0.01f;
    for (int pass = 0; high - low > 1 && at_low - at_high > 32; pass++) {
        uint32_t middle = low + (high - low) / 2;
        if (pass == 0 && guess) {
            middle = guess;
        } else if (low > 0 && high < above_all) {
            // between two counts, the magnitudes are about evenly spread; every fourth pass halves whatever they are
            const float a = from_bits(low), b = from_bits(high);
            const float share = static_cast<float>(at_low - keep + 1) / static_cast<float>(at_low - at_high + 1);
            if (pass % 4 != 3) middle = to_bits(a + (b - a) * share);
        } else if (guess && pass < 8) {
            // step out from the guess until the threshold is between two counts
            const float from = from_bits(low > 0 ? low : high);
            middle = to_bits(low > 0 ? from * (1 + spread) : from * (1 - spread));
            spread = spread * 3 < 0.9f ? spread * 3 : 0.9f;
        }
        if (middle <= low) middle = low + 1;
        if (middle >= high) middle = high - 1;
        const int64_t count = count_at_least(x, n, middle);
        if (count >= keep)
            low = middle, at_low = count;
        else
            high = middle, at_high = count;
    }
    if (high - low <= 1) return low;
    uint32_t candidates[32] = {};
    int count = 0;
    for (int64_t i = 0; i < n; i += Vec::width) {
        const int64_t width = least(Vec::width, n - i);
        const Vec v = width == Vec::width ? Vec::load(x + i) : Vec::load(x + i, width);
        // a lane past the end of the row is no candidate, even if zero is in the bracket
        uint32_t between = v.at_least(low) & ~v.at_least(high) & static_cast<uint32_t>((uint64_t{1} << width) - 1);
        for (; between; between &= between - 1) {
            const uint32_t bits = to_bits(x[i + __builtin_ctz(between)]) & 0x7fffffff;
            int place = count++;
            for (; place > 0 && candidates[place - 1] < bits; place--) candidates[place] = candidates[place - 1];
            candidates[place] = bits;
        }
    }
    return count ? candidates[least(keep - at_high, count) - 1] : low;
}

inline double sparse_step(int64_t rows, int64_t columns, int64_t keep, float beta, const float *A, const float *L,
                          float *S, float *next, float *threshold, int threads) {
    constexpr int W = Vec::width;
    const int64_t chunk = most(1, 16384 / most(columns, 1)), chunks = ceil_div(rows, chunk);
    Scratch<float> residuals(int64_t{threads} * round_up(columns, 16));
    Scratch<double> errors(chunks);
    parallel(chunks, threads, [&](int64_t c, int worker) {
        float *R = residuals + worker * round_up(columns, 16);
        double error = 0;
        for (int64_t row = c * chunk; row < least(rows, (c + 1) * chunk); row++) {
            const float *a = A + row * columns, *l = L + row * columns;
            float *s = S + row * columns, *out = next + row * columns;
            int64_t i = 0;
            for (; i + W <= columns; i += W) (Vec::load(a + i) - Vec::load(l + i)).store(R + i);
            for (; i < columns; i++) R[i] = a[i] - l[i];

            uint32_t boundary = above_all;
            int64_t equal = 0;  // how many at the boundary there is room for; 0: for all
            if (keep >= columns) {
                boundary = 0;
            } else if (keep > 0) {
                boundary = select(R, columns, keep, to_bits(threshold[row]));
                threshold[row] = from_bits(boundary);
                if (count_at_least(R, columns, boundary) > keep)
                    equal = keep - count_at_least(R, columns, boundary + 1);
            }
            const bool ties = equal > 0;
            Vec squares = Vec::zero();
            const Vec by = Vec::all(-beta);
            i = 0;
            for (; !ties && i + W <= columns; i += W) {
                const Vec r = Vec::load(R + i), kept = r.where(r.at_least(boundary)), lost = r - kept;
                squares = fma(lost, lost, squares);
                const Vec step = kept - Vec::load(s + i);
                fma(by, step, Vec::load(a + i) - kept).store(out + i);
                kept.store(s + i);
            }
            double lost_squares = squares.sum();
            for (; i < columns; i++) {
                const uint32_t bits = to_bits(R[i]) & 0x7fffffff;
                const bool in = bits > boundary || (bits == boundary && (!ties || equal-- > 0));
                const float kept = in ? R[i] : 0, lost = R[i] - kept;
                lost_squares += double{lost} * lost;
                out[i] = a[i] - kept - beta * (kept - s[i]);
                s[i] = kept;
            }
            error += lost_squares;
        }
        errors[c] = error;
    });
    double error = 0;
    for (int64_t c = 0; c < chunks; c++) error += errors[c];
    return error;
}

}  // namespace oats::OATS_ISA
