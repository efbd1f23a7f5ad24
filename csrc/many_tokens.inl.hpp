// Many tokens: a tile of inputs, tokens in the lanes, stays in the first-level cache while the rows of S go by.
#pragma once

#include "stream.inl.hpp"

namespace oats::OATS_ISA {

// A tile holds 64 columns of up to 8 vectors of tokens: 32 KB with 512-bit vectors, of a first-level cache of 48. The
// outputs of up to 1024 rows stay in the second-level cache meanwhile (512 KB); with fewer rows, turning the tile over
// is too much of the work.
constexpr int most_vectors = 8;
constexpr int64_t task_rows = 1024;
constexpr int64_t stream_bytes = 16 << 20;  // of reordered values at a time

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

}  // namespace oats::OATS_ISA
