// Noise, normalisation and cast in one read and one write, and their backward in one more.
//
// A row is held in registers by one warp, or by a block where it is long, eight features at a time: 16 bytes of 16-bit
// features. The noise's integers are those of noise.random_bits.

#include <initializer_list>
#include <type_traits>

#include "cuda/group_sums.cuh"
#include "cuda/launch.h"
#include "cuda/vector.cuh"
#include "kernels.h"
#include "philox.h"

namespace modest_align::cuda {
namespace {

constexpr float kMinNorm = 1e-12f;
// A row of finite features whose squares overflow is taken so many times: else it would count as a row of zeros.
constexpr float kShrink = 0x1p-80f;

template <typename T>
__device__ float to_float(T value) {
  return static_cast<float>(value);
}

__device__ void store_element(__half* to, float value) { *to = __float2half_rn(value); }
__device__ void store_element(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ void store_element(float* to, float value) { *to = value; }

// Two standard normals of two words: noise.gaussian_noise.
__device__ void box_muller(std::uint32_t word0, std::uint32_t word1, float& first, float& second) {
  const float u = static_cast<float>((word0 >> 8) + 1) * 0x1p-24f;
  const float radius = sqrtf(-2.0f * logf(u));
  float sine, cosine;
  sincospif(static_cast<float>(word1 >> 8) * 0x1p-23f, &sine, &cosine);
  first = radius * cosine;
  second = radius * sine;
}

// Adds std times the noise of features `feature` to `feature` + 7.
__device__ void add_noise(std::int64_t seed, int noise_stream, std::int64_t row, int feature, float std,
                          float (&values)[kVector]) {
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    std::uint32_t words[4] = {static_cast<std::uint32_t>(feature / 4 + group), static_cast<std::uint32_t>(row),
                              static_cast<std::uint32_t>(row >> 32), static_cast<std::uint32_t>(noise_stream)};
    philox4x32_10(words, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float first, second;
      box_muller(words[2 * pair], words[2 * pair + 1], first, second);
      values[4 * group + 2 * pair] += std * first;
      values[4 * group + 2 * pair + 1] += std * second;
    }
  }
}

// kThreads threads have a row; a block has 256 threads. Vector c of a thread starts at feature
// 8 (c kThreads + its number).
template <typename T, int kThreads, int kVectors>
__global__ void __launch_bounds__(256)
    perturb_normalize_kernel(const T* __restrict__ x, std::int64_t row_stride, std::int64_t feature_stride,
                             bool aligned, const std::int64_t* __restrict__ seed, const float* __restrict__ noise_std,
                             int noise_stream, std::int64_t first_row, bool relative_noise,
                             const __half* __restrict__ pair_hat, __half* __restrict__ x_hat,
                             float* __restrict__ inv_norm, float* __restrict__ pair_dot, std::int64_t rows,
                             std::int64_t pairs, int features, int width) {
  const std::int64_t row = std::int64_t{blockIdx.x} * (256 / kThreads) + threadIdx.x / kThreads;
  const int thread = threadIdx.x % kThreads;
  if (row >= rows) return;  // a whole warp, or the whole block
  const T* from = x + row * row_stride;
  float values[kVectors][kVector];
  if (aligned) {
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      const int feature = kVector * (c * kThreads + thread);
      if (feature < features) {
        load_vector(from + feature, values[c]);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[c][i] = 0.0f;
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int feature = kVector * (c * kThreads + thread) + i;
        values[c][i] = feature < features ? to_float(from[feature * feature_stride]) : 0.0f;
      }
    }
  }
  float taken = 1.0f;
  const auto norm_of_values = [&] {
    for (;;) {
      float squares = 0.0f;
#pragma unroll
      for (int c = 0; c < kVectors; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) squares = fmaf(values[c][i], values[c][i], squares);
      }
      const float norm = sqrtf(row_sum<kThreads>(squares));
      if (norm < INFINITY || taken != 1.0f) return norm;  // all of the row's threads
      taken = kShrink;
#pragma unroll
      for (int c = 0; c < kVectors; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[c][i] *= kShrink;
      }
    }
  };
  if (seed != nullptr) {
    float std = *noise_std;
    if (relative_noise) std *= norm_of_values() / sqrtf(static_cast<float>(features));
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      const int feature = kVector * (c * kThreads + thread);
      if (feature < features) add_noise(*seed, noise_stream, first_row + row, feature, std, values[c]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[c][i] = feature + i < features ? values[c][i] : 0.0f;
    }
  }
  const float norm = norm_of_values();
  // A NaN must come through, which a maximum would drop.
  const float inverse = 1.0f / (norm < kMinNorm ? kMinNorm : norm);
  if (thread == 0) inv_norm[row] = inverse * taken;
  const bool has_pair = row < pairs;
  float dot = 0.0f;
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    const int feature = kVector * (c * kThreads + thread);
    if (feature >= width) break;
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[c][i] *= inverse;
    store_vector(x_hat + row * width + feature, values[c]);
    if (has_pair) {
      float pair[kVector];
      load_vector(pair_hat + row * width + feature, pair);
#pragma unroll
      for (int i = 0; i < kVector; ++i) dot = fmaf(__half2float(__float2half_rn(values[c][i])), pair[i], dot);
    }
  }
  if (!has_pair) return;  // a whole warp, or the whole block
  dot = row_sum<kThreads>(dot);
  if (thread == 0) pair_dot[row] = dot;
}

