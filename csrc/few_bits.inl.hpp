// Values of few bits. Their codes, or the levels that these stand for, become bytes in registers, which integers that
// stand for the inputs are multiplied by: sums of integers, times the scales of both, are the products.
#pragma once

#include <cstring>
#include <type_traits>

#include "bytes.hpp"
#include "few_tokens.inl.hpp"
#include "integers.inl.hpp"

namespace oats::OATS_ISA {

// 64 codes at a time, each a byte; or their levels plus 128.
template <int low, int high, bool look_up>
class Codes {
  public:
    // the byte of what is zero, where groups have no zeros of their own
    static constexpr int zero = look_up ? 128 : 1 << (low + high - 1);

    explicit Codes(const FewBits &S) {
        const int64_t count = S.kept.bitmask ? S.kept.nonzeros : S.kept.rows * S.kept.columns;
        low_ = S.codes, high_ = S.codes + ceil_div(count * low, 8), end_ = high_ + ceil_div(count * high, 8);
        if constexpr (look_up)
            for (int i = 0; i < 16; i++) levels_[i] = static_cast<uint8_t>(S.levels[i] + 128);
    }

    // Those from `first` on, a multiple of 8; anything past the last.
    OATS_INLINE Bytes at(int64_t first) const {
        const uint8_t *p = low_ + first * low / 8, *q = high_ + first * high / 8;
        uint8_t near_end[8 * (low + high)];
        if (!whole(first, 64)) copy_rest(p, q, near_end);
        return read(p, q);
    }

    // Whether `count` from `first` on, both multiples of 8, can be read without a look at where codes end.
    OATS_INLINE bool whole(int64_t first, int64_t count) const {
        const int64_t last = first + count;
        return low_ + last * low / 8 <= end_ && high_ + last * high / 8 <= end_;
    }

    // `count` bytes, those from `first` on, as they lie in memory: null where none do, or not so many.
    const uint8_t *in_memory(int64_t first, int64_t count) const {
        return low == 8 && whole(first, count) ? low_ + first : nullptr;
    }

    // As `few_bits_dot` reads them, those from `first` on.
    auto from(int64_t first) const {
        return [this, p = low_ + first * low / 8, q = high_ + first * high / 8](auto, uint8_t) mutable
               OATS_INLINE_LAMBDA {
            const Bytes bytes = read(p, q);
            p += 8 * low, q += 8 * high;
            return bytes;
        };
    }

  private:
    OATS_INLINE Bytes read(const uint8_t *p, const uint8_t *q) const {
        __builtin_prefetch(p + 4096);
        if constexpr (look_up) return Bytes::look_up<low, high>(p, q, levels_);
        Bytes codes;
        if constexpr (low == 8)
            codes = Bytes::load(p);
        else
            codes = Bytes::of_bits<low, 0>(p);
        if constexpr (high == 1)
            codes = codes.plus_where(q, 1 << low);
        else if constexpr (high)
            codes = codes.plus(Bytes::of_bits<high, low>(q));
        return codes;
    }

    // Pieces of which some bytes are there, and others past the end.
    void copy_rest(const uint8_t *&p, const uint8_t *&q, uint8_t (&to)[8 * (low + high)]) const {
        std::memset(to, 0, sizeof to);
        std::memcpy(to, p, static_cast<size_t>(least(end_ - p, 8 * low)));
        if (high && q < end_) std::memcpy(to + 8 * low, q, static_cast<size_t>(least(end_ - q, 8 * high)));
        p = to, q = to + 8 * low;
    }

    const uint8_t *low_, *high_, *end_;
    uint8_t levels_[16];
};

// Calls f(codes).
template <class F>
void with_codes(const FewBits &S, F f) {
    const auto of_pieces = [&]<int low, int high>() {
        if constexpr (low + high <= 4)
            if (S.levels) return f(Codes<low, high, true>(S));
        f(Codes<low, high, false>(S));
    };
    switch (S.bits) {
        case 2:
            return of_pieces.template operator()<2, 0>();
        case 3:
            return of_pieces.template operator()<2, 1>();
        case 4:
            return of_pieces.template operator()<4, 0>();
        case 5:
            return of_pieces.template operator()<4, 1>();
        case 6:
            return of_pieces.template operator()<4, 2>();
        default:
            return of_pieces.template operator()<8, 0>();
    }
}

// A row's bytes in the first-level cache, where some columns have none, or it does not begin with a byte.
class Row {
  public:
    // bytes of memory that it takes: 7 codes before the row's, 64 that are written or read beyond its last
    static int64_t room(const FewBits &S) { return round_up(S.kept.columns, 64) + 128; }

