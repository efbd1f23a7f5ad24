// Products in bfloat16 on a CPU's matrix units (AMX): S is spread out into tiles on the way from its packed form, so
// that only the packed weights come from memory, and each is spread once for hundreds of tokens.
#include "kernels.hpp"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#define OATS_ISA amx
#include "rows.inl.hpp"
#include "tiles.inl.hpp"

namespace oats::amx {
namespace {

// The spread weights of 128 rows and the sums of 512 tokens (256 KB each for 1024 columns) stay in the second-level
// cache.
constexpr int64_t most_rows = 128, most_tokens = 512;
constexpr int64_t inputs_bytes = 16 << 20, cached_inputs = 1 << 20;  // of rearranged inputs: at a time, of a chunk

inline __m512i load(const bfloat16 *p, int64_t n) {
    const __mmask32 mask = n >= depth ? ~__mmask32{0} : n > 0 ? (__mmask32{1} << n) - 1 : 0;
    return _mm512_maskz_loadu_epi16(mask, p);
}

// A row of n numbers to its place in tiles; `row` may be null if there are none
inline void spread_row(const bfloat16 *row, int64_t n, int64_t steps, bfloat16 *to) {
    for (int64_t s = 0; s < steps; s++, to += tile_values)
        _mm512_store_si512(to, s * depth < n ? load(row + s * depth, n - s * depth) : _mm512_setzero_si512());
}

inline bfloat16 *row_of_tiles(bfloat16 *tiles, int64_t row, int64_t steps) {
    return tiles + row / tile * steps * tile_values + row % tile * depth;
}

struct Product {
    const Sparse &S;
    const int64_t *row_start;
    const LowRank &L;
    const bfloat16 *bias;
    const Tokens &io;
    int64_t rank_steps;  // of all parts: each begins with a tile of its own
    Fit &fit;

    const bfloat16 *x() const { return static_cast<const bfloat16 *>(io.x); }
    bfloat16 *y() const { return static_cast<bfloat16 *>(io.y); }
    int64_t steps() const { return ceil_div(S.columns, depth); }

    // Calls f(rows before, ranks before, steps before, part) for each part.
    template <class F>
    void for_parts_and_steps(F f) const {
        int64_t step = 0;
        for_parts(L, [&](int64_t row, int64_t rank, const Part &part) {
            f(row, rank, step, part);
            step += ceil_div(part.rank, depth);
        });
    }
};

// Inputs of one tile of tokens: pairs of columns are turned over as one number of 32 bits
inline void pack_inputs(const Product &p, int64_t token, const Inputs &inputs) {
    for (int64_t s = 0; s < p.steps(); s++) {
        bfloat16 *to = inputs.at(0, s);
        Vec r[tile];
        for (int64_t i = 0; i < tile; i++) {
            const bool there = token + i < p.io.tokens;
            const bfloat16 *from = p.x() + (token + i) * p.io.stride + s * depth;
            r[i].v = there ? _mm512_castsi512_ps(load(from, p.S.columns - s * depth)) : _mm512_setzero_ps();
        }
        Vec::transpose(r);
        for (int64_t i = 0; i < tile; i++) r[i].store(reinterpret_cast<float *>(to + i * depth));
    }
}

// The 32 rows of V that make one step of U, and zeros where a part's ranks end
inline void spread_V(const Product &p, int64_t step, bfloat16 *weights) {
    p.for_parts_and_steps([&](int64_t, int64_t part_rank, int64_t part_step, const Part &part) {
        const int64_t first = (step - part_step) * depth;
        if (first < 0 || first >= part.rank) return;
        const auto V = static_cast<const bfloat16 *>(p.L.V) + (part_rank + first) * p.S.columns;
        for (int64_t r = 0; r < depth; r++)
            spread_row(V + r * p.S.columns, first + r < part.rank ? p.S.columns : 0, p.steps(),
                       row_of_tiles(weights, r, p.steps()));
    });
}

// Two tiles of sums, one above the other, are one of inputs once each two rows are paired
inline void write_inputs(const float *sums, int64_t step, int64_t token_tiles, const Inputs &z) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t t = 0; t < token_tiles; t++)
        for (int64_t i = 0; i < tile; i++) {
            const int64_t row = 2 * i;
            const float *from = sums + (row / tile * token_tiles + t) * tile_sums + row % tile * tile;
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(from + tile), _mm512_load_ps(from));
            _mm512_store_si512(z.at(t, step) + i * depth,
                               _mm512_permutexvar_epi16(pairs, reinterpret_cast<__m512i>(both)));
        }
}

