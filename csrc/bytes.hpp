// 64 bytes in registers, and columns that are one byte each, as each instruction set has them: see simd.hpp.
//
//     Bytes::load(p)                  64 bytes from p
//     Bytes::of_bits<width, shift>(p) 64 numbers of `width` bits (2 or 4) from p, shifted left by `shift`
//     plus, minus, store              bytes plus bytes, bytes less a number, bytes to memory
//     minus_where_none(p, x)          bytes less x where the 64 bits from p are 0
//     look_up(table)                  the number that each byte, below 16, has in a table of 16
//
//     Columns<sparse, zeros>(bits, count, zero, p)
//                                     up to 64 columns of the numbers from p on, less `zero`: one in each, or where
//                                     `bits` are 1, the others being 0. Moves p on, and reads up to 64 bytes beyond.
//     next()                          the next register of columns
#pragma once

#include "simd.hpp"

namespace oats::OATS_ISA {

#if defined(__AVX512F__)

struct Bytes {
    __m512i v;

    static Bytes load(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
    template <int width, int shift>
    static Bytes of_bits(const uint8_t *p) {
        uint64_t from = 0;  // the bits of a lane that its bytes begin at
        for (int i = 0; i < 8; i++) from |= static_cast<uint64_t>((i * width - shift) & 63) << (8 * i);
        __m512i eight;  // in each lane
        if constexpr (width == 4)
            eight = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
        else
            eight = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        const __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(from)), eight);
        return {_mm512_and_si512(bytes, _mm512_set1_epi8(((1 << width) - 1) << shift))};
    }
    Bytes plus(Bytes other) const { return {_mm512_add_epi8(v, other.v)}; }
    Bytes minus(int x) const { return {_mm512_sub_epi8(v, _mm512_set1_epi8(static_cast<char>(x)))}; }
    Bytes minus_where_none(const uint8_t *p, int x) const {
        return {_mm512_mask_sub_epi8(v, ~read_bits(p, 8), v, _mm512_set1_epi8(static_cast<char>(x)))};
    }
    Bytes look_up(const int8_t *table) const {
        const __m128i levels = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
        return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), v)};
    }
    void store(int8_t *p) const { _mm512_storeu_si512(p, v); }
};

template <bool sparse, bool zeros>
class Columns {
  public:
    Columns(const uint8_t *bits, int64_t count, float zero, const int8_t *&p) : zero_(Vec::all(zero)), from_(p) {
        if constexpr (sparse) {
            mask_ = read_bits(bits, (count + 7) / 8);
            _mm512_store_si512(bytes_, _mm512_maskz_expand_epi8(mask_, _mm512_loadu_si512(p)));
            from_ = bytes_;
        }
        p += sparse ? popcount(mask_) : count;
    }
    Vec next() {
        Vec w = Vec::load(from_);
        from_ += Vec::width;
        if constexpr (zeros) w = w - zero_;
        if constexpr (zeros && sparse) w = w.where(static_cast<uint32_t>(mask_ & 0xffff));
        mask_ >>= Vec::width;
        return w;
    }

  private:
    alignas(64) int8_t bytes_[64];
    Vec zero_;
    const int8_t *from_;
    uint64_t mask_ = 0;
};

#elif defined(__AVX2__)

// As `ExpandTable`, to shuffle bytes by, which makes 0 of those whose lane is 0x80.
struct ExpandBytesTable {
    uint64_t lanes[257];  // read two at a time

