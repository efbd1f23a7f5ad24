#define OATS_ISA avx512
#if defined(__AVX512F__)
#include "kernels.inl.hpp"
#else
#include "kernels.hpp"
#endif

namespace oats {
const Kernels *avx512_kernels() {
#if defined(__AVX512F__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512vpopcntdq") && avx2_kernels())
        return avx512::kernels("avx512");
#endif
    return nullptr;
}
}  // namespace oats