// `count` rows from `first` on of S, and of U, which has a step of its own for each part; zeros up to `whole`
inline void spread_S(const Product &p, int64_t first, int64_t count, int64_t whole, bfloat16 *weights) {
    const int64_t row_bytes = p.S.row_bytes(), steps = p.steps();
    for (int64_t r = 0; r < whole; r++) {
        bfloat16 *to = row_of_tiles(weights, r, steps);
        if (r < count && !row_fits(p.S, p.row_start, first + r)) p.fit.lost();
        if (r >= count || !p.fit) {
            spread_row(nullptr, 0, steps, to);
            continue;
        }
        const uint8_t *bits = p.S.bitmask + (first + r) * row_bytes;
        const bfloat16 *value = static_cast<const bfloat16 *>(p.S.values) + p.row_start[first + r];
        for (int64_t s = 0; s < steps; s += 2, to += 2 * tile_values) {
            fetch_ahead(bits + s * 4, value);
            const uint64_t mask = read_bits(bits + s * 4, row_bytes - s * 4);
            const auto low = static_cast<__mmask32>(mask), high = static_cast<__mmask32>(mask >> 32);
            _mm512_store_si512(to, _mm512_maskz_expandloadu_epi16(low, value));
            value += popcount(low);
            if (s + 1 == steps) break;
            _mm512_store_si512(to + tile_values, _mm512_maskz_expandloadu_epi16(high, value));
            value += popcount(high);
        }
    }
}

inline void spread_U(const Product &p, int64_t first, int64_t count, int64_t whole, bfloat16 *weights) {
    for (int64_t r = 0; r < whole; r++) spread_row(nullptr, 0, p.rank_steps, row_of_tiles(weights, r, p.rank_steps));
    p.for_parts_and_steps([&](int64_t part_row, int64_t, int64_t part_step, const Part &part) {
        for (int64_t row = most(first, part_row); row < least(first + count, part_row + part.rows); row++)
            spread_row(static_cast<const bfloat16 *>(p.L.U) + row * p.L.width, part.rank, ceil_div(part.rank, depth),
                       row_of_tiles(weights, row - first, p.rank_steps) + part_step * tile_values);
    });
}

inline void write_outputs(const Product &p, int64_t first, int64_t rows, int64_t token, int64_t token_tiles,
                          const float *sums) {
    for (int64_t t = 0; t < token_tiles; t++)
        for (int64_t row = 0; row < rows; row += tile) {
            const int64_t n = least(tile, rows - row), begin = token + t * tile;
            const float *from = sums + (row / tile * token_tiles + t) * tile_sums;
            Vec r[tile];
            for (int64_t i = 0; i < tile; i++) {
                r[i] = Vec::load(from + i * tile);
                if (p.bias && i < n) r[i] = r[i] + Vec::all(to_float(p.bias[first + row + i]));
            }
            Vec::transpose(r);
            for (int64_t i = 0; i < least(tile, p.io.tokens - begin); i++)
                _mm256_mask_storeu_epi16(p.y() + (begin + i) * p.S.rows + first + row,
                                         static_cast<__mmask16>((1u << n) - 1),
                                         reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(r[i].v)));
        }
}

