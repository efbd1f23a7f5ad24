// S with its zeros.
#pragma once

#include <cstring>

#include "rows.inl.hpp"

namespace oats::OATS_ISA {

inline bool expand(const Sparse &S, const int64_t *row_start, void *dense, int threads) {
    const int64_t row_bytes = S.row_bytes(), chunk = most(1, 65536 / most(S.columns, 1));
    Fit fit;
    with_type(S.type, [&](auto type) {
        using V = decltype(type);
        parallel(ceil_div(S.rows, chunk), threads, [&](int64_t c, int) {
            for (int64_t r = c * chunk; r < least(S.rows, (c + 1) * chunk); r++) {
                if (!row_fits(S, row_start, r)) return fit.lost();
                const uint8_t *bits = S.bitmask + r * row_bytes;
                const V *value = static_cast<const V *>(S.values) + row_start[r];
                V *to = static_cast<V *>(dense) + r * S.columns;
                int64_t byte = 0;
#if defined(__AVX512VBMI2__)
                for (; byte * 8 + 64 <= S.columns; byte += 8) {
                    const uint64_t mask = read_bits(bits + byte, 8);
                    OATS_UNROLL for (int i = 0; i < 64; i += 32) {
                        const uint32_t part = static_cast<uint32_t>(mask >> i);
                        V *out = to + byte * 8 + i;
                        if constexpr (sizeof(V) == 4) {
                            const int low = popcount(part & 0xffff);
                            _mm512_storeu_ps(out, _mm512_maskz_expandloadu_ps(part & 0xffff, value));
                            _mm512_storeu_ps(out + 16, _mm512_maskz_expandloadu_ps(part >> 16, value + low));
                        } else {
                            _mm512_storeu_si512(out, _mm512_maskz_expandloadu_epi16(part, value));
                        }
                        value += popcount(part);
                    }
                }
#endif
                std::memset(to + byte * 8, 0, (S.columns - byte * 8) * sizeof(V));
                for (; byte < row_bytes; byte += 8)
                    for (uint64_t mask = read_bits(bits + byte, row_bytes - byte); mask; mask &= mask - 1)
                        to[byte * 8 + __builtin_ctzll(mask)] = *value++;
            }
        });
    });
    return fit;
}

}  // namespace oats::OATS_ISA
