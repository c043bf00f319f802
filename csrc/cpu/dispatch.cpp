// Threads, and which level's kernels this machine runs. Compiled once, for the oldest machine.
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "../kernels.h"

#define MODEST_ALIGN_LEVEL baseline
#include "parallel.h"

// The OpenMP that PyTorch brought into the process, if it is GNU's or speaks its language. Its threads go on spinning for
// milliseconds after each of PyTorch's operations, and threads of our own would have to wait for their turn.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);

namespace modest_align {

namespace {

struct Team {
  std::int64_t tasks;
  void (*task)(void*, std::int64_t, int);
  void* context;
  std::atomic<std::int64_t> next{0};
  std::atomic<int> workers{0};
};

void join(void* pointer) {
  Team& team = *static_cast<Team*>(pointer);
  const int worker = team.workers.fetch_add(1);
  for (std::int64_t index; (index = team.next.fetch_add(1)) < team.tasks;) team.task(team.context, index, worker);
}

}  // namespace

void run_tasks(int threads, std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context) {
  Team team{tasks, task, context};
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) return join(&team);
  if (GOMP_parallel) return GOMP_parallel(join, &team, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  try {
    for (int worker = 1; worker < threads; ++worker) others.emplace_back(join, &team);
  } catch (const std::system_error&) {
    // A system that gives no more threads: those that started, and this one, do it all.
  }
  join(&team);
  for (std::thread& other : others) other.join();
}

#define MODEST_ALIGN_DECLARE(level)                                                              \
  namespace level {                                                                              \
  extern const decltype(CpuKernels::perturb_normalize) perturb_normalize;                        \
  extern const decltype(CpuKernels::perturb_normalize_backward) perturb_normalize_backward;      \
  extern const decltype(CpuKernels::contrastive_stats) contrastive_stats;                        \
  extern const decltype(CpuKernels::contrastive_grads) contrastive_grads;                        \
  extern const decltype(CpuKernels::contrastive_stats_workspace) contrastive_stats_workspace;    \
  extern const decltype(CpuKernels::contrastive_grads_workspace) contrastive_grads_workspace;    \
  }
#define MODEST_ALIGN_TABLE(level, bfloat16)                                                      \
  CpuKernels {                                                                                   \
    #level, bfloat16, level::perturb_normalize, level::perturb_normalize_backward,               \
        level::contrastive_stats, level::contrastive_grads, level::contrastive_stats_workspace,  \
        level::contrastive_grads_workspace                                                       \
  }

MODEST_ALIGN_DECLARE(baseline)
#ifdef MODEST_ALIGN_X86
MODEST_ALIGN_DECLARE(avx2)
MODEST_ALIGN_DECLARE(avx512)
MODEST_ALIGN_DECLARE(avx512_bf16)
#endif

namespace {

// Best first.
std::vector<CpuKernels> runnable() {
  std::vector<CpuKernels> found;
#ifdef MODEST_ALIGN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(MODEST_ALIGN_TABLE(avx512_bf16, true));
  if (avx512) found.push_back(MODEST_ALIGN_TABLE(avx512, false));
  if (avx2) found.push_back(MODEST_ALIGN_TABLE(avx2, false));
#endif
  found.push_back(MODEST_ALIGN_TABLE(baseline, false));
  return found;
}

const std::vector<CpuKernels>& levels() {
  static const std::vector<CpuKernels> found = runnable();
  return found;
}

std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = chosen.load();
  return kernels ? *kernels : levels().front();
}

bool set_cpu_level(const char* level) {
  for (const CpuKernels& kernels : levels()) {
    if (std::strcmp(kernels.level, level) == 0) {
      chosen = &kernels;
      return true;
    }
  }
  return false;
}

const char* const* cpu_levels() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> found;
    for (const CpuKernels& kernels : levels()) found.push_back(kernels.level);
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

}  // namespace modest_align
