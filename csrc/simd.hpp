// A vector of floats as each instruction set has it. The including file defines OATS_ISA, the namespace, and is
// compiled for that set; nothing here may leave the namespace, so that no function compiled for one CPU is linked into
// the code for another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "numbers.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define OATS_UNROLL _Pragma("GCC unroll 16")

namespace oats::OATS_ISA {

#if defined(__AVX512F__)

struct Vec {
    static constexpr int width = 16;
    static constexpr bool registers = true;  // whether it is one
    __m512 v;

    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const bfloat16 *p) { return widen_b(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
    static Vec load(const float16 *p) { return widen_h(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
    static Vec load(const int8_t *p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
    }
    static Vec load(const uint8_t *p) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))))};
    }
    // the first n (below `width`) of p, then zeros
    static Vec load(const float *p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
    static Vec load(const bfloat16 *p, int64_t n) { return widen_b(_mm256_maskz_loadu_epi16(first(n), p)); }
    static Vec load(const float16 *p, int64_t n) { return widen_h(_mm256_maskz_loadu_epi16(first(n), p)); }
    static Vec load(const int8_t *p, int64_t n) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
    }
    // Keeps the compiler from loading it again for each use.
    Vec &in_register() {
        asm("" : "+v"(v));
        return *this;
    }
    void store(float *p) const { _mm512_storeu_ps(p, v); }
    void store(float *p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
    // Values from p go where `mask` has ones, to two vectors: of columns `width` apart, or of even and odd columns
    // where `interleaved`. Reads popcount(mask) values, all before `end`.
    static void expand(uint32_t mask, const float *p, const float *, Vec &first, Vec &second) {
        first.v = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask), p);
        second.v = _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask >> 16), p + popcount(mask & 0xffff));
    }
#if defined(OATS_EXPAND_FLOATS)
    template <class T>
    static constexpr bool interleaved = false;
    template <class T>
    static void expand(uint32_t mask, const T *p, const T *, Vec &first, Vec &second) {
        const int low = popcount(mask & 0xffff), high = popcount(mask >> 16);
        first.v = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), load(p, low).v);
        second.v = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask >> 16), load(p + low, high).v);
    }
#else
    template <class T>
    static constexpr bool interleaved = std::is_same_v<T, bfloat16>;
    static void expand(uint32_t mask, const bfloat16 *p, const bfloat16 *, Vec &first, Vec &second) {
        const __m512i pairs = _mm512_maskz_expandloadu_epi16(mask, p);
        first.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        second.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    static void expand(uint32_t mask, const float16 *p, const float16 *, Vec &first, Vec &second) {
        // by way of memory: the conversion of a register competes with the expansion for an execution port
        alignas(64) uint16_t halves[32];
        _mm512_store_si512(halves, _mm512_maskz_expandloadu_epi16(mask, p));
        asm volatile("" : "+m"(halves));
        first.v = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(halves)));
        second.v = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(halves + 16)));
    }
#endif
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    float sum() const { return _mm512_reduce_add_ps(v); }

    // lanes of |x| that are at least the number with these bits, in the order of non-negative floats
    uint32_t at_least(uint32_t bits) const {
        const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
        return _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(static_cast<int>(bits)));
    }
    Vec where(uint32_t mask) const { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), v)}; }

    static void transpose(Vec (&r)[16]) {
        __m512 t[16];
        OATS_UNROLL for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
            t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
        }
        OATS_UNROLL for (int i = 0; i < 16; i += 4) {
            r[i].v = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
            r[i + 1].v = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
            r[i + 2].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3].v = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        OATS_UNROLL for (int i = 0; i < 4; i++) {
            t[i] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(r[i].v, r[i + 4].v, 0xdd);
            t[i + 8] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0x88);
            t[i + 12] = _mm512_shuffle_f32x4(r[i + 8].v, r[i + 12].v, 0xdd);
        }
        OATS_UNROLL for (int i = 0; i < 8; i++) {
            r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
            r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        }
    }

  private:
    static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
    static Vec widen_b(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
    static Vec widen_h(__m256i x) { return {_mm512_cvtph_ps(x)}; }
};

// Positions of the ones in `mask`, ascending.
inline void positions(uint64_t mask, uint8_t *out) {
    alignas(64) static constexpr uint8_t iota[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __mmask64 written = mask ? ~uint64_t{0} >> (64 - popcount(mask)) : 0;
    _mm512_mask_storeu_epi8(out, written, _mm512_maskz_compress_epi8(mask, _mm512_load_si512(iota)));
}

#else

// Positions of the ones in `mask`, ascending.
inline void positions(uint64_t mask, uint8_t *out) {
    for (; mask; mask &= mask - 1) *out++ = static_cast<uint8_t>(__builtin_ctzll(mask));
}

#if defined(__AVX2__)

// For each byte, the lane that each of its ones is moved from, as one number with a byte for a lane.
struct ExpandTable {
    uint64_t lanes[256];

    constexpr ExpandTable() : lanes() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, from = 0; lane < 8; lane++)
                if (mask >> lane & 1) lanes[mask] |= static_cast<uint64_t>(from++) << (8 * lane);
    }
};
inline constexpr ExpandTable expand_table{};

