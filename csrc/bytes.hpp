// 64 bytes in registers, and columns that are one byte each, as each instruction set has them: see simd.hpp.
//
//     Bytes::load(p)                  64 bytes from p
//     Bytes::of_bits<width, shift>(p) 64 numbers of `width` bits (2 or 4) from p, shifted left by `shift`
//     plus, store                     bytes plus bytes, bytes to memory
//     plus_where(p, x)                bytes plus x where the 64 bits from p are 1
//     Bytes::look_up<low, high>(p, q, table) the bytes that 64 numbers have in a table of 16; their low bits (2 or 4)
//                                     are from p, one high bit from q if there is one
//     Bytes::spread(bits, count, fill, p)
//                                     up to 64 columns: the bytes from p on where `bits` are 1, `fill` elsewhere. Moves
//                                     p on, and reads up to 64 bytes beyond.
//
//     order(x, to)                    64 integers of 16 bits, as `Sums` wants them: 128 bytes
//     Sums::none()                    a sum of products of bytes and such integers, exact while it stays below 2^31
//     add(bytes, x)                   plus 64 products, x being what `order` wrote
//     floats()                        a register of floats that add up to it
#pragma once

#include "simd.hpp"

namespace oats::OATS_ISA {

#if defined(__AVX512F__)

struct Bytes {
    __m512i v;

    static Bytes load(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
    template <int width, int shift>
    static Bytes of_bits(const uint8_t *p) {
        return {_mm512_and_si512(lanes_of_bits<width, shift>(p), _mm512_set1_epi8(((1 << width) - 1) << shift))};
    }
    // The same with other bits around them.
    template <int width, int shift>
    static __m512i lanes_of_bits(const uint8_t *p) {
        uint64_t from = 0;  // the bits of a lane that its bytes begin at
        for (int i = 0; i < 8; i++) from |= static_cast<uint64_t>((i * width - shift) & 63) << (8 * i);
        __m512i eight;  // in each lane
        if constexpr (width == 4)
            eight = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
        else
            eight = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(from)), eight);
    }
    // The first 2^width bytes, over and over.
    template <int width>
    static __m512i repeated(const uint8_t *table) {
        if constexpr (width == 4)
            return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
        int32_t four;
        std::memcpy(&four, table, 4);
        return _mm512_set1_epi32(four);
    }
    Bytes plus(Bytes other) const { return {_mm512_add_epi8(v, other.v)}; }
    Bytes plus_where(const uint8_t *p, int x) const {
        return {_mm512_mask_add_epi8(v, read_bits(p, 8), v, _mm512_set1_epi8(static_cast<char>(x)))};
    }
    template <int low, int high>
    static Bytes look_up(const uint8_t *p, const uint8_t *q, const uint8_t *table) {
        const __m512i codes = lanes_of_bits<low, 0>(p);  // a look-up takes six bits of each: tables repeat themselves
        const __m512i found = _mm512_permutexvar_epi8(codes, repeated<low>(table));
        if constexpr (high == 0) return {found};
        return {_mm512_mask_permutexvar_epi8(found, read_bits(q, 8), codes, repeated<low>(table + (1 << low)))};
    }
    static Bytes spread(const uint8_t *bits, int64_t count, uint8_t fill, const uint8_t *&p) {
        const uint64_t mask = read_bits(bits, (count + 7) / 8);
        const __m512i none = _mm512_set1_epi8(static_cast<char>(fill));
        const Bytes r = {_mm512_mask_expand_epi8(none, mask, _mm512_loadu_si512(p))};
        p += popcount(mask);
        return r;
    }
    void store(uint8_t *p) const { _mm512_storeu_si512(p, v); }
};

// The even ones, then the odd ones.
inline void order(const int16_t *x, uint8_t *to) {
    OATS_UNROLL for (int i = 0; i < 2; i++) {
        const __m512i pairs = _mm512_loadu_si512(x + 32 * i);
        auto *even = reinterpret_cast<__m256i *>(to + 32 * i), *odd = reinterpret_cast<__m256i *>(to + 64 + 32 * i);
        _mm256_storeu_si256(even, _mm512_cvtepi32_epi16(pairs));
        _mm256_storeu_si256(odd, _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    }
}

struct Sums {
    __m512i sum;

    static Sums none() { return {_mm512_setzero_si512()}; }
    void add(Bytes bytes, const uint8_t *x) {
        const __m512i even = _mm512_and_si512(bytes.v, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(bytes.v, 8);
        sum = _mm512_dpwssd_epi32(sum, even, _mm512_loadu_si512(x));
        sum = _mm512_dpwssd_epi32(sum, odd, _mm512_loadu_si512(x + 64));
    }
    Vec floats() const { return {_mm512_cvtepi32_ps(sum)}; }
};

#elif defined(__AVX2__)

// As `ExpandTable`, to shuffle the first or the second 8 of 16 bytes by; lanes are 0x80 where nothing is moved to.
struct ExpandBytesTable {
    uint64_t first[256], second[256];

    constexpr ExpandBytesTable() : first(), second() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0; lane < 8; lane++) {
                const bool moved = mask >> lane & 1;
                const uint64_t from = expand_table.lanes[mask] >> (8 * lane) & 0xff;
                first[mask] |= (moved ? from : 0x80) << (8 * lane);
                second[mask] |= (moved ? from + 8 : 0x80) << (8 * lane);
            }
    }
};
inline constexpr ExpandBytesTable expand_bytes_table{};

