// Memory for the time of one call, kept from call to call: large blocks fresh from the system cost more to touch for
// the first time than the kernels' work on them.
#pragma once

#include <cstddef>

namespace oats {

// `bytes` aligned to cache lines, for this thread, to be given back in the opposite order. Throws std::bad_alloc.
void *borrow(size_t bytes);
void give_back(void *memory, size_t bytes);

// Asks for huge pages where `memory` is so large that the C library maps it afresh each time: first touching it in
// pages of 4 KB takes a tenth of a layer's time.
void expect_fresh(void *memory, size_t bytes);

}  // namespace oats
