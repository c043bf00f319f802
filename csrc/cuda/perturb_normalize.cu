// Noise, normalisation and cast in one read and one write, and their backward in one more.
//
// A row is held in registers by one warp, or by a block where it is long, eight features at a time: 16 bytes of 16-bit
// features. The noise's integers are those of noise.random_bits.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <initializer_list>
#include <type_traits>

#include "cuda/launch.h"
#include "kernels.h"
#include "philox.h"

namespace modest_align::cuda {
namespace {

constexpr int kVector = 8;
constexpr float kMinNorm = 1e-12f;

template <typename T>
__device__ float to_float(T value) {
  return static_cast<float>(value);
}

__device__ void unpack(const uint4& bits, const __half*, float (&values)[kVector]) {
  const __half2* pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

__device__ void unpack(const uint4& bits, const __nv_bfloat16*, float (&values)[kVector]) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// Eight neighbours from a 16-byte aligned address.
template <typename T>
__device__ void load_vector(const T* from, float (&values)[kVector]) {
  unpack(__ldg(reinterpret_cast<const uint4*>(from)), from, values);
}

template <>
__device__ void load_vector(const float* from, float (&values)[kVector]) {
  const float4* quads = reinterpret_cast<const float4*>(from);
  const float4 low = __ldg(quads), high = __ldg(quads + 1);
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__device__ void store_vector(__half* to, const float (&values)[kVector]) {
  uint4 bits;
  __half2* pairs = reinterpret_cast<__half2*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = bits;
}

__device__ void store_vector(__nv_bfloat16* to, const float (&values)[kVector]) {
  uint4 bits;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = bits;
}

__device__ void store_vector(float* to, const float (&values)[kVector]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

__device__ void store_element(__half* to, float value) { *to = __float2half_rn(value); }
__device__ void store_element(__nv_bfloat16* to, float value) { *to = __float2bfloat16_rn(value); }
__device__ void store_element(float* to, float value) { *to = value; }

// The sum over the kThreads threads of a row, the same bits in each.
template <int kThreads>
__device__ float row_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  if constexpr (kThreads > 32) {
    __shared__ float warps[kThreads / 32];
    __syncthreads();  // the sum before this one has been read
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) value += warps[w];
  }
  return value;
}

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
                             int noise_stream, bool relative_noise, const __half* __restrict__ pair_hat,
                             __half* __restrict__ x_hat, float* __restrict__ inv_norm, float* __restrict__ pair_dot,
                             std::int64_t rows, std::int64_t pairs, int features, int width) {
  const std::int64_t row = std::int64_t{blockIdx.x} * (256 / kThreads) + threadIdx.x / kThreads;
  const int thread = threadIdx.x % kThreads;
  if (row >= rows) return;  // a whole warp, or the whole block
  const T* from = x + row * row_stride;
  float values[kVectors][kVector];
  float squares = 0.0f;
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
  if (seed != nullptr) {
    float std = *noise_std;
    if (relative_noise) {
#pragma unroll
      for (int c = 0; c < kVectors; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) squares = fmaf(values[c][i], values[c][i], squares);
      }
      std *= sqrtf(row_sum<kThreads>(squares) / static_cast<float>(features));
      squares = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      const int feature = kVector * (c * kThreads + thread);
      if (feature < features) add_noise(*seed, noise_stream, row, feature, std, values[c]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[c][i] = feature + i < features ? values[c][i] : 0.0f;
    }
  }
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares = fmaf(values[c][i], values[c][i], squares);
  }
  const float norm = sqrtf(row_sum<kThreads>(squares));
  // A NaN must come through, which a maximum would drop.
  const float inverse = 1.0f / (norm < kMinNorm ? kMinNorm : norm);
  if (thread == 0) inv_norm[row] = inverse;
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
    perturb_normalize_backward_kernel(const float* __restrict__ grad, const __half* __restrict__ x_hat,
                                      const float* __restrict__ inv_norm, const __half* __restrict__ pair_hat,
                                      const float* __restrict__ pair_weight, const float* __restrict__ offset,
                                      const float* __restrict__ factor, T* __restrict__ dx, bool aligned,
                                      float* __restrict__ row_dot, std::int64_t rows, std::int64_t pairs, int features,
                                      int width) {
  const std::int64_t row = std::int64_t{blockIdx.x} * (256 / kThreads) + threadIdx.x / kThreads;
  const int thread = threadIdx.x % kThreads;
  if (row >= rows) return;
  const bool has_pair = row < pairs;
  const float weight = has_pair ? pair_weight[row] : 0.0f;
  const float* row_offset = has_pair ? offset : offset + width;
  float g[kVectors][kVector];
  float dot = 0.0f;
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    const int feature = kVector * (c * kThreads + thread);
    if (feature >= width) break;
    load_vector(grad + row * width + feature, g[c]);
    float added[kVector], unit[kVector];
    load_vector(row_offset + feature, added);
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[c][i] += added[i];
    if (has_pair) {
      load_vector(pair_hat + row * width + feature, added);
#pragma unroll
      for (int i = 0; i < kVector; ++i) g[c][i] = fmaf(weight, added[i], g[c][i]);
    }
    load_vector(x_hat + row * width + feature, unit);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      g[c][i] *= *factor;
      dot = fmaf(unit[i], g[c][i], dot);
    }
  }
  dot = row_sum<kThreads>(dot);
  const float inverse = inv_norm[row];
  if (thread == 0) row_dot[row] = dot;
  // A row whose norm was below 1e-12 was divided by a constant: no projection there.
  const float projection = inverse < 1.0f / kMinNorm ? dot : 0.0f;
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    const int feature = kVector * (c * kThreads + thread);
    if (feature >= features) break;
    float unit[kVector];
    load_vector(x_hat + row * width + feature, unit);  // a second time, from the cache: registers are dearer
#pragma unroll
    for (int i = 0; i < kVector; ++i) g[c][i] = fmaf(-projection, unit[i], g[c][i]) * inverse;
    T* to = dx + row * features + feature;
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
                  a.noise_stream, a.relative_noise, static_cast<const __half*>(a.pair_hat),
                  static_cast<__half*>(a.x_hat), a.inv_norm, a.pair_dot, a.rows, a.pairs, static_cast<int>(a.features),
                  static_cast<int>(a.width));
  };
  return a.width <= kWarpWidth ? run(perturb_normalize_kernel<T, 32, 4>, 8)
                               : run(perturb_normalize_kernel<T, 256, 8>, 1);
}

template <typename T>
cudaError_t backward(const PerturbNormalizeBackward& a) {
  const bool aligned = a.features % kVector == 0 && is_aligned(a.dx);
  const auto run = [&](auto kernel, int rows_of_block) {
    return launch(kernel, ceil_div(a.rows, rows_of_block), 256, static_cast<cudaStream_t>(a.cuda_stream), a.grad,
                  static_cast<const __half*>(a.x_hat), a.inv_norm, static_cast<const __half*>(a.pair_hat),
                  a.pair_weight, a.offset, a.factor, static_cast<T*>(a.dx), aligned, a.row_dot, a.rows, a.pairs,
                  static_cast<int>(a.features), static_cast<int>(a.width));
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

int perturb_normalize_backward(const PerturbNormalizeBackward& a) {
  return checked(a, a.dx_dtype, {a.grad, a.x_hat, a.pair_hat, a.offset},
                 [&](auto* feature) { return backward<std::remove_pointer_t<decltype(feature)>>(a); });
}

}  // namespace modest_align::cuda