struct Bytes {
    __m256i v[2];

    static Bytes load(const uint8_t *p) {
        const auto *from = reinterpret_cast<const __m256i *>(p);
        return {{_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)}};
    }
    template <int width, int shift>
    static Bytes of_bits(const uint8_t *p) {
        Bytes r;
        OATS_UNROLL for (int i = 0; i < 2; i++, p += 4 * width) r.v[i] = half_of_bits<width, shift>(p);
        return r;
    }
    Bytes plus(Bytes other) const {
        return {{_mm256_add_epi8(v[0], other.v[0]), _mm256_add_epi8(v[1], other.v[1])}};
    }
    Bytes plus_where(const uint8_t *p, int x) const {
        Bytes r;
        OATS_UNROLL for (int i = 0; i < 2; i++, p += 4)
            r.v[i] = _mm256_add_epi8(v[i], _mm256_and_si256(ones(p), _mm256_set1_epi8(static_cast<char>(x))));
        return r;
    }
    template <int low, int high>
    static Bytes look_up(const uint8_t *p, const uint8_t *q, const uint8_t *table) {
        const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
        Bytes r;
        OATS_UNROLL for (int i = 0; i < 2; i++, p += 4 * low, q += 4) {
            if constexpr (low == 4) {
                r.v[i] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), half_of_bits<4, 0>(p));
            } else {
                const __m256i codes = half_of_pairs(p);
                r.v[i] = found_by_pairs(levels, codes);
                if constexpr (high)
                    r.v[i] = _mm256_blendv_epi8(r.v[i], found_by_pairs(_mm_srli_si128(levels, 4), codes), ones(q));
            }
        }
        return r;
    }
    static Bytes spread(const uint8_t *bits, int64_t count, uint8_t fill, const uint8_t *&p) {
        uint64_t mask = read_bits(bits, (count + 7) / 8);
        const __m128i none = _mm_set1_epi8(static_cast<char>(fill));
        __m128i of16[4];
        OATS_UNROLL for (int i = 0; i < 4; i++, mask >>= 16) {
            const uint32_t low = mask & 0xff, high = mask >> 8 & 0xff;
            const uint8_t *second = p + popcount(low);
            const __m128i packed = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)),
                                                      _mm_loadl_epi64(reinterpret_cast<const __m128i *>(second)));
            const __m128i lanes = _mm_set_epi64x(static_cast<int64_t>(expand_bytes_table.second[high]),
                                                 static_cast<int64_t>(expand_bytes_table.first[low]));
            of16[i] = _mm_blendv_epi8(_mm_shuffle_epi8(packed, lanes), none, lanes);
            p = second + popcount(high);
        }
        return {{_mm256_set_m128i(of16[1], of16[0]), _mm256_set_m128i(of16[3], of16[2])}};
    }
    void store(uint8_t *p) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v[0]);
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p) + 1, v[1]);
    }

  private:
    template <int width, int shift>
    static __m256i half_of_bits(const uint8_t *p) {
        if constexpr (width == 4) {
            const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
            return _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(0x0f));
        } else {
            const __m128i numbers = _mm_setr_epi8(0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
            return found_by_pairs(_mm_slli_epi16(numbers, shift), half_of_pairs(p));
        }
    }
    // 32 numbers of two bits, each in the lowest of its byte or in the two above those.
    static __m256i half_of_pairs(const uint8_t *p) {
        const __m256i byte =
            _mm256_setr_epi64x(0x0101010100000000, 0x0303030302020202, 0x0505050504040404, 0x0707070706060606);
        int64_t bits;
        std::memcpy(&bits, p, 8);
        __m256i x = _mm256_shuffle_epi8(_mm256_set1_epi64x(bits), byte);
        x = _mm256_blend_epi16(x, _mm256_srli_epi16(x, 4), 0xaa);  // two of each four bytes want the upper half
        return _mm256_and_si256(x, _mm256_set1_epi16(0x0c03));
    }
    // What they have in a table of four.
    static __m256i found_by_pairs(__m128i table, __m256i pairs) {
        const __m128i four = _mm_setr_epi8(0, 1, 2, 3, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0);
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_shuffle_epi8(table, four)), pairs);
    }
    // All ones in a byte where the 32 bits from p are 1.
    static __m256i ones(const uint8_t *p) {
        const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        int32_t bits;
        std::memcpy(&bits, p, 4);
        return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit), bit);
    }
};

