// Values of few bits. A row's codes are unpacked to bytes in the first-level cache; from there on they are in
// registers: to floats at their columns, less their zero, and times their group's scale.
#pragma once

#include <cstring>
#include <type_traits>

#include "bytes.hpp"
#include "few_tokens.inl.hpp"
#include "lanes.inl.hpp"

namespace oats::OATS_ISA {

// Where `bytes` bytes can be read that are those from p on: p, or a copy of what there is before `end`.
template <int64_t bytes>
OATS_INLINE const uint8_t *readable(const uint8_t *p, const uint8_t *end, uint8_t (&copy)[bytes]) {
    __builtin_prefetch(p + 4096);
    if (end - p >= bytes) return p;
    return static_cast<const uint8_t *>(std::memcpy(copy, p, static_cast<size_t>(end - p)));
}

// `count` codes of two pieces (or one: `second` is 0), less 2^(bits - 1), or their levels. Reads nothing from `end` on,
// and writes up to 63 bytes more.
template <int first, int second, bool look_up = false>
void unpack(const uint8_t *a, const uint8_t *b, const uint8_t *end, const int8_t *levels, int64_t count, int8_t *to) {
    constexpr int half = 1 << (first + second - 1);
    uint8_t last[8 * first] = {}, other[second ? 8 * second : 1] = {};
    for (int64_t i = 0; i < count; i += 64, a += 8 * first, b += 8 * second) {
        const uint8_t *from = readable(a, end, last);
        Bytes codes;
        if constexpr (first == 8)
            codes = Bytes::load(from);
        else
            codes = Bytes::of_bits<first, 0>(from);
        if constexpr (second == 1)
            codes = codes.minus_where_none(readable(b, end, other), half);
        else if constexpr (second)
            codes = codes.plus(Bytes::of_bits<second, first>(readable(b, end, other)));
        constexpr int less = second == 1 ? half : 0;  // than they are
        if constexpr (look_up)
            codes.minus(-less).look_up(levels).store(to + i);
        else
            codes.minus(half - less).store(to + i);
    }
}

// Codes first .. first + count - 1, where `first` is a multiple of 8, less 2^(bits - 1), or their levels. Writes up to
// 63 bytes more.
inline void unpack(const FewBits &S, int64_t all, int64_t first, int64_t count, int8_t *to) {
    const auto with_pieces = [&]<int low, int high>() {
        const int64_t start = ceil_div(all * low, 8), end = start + ceil_div(all * high, 8);  // of the second pieces
        const uint8_t *a = S.codes + first * low / 8, *b = S.codes + start + first * high / 8;
        if constexpr (low + high <= 4)
            if (S.levels) return unpack<low, high, true>(a, b, S.codes + end, S.levels, count, to);
        unpack<low, high>(a, b, S.codes + end, nullptr, count, to);
    };
    switch (S.bits) {
        case 2:
            return with_pieces.template operator()<2, 0>();
        case 3:
            return with_pieces.template operator()<2, 1>();
        case 4:
            return with_pieces.template operator()<4, 0>();
        case 5:
            return with_pieces.template operator()<4, 1>();
        case 6:
            return with_pieces.template operator()<4, 2>();
        default:
            return with_pieces.template operator()<8, 0>();
    }
}

// A row's codes less 2^(bits - 1), in its columns' order. Scales and zeros are floats, zeros less 2^(bits - 1) too.
class Row {
  public:
    // bytes of memory that it takes
    static int64_t room(const FewBits &S) { return codes_room(S) + 2 * scales_room(S); }

    Row(const FewBits &S, const int64_t *row_start, uint8_t *memory)
        : scales(reinterpret_cast<float *>(memory)),
          zeros(reinterpret_cast<float *>(memory + scales_room(S))),
          S_(S),
          row_start_(row_start),
          memory_(reinterpret_cast<int8_t *>(memory + 2 * scales_room(S))) {}

