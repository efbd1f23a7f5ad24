// What the kernels share: tasks for a team of threads, memory for one call, types, parts, and how weights are read.
#pragma once

#include <cstdint>

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

template <class F>
void with_factor_type(const LowRank &L, F f) {
    if (L.type == Type::int8)
        f(int8_t{});
    else
        with_type(L.type, f);
}

inline float scale_at(const uint16_t *scales, int64_t row) { return scales ? to_float(bfloat16{scales[row]}) : 1; }

inline float bias_at(const Bias &bias, int64_t row) {
    float b = 0;
    if (bias.values)
        with_type(bias.type, [&](auto type) { b = to_float(static_cast<const decltype(type) *>(bias.values)[row]); });
    return b;
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

template <class V>
OATS_INLINE void widen(const V *from, float *to, int64_t n) {
    constexpr int W = Vec::width;
    int64_t i = 0;
    for (; i + W <= n; i += W) Vec::load(from + i).store(to + i);
    if (i < n) Vec::load(from + i, n - i).store(to + i, n - i);
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

}  // namespace oats::OATS_ISA
