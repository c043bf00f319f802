// Rows eight features at a time: 16 bytes of 16-bit features.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace modest_align::cuda {

constexpr int kVector = 8;

__device__ inline void unpack(const uint4& bits, const __half*, float (&values)[kVector]) {
  const __half2* pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

__device__ inline void unpack(const uint4& bits, const __nv_bfloat16*, float (&values)[kVector]) {
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

__device__ inline void load_vector(const float* from, float (&values)[kVector]) {
  const float4* quads = reinterpret_cast<const float4*>(from);
  const float4 low = __ldg(quads), high = __ldg(quads + 1);
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__device__ inline void store_vector(__half* to, const float (&values)[kVector]) {
  uint4 bits;
  __half2* pairs = reinterpret_cast<__half2*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = bits;
}

__device__ inline void store_vector(__nv_bfloat16* to, const float (&values)[kVector]) {
  uint4 bits;
  __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  *reinterpret_cast<uint4*>(to) = bits;
}

__device__ inline void store_vector(float* to, const float (&values)[kVector]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
}

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

}  // namespace modest_align::cuda
