#pragma once

#include <cstdint>

#include "../extents.h"

namespace modest_align {

// Threads that work for one call of a kernel.
class Team;

// Runs body(context, team) on this thread, while up to `threads` - 1 others wait for what it gives the team to do.
void run_team(int threads, void (*body)(void*, Team&), void* context);

// Runs task(context, index, worker) for every index below `tasks`, and returns when all are done. Whoever is free takes
// the next index, so a task's result must not depend on its worker.
void run_tasks(Team& team, std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context);

// Asks for huge pages in fresh memory that is about to be written: every page of 4 KiB costs a microsecond or two when
// it is touched first. Nothing happens to small pieces, and where the system has no such thing.
void prefer_huge_pages(void* memory, std::int64_t bytes);

namespace MODEST_ALIGN_LEVEL {

// A thread is worth its start only for some million products.
MODEST_ALIGN_INLINE int useful_threads(int threads, std::int64_t products) {
  return static_cast<int>(larger(1, smaller(threads, products >> 23)));
}

template <class Body>
static void with_team(int threads, Body&& body) {
  run_team(threads, [](void* context, Team& team) { (*static_cast<Body*>(context))(team); }, &body);
}

template <class Task>
static void parallel(Team& team, std::int64_t tasks, Task&& task) {
  run_tasks(
      team, tasks, [](void* context, std::int64_t index, int worker) { (*static_cast<Task*>(context))(index, worker); },
      &task);
}

// row(i) for every row, an equal share of them to each thread that `products` make useful.
template <class Row>
static void parallel_rows(int threads, std::int64_t rows, std::int64_t products, Row&& row) {
  const int parts = useful_threads(threads, products);
  with_team(parts, [&](Team& team) {
    parallel(team, parts, [&](std::int64_t part, int) {
      for (std::int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) row(i);
    });
  });
}

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
