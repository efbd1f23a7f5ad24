// Few tokens: one pass over the packed weights, whose values are spread out to their columns in registers.
#pragma once

#include <cstring>

#include "rows.inl.hpp"

namespace oats::OATS_ISA {

constexpr int64_t group = 64;               // columns whose bits are read at once
constexpr int64_t one_thread = 128 * 1024;  // below so much work, waking a second thread takes longer

// Two vectors of columns in the order of `Vec::expand`: the even ones first
inline void interleave(float *x) {
    float odd[Vec::width];
    for (int i = 0; i < Vec::width; i++) odd[i] = x[2 * i + 1];
    for (int i = 0; i < Vec::width; i++) x[i] = x[2 * i];
    std::memcpy(x + Vec::width, odd, sizeof odd);
}

// acc[t] += row . x[t], for a sparse row; returns where the next row's values are
template <int T, class V>
OATS_INLINE const V *sparse_dot(const uint8_t *bits, int64_t row_bytes, const V *values, const V *end, const float *x,
                            int64_t x_stride, Vec (&acc)[T]) {
    constexpr int W = Vec::width;
    Vec other[T];  // a second sum hides the latency of the first
    OATS_UNROLL for (int t = 0; t < T; t++) other[t] = Vec::zero();
    const auto add = [&](uint64_t mask) OATS_INLINE_LAMBDA {
        OATS_UNROLL for (int i = 0; i < group; i += 2 * W, mask >>= 2 * W) {
            const uint32_t part = static_cast<uint32_t>(mask & ((uint64_t{1} << 2 * W) - 1));
            Vec first, second;
            Vec::expand(part, values, end, first, second);
            values += popcount(part);
            OATS_UNROLL for (int t = 0; t < T; t++) {
                acc[t] = fma(first, Vec::load(x + t * x_stride + i), acc[t]);
                other[t] = fma(second, Vec::load(x + t * x_stride + i + W), other[t]);
            }
        }
        x += group;
    };
    int64_t byte = 0;
    for (; byte + 8 <= row_bytes; byte += 8) {
        fetch_ahead(bits + byte, values);
        add(read_bits(bits + byte, 8));
    }
    if (byte < row_bytes) add(read_bits(bits + byte, row_bytes - byte));
    OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = acc[t] + other[t];
    return values;
}

// acc[t] += row . x[t], for a dense row
template <int T, class V>
OATS_INLINE void dense_dot(const V *row, int64_t n, const float *x, int64_t x_stride, Vec (&acc)[T]) {
    constexpr int W = Vec::width;
    Vec other[T];  // a second sum hides the latency of the first
    OATS_UNROLL for (int t = 0; t < T; t++) other[t] = Vec::zero();
    const auto add = [&](Vec w, int64_t i, Vec (&to)[T]) OATS_INLINE_LAMBDA {
        OATS_UNROLL for (int t = 0; t < T; t++) to[t] = fma(w, Vec::load(x + t * x_stride + i), to[t]);
    };
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        __builtin_prefetch(reinterpret_cast<const char *>(row + i) + 4096);
        add(Vec::load(row + i), i, acc);
        add(Vec::load(row + i + W), i + W, other);
    }
    if (i + W <= n) add(Vec::load(row + i), i, acc), i += W;
    if (i < n) {
        const Vec w = Vec::load(row + i, n - i);
        OATS_UNROLL for (int t = 0; t < T; t++) other[t] = fma(w, Vec::load(x + t * x_stride + i, n - i), other[t]);
    }
    OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = acc[t] + other[t];
}

struct FewTokens {
    const Sparse &S;
    const int64_t *row_start;
    const LowRank &L;
    const Bias &bias;
    int64_t x_stride, z_stride;
    float *x, *z, *y;  // inputs (tokens, x_stride), V x (tokens, z_stride) and outputs (tokens, rows)
    Fit &fit;
};

template <int T, class V>
void project(const FewTokens &p, int64_t token, int64_t first, int64_t last) {
    for (int64_t k = first; k < last; k++) {
        Vec acc[T];
        OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = Vec::zero();
        dense_dot<T>(static_cast<const V *>(p.L.V) + k * p.S.columns, p.S.columns, p.x + token * p.x_stride, p.x_stride,
                     acc);
        const float scale = scale_at(p.L.V_scale, k);
        for (int t = 0; t < T; t++) p.z[(token + t) * p.z_stride + k] = acc[t].sum() * scale;
    }
}

