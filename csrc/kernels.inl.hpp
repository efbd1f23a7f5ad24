// The kernels, written once on simd.hpp's vectors and compiled for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.hpp"
#include "memory.hpp"
#include "simd.hpp"
#include "team.hpp"

#define OATS_INLINE inline __attribute__((always_inline))
#define OATS_INLINE_LAMBDA __attribute__((always_inline))

namespace oats::OATS_ISA {

template <class Task>
void parallel(int64_t tasks, int threads, Task task) {
    run_tasks(tasks, threads, [](int64_t i, int worker, void *t) { (*static_cast<Task *>(t))(i, worker); }, &task);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Memory for the time of one call, aligned to cache lines.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : bytes_(static_cast<size_t>(count) * sizeof(T)), data_(static_cast<T *>(borrow(bytes_))) {}
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    ~Scratch() { give_back(data_, bytes_); }
    T *operator+(int64_t i) const { return data_ + i; }
    T &operator[](int64_t i) const { return data_[i]; }

  private:
    size_t bytes_;
    T *data_;
};

template <class F>
void with_type(Type type, F f) {
    if (type == Type::float32)
        f(float{});
    else if (type == Type::bfloat16)
        f(bfloat16{});
    else
        f(float16{});
}

// Calls f(rows before, ranks before, part) for each part.
template <class F>
OATS_INLINE void for_parts(const LowRank &L, F f) {
    int64_t row = 0, rank = 0;
    for (int64_t j = 0; j < L.parts; j++) {
        f(row, rank, L.part[j]);
        row += L.part[j].rows;
        rank += L.part[j].rank;
    }
}

inline int64_t ranks_of(const LowRank &L) {
    int64_t ranks = 0;
    for_parts(L, [&](int64_t, int64_t, const Part &part) { ranks += part.rank; });
    return ranks;
}

// ---------------------------------------------------------------------------------------------------------------
// Where each row's values start
// ---------------------------------------------------------------------------------------------------------------

inline int64_t ones_in(const uint8_t *bytes, int64_t count) {
    int64_t ones = 0, i = 0;
#if defined(__AVX512VPOPCNTDQ__)
    __m512i sums = _mm512_setzero_si512();
    for (; i + 64 <= count; i += 64)
        sums = _mm512_add_epi64(sums, _mm512_popcnt_epi64(_mm512_loadu_si512(bytes + i)));
    ones = _mm512_reduce_add_epi64(sums);
#endif
    for (; i < count; i += 8) ones += popcount(read_bits(bytes + i, count - i));
    return ones;
}

// Whether a row's bits hold as many ones as were counted, and none past the last column. Each kernel asks this before it
// follows the bits: whoever holds the tensor may have written to it since, and no more may be read than there is.
inline bool row_fits(const Sparse &S, const int64_t *row_start, int64_t row) {
    const int64_t row_bytes = S.row_bytes();
    const uint8_t *bits = S.bitmask + row * row_bytes;
    if (!row_bytes) return true;
    return ones_in(bits, row_bytes) == row_start[row + 1] - row_start[row] && !(bits[row_bytes - 1] & S.past_columns());
}

// Set by any thread that meets a row that does not fit
class Fit {
  public:
    void lost() { __atomic_store_n(&lost_, 1, __ATOMIC_RELAXED); }
    operator bool() const { return !__atomic_load_n(&lost_, __ATOMIC_RELAXED); }

