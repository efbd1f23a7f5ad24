// Inputs as integers of 16 bits, for products with bytes. Each stretch of columns has a scale of its own, so that one
// large input makes only its neighbours inexact: by 1 / 65534 of it at most.
#pragma once

#include <limits>

#include "bytes.hpp"
#include "common.inl.hpp"

namespace oats::OATS_ISA {

class Integers {
  public:
    static constexpr int largest = 32767;
    static constexpr int64_t longest = 256;  // columns whose products with bytes add up to less than 2^31

    // Of (tokens, columns) whose weights have a scale for each `group_size` of them: stretches of as much, or a share.
    Integers(int64_t tokens, int64_t columns, int64_t group_size)
        : size(size_of(columns, group_size)),
          count(ceil_div(columns, size)),
          in_group(group_size >= columns ? count : group_size / size),
          groups(ceil_div(columns, group_size)),
          padded(round_up(count, Vec::width)),
          stride(count * ceil_div(size, 64) * 128),
          columns_(columns),
          tokens_(tokens),
          scales_(tokens * padded),
          sums_(tokens * padded),
          values_(tokens * stride) {}

    void set(const float *x, int64_t x_stride) {
        for (int64_t t = 0; t < tokens_; t++) {
            uint8_t *to = values_ + t * stride;
            int64_t s = t * padded;
            for (int64_t begin = 0; begin < columns_; s++, begin += size)
                set(x + t * x_stride + begin, least(size, columns_ - begin), scales_[s], sums_[s], to);
            for (; s < (t + 1) * padded; s++) scales_[s] = sums_[s] = 0;
        }
    }

    // of a token, one for each stretch, then zeros
    const float *scales(int64_t token) const { return scales_ + token * padded; }
    const float *sums(int64_t token) const { return sums_ + token * padded; }  // of the integers
    const uint8_t *values(int64_t token) const { return values_ + token * stride; }

    const int64_t size, count, in_group;  // columns of a stretch; stretches of a token, and of a group
    const int64_t groups;                 // of a row, once: divisions take long
    const int64_t padded;                 // `count`, to whole registers
    const int64_t stride;                 // bytes from one token's values to the next's

  private:
    static int64_t size_of(int64_t columns, int64_t group_size) {
        int64_t size = longest;
        if (group_size < columns)
            while (group_size % size) size -= 16;  // which a group is a multiple of
        return size;
    }

    // One stretch; `to` moves on behind it.
    static void set(const float *x, int64_t n, float &scale, float &sum, uint8_t *&to) {
        int32_t top = 0;  // the bits of the largest |x|, which are in the same order
        for (int64_t i = 0; i < n; i++) {
            const auto bits = static_cast<int32_t>(to_bits(x[i]) & 0x7fffffff);
            top = bits > top ? bits : top;
        }
        const bool finite = top < 0x7f800000;
        scale = finite ? from_bits(static_cast<uint32_t>(top)) / largest : 0;
        if (scale < std::numeric_limits<float>::min()) scale = 0;
        const float inverse = scale > 0 ? 1 / scale : 0;
        int32_t total = 0;
        for (int64_t i = 0; i < n; i += 64, to += 128) {
            float floats[64] = {};
            int16_t integers[64];
            if (finite) std::memcpy(floats, x + i, static_cast<size_t>(least(n - i, 64)) * sizeof(float));
            for (int j = 0; j < 64; j++) {  // of 1.5 * 2^23 and more, the last bit is 1: adding that rounds
                const uint32_t rounded = to_bits(floats[j] * inverse + 12582912.0f) - to_bits(12582912.0f);
                integers[j] = static_cast<int16_t>(rounded);
                total += integers[j];
            }
            order(integers, to);
        }
        sum = static_cast<float>(total);
        if (!finite) scale = std::numeric_limits<float>::quiet_NaN();
    }

    int64_t columns_, tokens_;
    Scratch<float> scales_, sums_;
    Scratch<uint8_t> values_;
};

}  // namespace oats::OATS_ISA