template <typename T, int kThreads, int kVectors>
__global__ void __launch_bounds__(256)
    perturb_normalize_backward_kernel(const __grid_constant__ PerturbNormalizeBackward a,
                                      const __grid_constant__ GroupSums sums, bool aligned) {
  const std::int64_t row = std::int64_t{blockIdx.x} * (256 / kThreads) + threadIdx.x / kThreads;
  const int thread = threadIdx.x % kThreads, features = static_cast<int>(a.features), width = sums.width;
  if (row >= a.rows) return;
  const bool has_pair = row < a.pairs;
  const float* grad = a.grad + row * width;
  const __half* x_hat = static_cast<const __half*>(a.x_hat) + row * width;
  const __half* pair_hat = static_cast<const __half*>(a.pair_hat) + row * width;
  const float weight = has_pair ? a.pair_weight[row] : 0.0f;
  float smoothing = 0.0f, own_weight = 0.0f;
  int id = -1;
  bool has_rows = false;
  if (a.smoothing != nullptr) {
    smoothing = *a.smoothing;
    if (has_pair) own_weight = smoothing * a.negative_weight[row];
    if (a.ids != nullptr) {
      id = a.ids[row];
      has_rows = sums.count(0, id) > 0;
    }
  }
  float g[kVectors][kVector];
  float dot = 0.0f;
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    const int feature = kVector * (c * kThreads + thread);
    if (feature >= width) break;
    load_vector(grad + feature, g[c]);
    float values[kVector];
    const auto add = [&](float times) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) g[c][i] = fmaf(times, values[i], g[c][i]);
    };
    if (has_pair) {
      load_vector(pair_hat + feature, values);
      add(weight);
    }
    if (a.smoothing != nullptr) {
      if (has_pair) {
        sums.load_own(0, 0, id, has_rows, feature, values);
        add(own_weight);
      }
      sums.load_own(0, 1, id, has_rows, feature, values);
      add(smoothing);
    }
    load_vector(x_hat + feature, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) dot = fmaf(values[i], g[c][i], dot);
  }
  dot = row_sum<kThreads>(dot);
  if (thread == 0) a.row_dot[row] = *a.factor * dot;
  const float inverse = a.inv_norm[row], times = inverse * (*a.factor * *a.scale);
  // A row whose norm was below 1e-12 was divided by a constant, and has no gradient. A NaN's stays.
  const bool divided_by_constant = inverse >= 1.0f / kMinNorm;
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    const int feature = kVector * (c * kThreads + thread);
    if (feature >= features) break;
    float unit[kVector];
    load_vector(x_hat + feature, unit);  // a second time, from the cache: registers are dearer
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      g[c][i] = divided_by_constant ? 0.0f : fmaf(-dot, unit[i], g[c][i]) * times;
    }
    T* to = static_cast<T*>(a.dx) + row * features + feature;
    if (aligned) {
      store_vector(to, g[c]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (feature + i < features) store_element(to + i, g[c][i]);
      }
    }
  }
}

