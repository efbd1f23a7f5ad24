// A team of threads that share out numbered tasks.
#pragma once

#include <cstdint>

namespace oats {

// Runs task(i, worker, context) once for each i in 0 .. tasks - 1 on up to `threads` threads, and returns when all are
// done; `worker` (0 .. threads - 1) numbers the thread. Tasks may not throw.
void run_tasks(int64_t tasks, int threads, void (*task)(int64_t i, int worker, void *context), void *context);

}  // namespace oats