    constexpr ExpandBytesTable() : lanes() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0; lane < 8; lane++)
                lanes[mask] |= mask >> lane & 1 ? expand_table.lanes[mask] & uint64_t{0xff} << (8 * lane)
                                                : uint64_t{0x80} << (8 * lane);
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
    Bytes minus(int x) const {
        const __m256i less = _mm256_set1_epi8(static_cast<char>(x));
        return {{_mm256_sub_epi8(v[0], less), _mm256_sub_epi8(v[1], less)}};
    }
    Bytes minus_where_none(const uint8_t *p, int x) const {
        const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        Bytes r;
        OATS_UNROLL for (int i = 0; i < 2; i++, p += 4) {
            int32_t bits;
            std::memcpy(&bits, p, 4);
            const __m256i ones = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
            const __m256i none = _mm256_cmpeq_epi8(ones, _mm256_setzero_si256());
            r.v[i] = _mm256_sub_epi8(v[i], _mm256_and_si256(none, _mm256_set1_epi8(static_cast<char>(x))));
        }
        return r;
    }
    Bytes look_up(const int8_t *table) const {
        const __m256i levels = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
        return {{_mm256_shuffle_epi8(levels, v[0]), _mm256_shuffle_epi8(levels, v[1])}};
    }
    void store(int8_t *p) const {
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
            const __m256i byte = _mm256_setr_epi64x(0x0101010100000000, 0x0303030302020202, 0x0505050504040404,
                                                    0x0707070706060606);
            int64_t bits;
            std::memcpy(&bits, p, 8);
            __m256i x = _mm256_shuffle_epi8(_mm256_set1_epi64x(bits), byte);
            x = _mm256_blend_epi16(x, _mm256_srli_epi16(x, 4), 0xaa);  // two of each four bytes want the upper half
            x = _mm256_and_si256(x, _mm256_set1_epi16(0x0c03));
            // 1, 2, 3 from two bits, or from the two above them
            const __m128i table = _mm_slli_epi16(_mm_setr_epi8(0, 1, 2, 3, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0), shift);
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), x);
        }
    }
};

template <bool sparse, bool zeros>
class Columns {
  public:
    Columns(const uint8_t *bits, int64_t, float zero, const int8_t *&p) : bits_(bits), zero_(Vec::all(zero)), p_(p) {}
    Vec next() {
        __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p_));
        uint32_t mask = 0;
        if constexpr (sparse) {
            mask = *bits_++;
            const auto *from = reinterpret_cast<const __m128i *>(&expand_bytes_table.lanes[mask]);
            bytes = _mm_shuffle_epi8(bytes, _mm_loadu_si128(from));
        }
        p_ += sparse ? popcount(mask) : Vec::width;
        Vec w = {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
        if constexpr (zeros) w = w - zero_;
        return zeros && sparse ? w.where(mask) : w;
    }

  private:
    const uint8_t *bits_;
    Vec zero_;
    const int8_t *&p_;
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
    Bytes minus(int x) const {
        Bytes r;
        for (int i = 0; i < 4; i++) r.v[i] = v[i] - static_cast<uint8_t>(x);
        return r;
    }
    Bytes minus_where_none(const uint8_t *p, int x) const {
        Bytes r;
        for (int i = 0; i < 4; i++) {
            const Two bits = {bits_table.bytes[p[2 * i]], bits_table.bytes[p[2 * i + 1]]};
            r.v[i] = v[i] - (reinterpret_cast<Sixteen>(~bits) & static_cast<uint8_t>(x));
        }
        return r;
    }
    Bytes look_up(const int8_t *table) const {
        uint8_t bytes[64];
        std::memcpy(bytes, v, 64);
        for (uint8_t &byte : bytes) byte = static_cast<uint8_t>(table[byte]);
        return load(bytes);
    }
    void store(int8_t *p) const { std::memcpy(p, v, 64); }
};

template <bool sparse, bool zeros>
class Columns {
  public:
    Columns(const uint8_t *bits, int64_t count, float zero, const int8_t *&p) {
        const int8_t *from = p;
        int8_t bytes[64] = {};
        float less[64] = {};
        if constexpr (sparse) {
            for (uint64_t mask = read_bits(bits, (count + 7) / 8); mask; mask &= mask - 1) {
                bytes[__builtin_ctzll(mask)] = *p++;
                if constexpr (zeros) less[__builtin_ctzll(mask)] = zero;
            }
            from = bytes;
        } else {
            p += count;
        }
        // all at once, which compilers turn into vectors
        for (int i = 0; i < 64; i++) floats_[i] = zeros ? from[i] - (sparse ? less[i] : zero) : from[i];
    }
    Vec next() {
        at_ += Vec::width;
        return Vec::load(floats_ + at_ - Vec::width);
    }

  private:
    float floats_[64];
    int at_ = 0;
};

#endif

}  // namespace oats::OATS_ISA