bool many_bfloat16(const Sparse &S, const int64_t *row_start, const LowRank &L, const void *bias, const Tokens &io,
                   int threads) {
    if (!S.rows || !io.tokens) return true;
    Fit fit;
    Product p{S, row_start, L, static_cast<const bfloat16 *>(bias), io, 0, fit};
    for_parts(L, [&](int64_t, int64_t, const Part &part) { p.rank_steps += ceil_div(part.rank, depth); });

    // as many blocks of rows for each thread, of as many rows
    const int64_t shares = round_up(ceil_div(S.rows, most_rows), threads);
    const int64_t step = round_up(ceil_div(S.rows, shares), 2 * tile), blocks = ceil_div(S.rows, step);
    const int64_t all_tiles = ceil_div(io.tokens, tile), steps = p.steps();
    const int64_t at_once =
        least(all_tiles, most(2, inputs_bytes / ((steps + p.rank_steps) * tile_values * 2) / 2 * 2));
    const int64_t widest = least(at_once, most_tokens / tile);
    const int64_t sums_size = most(step, depth) / tile * widest * tile_sums;
    const int64_t weights_size = most(step, depth) * (steps + p.rank_steps) * depth;
    Scratch<bfloat16> input(Inputs::size(at_once, steps)), projected(Inputs::size(at_once, p.rank_steps));
    Scratch<bfloat16> spread(threads * weights_size);
    Scratch<float> sum(threads * sums_size);
    for (int64_t begin = 0; begin < all_tiles; begin += at_once) {
        const int64_t count = least(at_once, all_tiles - begin), chunks = ceil_div(count, widest);
        const Inputs inputs{input + 0, count, 0}, z{projected + 0, count, 0};
        parallel(count, threads, [&](int64_t t, int) { pack_inputs(p, (begin + t) * tile, inputs.from(t)); });
        // A task spreads one of `each` pieces of the weights, then takes some chunks of tokens. Inputs that fit the
        // second-level cache are better kept there, chunk after chunk, than weights spread only once.
        const bool cached = steps * widest * tile_values * 2 <= cached_inputs;
        const auto with_chunks = [&](int64_t each, auto spread_weights, auto multiply) {
            const int64_t groups = cached ? chunks : each % threads ? least(chunks, threads) : 1;
            parallel(each * groups, threads, [&](int64_t i, int worker) {
                const int64_t group = i / each;
                bfloat16 *weights = spread + worker * weights_size;
                float *sums = sum + worker * sums_size;
                spread_weights(i % each, weights);
                const Tiles tiles;
                for (int64_t c = group * chunks / groups; c < (group + 1) * chunks / groups; c++) {
                    const int64_t first = c * count / chunks, n = (c + 1) * count / chunks - first;
                    multiply(i % each, weights, first, n, sums);
                }
            });
        };
        with_chunks(
            p.rank_steps, [&](int64_t i, bfloat16 *weights) { spread_V(p, i, weights); },
            [&](int64_t i, const bfloat16 *weights, int64_t first, int64_t n, float *sums) {
                product(weights, depth, steps, inputs.from(first), n, false, sums);
                write_inputs(sums, i, n, z.from(first));
            });
        const auto rows_of = [&](int64_t i) { return least(step, S.rows - i * step); };
        with_chunks(
            blocks,
            [&](int64_t i, bfloat16 *weights) {
                const int64_t rows = rows_of(i), whole = round_up(rows, 2 * tile);
                spread_S(p, i * step, rows, whole, weights);
                spread_U(p, i * step, rows, whole, weights + whole * steps * depth);
            },
            [&](int64_t i, const bfloat16 *weights, int64_t first, int64_t n, float *sums) {
                const int64_t whole = round_up(rows_of(i), 2 * tile);
                product(weights, whole, steps, inputs.from(first), n, false, sums);
                product(weights + whole * steps * depth, whole, p.rank_steps, z.from(first), n, true, sums);
                write_outputs(p, i * step, rows_of(i), (begin + first) * tile, n, sums);
            });
    }
    return fit;
}

bool usable() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;                   // AVX512_BF16
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;  // AMX
    constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: the state is large
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

}  // namespace
}  // namespace oats::amx
#endif

namespace oats {
const Kernels *amx_kernels() {
#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
    static const Kernels *const table = []() -> const Kernels * {
        if (!avx512_kernels() || !amx::usable()) return nullptr;
        static Kernels kernels = *avx512_kernels();
        kernels.name = "amx";
        kernels.many_bfloat16 = amx::many_bfloat16;
        return &kernels;
    }();
    return table;
#else
    return nullptr;
#endif
}
}  // namespace oats
