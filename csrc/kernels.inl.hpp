// The kernels, written once on simd.hpp's vectors and compiled for each instruction set: one file for each family.
#pragma once

#include "expand.inl.hpp"
#include "few_bits.inl.hpp"
#include "few_tokens.inl.hpp"
#include "kernels.hpp"
#include "many_tokens.inl.hpp"
#include "rows.inl.hpp"
#include "sparse_step.inl.hpp"

namespace oats::OATS_ISA {

inline const Kernels *kernels(const char *name) {
    static const Kernels table{name, row_starts, few_tokens, many_tokens, expand,
                               dequantise, few_bits, sparse_step};
    return &table;
}

}  // namespace oats::OATS_ISA
