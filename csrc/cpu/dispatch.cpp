// Threads, and which level's kernels this machine runs. Compiled once, for the oldest machine.
#include <dlfcn.h>
#include <strings.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../kernels.h"

#define MODEST_ALIGN_LEVEL baseline  // of parallel.h, whose declarations alone are wanted
#include "parallel.h"

namespace modest_align {
namespace {

using OpenMp = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel of the OpenMP that PyTorch is linked with, if it is GNU's or speaks its language, as LLVM's does. Its
// threads go on spinning for milliseconds after each of PyTorch's operations, and threads of our own would have to wait
// for their turn. Not a weak symbol: not every wheel of PyTorch makes what it is linked with visible to others.
OpenMp openmp() {
  static const OpenMp found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<OpenMp>(dlsym(torch ? torch : RTLD_DEFAULT, "GOMP_parallel"));
  }();
  return found;
}

// How long a thread looks for work before it sleeps: to wake up takes longer than many a task. Not at all where OpenMP
// is told not to, for another process wants the core.
std::chrono::microseconds patience() {
  static const std::chrono::microseconds found = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return std::chrono::microseconds(policy && strcasecmp(policy, "passive") == 0 ? 0 : 50);
  }();
  return found;
}

}  // namespace

// One region of OpenMP for a whole kernel, and in it a queue of our own: what is waited for are tasks, not threads. A
// thread that another process holds up delays no one, while OpenMP's barriers would spin for it.
class Team {
 public:
  void run(std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context) {
    std::unique_lock<std::mutex> lock(mutex_);
    tasks_ = tasks;
    task_ = task;
    context_ = context;
    next_ = done_ = 0;
    post();
    take_tasks(lock, 0);
    wait(lock, finished_, [this] { return done_.load() == tasks_; });
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int worker = ++helpers_;
    while (!closed_) {
      take_tasks(lock, worker);
      const std::int64_t seen = posted_;
      wait(lock, work_, [&] { return posted_.load() != seen; });
    }
  }

  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    closed_ = true;
    post();
  }

 private:
  void post() {
    ++posted_;
    work_.notify_all();
  }

  void take_tasks(std::unique_lock<std::mutex>& lock, int worker) {
    while (next_ < tasks_) {
      const std::int64_t index = next_++;
      lock.unlock();
      task_(context_, index, worker);
      lock.lock();
      if (++done_ == tasks_) finished_.notify_all();
    }
  }

  template <class Ready>
  static void wait(std::unique_lock<std::mutex>& lock, std::condition_variable& condition, Ready ready) {
    if (ready()) return;
    lock.unlock();
    const auto start = std::chrono::steady_clock::now();
    while (!ready() && std::chrono::steady_clock::now() - start < patience()) {
    }
    lock.lock();
    condition.wait(lock, ready);
  }

  std::mutex mutex_;
  std::condition_variable work_, finished_;
  std::int64_t tasks_ = 0, next_ = 0;
  void (*task_)(void*, std::int64_t, int) = nullptr;
  void* context_ = nullptr;
  int helpers_ = 0;
  bool closed_ = false;
  // Read without the mutex while waiting.
  std::atomic<std::int64_t> done_{0}, posted_{0};
};

namespace {

struct Call {
  void (*body)(void*, Team&);
  void* context;
  std::thread::id caller;
  Team team;
};

void enter(void* pointer) {
  Call& call = *static_cast<Call*>(pointer);
  if (std::this_thread::get_id() != call.caller) return call.team.help();
  call.body(call.context, call.team);
  call.team.close();
}

}  // namespace

void run_tasks(Team& team, std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context) {
  team.run(tasks, task, context);
}

void run_team(int threads, void (*body)(void*, Team&), void* context) {
  Call call{body, context, std::this_thread::get_id(), {}};
  if (threads > 1 && openmp()) return openmp()(enter, &call, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> helpers;
  try {
    for (int helper = 1; helper < threads; ++helper) helpers.emplace_back(enter, &call);
  } catch (const std::system_error&) {
    // A system that gives no more threads: those that started, and this one, do it all.
  }
  enter(&call);
  for (std::thread& helper : helpers) helper.join();
}

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(memory),
                       end = begin + static_cast<std::uintptr_t>(bytes);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

namespace baseline {
extern const CpuKernels kernels;
}
#ifdef MODEST_ALIGN_X86
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx512_bf16 {
extern const CpuKernels kernels;
}
#endif

namespace {

// Best first.
std::vector<const CpuKernels*> runnable() {
  std::vector<const CpuKernels*> found;
#ifdef MODEST_ALIGN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::kernels);
  if (avx512) found.push_back(&avx512::kernels);
  if (avx2) found.push_back(&avx2::kernels);
#endif
  found.push_back(&baseline::kernels);
  return found;
}

const std::vector<const CpuKernels*>& levels() {
  static const std::vector<const CpuKernels*> found = runnable();
  return found;
}

std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = chosen.load();
  return kernels ? *kernels : *levels().front();
}

bool set_cpu_level(const char* level) {
  for (const CpuKernels* kernels : levels()) {
    if (std::strcmp(kernels->level, level) == 0) {
      chosen = kernels;
      return true;
    }
  }
  return false;
}

const char* const* cpu_levels() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> found;
    for (const CpuKernels* kernels : levels()) found.push_back(kernels->level);
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

}  // namespace modest_align