  private:
    int lost_ = 0;
};

inline bool row_starts(const Sparse &S, int64_t *row_start, int threads) {
    const int64_t row_bytes = S.row_bytes(), chunk = most(1, (int64_t{1} << 16) / most(row_bytes, 1));
    Fit fit;
    parallel(ceil_div(S.rows, chunk), threads, [&](int64_t c, int) {
        for (int64_t r = c * chunk; r < least(S.rows, (c + 1) * chunk); r++) {
            const uint8_t *bits = S.bitmask + r * row_bytes;
            row_start[r + 1] = ones_in(bits, row_bytes);
            if (row_bytes && bits[row_bytes - 1] & S.past_columns()) fit.lost();
        }
    });
    row_start[0] = 0;
    for (int64_t r = 0; r < S.rows; r++) row_start[r + 1] += row_start[r];
    return fit && row_start[S.rows] == S.nonzeros;
}

// ---------------------------------------------------------------------------------------------------------------
// Few tokens: the packed values are spread out to their columns in registers
// ---------------------------------------------------------------------------------------------------------------

template <class V>
OATS_INLINE void widen(const V *from, float *to, int64_t n) {
    constexpr int W = Vec::width;
    int64_t i = 0;
    for (; i + W <= n; i += W) Vec::load(from + i).store(to + i);
    if (i < n) Vec::load(from + i, n - i).store(to + i, n - i);
}

constexpr int64_t group = 64;               // columns whose bits are read at once
constexpr int64_t one_thread = 128 * 1024;  // below so much work, waking a second thread takes longer

// Two vectors of columns in the order of `Vec::expand`: the even ones first
inline void interleave(float *x) {
    float odd[Vec::width];
    for (int i = 0; i < Vec::width; i++) odd[i] = x[2 * i + 1];
    for (int i = 0; i < Vec::width; i++) x[i] = x[2 * i];
    std::memcpy(x + Vec::width, odd, sizeof odd);
}

// Weights are read once, from far away, and in several streams: the CPU's own fetching ahead stops at each page's end.
// The distances are of about as many columns in the bits as in the values; for each 64 columns.
template <class V>
OATS_INLINE void fetch_ahead(const uint8_t *bits, const V *values) {
    const char *ahead = reinterpret_cast<const char *>(values) + 4096;
    __builtin_prefetch(bits + 768);
    __builtin_prefetch(ahead);
    if (sizeof(V) == 4) __builtin_prefetch(ahead + 64);
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
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Vec w = Vec::load(row + i);
        OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = fma(w, Vec::load(x + t * x_stride + i), acc[t]);
    }
    if (i < n) {
        const Vec w = Vec::load(row + i, n - i);
        OATS_UNROLL for (int t = 0; t < T; t++) acc[t] = fma(w, Vec::load(x + t * x_stride + i, n - i), acc[t]);
    }
}

struct FewTokens {
    const Sparse &S;
    const int64_t *row_start;
    const LowRank &L;
    const void *bias;
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
        for (int t = 0; t < T; t++) p.z[(token + t) * p.z_stride + k] = acc[t].sum();
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
        const float b = p.bias ? to_float(static_cast<const V *>(p.bias)[row]) : 0;
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

inline bool few_tokens(const Sparse &S, const int64_t *row_start, const LowRank &L, const void *bias, const Tokens &io,
                       int threads) {
    const int64_t ranks = ranks_of(L);
    if (S.rows * S.columns * io.tokens < one_thread) threads = 1;
    const int64_t x_stride = round_up(S.columns, group);
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
    with_type(S.type, [&](auto type) {
        using V = decltype(type);
        const int64_t step = most(4, ceil_div(ranks, int64_t{threads} * 4));
        parallel(ceil_div(ranks, step), threads, [&](int64_t i, int) {
            for_tokens(io.tokens, [&]<int T>(int64_t token) {
                project<T, V>(p, token, i * step, least(ranks, (i + 1) * step));
            });
        });
        if (Vec::interleaved<V>)
            for (int64_t i = 0; i < io.tokens * x_stride; i += 2 * Vec::width) interleave(x + i);
        const int64_t chunk = most(16, ceil_div(S.rows, int64_t{threads} * 4));
        parallel(ceil_div(S.rows, chunk), threads, [&](int64_t i, int) {
            const int64_t begin = i * chunk, end = least(S.rows, begin + chunk);
            for_parts(L, [&](int64_t row, int64_t rank, const Part &part) {
                const int64_t first = most(begin, row), last = least(end, row + part.rows);
                if (first < last)
                    for_tokens(io.tokens,
                               [&]<int T>(int64_t token) { few_rows<T, V>(p, token, first, last, part.rank, rank); });
            });
        });
    });
    if (!fit) return false;
    with_type(io.type, [&](auto type) {
        auto *to = static_cast<decltype(type) *>(io.y);
        for (int64_t i = 0; i < io.tokens * S.rows; i++) from_float(y[i], to[i]);
    });
    return true;
}

// ---------------------------------------------------------------------------------------------------------------
// Many tokens: a tile of inputs, tokens in the lanes, stays in the first-level cache while the rows of S go by
// ---------------------------------------------------------------------------------------------------------------

// A tile holds 64 columns of up to 8 vectors of tokens: 32 KB with 512-bit vectors, of a first-level cache of 48. The
// outputs of up to 1024 rows stay in the second-level cache meanwhile (512 KB); with fewer rows, turning the tile over
// is too much of the work.
constexpr int64_t block_columns = 64, block_bytes = block_columns / 8, task_rows = 1024;
constexpr int most_vectors = 8;
constexpr int64_t stream_bytes = 16 << 20;  // of reordered values at a time

struct Entry {  // one row's values in one block of columns
    uint16_t row, count;
};

OATS_INLINE uint64_t block_bits(const uint8_t *row, int64_t row_bytes, int64_t block) {
    return read_bits(row + block * block_bytes, row_bytes - block * block_bytes);
}

// Some rows of S in the order in which `multiply` goes through them: block by block of columns, and in a block by
// the number of values, so that loops of equal length follow each other and the CPU foresees their ends.
struct Stream {
    struct Place {  // of the next row with some number of values in some block
        int64_t value, entry;
    };
    static constexpr int64_t counts = block_columns + 1;

