#pragma once

#include <cstdint>

namespace modest_align {

// Runs task(context, index, worker) for every index below `tasks`, on at most `threads` threads, this one among them.
// Threads take the next index when they are done, so a task's result must not depend on its worker.
void run_tasks(int threads, std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context);

namespace MODEST_ALIGN_LEVEL {

template <class Task>
static void parallel(int threads, std::int64_t tasks, Task&& task) {
  run_tasks(
      threads, tasks, [](void* context, std::int64_t index, int worker) { (*static_cast<Task*>(context))(index, worker); },
      &task);
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