    Row(const FewBits &S, const int64_t *row_start, uint8_t *memory)
        : S_(S), row_start_(row_start), memory_(memory) {}

    // False where its bits do not fit.
    template <class C>
    bool read(const C &codes, int64_t row) {
        const int64_t columns = S_.kept.columns;
        bits_ = S_.kept.bitmask ? S_.kept.bitmask + row * S_.kept.row_bytes() : nullptr;
        if (bits_ && !row_fits(S_.kept, row_start_, row)) return false;
        const int64_t start = bits_ ? row_start_[row] : row * columns, before = start % 8;
        const int64_t count = before + (bits_ ? row_start_[row + 1] - start : columns);
        first_ = codes.in_memory(start - before, round_up(count, 64) + 64);
        if (!first_) {
            unpack(codes, start - before, count, memory_);
            first_ = memory_;
        }
        first_ += before;
        return true;
    }

    // `codes` is a copy, whose address no store to memory can be: it stays in registers.
    template <class C>
    static void unpack(const C codes, int64_t first, int64_t count, uint8_t *to) {
        const int64_t whole = codes.whole(first, round_up(count, 64)) ? count : 0;
        auto next = codes.from(first);
        int64_t i = 0;
        for (; i < whole; i += 64) next(64, 0).store(to + i);
        for (; i < count; i += 64) codes.at(first + i).store(to + i);
    }

    // Its columns as `few_bits_dot` reads them.
    template <bool sparse>
    auto columns() const {
        return [bits = bits_, p = first_](int64_t count, uint8_t fill) mutable OATS_INLINE_LAMBDA {
            const uint8_t *bits_here = bits, *here = p;
            __builtin_prefetch(p + 4096);
            if constexpr (sparse) {
                bits += count / 8;
                return Bytes::spread(bits_here, count, fill, p);
            }
            p += count;
            return Bytes::load(here);
        };
    }