    int64_t first, rows;
    float *values;
    uint8_t *columns;  // within the block
    Entry *entries;    // blocks x rows
    int64_t *start;    // of each block in values and columns
    Place *places;     // blocks x counts

    // Rows are read as they lie in memory, and written to the places of their numbers of values. False if a row does
    // not fit.
    template <class V>
    bool build(const Sparse &S, const int64_t *row_start) const {
        const int64_t row_bytes = S.row_bytes(), blocks = ceil_div(S.columns, block_columns);
        std::memset(places, 0, sizeof(Place) * blocks * counts);
        for (int64_t r = 0; r < rows; r++) {
            if (!row_fits(S, row_start, first + r)) return false;
            const uint8_t *row = S.bitmask + (first + r) * row_bytes;
            for (int64_t b = 0; b < blocks; b++) places[b * counts + popcount(block_bits(row, row_bytes, b))].entry++;
        }
        int64_t value = 0;
        for (int64_t b = 0; b < blocks; b++) {
            start[b] = value;
            int64_t entry = b * rows;
            for (int64_t n = 0; n < counts; n++) {
                Place &place = places[b * counts + n];
                const int64_t count = place.entry;
                place = {value, entry};
                entry += count;
                value += count * n;
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *row = S.bitmask + (first + r) * row_bytes;
            const V *from = static_cast<const V *>(S.values) + row_start[first + r];
            for (int64_t b = 0; b < blocks; b++) {
                const uint64_t bits = block_bits(row, row_bytes, b);
                const int n = popcount(bits);
                Place &place = places[b * counts + n];
                entries[place.entry++] = {static_cast<uint16_t>(r), static_cast<uint16_t>(n)};
                positions(bits, columns + place.value);
                widen(from, values + place.value, n);
                place.value += n;
                from += n;
            }
        }
        return true;
    }
};

// y[0 .. K) += values . x, for one row in one block of columns
template <int K>
OATS_INLINE void multiply_row(const float *x, const uint8_t *columns, const float *values, int n, float *y) {
    constexpr int W = Vec::width, sums = K >= 5 ? 1 : K == 4 ? 2 : 4, unrolled = 4;
    Vec acc[sums][K];
    OATS_UNROLL for (int k = 0; k < K; k++) {
        acc[0][k] = Vec::load(y + k * W);
        OATS_UNROLL for (int s = 1; s < sums; s++) acc[s][k] = Vec::zero();
    }
    int i = 0;
    for (; i + unrolled <= n; i += unrolled) {
        OATS_UNROLL for (int u = 0; u < unrolled; u++) {
            const float *from = x + static_cast<int64_t>(columns[i + u]) * (K * W);
            const Vec value = Vec::all(values[i + u]);
            OATS_UNROLL for (int k = 0; k < K; k++)
                acc[u % sums][k] = fma(value, Vec::load(from + k * W), acc[u % sums][k]);
        }
    }
    for (; i < n; i++) {
        const float *from = x + static_cast<int64_t>(columns[i]) * (K * W);
        const Vec value = Vec::all(values[i]);
        OATS_UNROLL for (int k = 0; k < K; k++) acc[0][k] = fma(value, Vec::load(from + k * W), acc[0][k]);
    }
    OATS_UNROLL for (int k = 0; k < K; k++) {
        OATS_UNROLL for (int s = 1; s < sums; s++) acc[0][k] = acc[0][k] + acc[s][k];
        acc[0][k].store(y + k * W);
    }
}

// y (rows, K vectors) = bias + U . z (rank, K vectors), for rows of U that are `width` apart
template <int K>
void multiply_dense(const float *U, int64_t width, const float *bias, int64_t rows, int64_t rank, const float *z,
                    float *y) {
    constexpr int W = Vec::width, at_once = K > 6 ? 3 : 4;  // rows whose sums stay in registers
    constexpr int64_t cached = 64;                          // rows of z that stay in the first-level cache
    int64_t begin = 0;
    do {
        const int64_t end = least(rank, begin + cached);
        const auto block = [=]<int R>(int64_t row) {
            Vec acc[R][K];
            OATS_UNROLL for (int r = 0; r < R; r++)
                OATS_UNROLL for (int k = 0; k < K; k++)
                    acc[r][k] = begin  ? Vec::load(y + ((row + r) * K + k) * W)
                                : bias ? Vec::all(bias[row + r])
                                       : Vec::zero();
            for (int64_t i = begin; i < end; i++) {
                Vec u[R];
                OATS_UNROLL for (int r = 0; r < R; r++) u[r] = Vec::all(U[(row + r) * width + i]);
                OATS_UNROLL for (int k = 0; k < K; k++) {
                    const Vec from = Vec::load(z + (i * K + k) * W).in_register();
                    OATS_UNROLL for (int r = 0; r < R; r++) acc[r][k] = fma(u[r], from, acc[r][k]);
                }
            }
            OATS_UNROLL for (int r = 0; r < R; r++)
                OATS_UNROLL for (int k = 0; k < K; k++) acc[r][k].store(y + ((row + r) * K + k) * W);
        };
        int64_t row = 0;
        for (; row + at_once <= rows; row += at_once) block.template operator()<at_once>(row);
        for (; row < rows; row++) block.template operator()<1>(row);
        begin = end;
    } while (begin < rank);
}

// Columns [first, last) of x (tokens, stride) for the `tile` tokens from `token` on, transposed: to[column][token],
// zeros for missing tokens
inline void transpose_in(const float *x, int64_t stride, int64_t tokens, int64_t token, int64_t tile, int64_t first,
                         int64_t last, float *to) {
    constexpr int W = Vec::width;
    for (int64_t t = 0; t < tile; t += W)
        for (int64_t c = first; c < last; c += W) {
            Vec r[W];
            const int64_t n = least(W, last - c);
            for (int i = 0; i < W; i++) {
                const float *from = x + (token + t + i) * stride + c;
                if (token + t + i >= tokens)
                    r[i] = Vec::zero();
                else
                    r[i] = n == W ? Vec::load(from) : Vec::load(from, n);
            }
            Vec::transpose(r);
            for (int i = 0; i < n; i++) r[i].store(to + (c - first + i) * tile + t);
        }
}

// from[row][token] as the outputs of rows [first, first + rows) of up to `tile` tokens
inline void transpose_out(const Tokens &io, int64_t token, int64_t tile, int64_t first, int64_t rows,
                           int64_t out_features, const float *from) {
    constexpr int W = Vec::width;
    float *y = static_cast<float *>(io.y);
    for (int64_t t = 0; t < least(tile, io.tokens - token); t += W)
        for (int64_t row = 0; row < rows; row += W) {
            const int64_t n = least(W, rows - row);
            Vec r[W];
            for (int i = 0; i < W; i++) r[i] = i < n ? Vec::load(from + (row + i) * tile + t) : Vec::zero();
            Vec::transpose(r);
            const int64_t tokens = least(W, io.tokens - token - t);
            for (int64_t i = 0; i < tokens; i++) {
                float *to = y + (token + t + i) * out_features + first + row;
                if (n == W)
                    r[i].store(to);
                else
                    r[i].store(to, n);
            }
        }
}

struct ManyTokens {
    const Sparse &S;
    const LowRank &L;
    const float *U, *bias, *Vx;
    const Tokens &io;
    int64_t ranks;
};

// A worker's tile of transposed inputs (block_columns, tile), of V x (ranks, tile) and of outputs (rows, tile)
struct Tile {
    float *x, *z, *y;
};

// One tile of tokens and the rows of some streams
template <int K>
void multiply(const ManyTokens &p, const Stream *streams, int64_t count, int64_t token, const Tile &tile) {
    constexpr int64_t width = K * Vec::width;
    const float *x = static_cast<const float *>(p.io.x);
    const int64_t first = streams[0].first, rows = streams[count - 1].first + streams[count - 1].rows - first;
    const int64_t tokens = least(width, p.io.tokens - token), blocks = ceil_div(p.S.columns, block_columns);
    for (int64_t i = 0; i < p.ranks; i++)
        for (int64_t t = 0; t < width; t += Vec::width) {
            const float *from = p.Vx + i * p.io.tokens + token + t;
            const Vec z = t + Vec::width <= tokens ? Vec::load(from) : Vec::load(from, most(0, tokens - t));
            z.store(tile.z + i * width + t);
        }
    for_parts(p.L, [&](int64_t row, int64_t rank, const Part &part) {
        const int64_t from = most(first, row), to = least(first + rows, row + part.rows);
        if (from < to)
            multiply_dense<K>(p.U + from * p.L.width, p.L.width, p.bias ? p.bias + from : nullptr, to - from, part.rank,
                              tile.z + rank * width, tile.y + (from - first) * width);
    });
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t column = b * block_columns;
        transpose_in(x, p.io.stride, p.io.tokens, token, width, column, least(p.S.columns, column + block_columns),
                     tile.x);
        // the next block's inputs, a token at a time
        const int64_t after = column + block_columns, every = most(1, rows / tokens);
        int64_t fetched = after < p.S.columns ? 0 : tokens, done = 0;
        for (int64_t s = 0; s < count; s++) {
            const Entry *entry = streams[s].entries + b * streams[s].rows;
            const float *values = streams[s].values + streams[s].start[b];
            const uint8_t *columns = streams[s].columns + streams[s].start[b];
            float *y = tile.y + (streams[s].first - first) * width;
            for (int64_t e = 0; e < streams[s].rows; e++, done++) {
                if (fetched < tokens && done >= fetched * every) {
                    const char *ahead = reinterpret_cast<const char *>(x + (token + fetched++) * p.io.stride + after);
                    OATS_UNROLL for (int i = 0; i < block_columns * 4; i += 64) __builtin_prefetch(ahead + i, 0, 2);
                }
                const float *ahead = y + entry[least(e + 2, streams[s].rows - 1)].row * width;
                OATS_UNROLL for (int k = 0; k < K; k++) __builtin_prefetch(ahead + k * Vec::width);
                multiply_row<K>(tile.x, columns, values, entry[e].count, y + entry[e].row * width);
                columns += entry[e].count;
                values += entry[e].count;
            }
        }
    }
    transpose_out(p.io, token, width, first, rows, p.S.rows, tile.y);
}

inline bool many_tokens(const Sparse &S, const int64_t *row_start, const LowRank &L, const float *bias, const float *Vx,
                        const Tokens &io, int threads) {
    constexpr int W = Vec::width;
    if (!S.rows || !io.tokens) return true;
    const int64_t ranks = ranks_of(L);
    Fit fit;
    const ManyTokens p{S, L, static_cast<const float *>(L.U), bias, Vx, io, ranks};
    const int64_t blocks = ceil_div(S.columns, block_columns);
    // as many streams for each thread, of as many rows
    const int64_t shares = round_up(ceil_div(S.rows, task_rows), threads);
    const int64_t step = most(round_up(ceil_div(S.rows, shares), W), W), streams = ceil_div(S.rows, step);
    // tiles of nearly equal width: 17 vectors of tokens are 6 + 6 + 5
    const int64_t vectors = ceil_div(io.tokens, W), tiles = ceil_div(vectors, most_vectors);
    const auto first_vector = [&](int64_t tile) { return tile * vectors / tiles; };
    // A task is a tile and some streams: all that fit, or one each where the tasks would else be uneven
    int64_t group = most(1, task_rows / step);
    if (const int64_t tasks = tiles * ceil_div(streams, group);
        tasks < 8 * threads && (tasks % threads || vectors % tiles || streams % group))
        group = 1;

    const int64_t most_values = most(1, S.nonzeros / most(streams, 1));
    const int64_t at_once = round_up(most(1, stream_bytes / (most_values * 5)), most(threads, group));
    const int64_t width = least(vectors, most_vectors) * W;
    Scratch<float> x(threads * block_columns * width), z(threads * ranks * width), y(threads * group * step * width);
    for (int64_t begin = 0; begin < streams; begin += at_once) {
        const int64_t count = least(at_once, streams - begin);
        const auto start = [&](int64_t s) { return row_start[least(S.rows, (begin + s) * step)]; };
        const int64_t total = start(count) - start(0);
        Scratch<float> values(total);
        Scratch<uint8_t> columns(total);
        Scratch<Entry> entries(count * blocks * step);
        Scratch<int64_t> block_start(count * blocks);
        Scratch<Stream::Place> places(count * blocks * Stream::counts);
        Scratch<Stream> stream(count);
        parallel(count, threads, [&](int64_t s, int) {
            const int64_t first = (begin + s) * step, at = start(s) - start(0);
            stream[s] = {first,
                         least(step, S.rows - first),
                         values + at,
                         columns + at,
                         entries + s * blocks * step,
                         block_start + s * blocks,
                         places + s * blocks * Stream::counts};
            with_type(S.type, [&](auto type) {
                if (!stream[s].build<decltype(type)>(S, row_start)) fit.lost();
            });
        });
        if (!fit) return false;
        parallel(tiles * ceil_div(count, group), threads, [&](int64_t i, int worker) {
            const int64_t s = i / tiles * group, v = first_vector(i % tiles), vectors = first_vector(i % tiles + 1) - v;
            const Tile tile{x + worker * block_columns * width, z + worker * ranks * width,
                            y + worker * group * step * width};
            const auto task = [&]<int K>() { multiply<K>(p, stream + s, least(group, count - s), v * W, tile); };
            switch (vectors) {
                case 1: task.template operator()<1>(); break;
                case 2: task.template operator()<2>(); break;
                case 3: task.template operator()<3>(); break;
                case 4: task.template operator()<4>(); break;
                case 5: task.template operator()<5>(); break;
                case 6: task.template operator()<6>(); break;
                case 7: task.template operator()<7>(); break;
                default: task.template operator()<8>();
            }
        });
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------
// The dense matrix
// ---------------------------------------------------------------------------------------------------------------

inline bool expand(const Sparse &S, const int64_t *row_start, void *dense, int threads) {
    const int64_t row_bytes = S.row_bytes(), chunk = most(1, 65536 / most(S.columns, 1));
    Fit fit;
    with_type(S.type, [&](auto type) {
        using V = decltype(type);
        parallel(ceil_div(S.rows, chunk), threads, [&](int64_t c, int) {
            for (int64_t r = c * chunk; r < least(S.rows, (c + 1) * chunk); r++) {
                if (!row_fits(S, row_start, r)) return fit.lost();
                const uint8_t *bits = S.bitmask + r * row_bytes;
                const V *value = static_cast<const V *>(S.values) + row_start[r];
                V *to = static_cast<V *>(dense) + r * S.columns;
                int64_t byte = 0;
#if defined(__AVX512VBMI2__)
                for (; byte * 8 + 64 <= S.columns; byte += 8) {
                    const uint64_t mask = read_bits(bits + byte, 8);
                    OATS_UNROLL for (int i = 0; i < 64; i += 32) {
                        const uint32_t part = static_cast<uint32_t>(mask >> i);
                        V *out = to + byte * 8 + i;
                        if constexpr (sizeof(V) == 4) {
                            const int low = popcount(part & 0xffff);
                            _mm512_storeu_ps(out, _mm512_maskz_expandloadu_ps(part & 0xffff, value));
                            _mm512_storeu_ps(out + 16, _mm512_maskz_expandloadu_ps(part >> 16, value + low));
                        } else {
                            _mm512_storeu_si512(out, _mm512_maskz_expandloadu_epi16(part, value));
                        }
                        value += popcount(part);
                    }
                }
#endif
                std::memset(to + byte * 8, 0, (S.columns - byte * 8) * sizeof(V));
                for (; byte < row_bytes; byte += 8)
                    for (uint64_t mask = read_bits(bits + byte, row_bytes - byte); mask; mask &= mask - 1)
                        to[byte * 8 + __builtin_ctzll(mask)] = *value++;
            }
        });
    });
    return fit;
}

// ---------------------------------------------------------------------------------------------------------------
// A round of alternating thresholding
// ---------------------------------------------------------------------------------------------------------------

constexpr uint32_t above_all = 0x7fffffff;  // magnitudes, and the NaN that are met

inline int64_t count_at_least(const float *x, int64_t n, uint32_t bits) {
    constexpr int W = Vec::width;
    int64_t count = 0, i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        OATS_UNROLL for (int j = 0; j < 4; j++) count += popcount(Vec::load(x + i + j * W).at_least(bits));
    for (; i < n; i++) count += (to_bits(x[i]) & 0x7fffffff) >= bits;
    return count;
}

// The bits of the `keep`-th largest magnitude of x, 0 < keep <= n, found by bracketing: counting costs a pass over a
// row in the cache, and the last round's threshold is a good first guess.
inline uint32_t select(const float *x, int64_t n, int64_t keep, uint32_t guess) {
    uint32_t low = 0, high = above_all;  // at least `keep` are at least low, fewer are at least high
    int64_t at_low = n, at_high = 0;
    float spread = 0.01f;
    for (int pass = 0; high - low > 1 && at_low - at_high > 32; pass++) {
        uint32_t middle = low + (high - low) / 2;
        if (pass == 0 && guess) {
            middle = guess;
        } else if (low > 0 && high < above_all) {
            // between two counts, the magnitudes are about evenly spread; every fourth pass halves whatever they are
            const float a = from_bits(low), b = from_bits(high);
            const float share = static_cast<float>(at_low - keep + 1) / static_cast<float>(at_low - at_high + 1);
            if (pass % 4 != 3) middle = to_bits(a + (b - a) * share);
        } else if (guess && pass < 8) {
            // step out from the guess until the threshold is between two counts
            const float from = from_bits(low > 0 ? low : high);
            middle = to_bits(low > 0 ? from * (1 + spread) : from * (1 - spread));
            spread = spread * 3 < 0.9f ? spread * 3 : 0.9f;
        }
        if (middle <= low) middle = low + 1;
        if (middle >= high) middle = high - 1;
        const int64_t count = count_at_least(x, n, middle);
        if (count >= keep)
            low = middle, at_low = count;
        else
            high = middle, at_high = count;
    }
    if (high - low <= 1) return low;
    uint32_t candidates[32] = {};
    int count = 0;
    for (int64_t i = 0; i < n; i += Vec::width) {
        const int64_t width = least(Vec::width, n - i);
        const Vec v = width == Vec::width ? Vec::load(x + i) : Vec::load(x + i, width);
        // a lane past the end of the row is no candidate, even if zero is in the bracket
        uint32_t between = v.at_least(low) & ~v.at_least(high) & static_cast<uint32_t>((uint64_t{1} << width) - 1);
        for (; between; between &= between - 1) {
            const uint32_t bits = to_bits(x[i + __builtin_ctz(between)]) & 0x7fffffff;
            int place = count++;
            for (; place > 0 && candidates[place - 1] < bits; place--) candidates[place] = candidates[place - 1];
            candidates[place] = bits;
        }
    }
    return count ? candidates[least(keep - at_high, count) - 1] : low;
}

inline double sparse_step(int64_t rows, int64_t columns, int64_t keep, float beta, const float *A, const float *L,
                          float *S, float *next, float *threshold, int threads) {
    constexpr int W = Vec::width;
    const int64_t chunk = most(1, 16384 / most(columns, 1)), chunks = ceil_div(rows, chunk);
    Scratch<float> residuals(int64_t{threads} * round_up(columns, 16));
    Scratch<double> errors(chunks);
    parallel(chunks, threads, [&](int64_t c, int worker) {
        float *R = residuals + worker * round_up(columns, 16);
        double error = 0;
        for (int64_t row = c * chunk; row < least(rows, (c + 1) * chunk); row++) {
            const float *a = A + row * columns, *l = L + row * columns;
            float *s = S + row * columns, *out = next + row * columns;
            int64_t i = 0;
            for (; i + W <= columns; i += W) (Vec::load(a + i) - Vec::load(l + i)).store(R + i);
            for (; i < columns; i++) R[i] = a[i] - l[i];

            uint32_t boundary = above_all;
            int64_t equal = 0;  // how many at the boundary there is room for; 0: for all
            if (keep >= columns) {
                boundary = 0;
            } else if (keep > 0) {
                boundary = select(R, columns, keep, to_bits(threshold[row]));
                threshold[row] = from_bits(boundary);
                if (count_at_least(R, columns, boundary) > keep)
                    equal = keep - count_at_least(R, columns, boundary + 1);
            }
            const bool ties = equal > 0;
            Vec squares = Vec::zero();
            const Vec by = Vec::all(-beta);
            i = 0;
            for (; !ties && i + W <= columns; i += W) {
                const Vec r = Vec::load(R + i), kept = r.where(r.at_least(boundary)), lost = r - kept;
                squares = fma(lost, lost, squares);
                const Vec step = kept - Vec::load(s + i);
                fma(by, step, Vec::load(a + i) - kept).store(out + i);
                kept.store(s + i);
            }
            double lost_squares = squares.sum();
            for (; i < columns; i++) {
                const uint32_t bits = to_bits(R[i]) & 0x7fffffff;
                const bool in = bits > boundary || (bits == boundary && (!ties || equal-- > 0));
                const float kept = in ? R[i] : 0, lost = R[i] - kept;
                lost_squares += double{lost} * lost;
                out[i] = a[i] - kept - beta * (kept - s[i]);
                s[i] = kept;
            }
            error += lost_squares;
        }
        errors[c] = error;
    });
    double error = 0;
    for (int64_t c = 0; c < chunks; c++) error += errors[c];
    return error;
}

inline const Kernels *kernels(const char *name) {
    static const Kernels table{name, row_starts, few_tokens, many_tokens, expand, sparse_step};
    return &table;
}

}  // namespace oats::OATS_ISA
