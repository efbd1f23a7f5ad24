// The 16-bit numbers as any CPU has them, and bits read from a mask. The including file defines OATS_ISA: see simd.hpp.
#pragma once

#include <cstdint>
#include <cstring>

namespace oats::OATS_ISA {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bfloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
inline float to_float(float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);  // infinite, NaN
    // 2^112 moves the exponent from one bias to the other, subnormal numbers included
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000u)));
}

inline void from_float(float x, float &out) { out = x; }
inline void from_float(float x, bfloat16 &out) {
    const uint32_t bits = to_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000)
        out.bits = 0x7fc0;
    else
        out.bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}
inline void from_float(float x, float16 &out) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 and above
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded bits at the end of the mantissa
        half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    out.bits = static_cast<uint16_t>(sign | half);
}

// `count` bytes (8 at most) as one number, the first byte lowest: reads no byte more.
inline uint64_t read_bits(const uint8_t *bytes, int64_t count) {
    uint64_t bits = 0;
    if (count >= 8)
        std::memcpy(&bits, bytes, 8);
    else
        for (int64_t i = 0; i < count; i++) bits |= uint64_t{bytes[i]} << (8 * i);
    return bits;
}

inline int popcount(uint64_t bits) { return __builtin_popcountll(bits); }

}  // namespace oats::OATS_ISA