  private:
    const FewBits &S_;
    const int64_t *row_start_;
    uint8_t *memory_;
    const uint8_t *first_ = nullptr;  // without gaps
    const uint8_t *bits_ = nullptr;  // null: all are kept
};

// A row with its zeros, floats.
template <bool sparse>
void dequantise_row(const FewBits &S, int64_t row, int zero, const Row &own, float *to) {
    const int64_t columns = S.kept.columns, groups = S.groups();
    auto next = own.columns<sparse>();
    for (int64_t g = row * groups, begin = 0; begin < columns; g++, begin += S.group_size) {
        if (S.zeros) zero = S.zeros[g];
        const Vec zeros = Vec::all(static_cast<float>(zero)), scale = Vec::all(to_float(bfloat16{S.scales[g]}));
        for (int64_t i = begin, end = least(begin + S.group_size, columns); i < end; i += 64) {
            uint8_t bytes[64];
            const int64_t count = least(end - i, 64);
            next(count, static_cast<uint8_t>(zero)).store(bytes);
            for (int64_t j = 0; j < count; j += Vec::width) {
                const Vec values = (Vec::load(bytes + j) - zeros) * scale;
                count - j < Vec::width ? values.store(to + i + j, count - j) : values.store(to + i + j);
            }
        }
    }
}

inline bool dequantise(const FewBits &S, const int64_t *row_start, float *dense, int threads) {
    const int64_t columns = S.kept.columns, chunk = most(1, 65536 / most(columns, 1));
    Scratch<uint8_t> memory(threads * Row::room(S));
    Fit fit;
    with_codes(S, [&](const auto &codes) {
        parallel(ceil_div(S.kept.rows, chunk), threads, [&](int64_t c, int worker) {
            Row own(S, row_start, memory + worker * Row::room(S));
            for (int64_t row = c * chunk; row < least(S.kept.rows, (c + 1) * chunk); row++) {
                if (!own.read(codes, row)) return fit.lost();
                float *to = dense + row * columns;
                if (S.kept.bitmask)
                    dequantise_row<true>(S, row, codes.zero, own, to);
                else
                    dequantise_row<false>(S, row, codes.zero, own, to);
            }
        });
    });
    return fit;
}

// Scales of a row's stretches, times those of the inputs. Returns what zeros add to the row's product.
OATS_INLINE Vec scale_stretches(const FewBits &S, const Integers &x, int64_t token, int64_t row, int zero, float *to) {
    constexpr int W = Vec::width;
    const int64_t count = x.count, first = row * x.groups;
    const auto *own = reinterpret_cast<const bfloat16 *>(S.scales) + first;
    const float *scales = x.scales(token), *sums = x.sums(token);
    Vec less = Vec::zero();
    if (x.in_group == 1 && !S.zeros) {
        const Vec minus = Vec::all(static_cast<float>(-zero));
        int64_t s = 0;
        const auto add = [&](auto... n) OATS_INLINE_LAMBDA {  // a register of them, or the first n and zeros
            const Vec scale = Vec::load(own + s, n...) * Vec::load(scales + s);
            scale.store(to + s);  // whole, since what a part of a register wrote is slow to read again
            less = fma(scale * minus, Vec::load(sums + s), less);
        };
        for (; s + W <= count; s += W) add();
        if (s < count) add(count - s);
        return less;
    }
    float total[W] = {};
    for (int64_t s = 0, g = 0, left = x.in_group; s < count; s++) {
        to[s] = to_float(own[g]) * scales[s];
        total[s % W] -= to[s] * static_cast<float>(S.zeros ? S.zeros[first + g] : zero) * sums[s];
        if (!--left) left = x.in_group, g++;
    }
    return Vec::load(total);
}

// sums[t] = row . x[t]; next(count, fill) are the bytes of the next columns, 64 at most, `fill` where there is none.
// zero: of groups that have none of their own. scales: room for those of products, T times x.padded.
template <int T, bool with_zeros, class Next>
OATS_INLINE void few_bits_dot(const FewBits &S, const Integers &x, int64_t token, int64_t row, int zero, Next next,
                              float *scales, Vec (&sums)[T]) {
    const int64_t columns = S.kept.columns, size = x.size, padded = x.padded, stride = x.stride;
    const uint8_t *zeros = S.zeros + (with_zeros ? row * x.groups : 0), *values = x.values(token);
    Vec acc[T], other[T];  // in registers; a second sum hides the latency of the first
    OATS_UNROLL for (int t = 0; t < T; t++) {
        acc[t] = scale_stretches(S, x, token + t, row, zero, scales + t * padded);
        other[t] = Vec::zero();
    }
    int64_t in_group = x.in_group;
    const auto stretch = [&](auto n, Vec(&to)[T]) OATS_INLINE_LAMBDA {
        const auto fill = static_cast<uint8_t>(with_zeros ? *zeros : zero);
        Sums part[T];
        OATS_UNROLL for (int t = 0; t < T; t++) part[t] = Sums::none();
        const auto add = [&](auto some) OATS_INLINE_LAMBDA {
            const Bytes bytes = next(some, fill);
            OATS_UNROLL for (int t = 0; t < T; t++) part[t].add(bytes, values + t * stride);
            values += 128;
        };
        int64_t i = 0;
        for (; i + 64 <= n; i += 64) add(std::integral_constant<int64_t, 64>{});
        if (i < n) add(n - i);
        OATS_UNROLL for (int t = 0; t < T; t++) to[t] = fma(part[t].floats(), Vec::all(scales[t * padded]), to[t]);
        scales++;
        if (with_zeros && !--in_group) in_group = x.in_group, zeros++;
    };
    int64_t begin = 0;
    if (size == 64) {
        if constexpr (Vec::registers)  // elsewhere a second sum takes longer than what it hides
            for (; begin + 128 <= columns; begin += 128) {
                stretch(std::integral_constant<int64_t, 64>{}, acc);
                stretch(std::integral_constant<int64_t, 64>{}, other);
            }
        for (; begin + 64 <= columns; begin += 64) stretch(std::integral_constant<int64_t, 64>{}, acc);
    }
    for (; begin < columns; begin += size) stretch(least(size, columns - begin), acc);
    OATS_UNROLL for (int t = 0; t < T; t++) sums[t] = acc[t] + other[t];
}

// The same of bytes in the first-level cache: one function for all codes.
template <int T>
void few_bits_dot(const FewBits &S, const Integers &x, int64_t token, int64_t row, int zero, const Row &own, float *scales,
                  Vec (&sums)[T]) {
    if (S.kept.bitmask && S.zeros)
        few_bits_dot<T, true>(S, x, token, row, zero, own.columns<true>(), scales, sums);
    else if (S.kept.bitmask)
        few_bits_dot<T, false>(S, x, token, row, zero, own.columns<true>(), scales, sums);
    else
        few_bits_dot<T, false>(S, x, token, row, zero, own.columns<false>(), scales, sums);
}

// sums[t] += U's row . z[t]
template <int T>
void add_low_rank(const FewTokens &p, int64_t token, int64_t row, int64_t rank, int64_t rank_start,
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

// Outputs of T tokens, row after row: each is the sum of a register of floats, and as many rows as these are added up
// at once.
template <int T>
class Outputs {
  public:
    Outputs(const FewTokens &p, int64_t token) : p_(p), token_(token) {}

    OATS_INLINE void put(int64_t row, const Vec (&sums)[T]) {
        OATS_UNROLL for (int t = 0; t < T; t++) sums_[t][count_] = sums[t];
        if (++count_ == W) write(row + 1);
    }

    // Those that are left, of rows that end before `last`.
    __attribute__((noinline)) void write(int64_t last) {
        const int64_t first = last - count_;
        for (int t = 0; t < T && count_; t++) {
            Vec r[W];
            for (int i = 0; i < W; i++) r[i] = i < count_ ? sums_[t][i] : Vec::zero();
            Vec::transpose(r);
            OATS_UNROLL for (int half = W / 2; half; half /= 2)
                OATS_UNROLL for (int i = 0; i < half; i++) r[i] = r[i] + r[i + half];
            float *to = p_.y + (token_ + t) * p_.S.rows + first;
            float y[W];
            r[0].store(y);
            for (int i = 0; i < count_; i++) to[i] = y[i] + bias_at(p_.bias, first + i);
        }
        count_ = 0;
    }

  private:
    static constexpr int W = Vec::width;
    const FewTokens &p_;
    int64_t token_;
    int count_ = 0;
    Vec sums_[T][W];
};

// Outputs first .. last - 1 of all tokens.
template <class C>
void few_bits_rows(const FewTokens &p, const FewBits &S, const C &codes, const Integers &x, int64_t tokens,
                   int64_t first, int64_t last, int64_t rank, int64_t rank_start, uint8_t *memory, float *scales) {
    const int64_t columns = S.kept.columns;
    const bool in_registers = !S.kept.bitmask && columns % 8 == 0 && x.size % 64 == 0;
    Row own(S, p.row_start, memory);
    for_tokens(tokens, [&]<int T>(int64_t token) {
        Outputs<T> outputs(p, token);
        for (int64_t row = first; row < last; row++) {
            Vec sums[T];
            if (in_registers && codes.whole(row * columns, round_up(columns, 64)))
                few_bits_dot<T, false>(S, x, token, row, codes.zero, codes.from(row * columns), scales, sums);
            else if (own.read(codes, row))
                few_bits_dot<T>(S, x, token, row, codes.zero, own, scales, sums);
            else
                return p.fit.lost();
            if (rank) add_low_rank(p, token, row, rank, rank_start, sums);
            outputs.put(row, sums);
        }
        outputs.write(last);
    });
}

inline bool few_bits(const FewBits &S, const int64_t *row_start, const LowRank &L, const Bias &bias, const Tokens &io,
                     int threads) {
    threads = threads_for(S.kept, io.tokens, threads);
    Scratch<uint8_t> memory(threads * Row::room(S));
    Integers x(io.tokens, S.kept.columns, S.group_size);
    Scratch<float> scales(threads * 8 * x.padded);
    bool fits = false;
    with_codes(S, [&](const auto &codes) {
        const auto set = [&](const FewTokens &p) { x.set(p.x, p.x_stride); };
        fits = one_pass(S.kept, row_start, L, bias, io, set, threads,
                        [&](const FewTokens &p, int64_t first, int64_t last, int64_t rank, int64_t start, int worker) {
                            few_bits_rows(p, S, codes, x, io.tokens, first, last, rank, start,
                                          memory + worker * Row::room(S), scales + worker * 8 * x.padded);
                        });
    });
    return fits;
}

}  // namespace oats::OATS_ISA
