// AVX-512 as AMD's cores (Zen 4, Zen 5) run it fastest: expanding numbers of 16 bits takes them longer than converting
// these to floats and expanding the floats.
#define OATS_ISA avx512_amd
#define OATS_EXPAND_FLOATS
#if defined(__AVX512F__)
#include "kernels.inl.hpp"
#else
#include "kernels.hpp"
#endif

namespace oats {
const Kernels *avx512_amd_kernels() {
#if defined(__AVX512F__)
    if (avx512_kernels()) return avx512_amd::kernels("avx512_amd");
#endif
    return nullptr;
}
}  // namespace oats
