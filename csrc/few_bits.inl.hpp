// Values of few bits. A row's codes are unpacked to bytes and spread out to their columns in the first-level cache;
// from there on they are in registers: to floats, less their zero, and times their group's scale.
#pragma once

#include <cstring>
#include <type_traits>

#include "few_tokens.inl.hpp"

namespace oats::OATS_ISA {

// The codes in a byte, of 2 or 4 bits each, in as many bytes.
template <int width>
OATS_INLINE auto spread(uint8_t byte) {
    if constexpr (width == 4) {
        const uint16_t v = byte;
        return static_cast<uint16_t>((v | v << 4) & 0x0f0f);
    } else {
        static_assert(width == 2);
        uint32_t v = byte;
        v = (v | v << 12) & 0x000f000f;
        return (v | v << 6) & 0x03030303;
    }
}

// The first pieces of codes.
template <int width>
inline void unpack_first(const uint8_t *from, int64_t bytes, int8_t *to) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + 4096);
    for (int64_t i = 0; i < bytes; i++) {
        const auto codes = spread<width>(from[i]);
        std::memcpy(to + i * sizeof codes, &codes, sizeof codes);
    }
}

// The second pieces of codes of 6 bits: 2 bits, above 4.
inline void unpack_second_of_6(const uint8_t *from, int64_t bytes, int8_t *to) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + 4096);
    for (int64_t i = 0; i < bytes; i++) {
        uint32_t codes;
        std::memcpy(&codes, to + i * 4, 4);
        codes |= spread<2>(from[i]) << 4;
        std::memcpy(to + i * 4, &codes, 4);
    }
}

// The second pieces of codes of 3 or 5 bits: 1 bit. What has it is `half` more, and all are to be that less.
inline void unpack_last_bit(const uint8_t *from, int64_t bytes, int8_t half, int8_t *to) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i + 2048);
    for (int64_t i = 0; i < bytes; i += 8) subtract_where_none(read_bits(from + i, bytes - i), half, to + i * 8);
}

// Codes first .. first + count - 1, where `first` is a multiple of 8, less 2^(bits - 1). Reads no byte that holds none
// of them; writes up to 63 bytes more.
inline void unpack(const FewBits &S, int64_t all, int64_t first, int64_t count, int8_t *to) {
    if (!count) return;  // there may be no memory at all
    const auto piece = [&](int width, int64_t start) { return S.codes + start + first * width / 8; };
    const auto bytes = [&](int width) { return ceil_div(count * width, 8); };
    switch (S.bits) {
        case 2:
            unpack_first<2>(piece(2, 0), bytes(2), to);
            break;
        case 3:
            unpack_first<2>(piece(2, 0), bytes(2), to);
            return unpack_last_bit(piece(1, ceil_div(all, 4)), bytes(1), 4, to);
        case 4:
            unpack_first<4>(piece(4, 0), bytes(4), to);
            break;
        case 5:
            unpack_first<4>(piece(4, 0), bytes(4), to);
            return unpack_last_bit(piece(1, ceil_div(all, 2)), bytes(1), 16, to);
        case 6:
            unpack_first<4>(piece(4, 0), bytes(4), to);
            unpack_second_of_6(piece(2, ceil_div(all, 2)), bytes(2), to);
            break;
        default:
            std::memcpy(to, piece(8, 0), static_cast<size_t>(count));
    }
    const uint8_t half = static_cast<uint8_t>(1 << (S.bits - 1));
    for (int64_t i = 0; i < count; i++) to[i] = static_cast<int8_t>(static_cast<uint8_t>(to[i]) - half);
}

// A row's codes less 2^(bits - 1), for each of its columns: 0 where none is kept. What follows the last column, up to
// a whole number of `group`, is of no meaning. Scales and zeros are floats, zeros less 2^(bits - 1) too.
class Row {
  public:
    // bytes of memory that it takes
    static int64_t room(const FewBits &S) { return 2 * codes_room(S) + 2 * scales_room(S); }

    Row(const FewBits &S, const int64_t *row_start, uint8_t *memory)
        : scales(reinterpret_cast<float *>(memory)),
          zeros(reinterpret_cast<float *>(memory + scales_room(S))),
          S_(S),
          row_start_(row_start),
          packed_(reinterpret_cast<int8_t *>(memory + 2 * scales_room(S))),
          spread_(packed_ + codes_room(S)) {}

    // False where its bits do not fit.
    bool read(int64_t row) {
        const int64_t columns = S_.kept.columns, groups = S_.groups(), half = 1 << (S_.bits - 1);
        bits = S_.kept.bitmask ? S_.kept.bitmask + row * S_.kept.row_bytes() : nullptr;
        if (bits && !row_fits(S_.kept, row_start_, row)) return false;
        const int64_t start = bits ? row_start_[row] : row * columns, before = start % 8;
        const int64_t count = bits ? row_start_[row + 1] - start : columns;
        unpack(S_, bits ? S_.kept.nonzeros : S_.kept.rows * columns, start - before, before + count, packed_);
        codes = bits ? spread_out(packed_ + before) : packed_ + before;
        for (int64_t g = 0; g < groups; g++) scales[g] = to_float(bfloat16{S_.scales[row * groups + g]});
        if (S_.zeros)
            for (int64_t g = 0; g < groups; g++) zeros[g] = static_cast<float>(S_.zeros[row * groups + g] - half);
        return true;
    }