// For each byte, all ones in a lane where it has a one.
inline __m256i lanes_of(uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}

struct Vec {
    static constexpr int width = 8;
    static constexpr bool registers = true;
    __m256 v;

    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec all(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const bfloat16 *p) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
    }
    static Vec load(const float16 *p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))};
    }
    static Vec load(const int8_t *p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
    }
    static Vec load(const uint8_t *p) {
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p))))};
    }
    static Vec load(const float *p, int64_t n) { return {_mm256_maskload_ps(p, lanes_of((1u << n) - 1))}; }
    template <class T>
    static Vec load(const T *p, int64_t n) {
        T padded[8] = {};
        if (n > 0) std::memcpy(padded, p, n * sizeof(T));
        return load(padded);
    }
    Vec &in_register() {
        asm("" : "+x"(v));
        return *this;
    }
    void store(float *p) const { _mm256_storeu_ps(p, v); }
    void store(float *p, int64_t n) const { _mm256_maskstore_ps(p, lanes_of((1u << n) - 1), v); }
    template <class T>
    static constexpr bool interleaved = false;
    template <class T>
    static void expand(uint32_t mask, const T *p, const T *end, Vec &first, Vec &second) {
        first = expand_one(mask & 0xff, p, end);
        second = expand_one(mask >> 8, p + popcount(mask & 0xff), end);
    }
    template <class T>
    static Vec expand_one(uint32_t mask, const T *p, const T *end) {
        const Vec packed = end - p >= 8 ? load(p) : load(p, end - p);
        const __m256i from = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(expand_table.lanes[mask])));
        return {_mm256_and_ps(_mm256_permutevar8x32_ps(packed.v, from), _mm256_castsi256_ps(lanes_of(mask)))};
    }
    friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    float sum() const {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
    }
    uint32_t at_least(uint32_t bits) const {
        const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
        const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bits)), magnitude);
        return ~static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(below))) & 0xff;
    }
    Vec where(uint32_t mask) const { return {_mm256_and_ps(v, _mm256_castsi256_ps(lanes_of(mask)))}; }

    static void transpose(Vec (&r)[8]) {
        __m256 t[8];
        OATS_UNROLL for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
            t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
        }
        OATS_UNROLL for (int i = 0; i < 8; i += 4) {
            r[i].v = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
            r[i + 1].v = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
            r[i + 2].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        OATS_UNROLL for (int i = 0; i < 4; i++) {
            t[i] = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x20);
            t[i + 4] = _mm256_permute2f128_ps(r[i].v, r[i + 4].v, 0x31);
        }
        OATS_UNROLL for (int i = 0; i < 8; i++) r[i].v = t[i];
    }
};

#else

struct Vec {
    static constexpr int width = 8;
    static constexpr bool registers = false;
    float v[8];

    static Vec zero() { return all(0); }
    static Vec all(float x) { return {{x, x, x, x, x, x, x, x}}; }
    template <class T>
    static Vec load(const T *p) {
        return load(p, 8);
    }
    template <class T>
    static Vec load(const T *p, int64_t n) {
        Vec r = zero();
        for (int64_t i = 0; i < n; i++) r.v[i] = to_float(p[i]);
        return r;
    }
    Vec &in_register() { return *this; }
    void store(float *p) const { std::memcpy(p, v, sizeof v); }
    void store(float *p, int64_t n) const { std::memcpy(p, v, n * sizeof(float)); }
    template <class T>
    static constexpr bool interleaved = false;
    template <class T>
    static void expand(uint32_t mask, const T *p, const T *, Vec &first, Vec &second) {
        for (int i = 0; i < 8; i++, mask >>= 1) first.v[i] = mask & 1 ? to_float(*p++) : 0;
        for (int i = 0; i < 8; i++, mask >>= 1) second.v[i] = mask & 1 ? to_float(*p++) : 0;
    }
    friend Vec operator+(Vec a, Vec b) {
        for (int i = 0; i < 8; i++) a.v[i] += b.v[i];
        return a;
    }
    friend Vec operator-(Vec a, Vec b) {
        for (int i = 0; i < 8; i++) a.v[i] -= b.v[i];
        return a;
    }
    friend Vec operator*(Vec a, Vec b) {
        for (int i = 0; i < 8; i++) a.v[i] *= b.v[i];
        return a;
    }
    friend Vec fma(Vec a, Vec b, Vec c) {
        for (int i = 0; i < 8; i++) c.v[i] += a.v[i] * b.v[i];
        return c;
    }
    float sum() const { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
    uint32_t at_least(uint32_t bits) const {
        uint32_t mask = 0;
        for (int i = 0; i < 8; i++) mask |= uint32_t{(to_bits(v[i]) & 0x7fffffff) >= bits} << i;
        return mask;
    }
    Vec where(uint32_t mask) const {
        Vec r = *this;
        for (int i = 0; i < 8; i++)
            if (!(mask >> i & 1)) r.v[i] = 0;
        return r;
    }
    static void transpose(Vec (&r)[8]) {
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < i; j++) {
                const float t = r[i].v[j];
                r[i].v[j] = r[j].v[i];
                r[j].v[i] = t;
            }
    }
};

#endif
#endif

}  // namespace oats::OATS_ISA
