// Codes of 2 to 4 bits where every weight is kept, on AVX-512: looked up as they lie in a register's 16 lanes of 32
// bits, without a byte of their own in between. A lane holds 8 (of 4 bits) or 16 neighbouring columns; the k-th of all lanes
// make one vector of weights, so that inputs are put in the same order beforehand.
#pragma once

#include "few_tokens.inl.hpp"

namespace oats::OATS_ISA {

#if defined(__AVX512F__)

template <int bits>
struct Lanes {
    static constexpr int low = bits == 4 ? 4 : 2;  // bits of a code's first piece; of 3 bits there is a second, of one
    static constexpr int64_t each = 32 / low;      // columns of a lane
    static constexpr int64_t chunk = 16 * each;    // and of a register

    // Whether whole rows lie in whole bytes, and each lane in one group.
    static bool take(const FewBits &S) {
        if (S.bits != bits || S.kept.bitmask || S.zeros || S.kept.columns % 8) return false;
        return S.groups() <= 1 || S.group_size % chunk == 0 || (chunk % S.group_size == 0 && S.group_size % each == 0);
    }

    // Inputs of columns begin .. begin + chunk - 1 in the order of the lanes' codes.
    static void reorder(float *x) {
        float ordered[chunk];
        for (int64_t l = 0; l < 16; l++)
            for (int64_t k = 0; k < each; k++) ordered[16 * k + l] = x[each * l + k];
        std::memcpy(x, ordered, sizeof ordered);
    }

    explicit Lanes(const FewBits &S)
        : S_(S),
          groups_(S.groups()),
          in_chunk_(groups_ <= 1 ? 0 : chunk / S.group_size),
          chunks_(groups_ <= 1 ? ceil_div(S.kept.columns, chunk) : S.group_size / chunk) {
        alignas(64) float levels[16];
        alignas(64) int32_t own[16];
        const int half = 1 << (bits - 1);
        for (int i = 0; i < 16; i++) {  // above a code's bits lie those of others, which are to make no difference
            const int code = i & (2 * half - 1);
            levels[i] = static_cast<float>(S.levels ? S.levels[code] : code - half);
            own[i] = static_cast<int32_t>(in_chunk_ ? i * each / S.group_size : 0);
        }
        levels_ = _mm512_load_ps(levels);
        group_ = _mm512_load_si512(own);
    }

    // sums[t] = row . x[t]
    template <int T>
    OATS_INLINE void dot(int64_t row, const float *x, int64_t x_stride, Vec (&sums)[T]) const {
        const int64_t columns = S_.kept.columns, row_bytes = columns * low / 8;
        const uint8_t *codes = S_.codes + row * row_bytes;
        const uint8_t *high = S_.codes + S_.kept.rows * row_bytes + row * columns / 8;
        const auto *scales = reinterpret_cast<const bfloat16 *>(S_.scales) + row * groups_;
        int64_t groups_left = groups_, chunks_left = chunks_;
        OATS_UNROLL for (int t = 0; t < T; t++) sums[t] = Vec::zero();
        for (int64_t begin = 0; begin < columns; begin += chunk, x += chunk, codes += 64, high += 32) {
            const int64_t left = columns - begin;
            __builtin_prefetch(codes + 2048);
            const __m512i from = left >= chunk ? _mm512_loadu_si512(codes)
                                               : _mm512_maskz_loadu_epi8(first(left * low / 8), codes);
            __m512i top = {};
            if constexpr (bits == 3)
                top = _mm512_cvtepu16_epi32(left >= chunk ? _mm256_loadu_si256(reinterpret_cast<const __m256i *>(high))
                                                          : _mm256_maskz_loadu_epi8(
                                                                static_cast<__mmask32>(first(left / 8)), high));
            Vec part[T];
            OATS_UNROLL for (int t = 0; t < T; t++) part[t] = Vec::zero();
            OATS_UNROLL for (int k = 0; k < each; k++) {
                __m512i code = _mm512_srli_epi32(from, static_cast<unsigned>(low * k));
                if constexpr (bits == 3) {  // the two low bits of this, and the others of that
                    const __m512i third = k < 2 ? _mm512_slli_epi32(top, static_cast<unsigned>(2 - k))
                                                : _mm512_srli_epi32(top, static_cast<unsigned>(k - 2));
                    code = _mm512_ternarylogic_epi32(code, third, _mm512_set1_epi32(3), 0xe4);
                }
                const Vec w = {_mm512_permutexvar_ps(code, levels_)};
                OATS_UNROLL for (int t = 0; t < T; t++) part[t] = fma(w, Vec::load(x + t * x_stride + 16 * k), part[t]);
            }
            Vec scale;  // of each lane; without a division, which would take as long as all the rest
            if (in_chunk_) {
                scale = {_mm512_permutexvar_ps(group_, Vec::load(scales, least(groups_left, 16)).v)};
                scales += in_chunk_, groups_left -= in_chunk_;
            } else {
                scale = Vec::all(to_float(*scales));
                if (!--chunks_left) scales++, chunks_left = chunks_;
            }
            OATS_UNROLL for (int t = 0; t < T; t++) sums[t] = fma(scale, part[t], sums[t]);
        }
    }

  private:
    static __mmask64 first(int64_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

    const FewBits &S_;
    int64_t groups_, in_chunk_, chunks_;  // of a row; of a chunk, 0 where all of it lies in one; chunks of a group
    __m512 levels_;
    __m512i group_;
};

#endif

}  // namespace oats::OATS_ISA