    const int8_t *codes = nullptr;
    const uint8_t *bits = nullptr;  // null: all are kept
    float *scales, *zeros;

  private:
    // 7 codes before the row's, 64 that are read beyond its last
    static int64_t codes_room(const FewBits &S) { return round_up(S.kept.columns, 64) + 128; }
    static int64_t scales_room(const FewBits &S) { return round_up(S.groups() * 4, 64); }

    const int8_t *spread_out(const int8_t *from) {
        const int64_t row_bytes = S_.kept.row_bytes();
        for (int64_t byte = 0; byte < row_bytes; byte += 8) {
            const uint64_t mask = read_bits(bits + byte, row_bytes - byte);
            expand_bytes(mask, from, spread_ + byte * 8);
            from += popcount(mask);
        }
        return spread_;
    }

    const FewBits &S_;
    const int64_t *row_start_;
    int8_t *packed_, *spread_;
};

// What is taken off a code: nothing more, its group's zero, or that where a value is kept.
enum class Offset { none, all, kept };

template <class F>
void with_offset(const FewBits &S, F f) {
    if (!S.zeros)
        f.template operator()<Offset::none>();
    else if (!S.kept.bitmask)
        f.template operator()<Offset::all>();
    else
        f.template operator()<Offset::kept>();
}

// Calls f(i, count, scale, at) for up to `group` columns of one group at a time, those from i on; at(j) is the register
// of values at column i + j, still to be multiplied by `scale`. A full `group` comes as a constant, for loops unrolled.
template <Offset offset, class F>
OATS_INLINE void for_columns(const FewBits &S, const Row &row, F f) {
    const int64_t columns = S.kept.columns, row_bytes = S.kept.row_bytes();
    for (int64_t g = 0, begin = 0; begin < columns; g++, begin += S.group_size) {
        const Vec scale = Vec::all(row.scales[g]);
        const auto some = [&](int64_t i, auto count) OATS_INLINE_LAMBDA {
            const uint64_t mask = offset == Offset::kept ? read_bits(row.bits + i / 8, row_bytes - i / 8) : 0;
            f(i, count, scale, [&](int64_t j) OATS_INLINE_LAMBDA {
                Vec w = Vec::load(row.codes + i + j);
                if constexpr (offset != Offset::none) w = w - Vec::all(row.zeros[g]);
                if constexpr (offset == Offset::kept) w = w.where(mask >> j & ((1u << Vec::width) - 1));
                return w;
            });
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
    with_offset(S, [&]<Offset offset>() {
        parallel(ceil_div(S.kept.rows, chunk), threads, [&](int64_t c, int worker) {
            Row values(S, row_start, memory + worker * room);
            for (int64_t r = c * chunk; r < least(S.kept.rows, (c + 1) * chunk); r++) {
                if (!values.read(r)) return fit.lost();
                float *to = dense + r * columns;
                for_columns<offset>(S, values, [&](int64_t i, auto count, Vec scale, auto at) OATS_INLINE_LAMBDA {
                    int64_t j = 0;
                    for (; j + W <= count; j += W) (at(j) * scale).store(to + i + j);
                    if (j < count) (at(j) * scale).store(to + i + j, count - j);
                });
            }
        });
    });
    return fit;
}

// sums[t] = row . x[t]
template <int T, Offset offset>
OATS_INLINE void few_bits_dot(const FewBits &S, const Row &row, const float *x, int64_t x_stride, Vec (&sums)[T]) {
    Vec acc[T];
    OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = Vec::zero();
    for_columns<offset>(S, row, [&](int64_t i, auto count, Vec scale, auto at) OATS_INLINE_LAMBDA {
        Vec part[T];  // multiplied by the scale once for all of them
        OATS_UNROLL for (int t = 0; t < T; t++) part[t] = Vec::zero();
        for (int64_t j = 0; j < count; j += Vec::width) {
            const Vec w = at(j);
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

template <int T, Offset offset>
void few_bits_rows(const FewTokens &p, const FewBits &S, int64_t token, int64_t first, int64_t last, int64_t rank,
                   int64_t rank_start, uint8_t *memory) {
    Row values(S, p.row_start, memory);
    for (int64_t row = first; row < last; row++) {
        if (!values.read(row)) return p.fit.lost();
        Vec sums[T];
        few_bits_dot<T, offset>(S, values, p.x + token * p.x_stride, p.x_stride, sums);
        if (rank) add_low_rank(p, token, row, rank, rank_start, sums);
        const float b = bias_at(p.bias, row);
        for (int t = 0; t < T; t++) p.y[(token + t) * S.kept.rows + row] = sums[t].sum() + b;
    }
}

inline bool few_bits(const FewBits &S, const int64_t *row_start, const LowRank &L, const Bias &bias, const Tokens &io,
                     int threads) {
    threads = threads_for(S.kept, io.tokens, threads);
    const int64_t room = Row::room(S);
    Scratch<uint8_t> memory(threads * room);
    bool fits = false;
    with_offset(S, [&]<Offset offset>() {
        fits = one_pass(S.kept, row_start, L, bias, io, false, threads,
                        [&](const FewTokens &p, int64_t first, int64_t last, int64_t rank, int64_t start, int worker) {
                            for_tokens(io.tokens, [&]<int T>(int64_t token) {
                                few_bits_rows<T, offset>(p, S, token, first, last, rank, start, memory + worker * room);
                            });
                        });
    });
    return fits;
}

}  // namespace oats::OATS_ISA
