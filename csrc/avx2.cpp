#define OATS_ISA avx2
#if defined(__AVX2__)
#include "kernels.inl.hpp"
#else
#include "kernels.hpp"
#endif

namespace oats {
const Kernels *avx2_kernels() {
#if defined(__AVX2__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
        __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c"))
        return avx2::kernels("avx2");
#endif
    return nullptr;
}
}  // namespace oats
