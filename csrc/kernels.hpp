// What the compiled code offers, once for each instruction set; see kernels.inl.hpp for where.
#pragma once

#include <cstdint>

namespace oats {

enum class Type : int { float32 = 0, bfloat16 = 1, float16 = 2, int8 = 3 };  // int8: of U and V alone

// A sparse matrix (rows, columns) as oats_vision.kernels.PackedWeight holds it: values in row order, and a bitmask with
// each row padded to a byte.
struct Sparse {
    int64_t rows, columns, nonzeros;
    Type type;
    const void *values;
    const uint8_t *bitmask;

    // inline in any build: a copy that one instruction set's code had made could be linked into another's
    __attribute__((always_inline)) int64_t row_bytes() const { return (columns + 7) / 8; }
    // the bits past the last column in a row's last byte, which must be zero
    __attribute__((always_inline)) uint8_t past_columns() const {
        return columns % 8 ? static_cast<uint8_t>(0xff << columns % 8) : 0;
    }
};

// Rows of U (rows, rank) and of V (rank, columns) that belong together.
struct Part {
    int64_t rows, rank;
};

// The low-rank term: U (rows, width), V (sum of the parts' ranks, columns). Where they are int8, each of their rows has
// a scale, the bits of bfloat16; else there are none.
struct LowRank {
    const void *U, *V;
    Type type;
    const uint16_t *U_scale, *V_scale;
    int64_t width, parts;
    const Part *part;
};

// One number for each row; null values are zeros.
struct Bias {
    const void *values;
    Type type;
};

// A matrix (rows, columns) whose values have few bits, as oats_vision.nn.QuantisedSparse holds it: codes packed as
// oats_vision/kernels/codes.py says, scales (rows, groups) as the bits of bfloat16, and zeros (rows, groups) or null.
struct FewBits {
    Sparse kept;  // where values are kept: a null bitmask says everywhere. Its own values mean nothing.
    int bits;     // of a code: 2, 3, 4, 5, 6 or 8
    const uint8_t *codes;
    const uint16_t *scales;
    const uint8_t *zeros;
    int64_t group_size;    // columns that share a scale: a multiple of 16, or all
    const int8_t *levels;  // of each code, 16; null: code - 2^(bits - 1)

    __attribute__((always_inline)) int64_t groups() const { return (kept.columns + group_size - 1) / group_size; }
};

// Inputs (tokens, columns) with a row stride, outputs (tokens, rows) without gaps.
struct Tokens {
    int64_t tokens, stride;
    Type type;
    const void *x;
    void *y;
};

// Row starts of `sparse` in its values: row_start[0 .. rows]. False if the bitmask does not hold exactly
// `nonzeros` ones or has ones past the last column.
using RowStarts = bool (*)(const Sparse &sparse, int64_t *row_start, int threads);

// All but `row_starts` and `sparse_step` return false where a row's bits are not those that its row start was counted
// by, having read and written nothing out of bounds; the outputs are then undefined.
struct Kernels {
    const char *name;
    RowStarts row_starts;
    // y = S x + U V x + bias: for few tokens, where reading the weights is most of the work.
    bool (*few_tokens)(const Sparse &, const int64_t *row_start, const LowRank &, const Bias &, const Tokens &,
                       int threads);
    // The same for many tokens, where arithmetic is most of the work. All but the values is float32, and Vx (sum of
    // the ranks, tokens) is V x.
    bool (*many_tokens)(const Sparse &, const int64_t *row_start, const LowRank &, const float *bias, const float *Vx,
                        const Tokens &, int threads);
    // S with its zeros, (rows, columns), in the values' type.
    bool (*expand)(const Sparse &, const int64_t *row_start, void *dense, int threads);
    // S of few bits with its zeros, (rows, columns).
    bool (*dequantise)(const FewBits &, const int64_t *row_start, float *dense, int threads);
    // As few_tokens, with S of few bits. Without a bitmask there are no row starts, and it is always true.
    bool (*few_bits)(const FewBits &, const int64_t *row_start, const LowRank &, const Bias &, const Tokens &,
                     int threads);
    // One round's sparse step of alternating thresholding, float32, all (rows, columns): with R = A - L,
    // S_new = the `keep` largest |R| of each row; S <- S_new, next <- A - (S_new + beta (S_new - S));
    // threshold[row] is the boundary of the last round on entry (or 0) and of this one on return. `next` may be `L`.
    // Returns the sum of (R - S_new)^2.
    double (*sparse_step)(int64_t rows, int64_t columns, int64_t keep, float beta, const float *A, const float *L,
                          float *S, float *next, float *threshold, int threads);
    // As few_tokens, for many tokens with weights, inputs and outputs in bfloat16; null without units for it.
    bool (*many_bfloat16)(const Sparse &, const int64_t *row_start, const LowRank &, const void *bias, const Tokens &,
                          int threads) = nullptr;
};

const Kernels *amx_kernels();         // null if not compiled in, or not runnable on this CPU
const Kernels *avx512_kernels();      // likewise
const Kernels *avx512_amd_kernels();  // likewise, on any maker's CPU
const Kernels *avx2_kernels();        // likewise
const Kernels *portable_kernels();    // always there

}  // namespace oats
