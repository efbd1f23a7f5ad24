// The Python module oats_vision.kernels._native. Tensors come as addresses and sizes: exchanging them by DLPack takes
// longer than the product of a small layer. oats_vision.kernels, its only caller, has checked them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "memory.hpp"

namespace nb = nanobind;

namespace oats {
namespace {

using Address = uintptr_t;

bool made_by_amd() {
#if defined(__x86_64__)
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

// The fastest first.
std::vector<const Kernels *> runnable() {
    const Kernels *avx512 = avx512_kernels(), *other_avx512 = avx512_amd_kernels();
    if (made_by_amd()) std::swap(avx512, other_avx512);
    std::vector<const Kernels *> all;
    for (const Kernels *k : {amx_kernels(), avx512, other_avx512, avx2_kernels(), portable_kernels()})
        if (k) all.push_back(k);
    return all;
}

const Kernels *chosen = runnable().front();

void use(const std::string &name) {
    for (const Kernels *k : runnable())
        if (name == k->name) {
            chosen = k;
            return;
        }
    throw std::invalid_argument("this CPU does not run the " + name + " kernels");
}

using Parts = std::vector<std::pair<int64_t, int64_t>>;

// A packed matrix with its low-rank term and bias. It does not own its tensors: the caller keeps them.
class Packed {
  protected:
    // Nothing is read by the bitmask before it is known to fit the values.
    Packed(const Sparse &sparse, Address U, Address V, int64_t width, const Parts &parts, Address bias, int threads)
        : sparse_(sparse),
          U_(reinterpret_cast<const void *>(U)),
          V_(reinterpret_cast<const void *>(V)),
          width_(width),
          bias_(reinterpret_cast<const void *>(bias)),
          row_start_(counted(threads)) {
        for (const auto &[part_rows, rank] : parts) parts_.push_back({part_rows, rank});
    }

    // Runs a kernel without the interpreter's lock, and once more where the bits had changed and are counted anew.
    template <class Kernel>
    void run(int threads, Kernel kernel) {
        RowStart row_start = row_start_;  // another thread may put a new one in its place
        {
            const nb::gil_scoped_release release;
            if (kernel(row_start->data())) return;
            row_start = counted(threads);
            if (!kernel(row_start->data())) throw std::invalid_argument("the bitmask was written to during a product");
        }
        row_start_ = row_start;
    }

    LowRank low_rank(const void *U, Type type, const uint16_t *U_scale = nullptr,
                     const uint16_t *V_scale = nullptr) const {
        return {U, V_, type, U_scale, V_scale, width_, static_cast<int64_t>(parts_.size()), parts_.data()};
    }
    static Tokens io(Address x, int x_type, int64_t tokens, int64_t stride, Address y) {
        return {tokens, stride, static_cast<Type>(x_type), reinterpret_cast<const void *>(x),
                reinterpret_cast<void *>(y)};
    }

    Sparse sparse_;
    const void *U_, *V_;
    int64_t width_;
    const void *bias_;
    std::vector<Part> parts_;

  private:
    using RowStart = std::shared_ptr<const std::vector<int64_t>>;

    // None where there are no bits.
    RowStart counted(int threads) const {
        if (!sparse_.bitmask) return std::make_shared<const std::vector<int64_t>>();
        std::vector<int64_t> row_start(static_cast<size_t>(sparse_.rows) + 1);
        if (!chosen->row_starts(sparse_, row_start.data(), threads))
            throw std::invalid_argument("the bitmask does not fit the " + std::to_string(sparse_.nonzeros) +
                                        " values of a sparse matrix of " + std::to_string(sparse_.rows) + " x " +
                                        std::to_string(sparse_.columns));
        return std::make_shared<const std::vector<int64_t>>(std::move(row_start));
    }

    RowStart row_start_;
};

// Of floating values.
class Matrix : Packed {
  public:
    Matrix(Address values, int type, int64_t nonzeros, Address bitmask, int64_t rows, int64_t columns, Address U,
           Address V, int64_t width, const Parts &parts, Address bias, int threads)
        : Packed({rows, columns, nonzeros, static_cast<Type>(type), reinterpret_cast<const void *>(values),
                  reinterpret_cast<const uint8_t *>(bitmask)},
                 U, V, width, parts, bias, threads) {}

    void few_tokens(Address x, int x_type, int64_t tokens, int64_t stride, Address y, int threads) {
        run(threads, [&](const int64_t *row_start) {
            return chosen->few_tokens(sparse_, row_start, low_rank(U_, sparse_.type), {bias_, sparse_.type},
                                      io(x, x_type, tokens, stride, y), threads);
        });
    }

    // U and bias in float32, which the matrix's own may not be
    void many_tokens(Address U, Address bias, Address Vx, Address x, int64_t tokens, int64_t stride, Address y,
                     int threads) {
        expect_fresh(reinterpret_cast<void *>(y), static_cast<size_t>(tokens * sparse_.rows) * sizeof(float));
        run(threads, [&](const int64_t *row_start) {
            return chosen->many_tokens(sparse_, row_start, low_rank(reinterpret_cast<const void *>(U), Type::float32),
                                       reinterpret_cast<const float *>(bias), reinterpret_cast<const float *>(Vx),
                                       io(x, static_cast<int>(Type::float32), tokens, stride, y), threads);
        });
    }

    void many_bfloat16(Address x, int64_t tokens, int64_t stride, Address y, int threads) {
        if (!chosen->many_bfloat16) throw std::invalid_argument("this CPU has no matrix units for bfloat16");
        run(threads, [&](const int64_t *row_start) {
            return chosen->many_bfloat16(sparse_, row_start, low_rank(U_, Type::bfloat16), bias_,
                                         io(x, static_cast<int>(Type::bfloat16), tokens, stride, y), threads);
        });
    }

    void expand(Address dense, int threads) {
        run(threads, [&](const int64_t *row_start) {
            return chosen->expand(sparse_, row_start, reinterpret_cast<void *>(dense), threads);
        });
    }
};

// Of values of few bits. `type` is that of U and V; a bitmask of 0 says that all values are kept.
class FewBitsMatrix : Packed {
  public:
    FewBitsMatrix(int bits, Address levels, int64_t group_size, Address codes, int64_t count, Address scales,
                  Address zeros, Address bitmask, int64_t rows, int64_t columns, Address U, Address V, int type, Address U_scale,
                  Address V_scale, int64_t width, const Parts &parts, Address bias, int bias_type, int threads)
        : Packed({rows, columns, count, Type::float32, nullptr, reinterpret_cast<const uint8_t *>(bitmask)}, U, V,
                 width, parts, bias, threads),
          S_{sparse_,
             bits,
             reinterpret_cast<const uint8_t *>(codes),
             reinterpret_cast<const uint16_t *>(scales),
             reinterpret_cast<const uint8_t *>(zeros),
             group_size,
             reinterpret_cast<const int8_t *>(levels)},
          type_(static_cast<Type>(type)),
          bias_type_(static_cast<Type>(bias_type)),
          U_scale_(reinterpret_cast<const uint16_t *>(U_scale)),
          V_scale_(reinterpret_cast<const uint16_t *>(V_scale)) {}

    void few_tokens(Address x, int x_type, int64_t tokens, int64_t stride, Address y, int threads) {
        run(threads, [&](const int64_t *row_start) {
            return chosen->few_bits(S_, row_start, low_rank(U_, type_, U_scale_, V_scale_), {bias_, bias_type_},
                                    io(x, x_type, tokens, stride, y), threads);
        });
    }

    void dequantise(Address dense, int threads) {
        expect_fresh(reinterpret_cast<void *>(dense),
                     static_cast<size_t>(sparse_.rows * sparse_.columns) * sizeof(float));
        run(threads, [&](const int64_t *row_start) {
            return chosen->dequantise(S_, row_start, reinterpret_cast<float *>(dense), threads);
        });
    }

  private:
    FewBits S_;
    Type type_, bias_type_;
    const uint16_t *U_scale_, *V_scale_;
};

double sparse_step(int64_t rows, int64_t columns, int64_t keep, float beta, Address A, Address L, Address S,
                   Address next, Address threshold, int threads) {
    const nb::gil_scoped_release release;
    return chosen->sparse_step(rows, columns, keep, beta, reinterpret_cast<const float *>(A),
                               reinterpret_cast<const float *>(L), reinterpret_cast<float *>(S),
                               reinterpret_cast<float *>(next), reinterpret_cast<float *>(threshold), threads);
}

}  // namespace
}  // namespace oats

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // a traced or exported model may outlive the interpreter, which is no fault
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const oats::Kernels *k : oats::runnable()) names.emplace_back(k->name);
        return names;
    });
    m.def("instruction_set", [] { return std::string(oats::chosen->name); });
    m.def("use", &oats::use);
    m.def("multiplies_bfloat16", [] { return oats::chosen->many_bfloat16 != nullptr; });
    nb::class_<oats::Matrix>(m, "Matrix")
        .def(nb::init<uintptr_t, int, int64_t, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, int64_t,
                      const std::vector<std::pair<int64_t, int64_t>> &, uintptr_t, int>())
        .def("few_tokens", &oats::Matrix::few_tokens)
        .def("many_tokens", &oats::Matrix::many_tokens)
        .def("many_bfloat16", &oats::Matrix::many_bfloat16)
        .def("expand", &oats::Matrix::expand);
    nb::class_<oats::FewBitsMatrix>(m, "FewBitsMatrix")
        .def(nb::init<int, uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t,
                      uintptr_t, uintptr_t, int, uintptr_t, uintptr_t, int64_t,
                      const std::vector<std::pair<int64_t, int64_t>> &, uintptr_t, int, int>())
        .def("few_tokens", &oats::FewBitsMatrix::few_tokens)
        .def("dequantise", &oats::FewBitsMatrix::dequantise);
    m.def("sparse_step", &oats::sparse_step);
}