constexpr int kWarpWidth = 32 * 4 * kVector, kBlockWidth = 256 * 8 * kVector;

template <typename T>
cudaError_t forward(const PerturbNormalize& a) {
  const bool aligned =
      a.feature_stride == 1 && a.features % kVector == 0 && a.row_stride * sizeof(T) % 16 == 0 && is_aligned(a.x);
  const auto run = [&](auto kernel, int rows_of_block) {
    return launch(kernel, ceil_div(a.rows, rows_of_block), 256, static_cast<cudaStream_t>(a.cuda_stream),
                  static_cast<const T*>(a.x), a.row_stride, a.feature_stride, aligned, a.seed, a.noise_std,
                  a.noise_stream, a.first_row, a.relative_noise, static_cast<const __half*>(a.pair_hat),
                  static_cast<__half*>(a.x_hat), a.inv_norm, a.pair_dot, a.rows, a.pairs, static_cast<int>(a.features),
                  static_cast<int>(a.width));
  };
  return a.width <= kWarpWidth ? run(perturb_normalize_kernel<T, 32, 4>, 8)
                               : run(perturb_normalize_kernel<T, 256, 8>, 1);
}

// The other side's sums, plain and weighted.
GroupSums sums_of(const PerturbNormalizeBackward& a) {
  GroupSums sums{};
  sums.first = {static_cast<const __half*>(a.pair_hat), a.pair_ids, a.pair_order, a.pair_rows};
  sums.sides = 1;
  sums.kinds = 2;
  sums.weight = a.pair_negative_weight;
  sums.weighted_rows = a.pairs;
  sums.numbers = a.pairs + 1;
  sums.width = static_cast<int>(a.width);
  return sums;
}

template <typename T>
cudaError_t backward(const PerturbNormalizeBackward& a) {
  const auto stream = static_cast<cudaStream_t>(a.cuda_stream);
  GroupSums sums = sums_of(a);
  if (a.smoothing != nullptr) {
    sums.place(a.workspace);
    const cudaError_t status = sum_groups(sums, stream);
    if (status != cudaSuccess) return status;
  }
  const bool aligned = a.features % kVector == 0 && is_aligned(a.dx);
  const auto run = [&](auto kernel, int rows_of_block) {
    return launch(kernel, ceil_div(a.rows, rows_of_block), 256, stream, a, sums, aligned);
  };
  return a.width <= kWarpWidth ? run(perturb_normalize_backward_kernel<T, 32, 4>, 8)
                               : run(perturb_normalize_backward_kernel<T, 256, 8>, 1);
}

// What both functions refuse, or the first failure of `run`, which is called with a null pointer of the features' type.
template <class Arguments, class Run>
int checked(const Arguments& a, Dtype dtype, std::initializer_list<const void*> aligned, Run&& run) {
  const CurrentDevice current(a.device);
  if (current.status() != cudaSuccess) return current.status();
  if (a.operand_dtype != Dtype::float16 || a.width > kBlockWidth || a.width % kVector != 0) {
    return cudaErrorInvalidValue;
  }
  for (const void* matrix : aligned) {
    if (!is_aligned(matrix)) return cudaErrorMisalignedAddress;
  }
  return dtype == Dtype::float32   ? run(static_cast<float*>(nullptr))
         : dtype == Dtype::float16 ? run(static_cast<__half*>(nullptr))
                                   : run(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace

const char* error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int perturb_normalize(const PerturbNormalize& a) {
  return checked(a, a.x_dtype, {a.x_hat, a.pair_hat},
                 [&](auto* feature) { return forward<std::remove_pointer_t<decltype(feature)>>(a); });
}

std::int64_t perturb_normalize_backward_workspace(const PerturbNormalizeBackward& a) {
  return !a.smoothing ? 0 : sums_of(a).place(nullptr);
}

int perturb_normalize_backward(const PerturbNormalizeBackward& a) {
  return checked(a, a.dx_dtype, {a.grad, a.x_hat, a.pair_hat, a.workspace},
                 [&](auto* feature) { return backward<std::remove_pointer_t<decltype(feature)>>(a); });
}

}  // namespace modest_align::cuda