template <int T, class V>
void few_rows(const FewTokens &p, int64_t token, int64_t row, int64_t last, int64_t rank, int64_t rank_start) {
    const V *values = static_cast<const V *>(p.S.values), *end = values + p.S.nonzeros;
    const int64_t row_bytes = p.S.row_bytes();
    for (; row < last; row++) {
        const uint8_t *bits = p.S.bitmask + row * row_bytes;
        // whatever the bits are, a row that is full would still end before the values do: what it read is seen after
        const bool reads_on = p.row_start[row] + row_bytes * 8 <= p.S.nonzeros;
        if (!reads_on && !row_fits(p.S, p.row_start, row)) return p.fit.lost();
        Vec acc[T];
        OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = Vec::zero();
        const V *next = sparse_dot<T>(bits, row_bytes, values + p.row_start[row], end, p.x + token * p.x_stride,
                                      p.x_stride, acc);
        if (next != values + p.row_start[row + 1] || (row_bytes && bits[row_bytes - 1] & p.S.past_columns()))
            return p.fit.lost();
        if (rank)
            dense_dot<T>(static_cast<const V *>(p.L.U) + row * p.L.width, rank, p.z + token * p.z_stride + rank_start,
                         p.z_stride, acc);
        const float b = bias_at(p.bias, row);
        for (int t = 0; t < T; t++) p.y[(token + t) * p.S.rows + row] = acc[t].sum() + b;
    }
}

// Calls f<T>(token) for groups of T tokens, 8 at most.
template <class F>
void for_tokens(int64_t tokens, F f) {
    int64_t t = 0;
    for (; t + 8 <= tokens; t += 8) f.template operator()<8>(t);
    if (t + 4 <= tokens) f.template operator()<4>(t), t += 4;
    if (t + 2 <= tokens) f.template operator()<2>(t), t += 2;
    if (t < tokens) f.template operator()<1>(t);
}

// Inputs as floats, V x in tasks, then prepare(p), which may change the inputs, each part's rows by rows(p, first, last,
// rank, rank_start, worker), and outputs in their type.
template <class Prepare, class Rows>
bool one_pass(const Sparse &S, const int64_t *row_start, const LowRank &L, const Bias &bias, const Tokens &io,
              Prepare prepare, int threads, Rows rows) {
    const int64_t ranks = ranks_of(L), x_stride = round_up(S.columns, group);
    Scratch<float> x(io.tokens * x_stride), z(io.tokens * ranks), y(io.tokens * S.rows);
    Fit fit;
    const FewTokens p{S, row_start, L, bias, x_stride, ranks, x + 0, z + 0, y + 0, fit};

    with_type(io.type, [&](auto type) {
        for (int64_t t = 0; t < io.tokens; t++) {
            float *to = x + t * x_stride;
            widen(static_cast<const decltype(type) *>(io.x) + t * io.stride, to, S.columns);
            for (int64_t i = S.columns; i < x_stride; i++) to[i] = 0;
        }
    });
    with_factor_type(L, [&](auto type) {
        const int64_t step = most(4, ceil_div(ranks, int64_t{threads} * 4));
        parallel(ceil_div(ranks, step), threads, [&](int64_t i, int) {
            for_tokens(io.tokens, [&]<int T>(int64_t token) {
                project<T, decltype(type)>(p, token, i * step, least(ranks, (i + 1) * step));
            });
        });
    });
    prepare(p);
    const int64_t chunk = most(16, ceil_div(S.rows, int64_t{threads} * 4));
    parallel(ceil_div(S.rows, chunk), threads, [&](int64_t i, int worker) {
        const int64_t begin = i * chunk, end = least(S.rows, begin + chunk);
        for_parts(L, [&](int64_t row, int64_t rank, const Part &part) {
            const int64_t first = most(begin, row), last = least(end, row + part.rows);
            if (first < last) rows(p, first, last, part.rank, rank, worker);
        });
    });
    if (!fit) return false;
    with_type(io.type, [&](auto type) {
        auto *to = static_cast<decltype(type) *>(io.y);
        for (int64_t i = 0; i < io.tokens * S.rows; i++) from_float(y[i], to[i]);
    });
    return true;
}

// Threads that are worth waking for so much work.
inline int threads_for(const Sparse &S, int64_t tokens, int threads) {
    return S.rows * S.columns * tokens < one_thread ? 1 : threads;
}

inline bool few_tokens(const Sparse &S, const int64_t *row_start, const LowRank &L, const Bias &bias, const Tokens &io,
                       int threads) {
    bool fits = false;
    with_type(S.type, [&](auto type) {
        using V = decltype(type);
        const auto reorder = [&](const FewTokens &p) {
            if (Vec::interleaved<V>)
                for (int64_t i = 0; i < io.tokens * p.x_stride; i += 2 * Vec::width) interleave(p.x + i);
        };
        fits = one_pass(S, row_start, L, bias, io, reorder, threads_for(S, io.tokens, threads),
                        [&](const FewTokens &p, int64_t first, int64_t last, int64_t rank, int64_t rank_start, int) {
                            for_tokens(io.tokens, [&]<int T>(int64_t token) {
                                few_rows<T, V>(p, token, first, last, rank, rank_start);
                            });
                        });
    });
    return fits;
}

}  // namespace oats::OATS_ISA
