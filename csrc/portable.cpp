#define OATS_ISA portable
#include "kernels.inl.hpp"

namespace oats {
const Kernels *portable_kernels() { return portable::kernels("portable"); }
}  // namespace oats