// Of each 32, the even ones, then the odd ones.
inline void order(const int16_t *x, uint8_t *to) {
    OATS_UNROLL for (int i = 0; i < 2; i++, x += 32, to += 64) {
        const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
        const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x + 16));
        const auto narrow = [](__m256i a, __m256i b) {  // integers of 32 bits that 16 are enough for
            return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        };
        const auto low = [](__m256i a) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16); };
        auto *even = reinterpret_cast<__m256i *>(to);
        _mm256_storeu_si256(even, narrow(low(first), low(second)));
        _mm256_storeu_si256(even + 1, narrow(_mm256_srai_epi32(first, 16), _mm256_srai_epi32(second, 16)));
    }
}

struct Sums {
    __m256i sum;

    static Sums none() { return {_mm256_setzero_si256()}; }
    void add(Bytes bytes, const uint8_t *x) {
        const auto *from = reinterpret_cast<const __m256i *>(x);
        OATS_UNROLL for (int i = 0; i < 2; i++) {
            const __m256i even = _mm256_and_si256(bytes.v[i], _mm256_set1_epi16(0xff));
            const __m256i odd = _mm256_srli_epi16(bytes.v[i], 8);
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_loadu_si256(from + 2 * i)),
                                                         _mm256_madd_epi16(odd, _mm256_loadu_si256(from + 2 * i + 1))));
        }
    }
    Vec floats() const { return {_mm256_cvtepi32_ps(sum)}; }
};

#else

// For each byte, a number with a byte of ones for each of its ones.
struct BitsTable {
    uint64_t bytes[256];

    constexpr BitsTable() : bytes() {
        for (int mask = 0; mask < 256; mask++)
            for (int bit = 0; bit < 8; bit++) bytes[mask] |= static_cast<uint64_t>(mask >> bit & 1) * 0xff << (8 * bit);
    }
};
inline constexpr BitsTable bits_table{};

struct Bytes {
    using Sixteen __attribute__((vector_size(16))) = uint8_t;
    using Two __attribute__((vector_size(16))) = uint64_t;
    Sixteen v[4];

    static Bytes load(const void *p) {
        Bytes r;
        std::memcpy(r.v, p, 64);
        return r;
    }
    template <int width, int shift>
    static Bytes of_bits(const uint8_t *p) {
        std::conditional_t<width == 4, uint16_t, uint32_t> codes[8 * width];
        for (int i = 0; i < 8 * width; i++) {
            uint32_t x = p[i];
            if constexpr (width == 4) {
                x = (x | x << 4) & 0x0f0f;
            } else {
                x = (x | x << 12) & 0x000f000f;
                x = (x | x << 6) & 0x03030303;
            }
            codes[i] = static_cast<std::remove_reference_t<decltype(*codes)>>(x << shift);
        }
        return load(codes);
    }
    Bytes plus(Bytes other) const {
        for (int i = 0; i < 4; i++) other.v[i] += v[i];
        return other;
    }
    Bytes plus_where(const uint8_t *p, int x) const {
        Bytes r;
        for (int i = 0; i < 4; i++) {
            const Two bits = {bits_table.bytes[p[2 * i]], bits_table.bytes[p[2 * i + 1]]};
            r.v[i] = v[i] + (reinterpret_cast<Sixteen>(bits) & static_cast<uint8_t>(x));
        }
        return r;
    }
    template <int low, int high>
    static Bytes look_up(const uint8_t *p, const uint8_t *q, const uint8_t *table) {
        Bytes codes = of_bits<low, 0>(p);
        if constexpr (high) codes = codes.plus_where(q, 1 << low);
        uint8_t bytes[64];
        codes.store(bytes);
        for (uint8_t &byte : bytes) byte = table[byte];
        return load(bytes);
    }
    static Bytes spread(const uint8_t *bits, int64_t count, uint8_t fill, const uint8_t *&p) {
        uint8_t bytes[64];
        std::memset(bytes, fill, 64);
        for (uint64_t mask = read_bits(bits, (count + 7) / 8); mask; mask &= mask - 1)
            bytes[__builtin_ctzll(mask)] = *p++;
        return load(bytes);
    }
    void store(uint8_t *p) const { std::memcpy(p, v, 64); }
};

inline void order(const int16_t *x, uint8_t *to) { std::memcpy(to, x, 128); }

struct Sums {
    int32_t sum;

    static Sums none() { return {0}; }
    void add(Bytes bytes, const uint8_t *x) {
        uint8_t factors[64];
        int16_t others[64];
        bytes.store(factors);
        std::memcpy(others, x, 128);
        for (int i = 0; i < 64; i++) sum += static_cast<int16_t>(factors[i]) * others[i];  // compilers know such sums
    }
    Vec floats() const {
        float first[Vec::width] = {static_cast<float>(sum)};
        return Vec::load(first);
    }
};

#endif

}  // namespace oats::OATS_ISA
