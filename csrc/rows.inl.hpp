// Where each row's values start, and whether its bits are still those that this was counted by.
#pragma once

#include "common.inl.hpp"

namespace oats::OATS_ISA {

inline int64_t ones_in(const uint8_t *bytes, int64_t count) {
    int64_t ones = 0, i = 0;
#if defined(__AVX512VPOPCNTDQ__)
    __m512i sums = _mm512_setzero_si512();
    for (; i + 64 <= count; i += 64)
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(_mm512_loadu_si512(bytes + i)));
    ones = _mm512_reduce_add_epi64(sums);
#endif
    for (; i < count; i += 8) ones += popcount(read_bits(bytes + i, count - i));
    return ones;
}

// Whether a row's bits hold as many ones as were counted, and none past the last column. Each kernel asks this before
// it follows the bits: whoever holds the tensor may have written to it since, and no more may be read than there is.
inline bool row_fits(const Sparse &S, const int64_t *row_start, int64_t row) {
    const int64_t row_bytes = S.row_bytes();
    const uint8_t *bits = S.bitmask + row * row_bytes;
    if (!row_bytes) return true;
    return ones_in(bits, row_bytes) == row_start[row + 1] - row_start[row] && !(bits[row_bytes - 1] & S.past_columns());
}

// Set by any thread that meets a row that does not fit
class Fit {
  public:
    void lost() { __atomic_store_n(&lost_, 1, __ATOMIC_RELAXED); }
    operator bool() const { return !__atomic_load_n(&lost_, __ATOMIC_RELAXED); }

  private:
    int lost_ = 0;
};

inline bool row_starts(const Sparse &S, int64_t *row_start, int threads) {
    const int64_t row_bytes = S.row_bytes(), chunk = most(1, (int64_t{1} << 16) / most(row_bytes, 1));
    Fit fit;
    parallel(ceil_div(S.rows, chunk), threads, [&](int64_t c, int) {
        for (int64_t r = c * chunk; r < least(S.rows, (c + 1) * chunk); r++) {
            const uint8_t *bits = S.bitmask + r * row_bytes;
            row_start[r + 1] = ones_in(bits, row_bytes);
            if (row_bytes && bits[row_bytes - 1] & S.past_columns()) fit.lost();
        }
    });
    row_start[0] = 0;
    for (int64_t r = 0; r < S.rows; r++) row_start[r + 1] += row_start[r];
    return fit && row_start[S.rows] == S.nonzeros;
}

}  // namespace oats::OATS_ISA