    // False where its bits do not fit.
    bool read(int64_t row) {
        const int64_t columns = S_.kept.columns, groups = S_.groups(), half = 1 << (S_.bits - 1);
        bits = S_.kept.bitmask ? S_.kept.bitmask + row * S_.kept.row_bytes() : nullptr;
        if (bits && !row_fits(S_.kept, row_start_, row)) return false;
        const int64_t start = bits ? row_start_[row] : row * columns, before = start % 8;
        const int64_t count = bits ? row_start_[row + 1] - start : columns;
        unpack(S_, bits ? S_.kept.nonzeros : S_.kept.rows * columns, start - before, before + count, memory_);
        codes = memory_ + before;
        for (int64_t g = 0; g < groups; g++) scales[g] = to_float(bfloat16{S_.scales[row * groups + g]});
        if (S_.zeros)
            for (int64_t g = 0; g < groups; g++) zeros[g] = static_cast<float>(S_.zeros[row * groups + g] - half);
        return true;
    }

    const int8_t *codes = nullptr;  // without gaps where some columns have none
    const uint8_t *bits = nullptr;  // null: all are kept
    float *scales, *zeros;

  private:
    // 7 codes before the row's, 64 that are written or read beyond its last
    static int64_t codes_room(const FewBits &S) { return round_up(S.kept.columns, 64) + 128; }
    static int64_t scales_room(const FewBits &S) { return round_up(S.groups() * 4, 64); }

