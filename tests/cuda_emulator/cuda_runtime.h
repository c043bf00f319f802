// Enough of CUDA to compile csrc/cuda with a C++ compiler and run it on a CPU: every thread of a block is a coroutine
// that runs until it waits for others. What cannot go on is a deadlock, and ends the process.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMisalignedAddress = 716;
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated device"; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 blockIdx, blockDim, threadIdx;

namespace emulator {

struct Barrier {
  int waiting = 0;
  unsigned generation = 0;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done;
  int number, exchanges;
  const Barrier* awaited;
  unsigned generation;

  bool ready() const { return !done && (awaited == nullptr || awaited->generation != generation); }
};

struct Warp {
  Barrier barrier;
  std::uint32_t words[2][32];
};

inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<Warp> warps;
inline std::map<int, Barrier> barriers;
inline Thread* current;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void wait(Barrier& barrier, int count) {
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  current->awaited = &barrier;
  current->generation = barrier.generation;
  swapcontext(&current->context, &scheduler);
  current->awaited = nullptr;
}

inline void enter() {
  body();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

// Runs `count` threads until all have ended.
inline void run_block(unsigned count, std::function<void()> thread_body) {
  body = std::move(thread_body);
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  warps.assign((count + 31) / 32, Warp());
  barriers.clear();
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = *threads[t];
    thread.done = false;
    thread.number = static_cast<int>(t);
    thread.exchanges = 0;
    thread.awaited = nullptr;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  // The first thread that can go on does, so that a warp runs as far ahead of the others as barriers let it; from the
  // other end on demand. Without races the order is nothing to the result.
  const bool reversed = std::getenv("CUDA_EMULATOR_REVERSED") != nullptr;
  for (unsigned t = 0; t < count;) {
    current = threads[reversed ? count - 1 - t : t].get();
    if (!current->ready()) {
      ++t;
      continue;
    }
    threadIdx = dim3(current->number % blockDim.x, current->number / blockDim.x);
    swapcontext(&scheduler, &current->context);
    t = 0;
  }
  for (unsigned t = 0; t < count; ++t) {
    if (!threads[t]->done) {
      std::fprintf(stderr, "deadlock: thread %u of block %u waits for ever\n", t, blockIdx.x);
      std::abort();
    }
  }
}

// The words of all lanes of this warp, each giving its own.
inline const std::uint32_t* exchange(unsigned mask, std::uint32_t word) {
  if (mask != 0xffffffffu) std::abort();
  Warp& warp = warps[current->number / 32];
  std::uint32_t* words = warp.words[current->exchanges++ % 2];
  words[current->number % 32] = word;
  wait(warp.barrier, 32);
  return words;
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) == 4);
  std::uint32_t word;
  std::memcpy(&word, &value, 4);
  word = emulator::exchange(mask, word)[(emulator::current->number % 32) ^ lanes];
  std::memcpy(&value, &word, 4);
  return value;
}

inline bool __any_sync(unsigned mask, bool value) {
  const std::uint32_t* words = emulator::exchange(mask, value);
  return std::any_of(words, words + 32, [](std::uint32_t word) { return word != 0; });
}

inline void __syncwarp() { emulator::exchange(0xffffffffu, 0); }

inline void __syncthreads() { emulator::wait(emulator::barriers[-1], static_cast<int>(blockDim.x * blockDim.y)); }

template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) std::abort();
  return *address;
}

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(M_PI * x));
  *cosine = static_cast<float>(std::cos(M_PI * x));
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  blockDim = config->blockDim;
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    blockIdx = dim3(b);
    emulator::run_block(blockDim.x * blockDim.y, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
