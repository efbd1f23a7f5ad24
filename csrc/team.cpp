#include "team.hpp"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace oats {
namespace {

// PyTorch's OpenMP team is borrowed where there is one: a second team would fight with its spinning threads for the
// cores. The runtimes of GCC, LLVM and Intel all export this entry point.
using ParallelRegion = void (*)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

ParallelRegion find_parallel_region() {
#if defined(__unix__) || defined(__APPLE__)
    return reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

struct Work {
    int64_t tasks;
    void (*task)(int64_t, int, void *);
    void *context;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    void run() {
        const int worker = workers++;
        for (int64_t i = next++; i < tasks; i = next++) task(i, worker, context);
    }
};

}  // namespace

void run_tasks(int64_t tasks, int threads, void (*task)(int64_t, int, void *), void *context) {
    static const ParallelRegion parallel_region = find_parallel_region();
    Work work{tasks, task, context};
    threads = static_cast<int>(std::min<int64_t>(threads, tasks));
    if (threads <= 1) {
        work.run();
    } else if (parallel_region) {
        parallel_region([](void *data) { static_cast<Work *>(data)->run(); }, &work, threads, 0);
    } else {
        std::vector<std::thread> team;
        for (int i = 1; i < threads; i++) team.emplace_back([&work] { work.run(); });
        work.run();
        for (auto &thread : team) thread.join();
    }
}

}  // namespace oats
