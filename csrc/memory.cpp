#include "memory.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace oats {
namespace {

// bytes, for each thread that calls the kernels; none under the address sanitizer, which is to see each block's ends
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t most_kept = 0;
#else
constexpr size_t most_kept = size_t{64} << 20;
#endif
constexpr size_t line = 64;

char *allocate(size_t bytes) {
    if (void *memory = std::aligned_alloc(line, bytes)) return static_cast<char *>(memory);
    throw std::bad_alloc();
}

struct Stack {
    char *memory = nullptr;
    size_t size = 0, used = 0;       // of what is kept
    size_t lent = 0, most_lent = 0;  // in all
    ~Stack() { std::free(memory); }
};
thread_local Stack stack;

size_t whole_lines(size_t bytes) { return std::max(line, (bytes + line - 1) / line * line); }

}  // namespace

void *borrow(size_t bytes) {
    bytes = whole_lines(bytes);
    const size_t wanted = std::min(stack.most_lent, most_kept);
    if (!stack.lent && stack.size < wanted) {  // the last call had to ask for more
        std::free(std::exchange(stack.memory, nullptr));
        stack.size = 0;
        stack.memory = allocate(wanted);
        stack.size = wanted;
    }
    char *memory = stack.memory + stack.used;
    if (stack.used + bytes <= stack.size)
        stack.used += bytes;
    else
        memory = allocate(bytes);
    stack.lent += bytes;
    stack.most_lent = std::max(stack.most_lent, stack.lent);
    return memory;
}

void give_back(void *memory, size_t bytes) {
    bytes = whole_lines(bytes);
    stack.lent -= bytes;
    if (memory >= stack.memory && memory < stack.memory + stack.size)
        stack.used -= bytes;
    else
        std::free(memory);
}

void expect_fresh([[maybe_unused]] void *memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t huge = uintptr_t{2} << 20, always_mapped = uintptr_t{32} << 20;  // glibc's highest threshold
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge - 1) / huge * huge;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / huge * huge;
    if (bytes >= always_mapped) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace oats