    const FewBits &S_;
    const int64_t *row_start_;
    int8_t *memory_;
};

// Calls f<sparse, zeros>(): whether some columns have no value, and whether groups have zeros of their own.
template <class F>
void with_form(const FewBits &S, F f) {
    const auto with_zeros = [&]<bool sparse>() {
        S.zeros ? f.template operator()<sparse, true>() : f.template operator()<sparse, false>();
    };
    S.kept.bitmask ? with_zeros.template operator()<true>() : with_zeros.template operator()<false>();
}

// Calls f(i, count, scale, next) for up to `group` columns of one group at a time, those from i on; each next() is the
// register of the next values, still to be multiplied by `scale`. A full `group` comes as a constant, for loops
// unrolled.
template <bool sparse, bool zeros, class F>
OATS_INLINE void for_columns(const FewBits &S, const Row &row, F f) {
    const int64_t columns = S.kept.columns;
    const int8_t *codes = row.codes;
    for (int64_t g = 0, begin = 0; begin < columns; g++, begin += S.group_size) {
        const Vec scale = Vec::all(row.scales[g]);
        const auto some = [&](int64_t i, auto count) OATS_INLINE_LAMBDA {
            const uint8_t *bits = sparse ? row.bits + i / 8 : nullptr;
            Columns<sparse, zeros> here(bits, count, zeros ? row.zeros[g] : 0, codes);
            f(i, count, scale, [&]() OATS_INLINE_LAMBDA { return here.next(); });
        };
        const int64_t end = least(begin + S.group_size, columns);
        int64_t i = begin;
        for (; i + group <= end; i += group) some(i, std::integral_constant<int64_t, group>{});
        if (i < end) some(i, end - i);
    }
}

inline bool dequantise(const FewBits &S, const int64_t *row_start, float *dense, int threads) {
    constexpr int W = Vec::width;
    const int64_t columns = S.kept.columns, chunk = most(1, 65536 / most(columns, 1)), room = Row::room(S);
    Scratch<uint8_t> memory(threads * room);
    Fit fit;
    with_form(S, [&]<bool sparse, bool zeros>() {
        parallel(ceil_div(S.kept.rows, chunk), threads, [&](int64_t c, int worker) {
            Row values(S, row_start, memory + worker * room);
            for (int64_t r = c * chunk; r < least(S.kept.rows, (c + 1) * chunk); r++) {
                if (!values.read(r)) return fit.lost();
                float *to = dense + r * columns;
                for_columns<sparse, zeros>(S, values, [&](int64_t i, auto count, Vec scale, auto next)
                                                          OATS_INLINE_LAMBDA {
                    int64_t j = 0;
                    for (; j + W <= count; j += W) (next() * scale).store(to + i + j);
                    if (j < count) (next() * scale).store(to + i + j, count - j);
                });
            }
        });
    });
    return fit;
}

// sums[t] = row . x[t]
template <int T, bool sparse, bool zeros>
OATS_INLINE void few_bits_dot(const FewBits &S, const Row &row, const float *x, int64_t x_stride, Vec (&sums)[T]) {
    Vec acc[T];
    OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = Vec::zero();
    for_columns<sparse, zeros>(S, row, [&](int64_t i, auto count, Vec scale, auto next) OATS_INLINE_LAMBDA {
        Vec part[T];  // multiplied by the scale once for all of them
        OATS_UNROLL for (int t = 0; t < T; t++) part[t] = Vec::zero();
        for (int64_t j = 0; j < count; j += Vec::width) {
            const Vec w = next();
            OATS_UNROLL for (int t = 0; t < T; t++) part[t] = fma(w, Vec::load(x + t * x_stride + i + j), part[t]);
        }
        OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = fma(scale, part[t], acc[t]);
    });
    OATS_UNROLL for (int t = 0; t < T; t++) sums[t] = acc[t];
}

// sums[t] += U's row . z[t]
template <int T>
OATS_INLINE void add_low_rank(const FewTokens &p, int64_t token, int64_t row, int64_t rank, int64_t rank_start,
                              Vec (&sums)[T]) {
    Vec products[T];
    OATS_UNROLL for (int t = 0; t < T; t++) products[t] = Vec::zero();
    with_factor_type(p.L, [&](auto type) {
        dense_dot<T>(static_cast<const decltype(type) *>(p.L.U) + row * p.L.width, rank,
                     p.z + token * p.z_stride + rank_start, p.z_stride, products);
    });
    const Vec scale = Vec::all(scale_at(p.L.U_scale, row));
    OATS_UNROLL for (int t = 0; t < T; t++) sums[t] = fma(scale, products[t], sums[t]);
}

// The outputs of a row, of which S's share is known.
template <int T>
OATS_INLINE void finish(const FewTokens &p, int64_t token, int64_t row, int64_t rank, int64_t rank_start,
                        Vec (&sums)[T]) {
    if (rank) add_low_rank(p, token, row, rank, rank_start, sums);
    const float b = bias_at(p.bias, row);
    for (int t = 0; t < T; t++) p.y[(token + t) * p.S.rows + row] = sums[t].sum() + b;
}

template <int T, bool sparse, bool zeros>
void few_bits_rows(const FewTokens &p, const FewBits &S, int64_t token, int64_t first, int64_t last, int64_t rank,
                   int64_t rank_start, uint8_t *memory) {
    Row values(S, p.row_start, memory);
    for (int64_t row = first; row < last; row++) {
        if (!values.read(row)) return p.fit.lost();
        Vec sums[T];
        few_bits_dot<T, sparse, zeros>(S, values, p.x + token * p.x_stride, p.x_stride, sums);
        finish(p, token, row, rank, rank_start, sums);
    }
}

#if defined(__AVX512F__)
template <int bits>
void in_lanes(const FewBits &S, const LowRank &L, const Bias &bias, const Tokens &io, int threads) {
    const Lanes<bits> lanes(S);
    one_pass(S.kept, nullptr, L, bias, io, Lanes<bits>::chunk, Lanes<bits>::reorder, threads,
             [&](const FewTokens &p, int64_t first, int64_t last, int64_t rank, int64_t rank_start, int) {
                 for_tokens(io.tokens, [&]<int T>(int64_t token) {
                     for (int64_t row = first; row < last; row++) {
                         Vec sums[T];
                         lanes.template dot<T>(row, p.x + token * p.x_stride, p.x_stride, sums);
                         finish(p, token, row, rank, rank_start, sums);
                     }
                 });
             });
}
#endif

inline bool few_bits(const FewBits &S, const int64_t *row_start, const LowRank &L, const Bias &bias, const Tokens &io,
                     int threads) {
    threads = threads_for(S.kept, io.tokens, threads);
#if defined(__AVX512F__)
    if (Lanes<2>::take(S)) return in_lanes<2>(S, L, bias, io, threads), true;
    if (Lanes<3>::take(S)) return in_lanes<3>(S, L, bias, io, threads), true;
    if (Lanes<4>::take(S)) return in_lanes<4>(S, L, bias, io, threads), true;
#endif
    const int64_t room = Row::room(S);
    Scratch<uint8_t> memory(threads * room);
    bool fits = false;
    with_form(S, [&]<bool sparse, bool zeros>() {
        fits = one_pass(S.kept, row_start, L, bias, io, group, [](float *) {}, threads,
                        [&](const FewTokens &p, int64_t first, int64_t last, int64_t rank, int64_t start, int worker) {
                            for_tokens(io.tokens, [&]<int T>(int64_t token) {
                                few_bits_rows<T, sparse, zeros>(p, S, token, first, last, rank, start,
                                                                memory + worker * room);
                            });
                        });
    });
    return fits;
}

}  // namespace oats::OATS_ISA
